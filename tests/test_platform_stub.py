"""The stand-in for RunPod's platform behaves towards clients as RunPod's documents say."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.client import Client, receiver, until
from tests.support.platform_stub import Platform, serving
from tests.support.platform_stub.job import WEEK

TAKE = "job-take/worker-1"


@pytest.fixture
def stub() -> Iterator[Platform]:
    """A platform without workers, 60 times faster than RunPod. Tests take and answer its jobs themselves."""
    with serving(speed=60) as stub:
        yield stub


@pytest.fixture
def client(stub: Platform) -> Client:
    return Client(stub)


def take(client: Client) -> str:
    return client.get(TAKE)["id"]


def finish(client: Client, job: str, **result: Any) -> None:
    client.post(f"job-done/worker-1/{job}", result or {"output": {"seed": 1}})


def is_unknown(client: Client, job: str) -> bool:
    return client.session.get(f"{client.url}/status/{job}", timeout=5).status_code == 404


def test_webhook_gets_the_whole_job(client: Client):
    with receiver(200, 200) as (url, received):
        done = client.post("run", {"input": {"prompt": "the sea"}, "webhook": url})["id"]
        finish(client, take(client))
        until(lambda: len(received) == 1)
        failed = client.post("run", {"input": {}, "webhook": url})["id"]
        finish(client, take(client), error="invalid input: prompt: required")
        until(lambda: len(received) == 2)
    (_, first), (_, second) = received
    assert first == client.get(f"status/{done}") | {"input": {"prompt": "the sea"}, "webhook": url}
    assert first["status"] == "COMPLETED" and first["output"] == {"seed": 1}
    assert (second["id"], second["status"]) == (failed, "FAILED")
    assert second["error"] == "invalid input: prompt: required"


def test_webhook_is_tried_three_times_ten_seconds_apart(
    stub: Platform, client: Client, capfd: pytest.CaptureFixture[str]
):
    with receiver(500, 201, 404, 200) as (url, received):
        job = client.post("run", {"input": {}, "webhook": url})["id"]
        finish(client, take(client))
        until(lambda: len(received) == 3)
        until(lambda: not stub.background)
    assert len(received) == 3
    times = [at for at, _ in received]
    assert all(later - earlier >= 10 / 60 for earlier, later in itertools.pairwise(times))
    assert f"webhook of job {job}, attempt 3 of 3: it answered 404" in capfd.readouterr().err


def test_cancelled_job_calls_no_webhook(stub: Platform, client: Client):
    with receiver(200) as (url, received):
        job = client.post("run", {"input": {}, "webhook": url})["id"]
        client.post(f"cancel/{job}")
        until(lambda: not stub.background)
    assert received == []


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("run", {}, "input: Field required"),
        ("run", {"input": {}, "webhook": "example.com"}, "webhook: String should match pattern"),
        ("run", {"input": {}, "policy": {"ttl": 9_999}}, "policy: ttl: Input should be greater than or equal to 10000"),
        ("run", {"input": {}, "policy": {"executionTimeout": 4_999}}, "policy: executionTimeout: Input should be"),
        ("run", {"input": {}, "policy": {"executionTimeout": WEEK + 1}}, "policy: executionTimeout: Input should be"),
        ("run", {"input": {}, "policy": {"lowPriority": "no"}}, "policy: lowPriority: Input should be a valid boolean"),
        ("runsync?wait=999", {"input": {}}, "wait: Input should be greater than or equal to 1000"),
        ("runsync?wait=300001", {"input": {}}, "wait: Input should be less than or equal to 300000"),
    ],
)
def test_request_out_of_bounds_is_refused(stub: Platform, client: Client, path: str, body: Any, reason: str):
    answer = client.session.post(f"{client.url}/{path}", json=body, timeout=5)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(reason)
    assert stub.jobs == {}


def test_request_over_the_size_limit_is_refused(client: Client):
    body = {"input": {"prompt": "x" * 10_000_000}}
    assert client.session.post(f"{client.url}/run", json=body, timeout=5).status_code == 413
    assert client.post("runsync?wait=1000", body)["status"] == "IN_QUEUE"


def test_job_is_gone_after_its_ttl(client: Client):
    policy = {"ttl": 20_000}
    waiting = client.post("run", {"input": {}, "policy": policy})["id"]
    until(lambda: is_unknown(client, waiting))
    running = client.post("run", {"input": {}, "policy": policy})["id"]
    assert take(client) == running
    assert client.get("job-stop/worker-1") == {"jobsToStop": [running]}
    assert is_unknown(client, running)


def test_runsync_waits_as_long_as_requested(client: Client):
    asked = time.monotonic()
    answer = client.post("runsync?wait=30000", {"input": {}})
    assert 0.4 < time.monotonic() - asked < 2
    assert answer["status"] == "IN_QUEUE"
    assert answer["id"].startswith("sync-")
    assert client.get(f"status/{answer['id']}") == answer


@pytest.mark.parametrize(("path", "minutes"), [("run", 30), ("runsync?wait=1000", 1)])
def test_result_is_kept_for_its_retention_time(stub: Platform, client: Client, path: str, minutes: int):
    stub.speed = 40 * minutes
    job = client.post(path, {"input": {}})["id"]
    finish(client, take(client), error="out of luck")
    assert client.get(f"status/{job}")["status"] == "FAILED"
    # nearly half of the time for which a result is kept, which begins anew when the job is retried
    time.sleep(0.7)
    assert client.post(f"retry/{job}")["status"] == "IN_QUEUE"
    finish(client, take(client))
    finished = time.monotonic()
    until(lambda: is_unknown(client, job))
    assert 1.4 < time.monotonic() - finished < 5
    assert client.session.post(f"{client.url}/retry/{job}", timeout=5).status_code == 404


def test_only_failed_or_timed_out_jobs_can_be_retried(client: Client):
    job = client.run(policy={"executionTimeout": 6_000})
    assert take(client) == job
    client.until(job, "TIMED_OUT")
    assert client.post(f"retry/{job}")["status"] == "IN_QUEUE"
    assert take(client) == job
    finish(client, job)
    refused = client.session.post(f"{client.url}/retry/{job}", timeout=5)
    assert (refused.status_code, "COMPLETED" in refused.json()["error"]) == (400, True)


def test_purging_the_queue_leaves_running_jobs(client: Client):
    running, *waiting = [client.run() for _ in range(3)]
    assert take(client) == running
    assert client.post("purge-queue") == {"removed": 2, "status": "completed"}
    assert {client.get(f"status/{job}")["status"] for job in waiting} == {"CANCELLED"}
    assert client.get(f"status/{running}")["status"] == "IN_PROGRESS"
    assert client.get("health")["jobs"]["inQueue"] == 0


@pytest.mark.process
def test_health_counts_workers_by_their_state(stub: Platform, client: Client):
    def states(**expected: int) -> bool:
        names = ("idle", "initializing", "ready", "running", "throttled", "unhealthy")
        return client.get("health")["workers"] == dict.fromkeys(names, 0) | expected

    assert states()
    name = stub.start_worker(["sleep", "60"])
    assert states(initializing=1)
    client.get(f"ping/{name}")
    assert states(idle=1, ready=1)
    client.run()
    assert client.get(f"job-take/{name}")
    assert states(running=1, ready=1)
    stub.throttled.add(name)
    assert states(throttled=1)
    stub.poll_seconds = 0.1
    client.run()
    assert client.session.get(f"{client.url}/job-take/{name}", timeout=5).status_code == 204
    stub.throttled.clear()
    stub.kill_worker(name)
    until(lambda: states(unhealthy=1))
