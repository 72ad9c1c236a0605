"""Whole worker processes, driven over HTTP by a stand-in for the platform."""

import fcntl
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import handler
from tests.bench.load import load
from tests.support import faulty_worker
from tests.support.client import Client, results, until
from tests.support.platform_stub import HANDLER, Fault, Platform, serving

pytestmark = pytest.mark.process

SLOW = {"prompt": "slow", "num_inference_steps": 150, "width": 64, "height": 64, "guidance_scale": 0}
"""A job of over 15 s, for workers of ``support/faulty_worker.py``."""
THREE_SECONDS = SLOW | {"num_inference_steps": 30}


def test_progress_comes_once_a_second_and_never_after_the_result(platform: Platform, client: Client):
    job = client.run(**THREE_SECONDS)
    shown = until(lambda: client.get(f"status/{job}").get("output"))
    assert shown["steps"] == 30
    assert shown["progress"] == pytest.approx(100 * shown["step"] / 30, abs=1)
    assert client.finished(job)["status"] == "COMPLETED"
    reports = [(at, post["output"]["progress"]) for at, post in platform.jobs[job].posts[:-1]]
    assert reports == sorted(reports, key=lambda report: report[1])
    assert len(reports) >= 2 and min(np.diff([at for at, _ in reports])) >= 0.95

    platform.faults.append(Fault("job-done", times=100, delay=3, body="IN_PROGRESS"))
    late = client.run(**THREE_SECONDS)
    assert client.finished(late)["status"] == "COMPLETED"
    platform.faults.clear()
    for each in (job, late):
        states = [post.get("status") for _, post in platform.jobs[each].posts]
        assert states == ["IN_PROGRESS"] * (len(states) - 1) + [None]


def test_failed_progress_report_does_not_affect_the_job(platform: Platform, client: Client):
    platform.faults += [
        Fault("job-done", status=500, body="IN_PROGRESS"),
        Fault("job-done", drop=True, body="PROGRESS"),
    ]
    assert client.generate(**THREE_SECONDS)["status"] == "COMPLETED"


def test_cancelled_job_frees_the_device(platform: Platform, client: Client):
    long = client.run(**SLOW)
    client.until(long, "IN_PROGRESS")
    waiting = client.run("the sea", width=256, num_inference_steps=1)
    client.until(waiting, "IN_PROGRESS")
    assert client.post(f"cancel/{waiting}")["status"] == "CANCELLED"
    until(lambda: client.get(f"status/{long}").get("output"))
    assert client.post(f"cancel/{long}")["status"] == "CANCELLED"
    cancelled = time.monotonic()
    assert client.generate("the sea")["status"] == "COMPLETED"
    assert time.monotonic() - cancelled < 5
    assert results(platform, long) == results(platform, waiting) == []
    assert client.get(f"status/{long}")["status"] == "CANCELLED"


def test_worker_retries_its_result_after_sigterm():
    with serving() as platform:
        client = Client(platform)
        worker = platform.workers[platform.start_worker(handler.main)].process
        job = client.run()
        platform.faults.append(fault := Fault("job-done", times=10**6, body='"image"', status=503))
        until(lambda: fault.times < 10**6 - 4)
        worker.terminate()
        left = fault.times
        until(lambda: fault.times < left - 1)
        assert worker.poll() is None
        platform.faults.clear()
        # its pauses are short now
        assert worker.wait(3) == 0
        assert client.get(f"status/{job}")["status"] == "COMPLETED"


def test_worker_that_shuts_down_keeps_its_jobs_after_a_second_sigterm_but_not_after_ctrl_c():
    with serving() as platform:
        worker = platform.workers[platform.start_worker(handler.main)].process
        platform.faults.append(fault := Fault("job-done", times=10**6, body='"image"', status=503))
        Client(platform).run()
        until(lambda: fault.times < 10**6)
        for _ in range(2):
            worker.terminate()
            until(lambda left=fault.times: fault.times < left - 1)
        worker.send_signal(signal.SIGINT)
        assert worker.wait(3) == 130


def test_worker_survives_an_outage_of_the_platform_and_ends_at_once_when_idle(tmp_path: Path):
    with serving() as platform:
        port = int(platform.url.rsplit(":", 1)[1])
    log = tmp_path / "log"
    with log.open("wb") as file:
        worker = platform.workers[platform.start_worker(handler.main, log=file)].process
    try:
        until(lambda: b"cannot take jobs" in log.read_bytes())
        before, seconds = psutil.Process(worker.pid).cpu_times(), 5
        time.sleep(seconds)
        after = psutil.Process(worker.pid).cpu_times()
        assert after.user + after.system - before.user - before.system < 0.02 * seconds
        # one line for jobs, one for cancellations, one for the heartbeat
        assert len(log.read_bytes().split(b"Starting Serverless Worker")[1].splitlines()) <= 1 + 3
        with serving(port) as back:
            back.workers = platform.workers
            assert Client(back).generate()["status"] == "COMPLETED"
            worker.terminate()
            assert worker.wait(10) == 0
        assert "Warning" not in log.read_text()
    finally:
        platform.stop_workers()


def test_failure_has_a_clear_error_and_affects_no_other_job(platform: Platform, client: Client):
    jobs = {
        "crash": client.run("crash"),
        "out of memory": client.run("out of memory", width=256),
        "nan": client.run("nan"),
        "too large": client.run("the sea", width=256, height=256, num_images=4),
        "bad": client.run("the sea", width=515),
        "good": client.run("the sea"),
        "needs a call alone": client.run("needs a call alone", num_images=2),
    }
    ended = {name: client.finished(job) for name, job in jobs.items()}
    assert {name for name, job in ended.items() if job["status"] == "COMPLETED"} == {"good", "needs a call alone"}
    errors = {name: job["error"] for name, job in ended.items() if job["status"] == "FAILED"}
    assert errors == {
        "crash": f"internal error, see the worker's log for job {jobs['crash']}",
        "out of memory": "an image of 256 x 128 did not fit in GPU memory: ask for 128 x 128",
        "nan": "the model produced NaN instead of a picture: try another seed, scheduler or a lower guidance_scale",
        "too large": errors["too large"],
        "bad": "invalid input: width: must be a multiple of 8, got 515",
    }
    assert errors["too large"].endswith(
        "the limit is 0.3 MB: ask for fewer or smaller images, for jpeg or webp as output_format, "
        "or have a bucket set up for the endpoint"
    )
    sent = " ".join(str(results(platform, job)) for name, job in jobs.items() if name in errors)
    for secret in ("Traceback", str(Path(__file__).parent), socket.gethostname(), platform.key):
        assert secret not in sent


def test_worker_with_a_poisoned_device_is_replaced():
    with serving() as platform:
        client = Client(platform)
        first = platform.start_worker(faulty_worker.main, MAX_CONCURRENCY="3")
        before = client.run(**THREE_SECONDS)
        client.until(before, "IN_PROGRESS")
        poison, behind = client.run("poison"), client.run("the sea")
        client.until(behind, "IN_PROGRESS")
        left = client.run("the sea")
        # the free slot of the first job must not be filled before the device fails
        platform.faults.append(Fault("job-take", delay=2))
        assert client.finished(before)["status"] == "COMPLETED"
        for job in (poison, behind):
            failed = client.finished(job)
            assert failed["error"] == "the GPU failed and this worker is being replaced: send the job again"
            assert results(platform, job)[0]["stopPod"] is True
        assert platform.workers[first].process.wait(20) == 1
        done = client.finished(left)
        assert (done["status"], done["workerId"]) == ("COMPLETED", "worker-2")


def test_worker_with_a_hanging_device_asks_to_be_replaced():
    with serving() as platform:
        client = Client(platform)
        first = platform.start_worker(faulty_worker.main, MAX_CONCURRENCY="2", STALL_TIMEOUT="3")
        hung = client.run("hang", num_inference_steps=50)
        client.until(hung, "IN_PROGRESS")
        behind = client.run("the sea", width=256)
        client.until(behind, "IN_PROGRESS")
        # the result is delivered before the process ends
        platform.faults.append(Fault(hung, times=4, status=500, body="error"))
        for job in (hung, behind):
            failed = client.finished(job)
            assert failed["error"] == "the GPU failed and this worker is being replaced: send the job again"
            assert results(platform, job)[0]["stopPod"] is True
        assert platform.workers[first].process.wait(20) == 1


def test_blocked_log_output_delays_no_job():
    read, write = os.pipe()
    # a small pipe, which is soon full
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    with serving() as platform:
        client = Client(platform)
        with os.fdopen(write, "wb") as log:
            # at this level, the SDK logs all outputs
            worker = platform.workers[platform.start_worker(handler.main, log=log, RUNPOD_LOG_LEVEL="DEBUG")]
        bad = [client.run(width=99) for _ in range(250)]
        assert {client.finished(job)["status"] for job in bad} == {"FAILED"}
        assert client.generate()["status"] == "COMPLETED"
        # the pipe ends with the worker
        giving_up = threading.Timer(20, worker.process.kill)
        giving_up.start()
        with os.fdopen(read, "rb") as reader:
            lines = (line for line in reader if b"lines dropped: nobody read the log" in line)
            threading.Timer(1, client.generate).start()
            assert next(lines)
        giving_up.cancel()
        # now the pipe is closed
        assert client.generate()["status"] == "COMPLETED"
        assert worker.process.poll() is None


def test_worker_that_can_start_no_further_thread_answers_jobs():
    with serving() as platform:
        client = Client(platform)
        platform.start_worker(faulty_worker.main, MAX_CONCURRENCY="4")
        assert client.generate("no more threads")["status"] == "COMPLETED"
        jobs = [client.run(width=width) for width in (64, 64, 128, 136)]
        assert [client.finished(job)["status"] for job in jobs] == ["COMPLETED"] * 4


def test_worker_with_closed_outputs_works():
    with serving() as platform:
        command = ["sh", "-c", 'exec "$@" 1>&- 2>&-', "sh", sys.executable, str(HANDLER)]
        worker = platform.workers[platform.start_worker(command)]
        assert Client(platform).generate()["status"] == "COMPLETED"
        until(lambda: worker.pings)
        worker.process.terminate()
        assert worker.process.wait(10) == 0


@pytest.mark.parametrize(
    "fault",
    [
        {"trickle": True},
        {"status": 302, "location": "/v2/local/health"},
        {"raw": "HTTP/1.1 503 \r\nRetry-After: soon\r\nContent-Length: 0\r\n\r\n"},
        {"raw": "HTTP/1.1 302 \r\nLocation: \xff\r\nContent-Length: 0\r\n\r\n"},
    ],
    ids=["endless", "redirect", "Retry-After", "Location"],
)
def test_heartbeat_goes_on_after_any_answer(platform: Platform, client: Client, fault: dict[str, Any]):
    worker = platform.workers["worker-1"]
    platform.faults.append(Fault("ping", **fault))
    until(lambda: not platform.faults)
    worker.pings.clear()
    until(lambda: worker.pings, 20)


def test_heartbeat_names_the_jobs_that_the_worker_holds(platform: Platform, client: Client):
    pings = platform.workers["worker-1"].pings
    job = client.run(**SLOW)
    until(lambda: pings and pings[-1].get("job_id") == job)
    client.post(f"cancel/{job}")
    until(lambda: "job_id" not in pings[-1])


def test_worker_ends_at_once_on_sigterm_right_after_its_start(tmp_path: Path):
    with serving() as platform, (tmp_path / "log").open("wb") as log:
        worker = platform.workers[platform.start_worker(handler.main, log=log)].process
        until(lambda: b"ready: " in (tmp_path / "log").read_bytes())
        worker.terminate()
        assert worker.wait(10) in (0, -signal.SIGTERM)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_worker_finishes_its_jobs_and_takes_no_more_after_sigterm():
    with serving(poll_seconds=30) as platform:
        client = Client(platform)
        worker = platform.workers[platform.start_worker(faulty_worker.main)].process
        held = [client.run(**SLOW | {"num_inference_steps": 20}) for _ in range(2)]
        for job in held:
            client.until(job, "IN_PROGRESS")
        left = client.run()
        worker.terminate()
        signalled = time.monotonic()
        assert worker.wait(60) == 0
        ended = time.monotonic() - signalled
        assert [client.get(f"status/{job}")["status"] for job in held] == ["COMPLETED"] * 2
        assert client.get(f"status/{left}")["status"] == "IN_QUEUE"
        assert ended < client.get(f"status/{held[1]}")["executionTime"] / 1000 + 2


def test_fifty_jobs_from_ten_clients_each_get_their_own_answer(platform: Platform, client: Client):
    """A small version of ``tests/bench/load.py``."""
    assert load(platform, jobs=50, clients=10).wrong == []
