"""The Postman collection, run by newman, Postman's command line."""

import base64
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from src.api.picture import encode
from src.api.request import OutputFormat
from tests.support.client import Client, receiver, until
from tests.support.examples import EXAMPLES
from tests.support.platform_stub import Platform

POSTMAN = EXAMPLES / "postman"
COLLECTION = POSTMAN / "stable-diffusion-worker.postman_collection.json"


def run_collection(
    node_modules: Path, file: str, folder: Path, requests: Sequence[str] = (), **variables: str
) -> dict[str, Any]:
    """Runs the collection, or only some of its ``requests``, and returns newman's report."""
    report = folder / "report.json"
    command = [node_modules / ".bin" / "newman", "run", COLLECTION, "-e", POSTMAN / file]
    for request in requests:
        command += ["--folder", request]
    for name, value in variables.items():
        command += ["--env-var", f"{name}={value}"]
    ran = subprocess.run(
        [*command, "--reporters", "cli,json", "--reporter-json-export", report],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout
    return json.loads(report.read_text())["run"]


def names_sent(run: dict[str, Any]) -> list[str]:
    return [execution["item"]["name"] for execution in run["executions"] if execution.get("response")]


def test_every_request_works_on_the_platform(node_modules: Path, platform: Platform, client: Client, tmp_path: Path):
    url = f"{platform.url}/v2/local"
    with receiver() as (webhook_url, received):
        variables = {"base_url": url, "api_key": platform.key, "webhook_url": webhook_url}
        variables |= {"allow_purge": "1", "native_size": "128"}
        run = run_collection(node_modules, "runpod.postman_environment.json", tmp_path, **variables)
        until(lambda: received)
    names = re.findall(r'"name": "([^"]+)",\s+"(?:event|request)"', COLLECTION.read_text())
    assert list(dict.fromkeys(names_sent(run))) == names and "Cancel" in names
    assert names_sent(run).count("Status") > 1


def test_queue_is_purged_only_if_allowed(node_modules: Path, platform: Platform, client: Client, tmp_path: Path):
    variables = {"base_url": client.url, "api_key": platform.key}
    requests = ["Generate with a webhook", "Purge the queue", "Health"]
    run = run_collection(node_modules, "runpod.postman_environment.json", tmp_path, requests, **variables)
    assert names_sent(run) == ["Health"]


def test_requests_for_the_sdks_local_server_work_there(node_modules: Path, local_server: str, tmp_path: Path):
    run = run_collection(node_modules, "localhost.postman_environment.json", tmp_path, base_url=local_server)
    names = ["Generate", "Status", "Generate and wait", "Several images", "From a picture", "Inpaint", "A bad request"]
    assert names_sent(run) == names


def test_collection_knows_the_first_bytes_of_every_format():
    collection = json.loads(COLLECTION.read_text())
    checks = re.findall(r"const BEGINNING = \{(.*?)\}", json.dumps(collection).replace('\\"', '"'))
    beginnings = [dict(re.findall(r'(\w+): "([^"]+)"', check)) for check in checks]
    assert beginnings and all(each == beginnings[0] for each in beginnings)
    assert list(beginnings[0]) == list(get_args(OutputFormat))
    for output_format, beginning in beginnings[0].items():
        file = encode(Image.new("RGB", (8, 8)), "a cat", output_format, 90)
        assert base64.b64encode(file).decode().startswith(beginning)


def test_environments_hold_no_key():
    for path in POSTMAN.glob("*.postman_environment.json"):
        (key,) = [value for value in json.loads(path.read_text())["values"] if value["key"] == "api_key"]
        assert (key["value"], key["type"]) == ("", "secret")
