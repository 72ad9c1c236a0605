"""Batches of one or several requests through the real pipeline."""

import asyncio
import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops

from builder.demo_model.evaluate import shape_colors
from src.errors import JobError
from src.generation.engine import Engine
from src.generation.pending import GenerationResult
from src.schedulers import SCHEDULERS
from tests.support import engines
from tests.support.engines import generate, generate_together, request_for


def furthest(a: Image.Image, b: Image.Image) -> int:
    """The largest difference between two pictures, in levels of 255."""
    return max(high for _, high in ImageChops.difference(a, b).getextrema())


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Records the prompts of each call of the pipeline."""
    seen: list[list[str]] = []
    real = StableDiffusionPipeline.__call__

    def counted(pipe: StableDiffusionPipeline, prompt: list[str], **kwargs: Any) -> Any:
        seen.append(prompt)
        return real(pipe, prompt=prompt, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counted)
    yield seen


def test_same_request_gives_same_bytes_and_another_seed_another_picture(v1_4_engine: Engine):
    first, again, other = (generate(v1_4_engine, seed=seed).pictures[0] for seed in (3, 3, 4))
    assert first.image.tobytes() == again.image.tobytes()
    assert furthest(first.image, other.image) > 2
    assert (first.image.size, first.image.mode) == ((64, 64), "RGB")


@pytest.mark.parametrize("model", ["v1_4_pipe", "demo_pipe"])
def test_single_picture_has_the_same_bytes_as_from_diffusers(model: str, request: pytest.FixtureRequest):
    pipe: StableDiffusionPipeline = request.getfixturevalue(model)
    scheduler = pipe.scheduler
    ours = generate(engines.around(pipe), prompt="the sea", num_inference_steps=4).pictures[0].image
    try:
        generator = torch.Generator().manual_seed(3)
        theirs = pipe("the sea", negative_prompt="", num_inference_steps=4, generator=generator).images[0]
    finally:
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
    assert ours.tobytes() == theirs.tobytes()


def test_image_i_matches_a_single_picture_of_seed_plus_i(demo_engine: Engine):
    together = generate(demo_engine, prompt="a forest", seed=10, num_images=3, num_inference_steps=8).pictures
    assert [picture.seed for picture in together] == [10, 11, 12]
    for picture in together:
        alone = generate(demo_engine, prompt="a forest", seed=picture.seed, num_inference_steps=8).pictures[0]
        assert furthest(picture.image, alone.image) <= 2


def test_four_prompts_in_one_batch_each_get_their_own_picture(
    demo_pipe: StableDiffusionPipeline, batches: list[list[str]]
):
    engine = engines.around(demo_pipe, "demo")
    asked = [
        ("red", "white"),
        ("blue", "yellow"),
        ("white", "blue"),
        ("black", "yellow"),
    ]
    long = " ".join(["nothing"] * 100)
    negative_prompts = ["", "the sea", long, ""]
    requests = [
        request_for(
            engine,
            prompt=f"a {color} square on a {background} background",
            negative_prompt=negative_prompts[i],
            seed=100 + 7 * i,
            num_inference_steps=8,
        )
        for i, (color, background) in enumerate(asked)
    ]
    results = generate_together(engine, *requests)
    assert [len(batch) for batch in batches] == [4]
    for one, (color, background), result in zip(requests, asked, results, strict=True):
        (picture,) = result.pictures
        assert picture.seed == one.seed
        assert shape_colors(np.asarray(picture.image)) == (color, background)
        assert any("longer than" in warning for warning in result.warnings) == (one.negative_prompt == long)
        alone = asyncio.run(engine.generate(one))
        assert furthest(picture.image, alone.pictures[0].image) <= 2
        assert alone.warnings == result.warnings


SMALL = {"width": 64, "height": 64, "guidance_scale": 0}
"""The fastest options: a step without guidance takes half as long."""


@pytest.mark.parametrize("quick_unet", ["v1_4_pipe", "demo_pipe"], indirect=True)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_scheduler_works_with_few_steps(quick_unet: StableDiffusionPipeline, scheduler: str, steps: int):
    engine = engines.around(quick_unet)
    options = SMALL | {"scheduler": scheduler, "num_inference_steps": steps}
    alone = generate(engine, **options).pictures[0].image
    first, second = (picture.image for picture in generate(engine, num_images=2, **options).pictures)
    assert furthest(alone, first) <= 2 < furthest(first, second)
    assert np.asarray(alone).std() > 1


@pytest.mark.parametrize("quick_unet", ["v1_4_pipe", "demo_pipe"], indirect=True)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler_works_with_the_maximum_of_steps(quick_unet: StableDiffusionPipeline, scheduler: str):
    engine = engines.around(quick_unet)
    options = SMALL | {"scheduler": scheduler, "num_inference_steps": engine.limits.schedulers[scheduler]}
    # in one batch, to save time
    jobs = (request_for(engine, num_images=images, **options) for images in (1, 2))
    (one,), (first, second) = (
        [picture.image for picture in result.pictures] for result in generate_together(engine, *jobs)
    )
    assert furthest(one, first) <= 2 < furthest(first, second)
    assert np.asarray(one).std() > 1


LINSPACE = {"timestep_spacing": "linspace"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}


@pytest.mark.parametrize("model", ["v1_4_pipe", "demo_pipe"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("PNDM", LEADING | {"skip_prk_steps": True, "set_alpha_to_one": False}),
        ("DDIM", LEADING | {"set_alpha_to_one": False, "clip_sample": False}),
        ("KLMS", LINSPACE),
        ("K_EULER", LINSPACE | {"final_sigmas_type": "zero"}),
        ("K_EULER_ANCESTRAL", LINSPACE),
        ("DPMSolverMultistep", LINSPACE | {"final_sigmas_type": "zero", "lower_order_final": True}),
        ("DPMSolverSinglestep", {"final_sigmas_type": "zero", "lower_order_final": True}),
        ("KarrasDPM", LINSPACE | {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}),
        ("LCM", {"original_inference_steps": 50, "timestep_scaling": 10.0}),
        ("UniPCMultistep", LINSPACE | {"final_sigmas_type": "zero", "lower_order_final": True}),
    ],
)
def test_scheduler_options_are_those_diffusers_recommends(
    model: str, name: str, expected: dict[str, Any], request: pytest.FixtureRequest
):
    pipe: StableDiffusionPipeline = request.getfixturevalue(model)
    scheduler = engines.new_scheduler(engines.around(pipe), name)
    assert type(scheduler).__name__ == SCHEDULERS[name].class_name
    trained = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction" if model == "demo_pipe" else "epsilon",
    }
    assert {key: scheduler.config[key] for key in trained | expected} == trained | expected


def test_schedulers_keep_the_models_timestep_spacing(
    v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    trailing = diffusers.DDIMScheduler.from_config(v1_4_pipe.scheduler.config, timestep_spacing="trailing")
    monkeypatch.setattr(v1_4_pipe, "scheduler", trailing)
    engine = engines.around(v1_4_pipe)
    for name in set(SCHEDULERS) - {"DPMSolverSinglestep"}:
        assert engines.new_scheduler(engine, name).config.timestep_spacing == "trailing"


def test_scheduler_leaves_no_state_for_later_requests(v1_4_engine: Engine):
    before = generate(v1_4_engine, num_inference_steps=5)
    for scheduler in SCHEDULERS:
        generate(v1_4_engine, scheduler=scheduler, num_inference_steps=3)
    assert generate(v1_4_engine, num_inference_steps=5).pictures == before.pictures


def test_warning_quotes_the_text_beyond_77_tokens(demo_pipe: StableDiffusionPipeline, demo_engine: Engine):
    tokenizer = demo_pipe.tokenizer
    fitting = " ".join(["sea"] * 80)
    while len(tokenizer(fitting).input_ids) > 77:
        fitting = fitting[:-4]
    # one token each, until the prompt has exactly as many as fit
    fitting += " 7" * (77 - len(tokenizer(fitting).input_ids))
    assert len(tokenizer(fitting).input_ids) == 77
    assert generate(demo_engine, prompt=fitting).warnings == []
    rest = "Seven 🎿 more\n wörds, 山."
    (warning,) = generate(demo_engine, prompt=f"{fitting} {rest}").warnings
    assert warning == f'prompt: longer than 77 tokens, this part was not used: "{rest}"'
    both = generate(demo_engine, prompt=f"{fitting} {rest}", negative_prompt=f"{fitting} blur").warnings
    assert both[1] == 'negative_prompt: longer than 77 tokens, this part was not used: "blur"'


def test_warning_counts_each_vector_of_a_word_from_textual_inversion(
    demo_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = copy.deepcopy(demo_pipe.tokenizer)
    tokenizer.add_tokens(["single", "charturner", *(f"charturner_{i}" for i in range(1, 15))])
    monkeypatch.setattr(demo_pipe, "tokenizer", tokenizer)
    engine = engines.around(demo_pipe)
    for words, end, unused in [
        (60, "charturner", ""),
        (59, "single charturner", ""),
        (60, "charturner blue", "blue"),
        (61, "charturner blue", "charturner blue"),
        (46, "charturners, Charturner charturner", "charturner"),
        (29, "charturner charturner charturner charturner blue", "charturner blue"),
    ]:
        text = "7 " * words + end
        # those of the begin and the end included
        encoded = len(tokenizer(demo_pipe.maybe_convert_prompt(text, tokenizer)).input_ids)
        assert (encoded > 77) == bool(unused)
        said = [f'prompt: longer than 77 tokens, this part was not used: "{unused}"'] if unused else []
        assert engines.runner_of(engine).prompt_warnings(request_for(engine, prompt=text)) == said


def test_blanked_picture_is_black_and_reported(v1_4_repository):
    engine = engines.build(v1_4_repository)
    checker = engines.pipe_of(engine).safety_checker
    # a cosine is at least -1, so every picture exceeds this threshold
    checker.concept_embeds_weights.data.fill_(-2.0)
    result = generate(engine, num_images=2)
    assert [picture.nsfw for picture in result.pictures] == [True, True]
    assert {picture.image.getextrema() for picture in result.pictures} == {((0, 0),) * 3}
    checker.concept_embeds_weights.data.fill_(2.0)
    assert generate(engine).pictures[0].nsfw is False


def test_model_without_safety_checker_reports_nothing_about_nsfw(demo_engine: Engine):
    assert generate(demo_engine).pictures[0].nsfw is None


def test_nan_fails_only_the_request_of_its_image(
    v1_4_pipe: StableDiffusionPipeline, v1_4_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    decode = v1_4_pipe.vae.decode

    def second_is_nan(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        pictures = decode(*args, **kwargs)[0].clone()
        pictures[min(1, len(pictures) - 1), :, 0, 0] = float("nan")
        return (pictures,)

    monkeypatch.setattr(v1_4_pipe.vae, "decode", second_is_nan)
    first, bad, last = generate_together(v1_4_engine, *(request_for(v1_4_engine, prompt=name) for name in "abc"))
    assert isinstance(first, GenerationResult) and isinstance(last, GenerationResult)
    assert isinstance(bad, JobError) and str(bad).startswith("the model produced NaN instead of a picture")
    with pytest.raises(JobError, match="the model produced NaN"):
        v1_4_engine.warm_up()


class Steps(list[int]):
    """The number of images in each denoising step so far."""

    def __init__(self) -> None:
        self.taken = threading.Condition()

    def append(self, images: int) -> None:
        with self.taken:
            super().append(images)
            self.taken.notify_all()

    def wait_for(self, count: int) -> None:
        with self.taken:
            assert self.taken.wait_for(lambda: len(self) >= count, 60)


@pytest.fixture
def steps(v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    forward = v1_4_pipe.unet.forward

    def counted(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert torch.is_inference_mode_enabled()
        steps.append(len(latents) // 2)
        return forward(latents, *args, **kwargs)

    monkeypatch.setattr(v1_4_pipe.unet, "forward", counted)
    return steps


async def cancel_after(steps: Steps, count: int, job: asyncio.Task) -> None:
    await asyncio.to_thread(steps.wait_for, count)
    job.cancel()


def test_cancelled_request_frees_the_device_within_two_steps(v1_4_engine: Engine, steps: Steps):
    async def cancel() -> int:
        job = asyncio.create_task(v1_4_engine.generate(request_for(v1_4_engine, num_inference_steps=150)))
        await cancel_after(steps, 5, job)
        await asyncio.gather(job, return_exceptions=True)
        at = len(steps)
        await engines.until_idle(v1_4_engine)
        return at

    at = asyncio.run(cancel())
    assert len(steps) <= at + 2


def test_cancelled_request_does_not_affect_others_in_its_batch(v1_4_engine: Engine, steps: Steps):
    alone = generate(v1_4_engine, prompt="b", num_inference_steps=40).pictures[0]
    steps.clear()

    async def cancel_one() -> GenerationResult:
        one = request_for(v1_4_engine, prompt="a", num_images=4)
        busy = asyncio.create_task(v1_4_engine.generate(one))
        gone, stays = (
            asyncio.create_task(v1_4_engine.generate(request_for(v1_4_engine, prompt=name, num_inference_steps=40)))
            for name in "ab"
        )
        await busy
        await cancel_after(steps, 8, gone)
        return await stays

    assert furthest(asyncio.run(cancel_one()).pictures[0].image, alone.image) <= 2
    # PNDM takes one step more than requested
    assert steps == [4] * 3 + [2] * 41


@pytest.mark.parametrize("at", ["unet", "decode"])
def test_tensors_of_a_failed_call_are_freed_before_the_next_try(
    at: str, v1_4_pipe: StableDiffusionPipeline, v1_4_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    tensors: list[weakref.ref] = []
    pipe, tries = v1_4_pipe, 0

    def watch(function: Callable[..., Any], fails: bool) -> Callable[..., Any]:
        def watched(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal tries
            result = function(sample, *args, **kwargs)
            given = [sample, *args, *kwargs.values()]
            tensors.extend(weakref.ref(each) for each in (*given, result[0]) if isinstance(each, torch.Tensor))
            if fails and (tries := tries + 1) == 2:
                raise RuntimeError("CUDA out of memory")
            return result

        return watched

    def encode(real: Callable[..., Any]) -> Callable[..., Any]:
        def encoded(*args: Any, **kwargs: Any) -> Any:
            alive.append(sum(tensor() is not None for tensor in tensors))
            tensors.clear()
            return real(*args, **kwargs)

        return encoded

    alive: list[int] = []
    monkeypatch.setattr(pipe.unet, "forward", watch(pipe.unet.forward, at == "unet"))
    monkeypatch.setattr(pipe.vae, "decode", watch(pipe.vae.decode, at == "decode"))
    monkeypatch.setattr(pipe, "encode_prompt", encode(pipe.encode_prompt))
    if at == "decode":
        tries = 1
    gc.disable()
    try:
        assert len(generate(v1_4_engine, num_images=2, num_inference_steps=5, scheduler="KLMS").pictures) == 2
    finally:
        gc.enable()
    # counted before the first call and before each of its halves
    assert alive == [0, 0, 0]
    assert tries > 2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_calls_the_unet_once_per_step(name: str):
    """Costs and the progress in /status depend on it."""
    scheduler = getattr(diffusers, SCHEDULERS[name].class_name).from_config(
        diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1).config
    )
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps) in (50, 51)
