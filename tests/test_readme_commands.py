"""The README's commands that call an endpoint, run as they stand there."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.client import Client
from tests.support.examples import SHORT_PAUSES, environment, run
from tests.support.platform_stub import Platform
from tests.support.processes import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    return [block for block in blocks if "curl" in block or "examples/" in block]


def readme_exports() -> list[list[str]]:
    """The variables by which the commands find an endpoint: those of each ``export`` command."""
    return [re.findall(r"(\w+)=", line) for line in re.findall(r"^export .*$", README, re.M)]


@pytest.mark.parametrize(
    ("command", "exported"),
    [
        (command, exported)
        for command in readme_commands()
        for exported in readme_exports()
        if set(re.findall(r"\$(\w+)", command)) <= set(exported)
    ],
)
def test_the_command_works(
    platform: Platform, client: Client, local_server: str, tmp_path: Path, command: str, exported: list[str]
):
    for replaced, by in (
        ("https://api.runpod.ai/v2", f"{platform.url}/v2"),
        ("http://localhost:8000/v2/local", f"{platform.url}/v2/local"),
        ("RUNPOD_API_KEY=local", f"RUNPOD_API_KEY={platform.key}"),
        ("localhost:8000", local_server.removeprefix("http://")),
        (".venv/bin/python", sys.executable),
        ("examples/", f"{ROOT}/examples/"),
    ):
        command = command.replace(replaced, by)
    if "<id>" in command:
        # whoever follows it pastes the id that the first answer gave
        command = command.replace("<id>", client.run())
    values = {name: environment(platform, ENDPOINT_URL=local_server, ENDPOINT_ID="local")[name] for name in exported}
    # in place of api.runpod.ai
    base = f"{platform.url}/v2"
    ran = run(
        ["bash", "-euo", "pipefail", "-c", command],
        tmp_path,
        RUNPOD_ENDPOINT_BASE_URL=base,
        PATH=SHORT_PAUSES,
        **values,
    )
    assert ran.returncode == 0, ran.stderr
    pictures = list(tmp_path.glob("*.png"))
    states = re.findall(r'"status": ?"(\w+)"', ran.stdout)
    assert pictures or states
    assert set(states) <= {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
    for path in pictures:
        assert Image.open(path).size == (128, 128)
