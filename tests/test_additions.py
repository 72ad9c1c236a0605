"""What a new field, scheduler, setting or output format must reach, beyond its own tests and the README's tables."""

import base64
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import diffusers
import pytest
import torch
from PIL import Image

from builder.schemas import V1_4
from examples import generate
from src.api.output import OneImage
from src.api.picture import encode, parameters
from src.api.request import ImageRequest, OutputFormat
from src.generation.batch_runner import BatchRunner
from src.schedulers import SCHEDULERS
from src.settings import Settings
from tests.support.client import until
from tests.support.platform_stub import serving
from tests.test_examples import GENERATE, LIKELY, environment

ROOT = Path(__file__).parents[1]
VALUES = {
    "prompt": ("a cat", "a dog"),
    "negative_prompt": ("", "blur"),
    "width": (64, 72),
    "height": (64, 72),
    "num_inference_steps": (10, 20),
    "guidance_scale": (5.0, 7.5),
    "seed": (1, 2),
    "num_images": (1, 2),
    "output_format": ("jpeg", "webp"),
    "output_quality": (80, 90),
    "scheduler": ("DDIM", "KLMS"),
}
"""Two values for each field."""
NOT_IN_A_PICTURE = {"num_images", "output_format", "output_quality"}
"""The fields without which a picture can be made again."""
OPTIONS = {
    "negative_prompt": "-n",
    "seed": "--seed",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "num_images": "--images",
    "scheduler": "--scheduler",
    "output_format": "--format",
    "output_quality": "--quality",
}
"""generate.sh's options, but for --size."""


def two_requests(field: str) -> tuple[ImageRequest, ImageRequest]:
    """Requests that differ in ``field`` alone."""
    first = {name: value for name, (value, _) in VALUES.items()}
    return ImageRequest.parse(first, V1_4), ImageRequest.parse(first | {field: VALUES[field][1]}, V1_4)


def test_each_field_has_its_values():
    assert list(VALUES) == list(ImageRequest.model_fields)
    assert set(LIKELY) == set(VALUES)


class RecordingPipeline:
    """Keeps what it is asked for, and produces NaN, which no picture is made of."""

    config = SimpleNamespace(sample_size=64)

    def __init__(self) -> None:
        self.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
        self.unet, self.vae_scale_factor = self, 8
        self.asked: list[dict[str, Any]] = []

    def __call__(self, *, generator: list[torch.Generator], callback_on_step_end: object, **asked: Any) -> Any:
        seeds = [each.initial_seed() for each in generator]
        self.asked.append(asked | {"seeds": seeds, "scheduler": type(self.scheduler)})
        return SimpleNamespace(images=torch.full((len(seeds), 3, 8, 8), torch.nan), nsfw_content_detected=None)


@pytest.mark.parametrize("field", VALUES)
def test_a_field_reaches_the_pipeline(field: str):
    pipeline = RecordingPipeline()
    runner = BatchRunner(pipeline, "none")
    for request in two_requests(field):
        runner.run([request] * request.num_images, request.seeds, lambda share: None)
    first, second = pipeline.asked
    assert (first == second) == (field in {"output_format", "output_quality"})


def test_an_output_tells_what_the_client_may_not_know():
    asked_and_known = {"prompt", "negative_prompt", "num_images", "output_quality"}
    assert set(VALUES) - set(get_type_hints(OneImage)) == asked_and_known


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_read_somewhere(name: str):
    modules = [ROOT / "handler.py", *(ROOT / "src").rglob("*.py")]
    assert any(re.search(rf"settings\.{name}\b", path.read_text()) for path in modules)


@pytest.mark.parametrize("field", VALUES)
def test_a_picture_says_how_it_was_made(field: str):
    first, second = (parameters(request, request.seed, "none") for request in two_requests(field))
    assert (first == second) == (field in NOT_IN_A_PICTURE)


@pytest.mark.process
@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_the_script_asks_for_every_field(output_format: str, tmp_path: Path):
    asked = {name: second for name, (_, second) in VALUES.items()} | {"output_format": output_format}
    arguments = [argument for name, option in OPTIONS.items() for argument in (option, str(asked[name]))]
    with serving() as platform:
        command = [GENERATE, asked["prompt"], "--size", f"{asked['width']}x{asked['height']}", *arguments]
        script = subprocess.Popen(command, cwd=tmp_path, env=environment(platform), stderr=subprocess.DEVNULL)
        try:
            (job,) = until(platform.jobs.values, 30)
        finally:
            script.terminate()
            script.wait(20)
    # it leaves the default format out
    assert {"output_format": "png"} | job.request.input == asked


def test_the_python_example_knows_every_format():
    assert set(generate.FORMATS.values()) == set(get_args(OutputFormat))


def test_postman_knows_how_every_formats_files_begin():
    collection = json.loads((ROOT / "examples/postman/stable-diffusion-worker.postman_collection.json").read_text())
    checks = re.findall(r"const BEGINNING = \{(.*?)\}", json.dumps(collection).replace('\\"', '"'))
    beginnings = [dict(re.findall(r'(\w+): "([^"]+)"', check)) for check in checks]
    assert beginnings and all(each == beginnings[0] for each in beginnings)
    assert list(beginnings[0]) == list(get_args(OutputFormat))
    for output_format, beginning in beginnings[0].items():
        file = encode(Image.new("RGB", (8, 8)), "a cat", output_format, 90)
        assert base64.b64encode(file).decode().startswith(beginning)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_takes_as_long_as_its_steps(name: str):
    """The README's costs and the share that /status shows count on one call of the UNet a step."""
    scheduler = getattr(diffusers, SCHEDULERS[name].class_name).from_config(
        diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1).config
    )
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps) in (50, 51)
