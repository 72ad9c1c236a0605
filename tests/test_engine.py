"""The engine's queue, batches, cancellation and error handling, with a stand-in for the pipeline's runner."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from PIL import Image

from src.api.limits import ModelLimits
from src.api.picture import Picture
from src.api.request import ImageRequest
from src.errors import JobError
from src.generation import stall_watch
from src.generation.engine import Engine
from src.generation.pending import GenerationResult, Progress
from src.threads import start_pool
from tests.support.engines import generate_together, occupy, until_idle
from tests.support.pauses import Pauses

LIMITS = ModelLimits(native_size=64, max_size=128, scheduler="PNDM")
IMAGE = Image.new("RGB", (64, 64))
LOST = "the GPU failed and this worker is being replaced: send the job again"


def request(**job_input: Any) -> ImageRequest:
    return ImageRequest.parse({"prompt": "a cat", "seed": 3} | job_input, LIMITS)


class StandIn:
    """A runner that returns blank images. It first calls ``first`` with the batch's requests, which may raise."""

    model_name = "stand-in"
    limits = LIMITS

    def __init__(self, first: Callable[[Sequence[ImageRequest]], None] = lambda requests: None) -> None:
        self.first = first
        self.batches: list[list[str]] = []
        """The prompts of each batch."""
        self.steps: list[int] = []
        """The number of images in each step."""
        self.released = 0
        self.graphs = False
        """Whether memory is released in which more may fit."""
        self.threads: set[threading.Thread] = set()

    def run(
        self, requests: Sequence[ImageRequest], seeds: Sequence[int], after_step: Callable[[float], None]
    ) -> list[Picture | JobError]:
        # recorded before the assertions: the engine takes an AssertionError for a failed batch and splits the batch
        self.batches.append([each.prompt for each in requests])
        assert len({each.batch_key for each in requests}) == 1
        self.threads.add(threading.current_thread())
        assert len(self.threads) == 1
        self.first(requests)
        steps = requests[0].num_inference_steps
        for step in range(steps):
            self.steps.append(len(requests))
            after_step((step + 1) / steps)
        return [
            JobError("not finite") if each.prompt == "nan" else Picture(IMAGE, seed, nsfw=None)
            for each, seed in zip(requests, seeds, strict=True)
        ]

    def release_memory(self) -> bool:
        self.released += 1
        return self.graphs

    def prompt_warnings(self, each: ImageRequest) -> list[str]:
        return [f"{each.prompt} was cut"] if "long" in each.prompt else []


def fail_with(error: Exception, *, when: Callable[[Sequence[ImageRequest]], bool]) -> StandIn:
    def first(requests: Sequence[ImageRequest]) -> None:
        if when(requests):
            raise error

    return StandIn(first)


def seeds(result: GenerationResult) -> list[int]:
    return [picture.seed for picture in result.pictures]


def test_compatible_requests_share_a_batch_oldest_first():
    runner = StandIn()
    steps = {"a": 2, "b": 3}
    order = ["b1", "a1", "b2", "a2", "b3", "b4", "b5", "a3"]
    generate_together(Engine(runner, 4), *(request(prompt=name, num_inference_steps=steps[name[0]]) for name in order))
    assert runner.batches == [["b1", "b2", "b3", "b4"], ["a1", "a2", "a3"], ["b5"]]


def test_batch_size_counts_images():
    runner = StandIn()
    x, y = request(prompt="x", seed=0, num_images=3), request(prompt="y", seed=50, num_images=3)
    results = generate_together(Engine(runner, 4), x, y)
    assert runner.batches == [["x", "x", "x", "y"], ["y", "y"]]
    assert [seeds(result) for result in results] == [[0, 1, 2], [50, 51, 52]]
    runner = StandIn()
    (result,) = generate_together(Engine(runner, 1), request(num_images=4, seed=7))
    assert seeds(result) == [7, 8, 9, 10]
    assert [len(batch) for batch in runner.batches] == [1] * 4


def test_one_batch_runs_at_a_time_and_the_event_loop_stays_free():
    running, most = 0, 0
    started, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def first(_: object) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        started.release()
        assert go_on.acquire(timeout=10)
        running -= 1

    async def both() -> None:
        engine = Engine(StandIn(first), 1)
        answers = [asyncio.create_task(engine.generate(request(num_inference_steps=1))) for _ in "ab"]
        for _ in answers:
            # the batch runs until the event loop, which must be free, releases it
            assert await asyncio.to_thread(started.acquire, timeout=10)
            assert running == 1
            go_on.release()
        await asyncio.gather(*answers)

    asyncio.run(both())
    assert most == 1


def test_result_has_the_warnings_of_its_own_request():
    first, second = generate_together(Engine(StandIn(), 4), request(prompt="long"), request())
    assert (first.warnings, second.warnings) == (["long was cut"], [])


def test_request_cancelled_while_waiting_never_reaches_the_device():
    runner, device_is_free = StandIn(), threading.Event()

    async def cancel_one() -> list[Any]:
        engine = Engine(runner, 4)
        occupy(engine, device_is_free)
        answers = [asyncio.create_task(engine.generate(request(prompt=name))) for name in "abc"]
        await asyncio.sleep(0)
        answers[1].cancel()
        await asyncio.sleep(0)
        device_is_free.set()
        return await asyncio.gather(*answers, return_exceptions=True)

    first, cancelled, last = asyncio.run(cancel_one())
    assert runner.batches == [["a", "c"]]
    assert isinstance(cancelled, asyncio.CancelledError)
    assert isinstance(first, GenerationResult) and isinstance(last, GenerationResult)


@pytest.mark.parametrize("others", [0, 1])
def test_batch_ends_at_the_next_step_once_all_its_requests_are_cancelled(others: int):
    started, go_on = threading.Event(), threading.Event()

    def first(_: object) -> None:
        started.set()
        assert go_on.wait(10)

    runner = StandIn(first)

    async def cancel_one() -> Any:
        engine = Engine(runner, 4)
        waiting = [asyncio.create_task(engine.generate(request(num_inference_steps=9))) for _ in range(1 + others)]
        await asyncio.to_thread(started.wait, 10)
        waiting[0].cancel()
        await asyncio.sleep(0)
        go_on.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        await until_idle(engine)
        return results

    # the first request is alone in its batch, since the other arrived while the device was busy
    results = asyncio.run(cancel_one())
    assert isinstance(results[0], asyncio.CancelledError)
    assert runner.steps == [1] + [1] * 9 * others


def test_progress_grows_from_zero_to_one_across_batches():
    progress, seen = Progress(), []

    class Watched(StandIn):
        def run(self, requests: Any, seeds: Any, after_step: Callable[[float], None]) -> Any:
            def watched(share: float) -> None:
                seen.append(progress.share)
                after_step(share)

            return super().run(requests, seeds, watched)

    engine = Engine(Watched(), 2)
    asyncio.run(engine.generate(request(num_images=3, num_inference_steps=10), progress))
    seen.append(progress.share)
    # the first batch has two images, the second one
    assert seen == pytest.approx([i / 10 * 2 / 3 for i in range(10)] + [2 / 3 + i / 10 / 3 for i in range(11)])


def test_progress_does_not_go_back_when_a_batch_is_run_again():
    progress, seen = Progress(), []

    class FailsTogether(StandIn):
        def run(self, requests: Any, seeds: Any, after_step: Callable[[float], None]) -> Any:
            after_step(0.5)
            seen.append(progress.share)
            if len(requests) > 1:
                raise RuntimeError("CUDA out of memory")
            after_step(0.25)
            seen.append(progress.share)
            return super().run(requests, seeds, after_step)

    asyncio.run(Engine(FailsTogether(), 2).generate(request(num_images=2), progress))
    assert seen == [0.5, 0.5, 0.5, 0.75, 0.75]


def out_of_memory_above(images: int) -> StandIn:
    return fail_with(RuntimeError("CUDA out of memory"), when=lambda requests: len(requests) > images)


def test_out_of_memory_halves_a_batch_until_it_fits():
    runner = out_of_memory_above(1)
    results = generate_together(Engine(runner, 4), *(request(prompt=name, num_images=2) for name in "ab"))
    assert all(len(result.pictures) == 2 for result in results)
    assert runner.batches == [["a", "a", "b", "b"], ["a", "a"], ["a"], ["a"], ["b"], ["b"]]
    assert runner.released == 2


def test_batch_size_that_fitted_is_remembered_per_picture_size():
    runner = out_of_memory_above(3)
    engine = Engine(runner, 8)
    sizes = []
    for width in (64, 64, 64, 128):
        runner.batches.clear()
        results = generate_together(engine, *(request(num_images=4, width=width) for _ in "ab"))
        assert all(len(result.pictures) == 4 for result in results)
        sizes.append([len(batch) for batch in runner.batches])
    # eight and then four did not fit, but two did
    assert sizes == [[8, 4, 2, 2, 2, 2], [2] * 4, [2] * 4, [8, 4, 2, 2, 2, 2]]


def test_larger_half_that_fitted_is_remembered():
    runner = out_of_memory_above(3)
    engine = Engine(runner, 5)
    for _ in "ab":
        generate_together(engine, request(num_images=2), request(num_images=3))
    assert [len(batch) for batch in runner.batches] == [5, 2, 3, 3, 2]


def test_single_image_that_did_not_fit_is_tried_again_when_asked_again():
    runner = out_of_memory_above(0)
    engine = Engine(runner, 4)
    for _ in range(2):
        (error,) = generate_together(engine, request(width=128, num_images=1))
        assert str(error) == "an image of 128 x 64 did not fit in GPU memory: ask for 64 x 64"
        assert isinstance(error, JobError) and not error.refresh_worker
        assert str(error.__cause__) == "CUDA out of memory"
    (error,) = generate_together(engine, request())
    assert str(error) == "an image of 64 x 64 did not fit in GPU memory: ask for a smaller one"
    runner.first = lambda requests: None
    (result,) = generate_together(engine, request())
    assert seeds(result) == [3]


def test_single_image_is_tried_once_more_if_graphs_were_dropped():
    runner = StandIn()
    runner.graphs = True

    def first(requests: Sequence[ImageRequest]) -> None:
        if len(runner.batches) < failing:
            raise RuntimeError("CUDA out of memory")

    runner.first = first
    engine, failing = Engine(runner, 4), 2
    (result,) = generate_together(engine, request())
    assert seeds(result) == [3]
    runner.batches.clear()
    failing = 9
    (error,) = generate_together(engine, request())
    assert "did not fit in GPU memory" in str(error)
    assert len(runner.batches) == 2


def test_only_the_request_that_fails_alone_fails():
    runner = fail_with(RuntimeError("anything"), when=lambda requests: "b" in [each.prompt for each in requests])
    first, bad, last = generate_together(
        Engine(runner, 4), *(request(prompt=name, num_images=1 + (name == "a")) for name in "abc")
    )
    assert seeds(first) == [3, 4] and seeds(last) == [3]
    assert str(bad) == "anything"
    assert runner.batches == [["a", "a", "b", "c"], ["a", "a"], ["b"], ["c"]]


def test_failed_image_fails_only_its_own_request():
    first, bad, last = generate_together(Engine(StandIn(), 4), *(request(prompt=name) for name in ("a", "nan", "c")))
    assert seeds(first) == seeds(last) == [3]
    assert str(bad) == "not finite"


def test_error_while_handling_an_error_leaves_no_request_waiting():
    runner = out_of_memory_above(1)

    def fail() -> None:
        raise RuntimeError("again")

    runner.release_memory = fail
    engine = Engine(runner, 4)
    assert [str(error) for error in generate_together(engine, request(), request())] == ["again", "again"]
    (result,) = generate_together(engine, request())
    assert seeds(result) == [3]


@pytest.mark.parametrize("words", ["", "CUDA out of memory"])
@pytest.mark.parametrize("shared", [False, True])
def test_lost_device_fails_all_requests_with_its_cause(shared: bool, words: str):
    cause = RuntimeError("CUDA error: an illegal memory access was encountered")
    cause.__context__ = RuntimeError(words)
    runner = fail_with(cause, when=lambda requests: True)
    engine = Engine(runner, 4)
    requests = [request(num_inference_steps=2), request(num_inference_steps=2 + (not shared)), request(width=72)]
    errors = [*generate_together(engine, *requests), *generate_together(engine, request())]
    for error in errors:
        assert isinstance(error, JobError) and error.refresh_worker
        assert str(error) == LOST
        assert error.__cause__ is cause
    assert len(runner.batches) == 1
    with pytest.raises(JobError, match="send the job again"):
        engine.warm_up()


def test_hanging_device_is_lost_for_current_and_later_requests():
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(_: Sequence[ImageRequest]) -> None:
        hangs.set()
        assert goes_on.wait(10)

    async def fail_all(engine: Engine) -> None:
        in_flight = [asyncio.create_task(engine.generate(request(width=width))) for width in (64, 72)]
        assert await asyncio.to_thread(hangs.wait, 10)
        errors = await asyncio.wait_for(asyncio.gather(*in_flight, return_exceptions=True), 5)
        with pytest.raises(JobError) as later:
            await asyncio.wait_for(engine.generate(request()), 5)
        for error in (*errors, later.value):
            assert isinstance(error, JobError) and (str(error), error.refresh_worker) == (LOST, True)
            assert str(error.__cause__) == "no denoising step for 0.1 s"

    engine = Engine(StandIn(hang), 4, stall_timeout=0.1)
    try:
        asyncio.run(fail_all(engine))
    finally:
        goes_on.set()
    # the call returns after all, but the device stays lost
    with pytest.raises(JobError, match=LOST):
        engine.warm_up()


def test_started_engine_and_pools_need_no_further_thread(monkeypatch: pytest.MonkeyPatch):
    engine, pool = Engine(StandIn(), 4), start_pool(2, "test")
    engine.warm_up()

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert [seeds(result) for result in generate_together(engine, request(), request(width=72))] == [[3], [3]]
    both_run = threading.Barrier(2)
    assert sorted(pool.map(lambda _: both_run.wait(10), "ab")) == [0, 1]


def test_slow_or_idle_device_is_not_lost(monkeypatch: pytest.MonkeyPatch):
    pauses = Pauses(monkeypatch)

    class Slow(StandIn):
        def run(self, requests: Any, seeds: Any, after_step: Callable[[float], None]) -> list[Picture | JobError]:
            def slow_step(share: float) -> None:
                pauses.pass_by(3)
                after_step(share)

            return super().run(requests, seeds, slow_step)

    engine = Engine(Slow(), 4, stall_timeout=5 * stall_watch.INTERVAL)
    (result,) = generate_together(engine, request(num_inference_steps=6))
    assert seeds(result) == [3]
    # a batch ends a little after its result has come
    asyncio.run(until_idle(engine))
    # idle for longer than the time-out
    pauses.pass_by(6)
    engine.warm_up()
