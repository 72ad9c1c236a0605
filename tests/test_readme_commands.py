"""The READMEs' commands and code for clients, run unchanged with a stand-in for RunPod."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.client import Client
from tests.support.examples import environment, run
from tests.support.platform_stub import Platform
from tests.support.processes import ROOT

PAGES = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "examples/README.md")]


def blocks(language: str) -> list[str]:
    """Returns the pages' different blocks of code in ``language`` that call an endpoint."""
    found = [block for page in PAGES for block in re.findall(rf"```{language}\n(.*?)```", page, re.S)]
    calls = [block for block in dict.fromkeys(found) if re.search("curl|examples/|api.runpod.ai", block)]
    # which runs until it is stopped: see test_playground.py
    return [block for block in calls if "playground.py" not in block]


def exports() -> list[tuple[str, ...]]:
    """Returns the variables that each ``export`` command sets, with which the other commands find an endpoint."""
    lines = [line for page in PAGES for line in re.findall(r"^export .*$", page, re.M)]
    return list(dict.fromkeys(tuple(re.findall(r"(\w+)=", line)) for line in lines))


def ways_to_export(command: str) -> list[tuple[str, ...]]:
    """Returns what a reader may have exported: whatever finds an endpoint for an example, else what is named."""
    fitting = [each for each in exports() if set(re.findall(r"\$(\w+)", command)) <= set(each)]
    return fitting if re.match(r"(\S+ )?examples/", command) else fitting[:1]


COMMANDS = [(command, exported) for command in blocks("bash") for exported in ways_to_export(command)]


@pytest.mark.parametrize(("command", "exported"), COMMANDS)
def test_command_works(
    platform: Platform,
    client: Client,
    local_server: str,
    node_modules: Path,
    tmp_path: Path,
    command: str,
    exported: tuple[str, ...],
):
    (tmp_path / "node_modules").symlink_to(node_modules)
    for shown, here in (
        ("https://api.runpod.ai/v2", f"{platform.url}/v2"),
        ("http://localhost:8000/v2/local", f"{platform.url}/v2/local"),
        ("RUNPOD_API_KEY=local", f"RUNPOD_API_KEY={platform.key}"),
        ("localhost:8000", local_server.removeprefix("http://")),
        (".venv/bin/python", sys.executable),
        ("examples/", f"{ROOT}/examples/"),
        # which finds packages next to itself
        (f"node {ROOT}/examples/generate.mjs", f"cp {ROOT}/examples/generate.mjs . && node generate.mjs"),
    ):
        command = command.replace(shown, here)
    if "<id>" in command:
        # the reader pastes the id from the first answer
        command = command.replace("<id>", client.run())
    settings = environment(platform, ENDPOINT_URL=local_server, ENDPOINT_ID="local")
    set_by_user = {name: settings[name] for name in (*exported, "PATH")}
    # in place of api.runpod.ai
    set_by_user["RUNPOD_ENDPOINT_BASE_URL"] = f"{platform.url}/v2"
    ran = run(["bash", "-euo", "pipefail", "-c", command], tmp_path, **set_by_user)
    assert ran.returncode == 0, ran.stderr
    pictures = list(tmp_path.glob("*.png"))
    states = re.findall(r'"status": ?"(\w+)"', ran.stdout)
    assert pictures or states
    assert set(states) <= {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
    for path in pictures:
        assert Image.open(path).size == (128, 128)


def test_python_code_works(platform: Platform, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENDPOINT_ID", "local")
    monkeypatch.setenv("RUNPOD_API_KEY", platform.key)
    exec(code.replace("https://api.runpod.ai/v2", f"{platform.url}/v2"), {})
    (path,) = tmp_path.glob("*.png")
    assert Image.open(path).size == (128, 128)
