"""Many clients and a platform in trouble: ``python -m tests.bench.load``.

Small requests from concurrent clients go through a stand-in for the platform to one worker: most ask for a picture of a
colour, some of them with a large picture to start from or to paint over, some are bad, JSON that cannot be read among
them, some are cancelled, some are delivered twice by the platform, some stopped and delivered again, for some it sends
a stop signal when they have ended. On every route that the worker calls, the platform fails at random: it drops
connections, before or after it has done what was asked, answers 429, 500, a redirect or something that is not HTTP, or
answers late. Every job must reach exactly one right final state, and no job may be answered with different pictures.
Printed are jobs per second, latencies, and the worker's memory after a fifth of the jobs and at the end.

The n-th request to a route fails always in the same way, and the i-th job is always the same; in which order they meet
is up to the machine.
"""

import argparse
import itertools
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from builder.demo_model.evaluate import shape_colors
from tests.support.client import Client, picture, results, until
from tests.support.pictures import in_base64
from tests.support.platform_stub import FINAL, Chaos, Fault, Platform, serving

COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "black"]
STEPS = 8
SEED = 1
DELIVERED_TWICE = 0.05
"""Share of the requests for jobs that the platform answers with jobs that it will hand out again."""
SHARES = {"bad": 0.1, "cancelled": 0.1, "delivered again": 0.05}
"""Each kind's share of the jobs that are not of an earlier kind. The last kind comes again as soon as it is stopped."""
STOPPED_LATE = 0.05
"""Share of the jobs for which a stop signal comes when they have ended."""
BAD_INPUTS: list[dict[str, object]] = [
    {"width": 99},
    {"raw_json": "[" * 1500 + "]" * 1500},
    {"raw_json": "9" * 5000},
    {"raw_json": '{"prompt": "\udcff"}'},
]
LARGE = in_base64(Image.effect_noise((2048, 2048), 8), "JPEG")
SIZE = {"width": 128, "height": 128}
PICTURES: list[dict[str, object]] = [
    SIZE | {"image": LARGE, "strength": 0.95},
    SIZE | {"image": LARGE, "mask": in_base64(Image.new("L", (2048, 2048), 255))},
]
WITH_PICTURE = 0.2
"""Share of the jobs that start from a picture, which the prompt should leave nothing of."""
FAILING = 0.2
"""Share of the worker's requests that the platform fails."""


@dataclass
class Report:
    """The jobs' errors and final states, their seconds in all and each, and the worker's memory in bytes."""

    wrong: list[str]
    states: Counter[str]
    seconds: float
    latencies: list[float]
    memory_early: int
    memory_end: int


def job_input(color: str) -> dict[str, object]:
    return {"prompt": f"a {color} square on a white background", "seed": SEED, "num_inference_steps": STEPS}


def resident_memory(pid: int) -> int:
    """Returns the resident memory of a process in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def load(platform: Platform, jobs: int, clients: int) -> Report:
    """Sends ``jobs`` jobs from ``clients`` clients to the platform's first worker."""
    pid = platform.workers["worker-1"].process.pid
    done, wrong = itertools.count(1), list[str]()
    memories: list[int] = []
    latencies: list[float] = []

    def check(kind: str, color: str, answer: dict) -> None:
        job, state = answer["id"], answer["status"]
        if state == "COMPLETED" and kind != "bad":
            seen = shape_colors(np.asarray(picture(answer["output"])))
            if seen != (color, "white"):
                wrong.append(f"{kind} {job}: asked for {color} on white, got {' on '.join(seen)}")
        elif not (kind == "bad" and answer.get("error", "").startswith("invalid input: ")) and not (
            kind == "cancelled" and state == "CANCELLED"
        ):
            wrong.append(f"{kind} {job}: {state} {answer.get('error')}")

    def send(i: int) -> None:
        client, rng = Client(platform), Random(i)
        color = COLORS[i % len(COLORS)]
        kind = next((kind for kind, share in SHARES.items() if rng.random() < share), "good")
        asked = job_input(color) | (rng.choice(BAD_INPUTS) if kind == "bad" else {})
        asked |= rng.choice(PICTURES) if rng.random() < WITH_PICTURE and kind != "bad" else {}
        if rng.random() < DELIVERED_TWICE:
            platform.faults.append(Fault("job-take", twice=True))
        started = time.monotonic()
        if kind == "cancelled":
            job = client.run(**asked)
            time.sleep(rng.random())
            client.post(f"cancel/{job}")
            answer = client.finished(job)
        elif kind == "delivered again":
            job = client.run(**asked)
            client.until(job, "IN_PROGRESS", "COMPLETED")
            stops = platform.stops.setdefault("worker-1", [])
            stops.append(job)
            platform.loop.call_soon_threadsafe(platform.notify)
            until(lambda: job not in stops)
            platform.loop.call_soon_threadsafe(platform.enqueue, platform.jobs[job])
            answer = client.finished(job)
        else:
            answer = client.post("runsync", {"input": asked})
            if answer["status"] not in FINAL:
                answer = client.finished(answer["id"])
            latencies.append(time.monotonic() - started)
        check(kind, color, answer)
        if rng.random() < STOPPED_LATE:
            platform.stops.setdefault("worker-1", []).append(answer["id"])
        if next(done) == jobs // 5:
            memories.append(resident_memory(pid))

    for color in COLORS:
        check("alone", color, Client(platform).post("runsync", {"input": job_input(color)}))
    before = set(platform.jobs)
    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        for sending in [pool.submit(send, i) for i in range(jobs)]:
            sending.result()
    seconds = time.monotonic() - started
    until(lambda: not platform.busy())
    for job in platform.jobs:
        sent = results(platform, job)
        if any(result != sent[0] for result in sent):
            wrong.append(f"{job}: results that differ")
    states = Counter(job.status for name, job in platform.jobs.items() if name not in before)
    return Report(wrong, states, seconds, latencies, memories[0], resident_memory(pid))


def main() -> None:
    parser = argparse.ArgumentParser(description="Load one worker with jobs.")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1, help="of the platform's faults")
    arguments = parser.parse_args()
    with serving() as platform:
        platform.faults.chaos = Chaos(arguments.seed, FAILING)
        platform.start_worker(MAX_CONCURRENCY="8", MAX_BATCH_IMAGES="8")
        report = load(platform, arguments.jobs, arguments.clients)
    p50, p95 = np.percentile(report.latencies, [50, 95])
    print(f"{arguments.jobs} jobs from {arguments.clients} clients: {dict(report.states)}, wrong: {len(report.wrong)}")
    for fault in report.wrong:
        print(f"  {fault}")
    print(f"{arguments.jobs / report.seconds:.1f} jobs per second; latency p50 {p50:.1f} s, p95 {p95:.1f} s")
    early, end = report.memory_early, report.memory_end
    print(f"resident memory {early / 2**20:.0f} MiB early, {end / 2**20:.0f} MiB at the end: {end / early - 1:+.1%}")


if __name__ == "__main__":
    main()
