"""The worker's loop, against a platform that misbehaves."""

import asyncio
import gzip
import json
import resource
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from hypothesis import given
from hypothesis import strategies as st
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_http, rp_job, rp_ping
from runpod.serverless.modules.worker_state import JobsProgress

from src.generation.engine import Engine
from src.job_handler import KEPT_ANSWERS, JobHandler
from src.serving import progress
from src.serving.delivery import Outage, Timing, deliver
from src.serving.heartbeat import Heartbeat
from src.serving.progress import progress_reports
from src.serving.taken_jobs import Job as TakenJob
from src.serving.taken_jobs import read_jobs
from src.serving.worker_loop import MAX_REMEMBERED, Handler, WorkerLoop
from src.settings import Settings
from tests.support import internals
from tests.support.client import Client, receiver, results, until
from tests.support.platform_stub import ENDPOINT, Fault, Platform, serving
from tests.support.platform_stub.job import Job

FOREVER = 10**6
SHORT = Timing(first_pause=0.01, max_pause=0.1)
"""The timing of a worker that soon tries again."""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    """A platform whose only worker is this process."""
    with serving() as stub:
        base = f"{stub.url}/v2/{ENDPOINT}"
        monkeypatch.setenv("RUNPOD_AI_API_KEY", stub.key)
        monkeypatch.setattr(rp_job, "JOB_GET_URL", f"{base}/job-take/worker-1?gpu=none")
        monkeypatch.setattr(rp_http, "JOB_DONE_URL", f"{base}/job-done/worker-1/$ID?gpu=none")
        yield stub
    JobsProgress().clear()


async def echo(job: dict[str, Any]) -> dict[str, Any]:
    return {"seen": job.get("input")}


def work(handle: Handler, clients: Callable[[], Any], concurrency: int = 8, timing: Timing = SHORT) -> Any:
    """Runs ``clients`` in a thread while the loop hands its jobs to ``handle``, and returns its result."""

    async def run() -> Any:
        loop = WorkerLoop({"handler": handle, "concurrency_modifier": lambda _: concurrency}, timing)
        working = asyncio.create_task(loop.run())
        answered = asyncio.create_task(asyncio.to_thread(clients))
        await asyncio.wait({working, answered}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        assert not working.done(), working.result()
        working.cancel()
        return await answered

    return asyncio.run(run())


def described(fault: Fault) -> str:
    what = "drop" if fault.drop else "lost" if fault.lost else fault.status or fault.text or fault.raw
    return f"{fault.path} {fault.times} {what!s:.40}"


UNREADABLE = [
    "SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "HTTP/1.1\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnone\r\n",
    f"HTTP/1.1 200 OK\r\nX-Long: {'x' * 100_000}\r\n\r\n",
    "HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
    "<html><body>Bad Gateway</body></html>",
    "\x15\x03\x01\x00\x02\x02\x46",
]
"""Answers of a proxy that are not HTTP. The last is a TLS alert."""


def send_stop(stub: Platform, job: str) -> None:
    """Sends a stop signal for ``job`` and waits until the worker has read it and asked for the next."""
    for job_id in (job, "unknown"):
        stub.stops.setdefault("worker-1", []).append(job_id)
        stub.loop.call_soon_threadsafe(stub.notify)
        until(lambda: not stub.stops["worker-1"])


@pytest.mark.parametrize(
    "fault",
    [
        Fault("job-done", times=6, drop=True),
        Fault("job-done", times=6, lost=True),
        Fault("job-done", times=4, status=429),
        *(Fault("job-done", times=4, status=status) for status in (408, 425)),
        Fault("job-done", times=6, status=500),
        Fault("job-done", times=2, delay=FOREVER),
        *(Fault("job-done", times=6, status=status, location="/v2/local/health") for status in (301, 302, 304, 307)),
        *(Fault("job-done", times=6, raw=raw) for raw in UNREADABLE),
    ],
    ids=described,
)
def test_result_is_sent_until_it_has_arrived(stub: Platform, fault: Fault):
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

    work(echo, clients, timing=replace(SHORT, transfer_timeout=0.3))


def test_undeliverable_result_is_given_up_with_one_line(stub: Platform, capsys: pytest.CaptureFixture):
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

    refused, lost = work(echo, clients, concurrency=1, timing=replace(SHORT, give_up=0.5))
    lines = [line.split("|", 1)[1].strip() for line in capsys.readouterr().out.splitlines() if "is lost" in line]
    assert lines[0].startswith(f"{refused} | the result is lost: the platform answered 413")
    assert lines[1].startswith(f"{lost} | the result is lost: ")
    assert len(lines) == 2


def test_other_jobs_go_on_while_a_result_waits(stub: Platform):
    def clients() -> None:
        client = Client(stub)
        stub.faults.append(Fault("job-done", times=FOREVER, status=503, body="waits"))
        waiting = client.run("waits")
        until(lambda: stub.faults[0].times < FOREVER)
        assert client.generate("goes on")["status"] == client.generate("goes on")["status"] == "COMPLETED"
        stub.faults.clear()
        assert client.finished(waiting)["status"] == "COMPLETED"

    work(echo, clients)


def test_result_of_a_stopped_job_is_not_sent_again(stub: Platform):
    def clients() -> None:
        client = Client(stub)
        fault = Fault("job-done", times=FOREVER, status=503)
        stub.faults.append(fault)
        job = client.run("unwanted")
        until(lambda: fault.times < FOREVER)
        client.post(f"cancel/{job}")
        until(lambda: not JobsProgress().get_job_count())
        stub.faults.clear()
        assert results(stub, job) == []

    work(echo, clients)


def test_burst_fills_the_free_slots_in_one_answer(stub: Platform):
    def clients() -> None:
        client = Client(stub)
        stub.throttled.add("worker-1")
        jobs = [client.run(f"{i}") for i in range(11)]
        stub.throttled.clear()
        stub.loop.call_soon_threadsafe(stub.notify)
        assert {client.finished(job)["status"] for job in jobs} == {"COMPLETED"}
        assert stub.handed_out[0] == 8
        assert sum(stub.handed_out) == 11

    work(echo, clients)


def test_freed_slot_is_filled_at_once(stub: Platform):
    def clients() -> None:
        client = Client(stub)
        jobs = [client.run(f"{i}") for i in range(20)]
        assert {client.finished(job)["status"] for job in jobs} == {"COMPLETED"}
        started, finished = ([getattr(stub.jobs[job], when) for job in jobs] for when in ("started", "finished"))
        # the SDK's own loop needs a second for each
        assert max(finished) - min(started) < len(jobs) / 2

    work(echo, clients, concurrency=1)


@pytest.mark.parametrize("stop_answer", [{"status": 204}, {"text": '{"jobsToStop": ["known"]}'}])
def test_answers_without_news_that_come_at_once_make_no_busy_loop(stub: Platform, stop_answer: dict[str, Any]):
    faults = [Fault("job-take", times=FOREVER, status=204), Fault("job-stop", times=FOREVER, **stop_answer)]
    stub.faults += faults

    def clients() -> None:
        until(lambda: all(FOREVER - fault.times > 2 for fault in faults))
        asked, started = [fault.times for fault in faults], time.monotonic()
        until(lambda: all(before - fault.times > 3 for before, fault in zip(asked, faults, strict=True)))
        for before, fault in zip(asked, faults, strict=True):
            assert before - fault.times <= (time.monotonic() - started) / Timing().poll_interval + 1

    work(echo, clients)


@pytest.mark.parametrize(("early_stop", "handled_once"), [(60.0, False), (0.01, True)])
def test_stop_signal_that_overtakes_its_job_is_honoured_for_a_while(
    stub: Platform, early_stop: float, handled_once: bool
):
    handled = list[str]()

    async def remember(job: dict[str, Any]) -> dict[str, Any]:
        handled.append(job["id"])
        return {}

    def clients() -> None:
        client = Client(stub)
        stub.throttled.add("worker-1")
        job = client.run()
        send_stop(stub, job)
        stub.throttled.clear()
        client.until(job, "IN_PROGRESS", "COMPLETED")
        assert client.generate()["status"] == "COMPLETED"
        assert handled.count(job) == handled_once
        # the signal counts for one delivery only
        stub.queue.append(stub.jobs[job])
        until(lambda: handled.count(job) == handled_once + 1)

    stub.poll_seconds = 0.1
    work(remember, clients, timing=replace(SHORT, early_stop=early_stop))


def deliver_again_after_a_stop(stub: Platform, client: Client) -> str:
    """Has a job end, then sends a stop signal for it, then delivers it again."""
    job = client.run()
    client.finished(job)
    until(lambda: not JobsProgress().get_job_count())
    send_stop(stub, job)
    stub.queue.append(stub.jobs[job])
    return job


def test_stop_signal_for_a_job_that_has_ended_does_not_stop_its_next_delivery(stub: Platform):
    def clients() -> None:
        client = Client(stub)
        job = deliver_again_after_a_stop(stub, client)
        until(lambda: len(results(stub, job)) == 2)

    stub.poll_seconds = 0.1
    work(echo, clients)


def test_stop_signal_that_overtakes_the_second_delivery_of_a_failed_job_is_honoured(stub: Platform):
    handled = list[str]()

    async def fail(job: dict[str, Any]) -> dict[str, Any]:
        handled.append(job["id"])
        return {"error": "failed"}

    def clients() -> None:
        client = Client(stub)
        job = deliver_again_after_a_stop(stub, client)
        # the second of two jobs that come one after the other
        client.generate()
        assert handled.count(job) == 1

    stub.poll_seconds = 0.1
    work(fail, clients, concurrency=1)


@pytest.mark.parametrize(
    "answer", ["null", "[]", "7", "{}", *(f'{{"jobsToStop": {x}}}' for x in ("null", "3", "[{}]"))]
)
def test_stop_signal_without_ids_is_no_failure(stub: Platform, answer: str, capsys: pytest.CaptureFixture):
    def clients() -> None:
        until(lambda: not stub.faults)
        assert_stops_a_job(stub, Client(stub))

    stub.faults.append(Fault("job-stop", text=answer))
    work(until_unwanted, clients)
    assert "cannot " not in capsys.readouterr().out


def test_worker_without_an_address_for_stop_signals_says_so_once(
    stub: Platform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(rp_job, "JOB_GET_URL", rp_job.JOB_GET_URL.replace("/job-take/", "/take/"))
    stub.faults.append(Fault("/take/", text='{"id": "job-1", "input": {}}'))

    def clients() -> None:
        until(lambda: not stub.faults)

    work(echo, clients)
    assert capsys.readouterr().out.count("no address for cancellations") == 1


def test_jobs_that_were_answered_take_bounded_memory():
    loop = WorkerLoop({"handler": echo, "concurrency_modifier": lambda _: 1})
    assert internals.remembered_answers(loop).maxlen == MAX_REMEMBERED


def test_stop_signals_for_unknown_jobs_take_bounded_memory():
    async def stop() -> None:
        loop = WorkerLoop({"handler": echo, "concurrency_modifier": lambda _: 1})
        await internals.stop_jobs(loop, *(f"{i}" for i in range(3 * MAX_REMEMBERED)))
        assert len(internals.remembered_stops(loop)) == MAX_REMEMBERED

    asyncio.run(stop())


def test_job_stopped_before_its_first_step_is_neither_handled_nor_counted():
    handled = list[str]()

    async def remember(job: dict[str, Any]) -> dict[str, Any]:
        handled.append(job["id"])
        return {}

    async def stop() -> None:
        loop = WorkerLoop({"handler": remember, "concurrency_modifier": lambda _: 1})
        async with aiohttp.ClientSession() as session:
            internals.begin_job(loop, session, TakenJob("job-1", {"id": "job-1", "input": {}}))
            assert JobsProgress().get_job_list() == "job-1"
            await internals.stop_jobs(loop, "job-1", "job-1")
            await asyncio.wait(internals.tasks_of(loop))
        assert JobsProgress().get_job_count() == len(internals.tasks_of(loop)) == 0

    asyncio.run(stop())
    assert handled == []


def test_second_stop_signal_does_not_interrupt_what_the_first_one_began(stub: Platform):
    cleaned_up, may_end = list[str](), threading.Event()

    async def clean_up(job: dict[str, Any]) -> dict[str, Any]:
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.to_thread(may_end.wait, 20)
            cleaned_up.append(job["id"])
        return {}

    def clients() -> None:
        client = Client(stub)
        job = client.run()
        client.until(job, "IN_PROGRESS")
        until(lambda: JobsProgress().get_job_count())
        for _ in range(2):
            send_stop(stub, job)
        may_end.set()
        until(lambda: not JobsProgress().get_job_count())
        assert cleaned_up == [job]

    stub.poll_seconds = 0.1
    work(clean_up, clients)


def test_job_delivered_again_while_its_cancellation_is_answered_starts_anew(stub: Platform, v1_4_engine: Engine):
    cancelled, may_end = threading.Event(), threading.Event()

    @asynccontextmanager
    async def last_report_is_late(job_id: str, report: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.to_thread(may_end.wait, 20)
            raise

    def clients() -> None:
        client = Client(stub)
        job = client.run(num_inference_steps=80)
        client.until(job, "IN_PROGRESS")
        until(lambda: JobsProgress().get_job_count())
        send_stop(stub, job)
        assert cancelled.wait(10)
        stub.queue.append(stub.jobs[job])
        assert client.finished(job)["status"] == "COMPLETED"
        may_end.set()
        assert len(results(stub, job)) == 1

    stub.poll_seconds = 0.1
    work(JobHandler(v1_4_engine, Settings(), last_report_is_late).handle, clients)


def test_answer_whose_cancellation_takes_long_is_not_taken_for_the_one_that_replaced_it(
    demo_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    begun = list[asyncio.Event]()

    async def answer(*_: object) -> dict[str, Any]:
        begun.append(may_end := asyncio.Event())
        try:
            await may_end.wait()
        finally:
            await may_end.wait()
        return {}

    async def delivery() -> asyncio.Task:
        handling = asyncio.create_task(job_handler.handle({"id": "job-1", "input": {}}))
        # more than enough for all tasks to run as far as they can
        for _ in range(10):
            await asyncio.sleep(0)
        return handling

    async def deliver() -> None:
        cancelled = await delivery()
        cancelled.cancel()
        replaced = await delivery()
        begun[0].set()
        await asyncio.wait([cancelled])
        again = await delivery()
        for each in begun:
            each.set()
        await asyncio.gather(replaced, again)
        assert len(begun) == 2

    job_handler = JobHandler(demo_engine, Settings())
    internals.replace_answer(monkeypatch, answer)
    asyncio.run(deliver())


def test_many_jobs_that_end_together_are_answered_and_the_last_good_answers_kept(
    demo_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    answered = list[str]()
    complaints = list[dict[str, Any]]()

    async def answer(self: JobHandler, job: dict[str, Any], *_: object) -> dict[str, Any]:
        answered.append(job["id"])
        await together.wait()
        return {"image": ""} if int(job["id"]) % 2 else {"error": ""}

    async def deliver() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        jobs = [{"id": f"{i}", "input": {}} for i in range(6 * KEPT_ANSWERS)]
        handling = [asyncio.create_task(job_handler.handle(job)) for job in jobs]
        await asyncio.sleep(0)
        together.set()
        await asyncio.gather(*handling)
        for job in jobs[1::2][-KEPT_ANSWERS:]:
            await job_handler.handle(job)
        assert len(answered) == len(jobs)

    together, job_handler = asyncio.Event(), JobHandler(demo_engine, Settings())
    internals.replace_answer(monkeypatch, answer)
    asyncio.run(deliver())
    assert complaints == []


def test_poll_without_news_is_no_outage(stub: Platform, capsys: pytest.CaptureFixture):
    fault = Fault("job-take", times=FOREVER, delay=FOREVER)
    stub.faults.append(fault)

    def clients() -> None:
        until(lambda: FOREVER - fault.times > 2)
        stub.faults.clear()
        assert Client(stub).generate()["status"] == "COMPLETED"

    work(echo, clients, timing=replace(SHORT, poll_timeout=0.3))
    assert "cannot" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "fault",
    [
        Fault("job-take", times=3, drop=True),
        Fault("job-take", times=3, status=500),
        Fault("job-take", times=3, status=429),
        Fault("job-take", times=3, status=400),
        Fault("job-take", times=3, status=302, location="/v2/local/health"),
        Fault("job-take", times=3, raw="HTTP/1.1\r\n\r\n"),
        Fault("job-take", times=3, text="[" * 10_000 + "]" * 10_000),
        *(Fault("job-take", times=3, text=text) for text in ("", "<html>", "null", "7", '"id"', "{}", "[[]]", "\0")),
        Fault("job-take", times=3, text='{"id": 5, "input": {}}'),
        Fault("job-stop", times=2, drop=True),
        Fault("job-stop", times=2, status=500),
        Fault("job-stop", times=2, text="<html>"),
    ],
    ids=described,
)
def test_failing_platform_costs_one_line_and_no_job(stub: Platform, fault: Fault, capsys: pytest.CaptureFixture):
    def clients() -> None:
        client = Client(stub)
        until(lambda: not stub.faults)
        assert client.generate()["status"] == "COMPLETED"
        assert_stops_a_job(stub, client)

    stub.faults.append(fault)
    work(until_unwanted, clients)
    log = capsys.readouterr().out
    assert log.count("cannot ") == log.count(" again, after") <= 1
    assert "ERROR" not in log


@pytest.mark.parametrize(
    "fault",
    [
        Fault("job-take", trickle=True),
        Fault("job-take", trickle=True, text='{"id": '),
        Fault("job-stop", trickle=True, text='{"jobsToStop": '),
        Fault("job-done", trickle=True),
    ],
    ids=described,
)
def test_answer_that_never_ends_costs_no_job(stub: Platform, fault: Fault):
    def clients() -> None:
        client = Client(stub)
        job = client.run()
        until(lambda: not stub.faults)
        assert client.finished(job)["status"] == client.generate()["status"] == "COMPLETED"
        assert_stops_a_job(stub, client)

    stub.faults.append(fault)
    stub.poll_seconds = 0.1
    work(until_unwanted, clients, concurrency=1, timing=replace(SHORT, poll_timeout=0.3, transfer_timeout=0.3))


def assert_stops_a_job(stub: Platform, client: Client) -> None:
    unwanted = client.run("unwanted")
    client.until(unwanted, "IN_PROGRESS")
    client.post(f"cancel/{unwanted}")
    until(lambda: not JobsProgress().get_job_count())
    assert results(stub, unwanted) == []


async def until_unwanted(job: dict[str, Any]) -> dict[str, Any]:
    if job["input"]["prompt"] == "unwanted":
        await asyncio.sleep(30)
    return {}


def test_malformed_job_does_not_affect_the_others_of_its_answer(stub: Platform, capsys: pytest.CaptureFixture):
    def clients() -> None:
        client = Client(stub)
        stub.throttled.add("worker-1")
        jobs = [client.run(f"{i}") for i in range(2)]
        for job in jobs:
            stub.begin(stub.jobs[job], "worker-1")
        good = [{"id": jobs[0], "input": 1}, {"id": jobs[1]}]
        bad: list[Any] = [None, "job", {}, {"input": {}}, {"id": None}, {"id": ["x"]}, {"id": ""}, {"id": "\ud800"}]
        stub.queue.clear()
        stub.faults.append(Fault("job-take-batch", text=json.dumps([*bad[:4], *good, *bad[4:]])))
        assert [client.finished(job)["output"] for job in jobs] == [{"seen": 1}, {"seen": None}]

    stub.poll_seconds = 0.2
    work(echo, clients)
    assert "8 of 10 jobs dropped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raw_json", "fault"),
    [
        ("[" * 1500 + "]" * 1500, "nested too deeply"),
        ('[{"a":' * 100_000 + '"]"' + "}]" * 100_000, "nested too deeply"),
    ],
    ids=["nested", "nested 200,000 deep"],
)
def test_unreadable_input_does_not_affect_the_others_of_its_answer(stub: Platform, raw_json: str, fault: str):
    def clients() -> None:
        client = Client(stub)
        stub.throttled.add("worker-1")
        before, bad, after = client.run("before"), client.post("run", {"input": {"raw_json": raw_json}}), client.run()
        stub.throttled.clear()
        assert client.finished(bad["id"])["error"] == f"invalid input: {fault}"
        assert client.finished(before)["output"]["seen"]["prompt"] == "before"
        assert client.finished(after)["status"] == "COMPLETED"
        # alone, it comes as an answer of its own
        alone = client.post("run", {"input": {"raw_json": raw_json}})
        assert client.finished(alone["id"])["error"] == f"invalid input: {fault}"

    stub.poll_seconds = 0.2
    work(echo, clients)
    assert stub.handed_out[0] == 3


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "bad", ["[" * 10_000 + "]" * 10_000, "9" * 5000, '"\ud800"'], ids=["nested", "digits", "Unicode"]
)
def test_unreadable_input_costs_no_other_job_in_any_encoding_of_json(encoding: str, bad: str, v1_4_engine: Engine):
    good = '{"id": "good", "input": {"prompt": "the sea"}}'
    text = f'[{good}, {{"id": "bad", "input": {{"prompt": "x", "seed": {bad}}}}}]'
    first, second = asyncio.run(read_jobs(bytearray(text.encode(encoding, "surrogatepass"))))
    assert (first.id, first.fields["input"], first.fault) == ("good", {"prompt": "the sea"}, None)
    if not second.fault:
        answer = asyncio.run(JobHandler(v1_4_engine, Settings()).handle(second.fields))
        assert answer["error"].startswith("invalid input: seed: must be ")
    assert (second.fault == "nested too deeply") == bad.startswith("[")


def test_event_loop_stays_free_while_a_large_answer_is_read():
    body = bytearray(b'{"id": "job-1", "input": [' + b"1, " * 500_000 + b"1]}")

    async def count_turns() -> int:
        reading, turns = asyncio.create_task(read_jobs(body)), 0
        while not reading.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert [job.id for job in reading.result()] == ["job-1"]
        return turns

    assert asyncio.run(count_turns()) > 5


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@given(st.lists(json_values, min_size=1), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_array_is_cut_into_its_elements(values: list[Any], ascii_only: bool, indent: int | str | None):
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    assert [json.loads(part) for part in internals.split(text)] == values


@given(st.dictionaries(st.text(), json_values, min_size=1), st.booleans())
def test_object_is_cut_into_its_members(values: dict[str, Any], ascii_only: bool):
    parts = internals.split(json.dumps(values, ensure_ascii=ascii_only))
    assert [json.loads(f"{{{part}}}") for part in parts] == [{key: value} for key, value in values.items()]


def test_string_that_does_not_end_is_noticed_at_once():
    started = time.process_time()
    with pytest.raises(ValueError, match="a string does not end"):
        internals.split('["' + "x" * 28)
    assert time.process_time() - started < 5


@given(st.text(alphabet='[]{},:"\\1 ae', max_size=30))
def test_invalid_json_raises_no_unexpected_error(text: str):
    with suppress(ValueError):
        internals.split(text)


def test_at_most_eight_jobs_are_asked_for_at_once_and_all_of_the_largest_fit(stub: Platform):
    seen = list[int]()

    async def weigh(job: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(job["input"]["prompt"]))
        return {}

    def clients() -> None:
        client = Client(stub)
        stub.throttled.add("worker-1")
        jobs = [client.run("small") for _ in range(12)]
        for job in jobs[:8]:
            stub.jobs[job].input["prompt"] = "x" * 19_900_000
        stub.throttled.clear()
        stub.loop.call_soon_threadsafe(stub.notify)
        assert {client.finished(job)["status"] for job in jobs} == {"COMPLETED"}
        assert stub.handed_out == [8, 4]

    work(weigh, clients, concurrency=20, timing=Timing())
    assert sorted(seen) == [5] * 4 + [19_900_000] * 8


def test_silent_poll_is_not_taken_for_the_end_of_an_outage(stub: Platform, capsys: pytest.CaptureFixture):
    silent = Fault("job-take", times=FOREVER, delay=FOREVER)
    stub.faults += [Fault("job-take", status=500), silent]
    work(echo, lambda: until(lambda: FOREVER - silent.times > 1), timing=replace(SHORT, poll_timeout=0.3))
    log = capsys.readouterr().out
    assert "cannot take jobs" in log
    assert "can take jobs again" not in log


def test_batch_of_a_job_is_named_in_its_lines_only(stub: Platform, capsys: pytest.CaptureFixture):
    stub.faults.append(Fault("job-take", text='{"id": "job-1", "input": {}, "batchId": "batch-1"}'))
    work(echo, lambda: (until(lambda: not stub.faults), Client(stub).generate()))
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if "[batchId=batch-1]" in line]
    assert "INFO   | job-1 | [batchId=batch-1] Started." in named
    assert all("job-1" in line for line in named)


def test_answer_that_is_half_read_at_shutdown_is_run(stub: Platform):
    async def shut_down() -> None:
        loop = WorkerLoop({"handler": echo, "concurrency_modifier": lambda _: 1}, SHORT)
        running = asyncio.create_task(loop.run())
        await asyncio.to_thread(until, lambda: internals.reads_jobs(loop))
        internals.shut_down(loop)
        await asyncio.wait_for(running, 30)

    stub.faults.append(Fault("job-take", halves=0.5))
    job = Client(stub).run()
    asyncio.run(shut_down())
    assert stub.jobs[job].status == "COMPLETED"


@pytest.mark.parametrize("stopped", [False, True])
def test_slow_progress_report_holds_no_finished_picture_and_no_stopped_job(
    stub: Platform, monkeypatch: pytest.MonkeyPatch, stopped: bool
):
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", rp_job.JOB_GET_URL)
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    monkeypatch.setattr(progress, "TIMEOUT", FOREVER if stopped else 0.1)
    stub.faults.append(Fault("job-done", delay=FOREVER, body="IN_PROGRESS"))

    async def report_once() -> None:
        async with progress_reports("job-1", dict):
            await asyncio.to_thread(until, lambda: not stub.faults)
            if stopped:
                asyncio.current_task().cancel()
                await asyncio.sleep(20)

    async def time_out() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.create_task(report_once()), 10)

    asyncio.run(time_out())


def test_progress_report_gets_five_seconds():
    assert progress.TIMEOUT == 5


async def requests_of(call: Callable[[aiohttp.ClientSession], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the method, path, query, headers and JSON body of each request that ``call`` sends."""
    received = list[Any]()

    async def receive(request: web.BaseRequest) -> web.Response:
        body = await request.text()
        headers = {name: value for name, value in request.headers.items() if name not in ("Host", "Content-Length")}
        received.append((request.method, request.raw_path, headers, json.loads(body) if body else None))
        return web.Response(status=204)

    async with RawTestServer(receive) as server, AsyncClientSession() as session:
        base = f"http://127.0.0.1:{server.port}"
        monkeypatch.setattr(rp_job, "JOB_GET_URL", f"{base}/job-take/worker-1?gpu=RTX A5000+x")
        monkeypatch.setattr(rp_http, "JOB_DONE_URL", f"{base}/job-done/worker-1/$ID?gpu=RTX A5000+x")
        monkeypatch.setenv("RUNPOD_WEBHOOK_PING", f"{base}/ping/worker-1?gpu=RTX A5000+x")
        await call(session)
    return received


@pytest.mark.parametrize("concurrency", [1, 5, 20])
def test_request_for_jobs_is_the_sdks_own(monkeypatch: pytest.MonkeyPatch, concurrency: int):
    async def ours(_: aiohttp.ClientSession) -> None:
        loop = WorkerLoop({"handler": echo, "concurrency_modifier": lambda _: concurrency})
        with suppress(TimeoutError):
            await asyncio.wait_for(loop.run(), 0.15)

    monkeypatch.setenv("RUNPOD_AI_API_KEY", "secret")
    sdks = asyncio.run(requests_of(lambda session: rp_job.get_job(session, min(concurrency, 8)), monkeypatch))
    assert sdks[0] in asyncio.run(requests_of(ours, monkeypatch))
    assert sdks[0][2]["Authorization"] == "secret"


def test_result_is_sent_as_the_sdk_sends_it(monkeypatch: pytest.MonkeyPatch):
    async def ours(session: aiohttp.ClientSession) -> None:
        await deliver(session, "job-1", result, asyncio.Event(), Timing())

    monkeypatch.setenv("RUNPOD_AI_API_KEY", "secret")
    result = {"output": {"prompt": "ключ"}}
    sdks = asyncio.run(requests_of(lambda session: rp_http.send_result(session, result, {"id": "job-1"}), monkeypatch))
    assert asyncio.run(requests_of(ours, monkeypatch)) == sdks
    assert len(sdks) == 1


@pytest.mark.parametrize("job_id", [".", ".."])
def test_id_of_dots_is_no_step_in_the_path(monkeypatch: pytest.MonkeyPatch, job_id: str):
    async def send(session: aiohttp.ClientSession) -> None:
        await deliver(session, job_id, {}, asyncio.Event(), Timing())

    ((_, path, _, _),) = asyncio.run(requests_of(send, monkeypatch))
    assert f"/job-done/worker-1/{'%2E' * len(job_id)}?" in path


@pytest.mark.parametrize("jobs", [None, "job-1,job-2"])
def test_heartbeat_is_the_sdks_own(monkeypatch: pytest.MonkeyPatch, jobs: str | None):
    def beat(kind: type[rp_ping.Heartbeat]) -> Callable[[object], Any]:
        return lambda _: asyncio.to_thread(lambda: internals.send_ping(kind(), jobs))

    monkeypatch.setenv("RUNPOD_AI_API_KEY", "secret")
    sdks = asyncio.run(requests_of(beat(rp_ping.Heartbeat), monkeypatch))
    assert asyncio.run(requests_of(beat(Heartbeat), monkeypatch)) == sdks
    assert len(sdks) == 1


def test_timing_is_what_the_operators_page_says():
    assert Timing() == Timing(
        first_pause=0.25,
        max_pause=25,
        shutdown_pause=1,
        line_interval=60,
        give_up=600,
        transfer_timeout=120,
        poll_timeout=90,
        poll_interval=0.2,
        early_stop=60,
    )


def test_redirected_request_of_the_worker_reaches_no_other_host(stub: Platform, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUNPOD_WEBHOOK_PING", f"{stub.url}/v2/{ENDPOINT}/ping/worker-1")
    with receiver() as (url, received):
        stub.faults += [
            Fault(route, status=307, location=url) for route in ("job-done", "job-take", "job-stop", "ping")
        ]
        work(echo, lambda: Client(stub).generate())
        internals.send_ping(Heartbeat())
    assert received == []
    assert stub.faults == []


@pytest.mark.parametrize(
    "job_id", ["a b/c?d#e&f", "\nid\r\x7f", "ключ", "100%25", "a\\b", ".", "..", "%2e%2E", "a/../b"]
)
def test_odd_id_is_answered(stub: Platform, job_id: str):
    def clients() -> None:
        client = Client(stub)
        job = Job.new({}, sync=False)
        job.id = job_id
        stub.loop.call_soon_threadsafe(stub.add, job)
        until(lambda: job.status == "COMPLETED")
        assert client.generate()["status"] == "COMPLETED"

    work(echo, clients)


def test_answer_that_is_too_long_or_a_gzip_bomb_is_malformed(stub: Platform, capsys: pytest.CaptureFixture):
    bomb = gzip.compress(bytes(500 * 2**20), compresslevel=1)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    stub.faults.append(Fault("job-take", raw=head + bomb.decode("latin-1")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def clients() -> None:
        assert Client(stub).generate()["status"] == "COMPLETED"

    work(echo, clients)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    assert "cannot take jobs, trying again: " in capsys.readouterr().out


def test_outage_is_logged_at_its_start_once_a_minute_and_at_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    outage, pauses = Outage("take jobs", Timing(), "job-1"), list[float]()
    outage.succeeded()
    while now < 3600:
        pauses.append(outage.failed(TimeoutError()))
        now += pauses[-1]
    outage.succeeded()
    outage.succeeded()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "WARN   | job-1 | cannot take jobs, trying again: TimeoutError"
    assert lines[-1].startswith("INFO   | job-1 | can take jobs again, after 36")
    assert lines[1].startswith("WARN   | job-1 | has been unable to take jobs for ")
    assert 40 < len(lines) <= 2 + 60
    assert pauses[0] <= 0.25 and min(pauses[20:]) >= 12.5 and max(pauses) <= 25
    assert len(set(pauses)) == len(pauses)


def test_failing_heartbeat_is_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    now = 0.0
    monkeypatch.setenv("RUNPOD_WEBHOOK_PING", "no address")
    heartbeat = Heartbeat()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for now in range(1, 135, 10):  # noqa: B007 - the clock reads it
        internals.send_ping(heartbeat)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "WARN   | cannot send the heartbeat, trying again",
        "WARN   | has been unable to send the heartbeat for 70 s",
    ]
