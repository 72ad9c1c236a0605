"""Pictures that start from a picture, whole or in the part that a mask leaves, are those of diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image, ImageChops

from src.api.request import ImageRequest
from src.errors import InvalidInput
from src.generation.engine import Engine
from src.schedulers import SCHEDULERS
from tests.support import engines, layouts
from tests.support.engines import generate, generate_together, request_for
from tests.support.pictures import in_base64, plain

# schedulers of the pinned diffusers call NumPy in a deprecated way
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

RAMP = Image.linear_gradient("L").resize((80, 64)).convert("RGB")
CIRCLE = Image.radial_gradient("L").resize((80, 64))
"""White at the edge, black in the middle."""
PICTURE = {"image": in_base64(RAMP)}
MASK = PICTURE | {"mask": in_base64(CIRCLE)}
PIPELINES = {"picture": StableDiffusionImg2ImgPipeline, "mask": StableDiffusionInpaintPipeline}


def from_diffusers(engine: Engine, *requests: ImageRequest) -> list[Image.Image]:
    """Generates the images of ``requests`` in one call of diffusers' own pipeline."""
    first, pipe = requests[0], engines.pipe_of(engine)
    pipe = PIPELINES[first.task](**pipe.components, requires_safety_checker=False)
    pipe.scheduler = engines.new_scheduler(engine, first.scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = [request for request in requests for _ in request.seeds]
    arguments: dict[str, Any] = {}
    if first.task == "mask":
        arguments = {"mask_image": [each.mask for each in images], "width": first.width, "height": first.height}
    return pipe(
        prompt=[each.prompt for each in images],
        negative_prompt=[each.negative_prompt for each in images],
        image=[each.image for each in images],
        strength=first.strength,
        num_inference_steps=first.num_inference_steps,
        generator=[torch.Generator().manual_seed(seed) for each in requests for seed in each.seeds],
        **arguments,
    ).images


def with_own_pixels(pictures: list[Image.Image], *requests: ImageRequest) -> list[bytes]:
    """The pixels of ``pictures``, where each is masked, and elsewhere those that its request came with."""
    images = [request for request in requests for _ in request.seeds]
    return [
        (Image.composite(picture, each.image, each.mask) if each.mask else picture).tobytes()
        for picture, each in zip(pictures, images, strict=True)
    ]


@pytest.mark.parametrize("task", [PICTURE, MASK], ids=["picture", "mask"])
@pytest.mark.parametrize("strength", [0.5, 1])
@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS.keys() - {"KLMS"}))
def test_picture_has_the_same_bytes_as_from_diffusers(
    task: dict[str, str], strength: float, scheduler: str, v1_4_engine: Engine
):
    asked = task | {"strength": strength, "scheduler": scheduler, "num_inference_steps": 4}
    alone = request_for(v1_4_engine, **asked)
    series = request_for(v1_4_engine, **asked | {"image": in_base64(plain("red", RAMP.size))}, num_images=2, seed=9)
    for jobs in ([alone], [alone, series]):
        results = generate_together(v1_4_engine, *jobs)
        ours = [picture.image.tobytes() for result in results for picture in result.pictures]
        assert ours == with_own_pixels(from_diffusers(v1_4_engine, *jobs), *jobs)


def test_pixels_outside_the_mask_are_the_inputs_own_and_the_others_are_not(v1_4_engine: Engine):
    picture = generate(v1_4_engine, **MASK).pictures[0].image
    changed = ImageChops.difference(picture, RAMP).convert("L").point(lambda value: 255 * (value > 0))
    masked = CIRCLE.point(lambda value: 255 * (value >= 128))
    assert ImageChops.subtract(changed, masked).getbbox() is None
    assert changed.histogram()[255] > 0.9 * masked.histogram()[255]


def test_blanked_picture_stays_black_outside_the_mask(v1_4_repository: Path):
    engine = engines.build(v1_4_repository)
    # a cosine is at least -1, so every picture exceeds this threshold
    engines.pipe_of(engine).safety_checker.concept_embeds_weights.data.fill_(-2.0)
    assert generate(engine, **MASK).pictures[0].image.getextrema() == ((0, 0),) * 3


def test_jobs_share_a_batch_only_with_those_of_the_same_task(v1_4_engine: Engine):
    text = {"width": 80, "height": 64, "num_inference_steps": 4}
    jobs = [request_for(v1_4_engine, **text | task, strength=1) for task in (PICTURE, MASK)]
    jobs.append(request_for(v1_4_engine, **text))
    assert len({job.batch_key for job in jobs}) == 3
    together = generate_together(v1_4_engine, *jobs)
    for job, result in zip(jobs, together, strict=True):
        assert result.pictures == generate_together(v1_4_engine, job)[0].pictures


def test_embedded_model_paints_the_masked_part(demo_engine: Engine, demo_pipe: StableDiffusionPipeline):
    channels = demo_pipe.unet.config.in_channels
    asked = {"image": in_base64(plain("blue", (128, 128))), "mask": in_base64(plain("white", (128, 128)))}
    prompt = "a red circle on a white background"
    (picture,) = generate(demo_engine, prompt=prompt, num_inference_steps=20, **asked).pictures
    red, green, blue = picture.image.getpixel((64, 64))
    assert red > 150 and max(green, blue) < 100
    assert channels == demo_pipe.unet.config.in_channels == 8


def test_checkpoint_for_inpainting_makes_the_same_bytes_as_diffusers_and_needs_both_pictures(tmp_path: Path):
    layouts.inpainting(tmp_path)
    engine = engines.build(tmp_path)
    engine.warm_up()
    job = request_for(engine, **MASK)
    (result,) = generate_together(engine, job)
    assert result.pictures[0].image.tobytes() == with_own_pixels(from_diffusers(engine, job), job)[0]
    for pictures, missing in (({}, "image and mask"), (PICTURE, "mask")):
        with pytest.raises(InvalidInput) as refused:
            request_for(engine, **pictures)
        assert str(refused.value) == f"invalid input: {missing}: required, this model is for inpainting"
