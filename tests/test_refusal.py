"""Workers that cannot start, that are stopped while they start, or that run on a Pod."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import requests

from handler import NO_PICTURE
from tests.support import faulty_worker, forks
from tests.support.client import Client, until
from tests.support.platform_stub import HANDLER, serving
from tests.support.processes import ROOT

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"MAX_CONCURRENCY": "none"}, "MAX_CONCURRENCY=none: must be an integer from 1 to 100"),
        ({"MODEL_ID": "/nowhere"}, "MODEL_ID=/nowhere: no such file or directory"),
        (
            {"RUNPOD_PING_INTERVAL": "10s", "SAFETY_CHECKER": "?"},
            "RUNPOD_PING_INTERVAL=10s: must be an integer from 1000 to 600000; SAFETY_CHECKER=?: must be true or false",
        ),
    ],
)
def test_jobs_are_answered_with_the_start_error_when_no_restart_can_help(
    tmp_path: Path, settings: dict[str, str], why: str
):
    with serving() as platform, (tmp_path / "log").open("wb") as log:
        # two arguments that the SDK would read otherwise
        command = partial(forks.call_handler, "--rp_log_level", "fatal", "--rp_debugger")
        worker = platform.workers[platform.start_worker(command, log=log, **settings)].process
        client = Client(platform)
        for _ in "ab":
            done = client.generate()
            assert (done["status"], done["error"]) == ("FAILED", f"this endpoint cannot start: {why}")
        error = client.post("openai/v1/images/generations", {"prompt": "the sea"})["error"]
        assert (error["type"], error["message"]) == ("server_error", f"this endpoint cannot start: {why}")
        assert worker.poll() is None
    lines = (tmp_path / "log").read_text().splitlines()
    # once for the operator, and for each of the three jobs under its id
    assert len([line for line in lines if f"the worker cannot start: {why}" in line]) == 1 + 3
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize(
    ("settings", "why", "cause"),
    [
        ({"ALWAYS_NAN": "1"}, f"StartError: MODEL_ID=demo: {NO_PICTURE}", None),
        ({"MODEL_ID": ""}, "StartError: no CUDA device: ", None),
        ({"ALWAYS_HANG": "1", "STALL_TIMEOUT": "2"}, "JobError: the GPU failed", "no denoising step for 2 s"),
        ({"ALWAYS_POISON": "1"}, "JobError: the GPU failed", "an illegal memory access was encountered"),
        ({"ALWAYS_CRASH": "1"}, "RuntimeError: no kernel image is available", "Traceback (most recent call last)"),
    ],
)
def test_worker_takes_no_job_and_reports_why_when_another_host_may_help(
    tmp_path: Path, settings: dict[str, str], why: str, cause: str | None
):
    with serving() as platform, (tmp_path / "log").open("wb") as log:
        job = Client(platform).run()
        worker = platform.workers[platform.start_worker(faulty_worker.main, log=log, **settings)]
        assert worker.process.wait(60) == 1
        assert [ping["status"] for ping in worker.pings] == ["unhealthy"]
        assert worker.pings[0]["reason"].startswith(why)
        assert Client(platform).get(f"status/{job}")["status"] == "IN_QUEUE"
    before, line = (tmp_path / "log").read_text().split("the worker cannot start: ")
    assert line.startswith(why.removeprefix("JobError: ").removeprefix("StartError: "))
    assert cause in before if cause else "Traceback" not in before


def test_worker_needs_no_shared_memory():
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root, to mount a /dev/shm that cannot be written")
    mount = 'mount -t tmpfs -o ro none /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, str(HANDLER)]
    with serving() as platform:
        worker = platform.workers[platform.start_worker(command)]
        assert Client(platform).generate()["status"] == "COMPLETED"
        until(lambda: worker.pings)


def test_process_1_of_a_container_ends_at_once_on_sigterm_during_start():
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root, for a namespace in which the worker is process 1")
    environment = os.environ | {"ALWAYS_HANG": "1", "MODEL_ID": "demo"}
    worker = [sys.executable, "-m", "tests.support.faulty_worker", "--check"]
    command = ["unshare", "--pid", "--fork", "--kill-child", *worker]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as unshare:
        try:
            # its first picture hangs
            until(lambda: b"weights: " in unshare.stdout.readline(), 60)
            (worker,) = (Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")).read_text().split()
            os.kill(int(worker), signal.SIGTERM)
            unshare.wait(10)
        finally:
            unshare.kill()


def test_pod_serves_the_api(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pod = {"RUNPOD_POD_ID": "pod", "MODEL_ID": "demo", "RUNPOD_REALTIME_PORT": str(port)}
    command = [sys.executable, HANDLER]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | pod, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = next(line for line in process.stdout if "this is a Pod" in line)
            assert said.endswith(f"serving /run, /runsync and /status on port {port}\n")
            job = {"input": {"prompt": "the sea", "num_inference_steps": 2}}

            def answer() -> dict | None:
                try:
                    return requests.post(f"http://127.0.0.1:{port}/runsync", json=job, timeout=60).json()
                except requests.ConnectionError:
                    return None

            assert until(answer, 30)["output"]["model"] == "demo"
            job = {"input": {"openai_route": "/v1/images/generations", "openai_input": {}}}
            assert answer()["error"] == "invalid input: prompt: required"
        finally:
            process.terminate()
    assert list(tmp_path.iterdir()) == []
    assert forks.run_handler(tmp_path, "--check", **pod).returncode == 0
    ran = forks.run_handler(tmp_path, "--test_input", '{"input": {"prompt": "sea", "num_inference_steps": 1}}', **pod)
    assert ran.returncode == 0 and (tmp_path / "picture.png").exists()
    refused = forks.run_handler(tmp_path, **pod | {"RUNPOD_REALTIME_PORT": "http"})
    assert refused.returncode == 1
    assert "the worker cannot start: RUNPOD_REALTIME_PORT=http: must be an integer" in refused.stdout
