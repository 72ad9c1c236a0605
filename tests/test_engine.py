import asyncio
import threading

import pytest
from PIL import Image, ImageChops

from src import pipeline
from src.batch import SCHEDULERS
from src.engine import Engine, GenerationResult
from src.request import ImageRequest, JobError
from src.settings import Settings


def request(engine: Engine, **job_input: object) -> ImageRequest:
    return ImageRequest.parse({"prompt": "a cat", "num_inference_steps": 2, "seed": 3} | job_input, engine.limits)


def generate(engine: Engine, **job_input: object) -> GenerationResult:
    return asyncio.run(engine.generate(request(engine, **job_input)))


def furthest(a: Image.Image, b: Image.Image) -> int:
    """The largest difference between two pictures, in levels of 255."""
    return max(high for _, high in ImageChops.difference(a, b).getextrema())


def test_the_same_request_paints_the_same_bytes_and_another_seed_another_picture(v1_4_engine: Engine):
    first, again, other = (generate(v1_4_engine, seed=seed).pictures[0] for seed in (3, 3, 4))
    assert first.image.tobytes() == again.image.tobytes()
    assert furthest(first.image, other.image) > 2
    assert (first.image.size, first.image.mode) == ((64, 64), "RGB")


def test_image_i_is_what_seed_plus_i_paints_alone(demo_engine: Engine):
    together = generate(demo_engine, prompt="a forest", seed=10, num_images=3, num_inference_steps=8).pictures
    assert [picture.seed for picture in together] == [10, 11, 12]
    for picture in together:
        alone = generate(demo_engine, prompt="a forest", seed=picture.seed, num_inference_steps=8).pictures[0]
        assert furthest(picture.image, alone.image) <= 2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 150])
def test_every_scheduler_paints_at_every_number_of_steps(v1_4_engine: Engine, scheduler: str, steps: int):
    painted = generate(v1_4_engine, scheduler=scheduler, num_inference_steps=steps, num_images=1 + (steps < 150))
    assert painted.pictures[0].image.size == (64, 64)


def test_a_scheduler_leaves_nothing_behind(v1_4_engine: Engine):
    before = generate(v1_4_engine, num_inference_steps=5)
    for scheduler in SCHEDULERS:
        generate(v1_4_engine, scheduler=scheduler, num_inference_steps=3)
    assert generate(v1_4_engine, num_inference_steps=5).pictures == before.pictures


def test_size_and_guidance_reach_the_pipeline(v1_4_engine: Engine):
    assert generate(v1_4_engine, width=72, height=128).pictures[0].image.size == (72, 128)
    assert generate(v1_4_engine, guidance_scale=0).pictures != generate(v1_4_engine, guidance_scale=30).pictures


def test_what_lies_beyond_77_tokens_is_quoted(demo_engine: Engine):
    tokenizer = demo_engine._runner._pipe.tokenizer
    fitting = " ".join(["sea"] * 80)
    while len(tokenizer(fitting).input_ids) > 77:
        fitting = fitting[:-4]
    # a letter more for each token that is left, until not one more fits
    fitting += " 7" * (77 - len(tokenizer(fitting).input_ids))
    assert len(tokenizer(fitting).input_ids) == 77
    assert generate(demo_engine, prompt=fitting).warnings == []
    rest = "Seven 🎿 more\n wörds, 山."
    (warning,) = generate(demo_engine, prompt=f"{fitting} {rest}").warnings
    assert warning == f'prompt: longer than 77 tokens, this part was not used: "{rest}"'
    both = generate(demo_engine, prompt=f"{fitting} {rest}", negative_prompt=f"{fitting} blur").warnings
    assert both[1] == 'negative_prompt: longer than 77 tokens, this part was not used: "blur"'


def test_a_blanked_picture_is_black_and_said_to_be(repository):
    engine = Engine(pipeline.load(Settings(model_id=str(repository))), max_batch_images=4)
    # cosines start at -1: every picture is over this threshold
    engine._runner._pipe.safety_checker.concept_embeds_weights.data.fill_(-2.0)
    painted = generate(engine, num_images=2)
    assert [picture.nsfw for picture in painted.pictures] == [True, True]
    assert {picture.image.getextrema() for picture in painted.pictures} == {((0, 0),) * 3}
    assert painted.warnings == [
        "image 1 of 2 (seed 3) was blanked by the safety checker",
        "image 2 of 2 (seed 4) was blanked by the safety checker",
    ]
    engine._runner._pipe.safety_checker.concept_embeds_weights.data.fill_(2.0)
    assert generate(engine).pictures[0].nsfw is False


def test_a_model_without_a_checker_says_nothing_of_nsfw(demo_engine: Engine):
    assert generate(demo_engine).pictures[0].nsfw is None


def test_nan_is_told_and_not_painted_black(v1_4_engine: Engine, monkeypatch: pytest.MonkeyPatch):
    decode = v1_4_engine._runner._pipe.vae.decode
    monkeypatch.setattr(
        v1_4_engine._runner._pipe.vae, "decode", lambda *args, **kwargs: (decode(*args, **kwargs)[0] * float("nan"),)
    )
    with pytest.raises(JobError, match="the model produced NaN"):
        v1_4_engine.warm_up()


def test_the_event_loop_stays_free_while_the_engine_paints_one_at_a_time(
    v1_4_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    painting, most = 0, 0
    threads, forward = set(), v1_4_engine._runner._pipe.unet.forward

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal painting, most
        painting += 1
        most = max(most, painting)
        threads.add(threading.current_thread().name)
        result = forward(*args, **kwargs)
        painting -= 1
        return result

    async def both() -> int:
        ticks = 0
        jobs = [asyncio.ensure_future(v1_4_engine.generate(request(v1_4_engine, num_inference_steps=20))) for _ in "ab"]
        while not all(job.done() for job in jobs):
            await asyncio.sleep(0.005)
            ticks += 1
        return ticks

    monkeypatch.setattr(v1_4_engine._runner._pipe.unet, "forward", counted)
    assert asyncio.run(both()) > 10
    assert (most, len(threads)) == (1, 1)
    assert threading.current_thread().name not in threads
