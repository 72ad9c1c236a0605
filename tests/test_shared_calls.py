"""What happens when several requests wait for the device together: sharing, order, cancelling, faults."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from builder.demo_model.evaluate import shape_colors
from src.engine import Engine, GenerationResult, Progress
from src.pipeline import Model
from src.request import ImageRequest, JobError
from tests.test_engine import furthest, generate, request

Call = Callable[..., Any]
Failing = Callable[[Call], None]


def wait_together(engine: Engine, requests: list[ImageRequest]) -> list[GenerationResult | BaseException]:
    """What becomes of requests that all wait while the device is busy."""
    device_is_free = threading.Event()

    async def wait() -> list[GenerationResult | BaseException]:
        engine._thread.submit(device_is_free.wait)
        answers = [asyncio.create_task(engine.generate(each)) for each in requests]
        await asyncio.sleep(0)
        device_is_free.set()
        return await asyncio.gather(*answers, return_exceptions=True)

    return asyncio.run(wait())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The prompts of each call of the pipeline."""
    seen: list[list[str]] = []
    real = StableDiffusionPipeline.__call__

    def counted(pipe: StableDiffusionPipeline, prompt: list[str], **kwargs: Any) -> Any:
        seen.append(prompt)
        return real(pipe, prompt=prompt, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counted)
    yield seen


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Has the pipeline's calls go through a function that may fail first."""

    def fail(first: Call) -> None:
        real = StableDiffusionPipeline.__call__

        def failing_call(pipe: StableDiffusionPipeline, prompt: list[str], **kwargs: Any) -> Any:
            first(prompt, **kwargs)
            return real(pipe, prompt=prompt, **kwargs)

        monkeypatch.setattr(StableDiffusionPipeline, "__call__", failing_call)

    return fail


def test_eight_prompts_in_one_call_each_get_their_own_picture(demo_model: Model, calls: list[list[str]]):
    engine = Engine(demo_model, max_batch_images=8)
    asked = [
        ("red", "white"),
        ("blue", "yellow"),
        ("green", "pink"),
        ("yellow", "purple"),
        ("purple", "white"),
        ("white", "blue"),
        ("orange", "blue"),
        ("black", "yellow"),
    ]
    long = " ".join(["nothing"] * 100)
    negative_prompts = ["", "the sea", "", long, "", "a desert", "", "a forest"]
    requests = [
        request(
            engine,
            prompt=f"a {color} square on a {background} background",
            negative_prompt=negative_prompts[i],
            seed=100 + 7 * i,
            num_inference_steps=30,
        )
        for i, (color, background) in enumerate(asked)
    ]
    painted = wait_together(engine, requests)
    assert [len(call) for call in calls] == [8]
    for one, (color, background), answer in zip(requests, asked, painted, strict=True):
        assert isinstance(answer, GenerationResult)
        (picture,) = answer.pictures
        assert picture.seed == one.seed
        assert shape_colors(np.asarray(picture.image)) == (color, background)
        assert bool(answer.warnings) == (one.negative_prompt == long)
        alone = asyncio.run(engine.generate(one))
        assert furthest(picture.image, alone.pictures[0].image) <= 2
        assert alone.warnings == answer.warnings


def test_requests_that_differ_in_shape_do_not_share_a_call(v1_4_engine: Engine, calls: list[list[str]]):
    differences: list[dict[str, Any]] = [
        {},
        {"width": 72},
        {"height": 72},
        {"num_inference_steps": 3},
        {"guidance_scale": 5},
        {"scheduler": "DDIM"},
    ]
    requests = [request(v1_4_engine, prompt=f"{i}", **difference) for i, difference in enumerate(differences)]
    painted = wait_together(v1_4_engine, requests)
    assert calls == [["0"], ["1"], ["2"], ["3"], ["4"], ["5"]]
    for one, answer in zip(requests, painted, strict=True):
        assert isinstance(answer, GenerationResult)
        assert answer.pictures[0].image.size == (one.width, one.height)


def test_the_oldest_goes_first_and_takes_along_what_can_share_its_call(v1_4_engine: Engine, calls: list[list[str]]):
    steps = {"a": 2, "b": 3}
    order = ["b1", "a1", "b2", "a2", "b3", "b4", "b5", "a3"]
    wait_together(
        v1_4_engine, [request(v1_4_engine, prompt=name, num_inference_steps=steps[name[0]]) for name in order]
    )
    assert calls == [["b1", "b2", "b3", "b4"], ["a1", "a2", "a3"], ["b5"]]


def test_images_count_towards_the_size_of_a_call(v1_4_model: Model, calls: list[list[str]]):
    engine = Engine(v1_4_model, max_batch_images=4)
    painted = wait_together(
        engine, [request(engine, prompt="x", seed=0, num_images=3), request(engine, prompt="y", seed=50, num_images=3)]
    )
    assert calls == [["x", "x", "x", "y"], ["y", "y"]]
    assert [[picture.seed for picture in answer.pictures] for answer in painted] == [[0, 1, 2], [50, 51, 52]]
    calls.clear()
    engine = Engine(v1_4_model, max_batch_images=1)
    assert [picture.seed for picture in generate(engine, prompt="x", num_images=4, seed=7).pictures] == [7, 8, 9, 10]
    assert calls == [["x"]] * 4


def steps_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry, the number of images, for each denoising step that the device takes."""
    taken: list[int] = []
    forward = engine._runner._pipe.unet.forward

    def counted(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        taken.append(len(latents) // 2)
        return forward(latents, *args, **kwargs)

    monkeypatch.setattr(engine._runner._pipe.unet, "forward", counted)
    return taken


def test_a_request_cancelled_while_it_waits_never_reaches_the_device(v1_4_engine: Engine, calls: list[list[str]]):
    async def cancel_one() -> list[GenerationResult | BaseException]:
        device_is_free = threading.Event()
        v1_4_engine._thread.submit(device_is_free.wait)
        answers = [asyncio.create_task(v1_4_engine.generate(request(v1_4_engine, prompt=name))) for name in "abc"]
        await asyncio.sleep(0)
        answers[1].cancel()
        await asyncio.sleep(0)
        device_is_free.set()
        return await asyncio.gather(*answers, return_exceptions=True)

    first, cancelled, last = asyncio.run(cancel_one())
    assert calls == [["a", "c"]]
    assert isinstance(cancelled, asyncio.CancelledError)
    assert isinstance(first, GenerationResult) and isinstance(last, GenerationResult)


def test_a_running_request_that_is_cancelled_frees_the_device_within_two_steps(
    v1_4_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    taken = steps_of(v1_4_engine, monkeypatch)

    async def cancel() -> int:
        answer = asyncio.create_task(v1_4_engine.generate(request(v1_4_engine, num_inference_steps=150)))
        while len(taken) < 5:
            await asyncio.sleep(0.001)
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        at = len(taken)
        await asyncio.wrap_future(v1_4_engine._thread.submit(lambda: None))
        return at

    at = asyncio.run(cancel())
    assert len(taken) <= at + 2


def test_a_cancelled_request_leaves_its_neighbours_alone(v1_4_engine: Engine, monkeypatch: pytest.MonkeyPatch):
    alone = generate(v1_4_engine, prompt="b", num_inference_steps=40).pictures[0]
    taken = steps_of(v1_4_engine, monkeypatch)

    async def cancel_one() -> GenerationResult:
        device_is_free = threading.Event()
        v1_4_engine._thread.submit(device_is_free.wait)
        gone, stays = (
            asyncio.create_task(v1_4_engine.generate(request(v1_4_engine, prompt=name, num_inference_steps=40)))
            for name in "ab"
        )
        await asyncio.sleep(0)
        device_is_free.set()
        while len(taken) < 5:
            await asyncio.sleep(0.001)
        gone.cancel()
        return await stays

    assert furthest(asyncio.run(cancel_one()).pictures[0].image, alone.image) <= 2
    # PNDM takes one step more than it is asked for
    assert taken == [2] * 41


def test_progress_grows_from_nothing_to_all_of_it(v1_4_model: Model, monkeypatch: pytest.MonkeyPatch):
    engine = Engine(v1_4_model, max_batch_images=2)
    progress, seen = Progress(), []
    run = engine._runner.run

    def watched(requests: Any, seeds: Any, after_step: Callable[[float], None]) -> Any:
        def seen_step(share: float) -> None:
            seen.append(progress.share)
            after_step(share)

        return run(requests, seeds, seen_step)

    monkeypatch.setattr(engine._runner, "run", watched)
    asyncio.run(engine.generate(request(engine, num_images=3, num_inference_steps=10, scheduler="DDIM"), progress))
    seen.append(progress.share)
    # two images in the first call, the third in the second
    assert seen == pytest.approx([i / 10 * 2 / 3 for i in range(10)] + [2 / 3 + i / 10 / 3 for i in range(11)])


def test_out_of_memory_halves_a_call_until_it_fits(v1_4_engine: Engine, failing: Failing, calls: list[list[str]]):
    def needs_memory(prompt: list[str], **_: Any) -> None:
        if len(prompt) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    failing(needs_memory)
    painted = wait_together(v1_4_engine, [request(v1_4_engine, prompt=name, num_images=2) for name in "ab"])
    assert all(isinstance(answer, GenerationResult) and len(answer.pictures) == 2 for answer in painted)
    assert calls == [["a"], ["a"], ["b"], ["b"]]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
)
def test_out_of_memory_alone_says_what_to_ask_for(v1_4_engine: Engine, failing: Failing, error: Exception):
    def needs_memory(prompt: list[str], width: int, **_: Any) -> None:
        if width > 64 or prompt[0] == "small":
            raise error

    failing(needs_memory)
    large, small, fits = wait_together(
        v1_4_engine,
        [
            request(v1_4_engine, width=128, num_images=4),
            request(v1_4_engine, prompt="small"),
            request(v1_4_engine, prompt="fits"),
        ],
    )
    assert isinstance(large, JobError) and not large.refresh_worker
    assert str(large) == "an image of 128 x 64 did not fit in GPU memory: ask for 64 x 64"
    assert str(small) == "an image of 64 x 64 did not fit in GPU memory: ask for a smaller one"
    assert isinstance(fits, GenerationResult)


def test_only_what_fails_alone_fails(v1_4_engine: Engine, failing: Failing, calls: list[list[str]]):
    def crash(prompt: list[str], **_: Any) -> None:
        if "b" in prompt:
            raise RuntimeError("anything")

    failing(crash)
    first, bad, last = wait_together(
        v1_4_engine, [request(v1_4_engine, prompt=name, num_images=1 + (name == "a")) for name in "abc"]
    )
    assert isinstance(first, GenerationResult) and isinstance(last, GenerationResult)
    assert str(bad) == "anything"
    assert calls == [["a", "a"], ["c"]]


def test_a_fault_in_handling_a_fault_leaves_nobody_waiting(
    v1_4_engine: Engine, failing: Failing, monkeypatch: pytest.MonkeyPatch
):
    def crash(prompt: list[str], **_: Any) -> None:
        if "c" not in prompt:
            raise RuntimeError("first")

    def crash_again() -> None:
        raise RuntimeError("second")

    failing(crash)
    monkeypatch.setattr(torch.cuda, "empty_cache", crash_again)
    answers = wait_together(v1_4_engine, [request(v1_4_engine, prompt=name) for name in "ab"])
    assert [str(answer) for answer in answers] == ["second", "second"]
    assert generate(v1_4_engine, prompt="c").pictures


def test_one_picture_of_nan_does_not_take_the_others_along(v1_4_engine: Engine, monkeypatch: pytest.MonkeyPatch):
    decode = v1_4_engine._runner._pipe.vae.decode

    def second_is_nan(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        pictures = decode(*args, **kwargs)[0].clone()
        pictures[1] = float("nan")
        return (pictures,)

    monkeypatch.setattr(v1_4_engine._runner._pipe.vae, "decode", second_is_nan)
    first, bad, last = wait_together(v1_4_engine, [request(v1_4_engine, prompt=name) for name in "abc"])
    assert isinstance(first, GenerationResult) and isinstance(last, GenerationResult)
    assert isinstance(bad, JobError) and str(bad).startswith("the model produced NaN instead of a picture")


def test_a_lost_device_fails_all_that_is_in_flight_with_a_request_to_try_again(
    v1_4_engine: Engine, failing: Failing, calls: list[list[str]]
):
    def poisoned(prompt: list[str], **_: Any) -> None:
        if "poison" in prompt:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    failing(poisoned)
    names = ["before", "with", "poison", "after"]
    painted = wait_together(
        v1_4_engine, [request(v1_4_engine, prompt=name, num_inference_steps=2 + (name == "after")) for name in names]
    )
    for answer in painted:
        assert isinstance(answer, JobError) and answer.refresh_worker
        assert str(answer) == "the GPU failed and this worker is being replaced: send the job again"
    with pytest.raises(JobError, match="send the job again"):
        generate(v1_4_engine)
    assert calls == []
