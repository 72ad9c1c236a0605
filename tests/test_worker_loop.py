"""The SDK's worker loop with what ``src/platform.py`` mends in it, against a platform that misbehaves."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest
from runpod.serverless.modules import rp_http, rp_job, rp_ping
from runpod.serverless.modules.worker_state import JobsProgress

from src.serving import worker_loop as platform_module
from src.serving.worker_loop import Handler, Outage, QuietLog, WorkerLoop
from tests.support.client import Client, results, until
from tests.support.platform_stub import ENDPOINT, Fault, Platform, serving
from tests.support.platform_stub.job import Job

FOREVER = 10**6


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    """A platform whose worker is this process: a loop that does not wait long before it tries again.

    The SDK waits for a second when its worker is full, and when it was told of no cancellation: few tests need either.
    """
    with serving() as stub:
        base = f"{stub.url}/v2/{ENDPOINT}"
        monkeypatch.setenv("RUNPOD_AI_API_KEY", stub.key)
        monkeypatch.setattr(rp_job, "JOB_GET_URL", f"{base}/job-take/worker-1?gpu=none")
        monkeypatch.setattr(rp_http, "JOB_DONE_URL", f"{base}/job-done/worker-1/$ID?gpu=none")
        monkeypatch.setattr(platform_module, "FIRST_PAUSE_SECONDS", 0.01)
        monkeypatch.setattr(platform_module, "MAX_PAUSE_SECONDS", 0.1)
        yield stub
    JobsProgress().clear()


async def echo(job: dict[str, Any]) -> dict[str, Any]:
    return {"seen": job.get("input")}


def work(handle: Handler, clients: Callable[[], Any], concurrency: int = 8) -> Any:
    """What ``clients`` gives, which runs in a thread while the SDK's loop has its jobs handled."""

    async def run() -> Any:
        loop = WorkerLoop({"handler": handle, "concurrency_modifier": lambda _: concurrency})
        working = asyncio.create_task(loop.run())
        answered = asyncio.create_task(asyncio.to_thread(clients))
        await asyncio.wait({working, answered}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        assert not working.done(), working.result()
        working.cancel()
        return await answered

    return asyncio.run(run())


@pytest.mark.parametrize(
    "fault",
    [
        Fault("job-done", times=6, drop=True),
        Fault("job-done", times=6, lost=True),
        Fault("job-done", times=4, status=429),
        Fault("job-done", times=4, status=408),
        Fault("job-done", times=6, status=500),
        Fault("job-done", times=2, delay=FOREVER),
    ],
    ids=lambda fault: f"{fault.times}-{'drop' if fault.drop else 'lost' if fault.lost else fault.status}",
)
def test_a_result_is_sent_until_it_has_arrived(stub: Platform, monkeypatch: pytest.MonkeyPatch, fault: Fault):
    monkeypatch.setattr(platform_module, "RESULT_TIMEOUT", aiohttp.ClientTimeout(sock_read=0.3))
    stub.faults.append(fault)

    def clients() -> None:
        client = Client(stub)
        jobs = [client.run(f"{i}") for i in range(4)]
        assert [client.finished(job)["status"] for job in jobs] == ["COMPLETED"] * 4
        # a job whose answer was lost is completed before the worker knows
        until(lambda: not stub.faults)
        for job in jobs:
            sent = results(stub, job)
            assert sent == sent[:1] * len(sent)

    work(echo, clients)


def test_a_result_that_no_try_will_deliver_is_given_up_with_a_line(
    stub: Platform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(platform_module, "RESULT_SECONDS", 0.5)

    def clients() -> tuple[str, str]:
        client = Client(stub)
        stub.faults.append(Fault("job-done", status=413))
        refused = client.run("refused")
        until(lambda: not stub.faults)
        drop = Fault("job-done", times=FOREVER, drop=True)
        stub.faults.append(drop)
        lost = client.run("lost")
        # the platform counts a job as in progress a little before the worker does
        until(lambda: drop.times < FOREVER)
        until(lambda: not JobsProgress().get_job_count())
        stub.faults.clear()
        good = client.run("good")
        assert client.finished(good)["status"] == "COMPLETED"
        assert results(stub, refused) == results(stub, lost) == []
        return refused, lost

    refused, lost = work(echo, clients, concurrency=1)
    lines = [line.split("|", 1)[1].strip() for line in capsys.readouterr().out.splitlines() if "is lost" in line]
    assert lines[0].startswith(f"{refused} | the result is lost: the platform answered 413")
    assert lines[1].startswith(f"{lost} | the result is lost: ")
    assert len(lines) == 2


def test_while_a_result_waits_other_jobs_go_on(stub: Platform):
    def clients() -> None:
        client = Client(stub)
        waiting = client.run("waits")
        stub.faults.append(Fault(waiting, times=FOREVER, status=503, body="waits"))
        until(lambda: stub.faults[0].times < FOREVER)
        assert client.generate("goes on")["status"] == client.generate("goes on")["status"] == "COMPLETED"
        stub.faults.clear()
        assert client.finished(waiting)["status"] == "COMPLETED"

    work(echo, clients)


def test_a_stopped_jobs_result_is_not_sent_again(stub: Platform):
    def clients() -> None:
        client = Client(stub)
        job = client.run("unwanted")
        fault = Fault("job-done", times=FOREVER, status=503)
        stub.faults.append(fault)
        until(lambda: fault.times < FOREVER)
        client.post(f"cancel/{job}")
        until(lambda: not JobsProgress().get_job_count())
        stub.faults.clear()
        assert results(stub, job) == []

    work(echo, clients)


def test_a_cancellation_before_the_start_is_honoured(stub: Platform, monkeypatch: pytest.MonkeyPatch):
    """The SDK starts a job up to 0.1 s after its arrival: here it is cancelled soon after the worker has it."""
    begin, handled = stub.begin, list[str]()

    def begin_and_cancel(job: Job, worker: str) -> None:
        begin(job, worker)
        if job.request.input["prompt"] == "unwanted":
            asyncio.get_running_loop().call_later(0.02, stub.end, job, "CANCELLED")

    async def slow(job: dict[str, Any]) -> dict[str, Any]:
        handled.append(job["id"])
        await asyncio.sleep(0.1)
        return {}

    def clients() -> None:
        client = Client(stub)
        for _ in range(5):
            unwanted = client.generate("unwanted")
            assert unwanted["status"] == "CANCELLED"
            assert client.generate("wanted")["status"] == "COMPLETED"
            assert results(stub, unwanted["id"]) == []
        assert len(handled) < 10

    monkeypatch.setattr(stub, "begin", begin_and_cancel)
    work(slow, clients)


def test_a_job_stopped_before_its_first_step_is_counted_no_more():
    async def stop() -> None:
        loop = WorkerLoop({"handler": echo})
        job = {"id": "job-1", "input": {}}
        await loop.jobs_queue.put(job)
        assert loop._accept(await loop.jobs_queue.get())
        loop.jobs_tasks["job-1"] = task = asyncio.create_task(loop.handle_job(None, job))
        assert await loop.stop_job("job-1")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert loop.job_progress.get_job_count() == 0
        assert not await loop.stop_job("job-1")

    asyncio.run(stop())


@pytest.mark.parametrize(
    "fault",
    [
        Fault("job-take", times=3, drop=True),
        Fault("job-take", times=3, status=500),
        Fault("job-take", times=3, status=429),
        Fault("job-take", times=3, status=400),
        *(Fault("job-take", times=3, text=text) for text in ("", "<html>", "null", "7", '"id"', "{}", "[[]]", "\0")),
        Fault("job-take", times=3, text='{"id": 5, "input": {}}'),
        Fault("job-take", times=3, text='{"id": "x", "__class__": 1}'),
        Fault("job-stop", times=2, drop=True),
        Fault("job-stop", times=2, status=500),
        *(Fault("job-stop", times=2, text=text) for text in ("", "[1]", '{"jobsToStop": 3}', '{"jobsToStop": [{}]}')),
    ],
    ids=lambda fault: f"{fault.path}-{'drop' if fault.drop else fault.status if fault.text is None else fault.text}",
)
def test_a_platform_in_trouble_costs_a_line_and_no_job(stub: Platform, fault: Fault, capsys: pytest.CaptureFixture):
    def clients() -> None:
        client = Client(stub)
        until(lambda: not stub.faults)
        assert client.generate()["status"] == "COMPLETED"
        unwanted = client.run("unwanted")
        client.until(unwanted, "IN_PROGRESS")
        client.post(f"cancel/{unwanted}")
        until(lambda: not JobsProgress().get_job_count())
        assert results(stub, unwanted) == []

    stub.faults.append(fault)
    work(until_unwanted, clients)
    log = capsys.readouterr().out
    assert log.count("cannot ") == log.count("again after") <= 1
    assert "ERROR" not in log


async def until_unwanted(job: dict[str, Any]) -> dict[str, Any]:
    if job["input"]["prompt"] == "unwanted":
        await asyncio.sleep(30)
    return {}


def test_a_bad_job_costs_its_batch_nothing(stub: Platform, capsys: pytest.CaptureFixture):
    def clients() -> None:
        client = Client(stub)
        stub.throttled.add("worker-1")
        jobs = [client.run(f"{i}") for i in range(2)]
        for job in jobs:
            stub.begin(stub.jobs[job], "worker-1")
        good = [{"id": jobs[0], "input": 1}, {"id": jobs[1]}]
        bad: list[Any] = [None, "job", {}, {"input": {}}, {"id": None}, {"id": ["x"]}, {"id": "x", "__class__": 1}]
        stub.queue.clear()
        stub.faults.append(Fault("job-take-batch", text=json.dumps([*bad[:4], *good, *bad[4:]])))
        assert [client.finished(job)["output"] for job in jobs] == [{"seen": 1}, {"seen": None}]

    stub.poll_seconds = 0.2
    work(echo, clients)
    assert "7 of 9 jobs dropped" in capsys.readouterr().out


def test_an_outage_is_logged_when_it_begins_once_a_minute_and_when_it_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    outage, pauses = Outage("take jobs", "job-1"), list[float]()
    outage.over()
    while now < 3600:
        pauses.append(outage.failed(TimeoutError()))
        now += pauses[-1]
    outage.over()
    outage.over()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "WARN   | job-1 | cannot take jobs, trying again: TimeoutError"
    assert lines[-1].startswith("INFO   | job-1 | could take jobs again after 36")
    assert 40 < len(lines) <= 2 + 60
    assert pauses[0] <= 0.25 and min(pauses[20:]) >= 12.5 and max(pauses) <= 25
    assert len(set(pauses)) == len(pauses)


def test_a_heartbeat_that_fails_is_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    now = 0.0
    monkeypatch.setattr(rp_ping, "log", QuietLog())
    monkeypatch.setenv("RUNPOD_WEBHOOK_PING", "http://127.0.0.1:9/ping")
    heartbeat = rp_ping.Heartbeat(retries=0)
    monkeypatch.setattr(platform_module.time, "monotonic", lambda: now)
    for now in range(0, 130, 10):  # noqa: B007 - the clock reads it
        heartbeat._send_ping()
    assert capsys.readouterr().out.count("Ping Request Error") == 2
