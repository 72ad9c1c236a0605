import os
import sys

os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
# small models gain nothing from more threads, and several processes run at a time
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not any("gpu" in argument for argument in sys.argv[1:]):
    # without -m gpu, the tests compute on the CPU on any machine
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import fcntl
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import requests

from src.generation.engine import Engine
from src.settings import Settings
from src.startup.import_libraries import import_libraries
from tests.support import faulty_worker
from tests.support.client import Client, until
from tests.support.forks import Fork, call_handler
from tests.support.platform_stub import Platform, serving

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


# how long an example takes depends on what else the machine does
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_collection() -> None:
    """Imports the libraries as handler.py does. With ``-n``, the process that hands out the tests does without them."""
    import_libraries(eager=["peft"])


@pytest.fixture(scope="session")
def v1_4_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small v1-4 with random weights. Tests that change it copy it first."""
    from tests.support.v1_4 import make_repository

    return make_repository(tmp_path_factory.mktemp("v1-4"))


@pytest.fixture(scope="session")
def pipes(v1_4_repository: Path) -> "dict[str, StableDiffusionPipeline]":
    from tests.support import engines

    return {name: engines.pipe_of(engines.build(name)) for name in (str(v1_4_repository), "demo")}


@pytest.fixture
def v1_4_pipe(pipes: "dict[str, StableDiffusionPipeline]", v1_4_repository: Path) -> "StableDiffusionPipeline":
    return pipes[str(v1_4_repository)]


@pytest.fixture
def demo_pipe(pipes: "dict[str, StableDiffusionPipeline]") -> "StableDiffusionPipeline":
    return pipes["demo"]


@pytest.fixture
def v1_4_engine(v1_4_pipe: "StableDiffusionPipeline", v1_4_repository: Path) -> Engine:
    from tests.support import engines

    return engines.around(v1_4_pipe, v1_4_repository.name)


@pytest.fixture
def demo_engine(demo_pipe: "StableDiffusionPipeline") -> Engine:
    from tests.support import engines

    return engines.around(demo_pipe, "demo")


@pytest.fixture
def quick_unet(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> "StableDiffusionPipeline":
    """A model's pipeline with a UNet of a single random layer, which takes a tenth of the time."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    pipe = request.getfixturevalue(request.param)
    layer = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    size = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    monkeypatch.setattr(pipe, "unet", UNet2DConditionModel.from_config(pipe.unet.config, **layer, **size).eval())
    return pipe


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Lets tests interrupt the processes that they start. Run in the background, the suite would ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


PROCESS_FIXTURES = {"platform", "local_server", "node_modules"}
"""Fixtures that start a process. Tests that use them get the ``process`` marker."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if PROCESS_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.process)
    # with two processes, the longest files must not be the last
    items.sort(key=lambda item: item.path.stem not in ("test_platform", "test_scripts", "test_worker_loop"))


@pytest.fixture(autouse=True)
def no_unmarked_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that starts a process without the ``process`` marker, so that the quick run stays quick."""
    if not request.node.get_closest_marker("process"):

        def refuse(*arguments: object, **_: object) -> None:
            pytest.fail(f"this test starts {arguments[0]}: mark it with pytest.mark.process")

        monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hides the machine's own settings and Hugging Face cache from tests."""
    for name in (*(name.upper() for name in Settings.model_fields), "RUNPOD_WEBHOOK_GET_JOB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    yield


@pytest.fixture(scope="session")
def platform() -> Iterator[Platform]:
    """A stand-in for RunPod with one worker."""
    with serving(key="rpa_secret") as platform:
        platform.start_worker(faulty_worker.main, MAX_CONCURRENCY="4", MAX_RESULT_BYTES="300000")
        yield platform


@pytest.fixture
def client(platform: Platform) -> Iterator[Client]:
    """A client of ``platform``. After the test, all faults must be used up and the worker alive."""
    yield Client(platform)
    assert platform.faults == []
    assert platform.workers["worker-1"].process.poll() is None


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The packages from npm, which are installed on first use."""
    if not shutil.which("npm"):
        pytest.skip("needs node and npm")
    folder = Path(__file__).parent / "node"
    lock, installed = folder / "package-lock.json", folder / "node_modules" / ".package-lock.json"
    with lock.open() as turns:
        fcntl.flock(turns, fcntl.LOCK_EX)
        if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
            subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, check=True, capture_output=True)
    return folder / "node_modules"


@pytest.fixture(scope="session")
def local_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``handler.py --rp_serve_api``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--rp_serve_api", "--rp_api_port", str(port), "--rp_api_host", "127.0.0.1"]
    folder = tmp_path_factory.mktemp("server")
    process = Fork(call_handler, *arguments, cwd=folder, env=dict(os.environ))
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None
        with suppress(requests.ConnectionError):
            return requests.get(f"{address}/docs", timeout=1).ok
        return False

    try:
        until(answers, 120)
        yield address
    finally:
        process.terminate()
        process.wait(10)
    assert list(folder.iterdir()) == []
