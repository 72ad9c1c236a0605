import base64
import io
import json
import re

import pytest
from PIL import Image

from builder.schemas import V1_4
from src.output import Picture, job_output, parameters
from src.request import ImageRequest, JobError

RED = Image.new("RGB", (64, 64), (255, 0, 0))


def request(**job_input: object) -> ImageRequest:
    return ImageRequest.parse({"prompt": "a cat", "width": 64, "height": 64, "seed": 5} | job_input, V1_4)


def output(request: ImageRequest, *, image: Image.Image = RED, limit: int = 10_000_000, warnings: tuple = ()) -> dict:
    pictures = [Picture(image, seed, False) for seed in request.seeds]
    return job_output(request, pictures, list(warnings), model_name="demo", max_result_bytes=limit)


def opened(image: str) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(image, validate=True)))
    picture.load()
    return picture


def test_one_image():
    told = output(request())
    picture = opened(told.pop("image"))
    assert (picture.format, picture.mode, picture.size, picture.getpixel((0, 0))) == (
        "PNG",
        "RGB",
        (64, 64),
        (255, 0, 0),
    )
    assert told == {
        "seed": 5,
        "width": 64,
        "height": 64,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "scheduler": "PNDM",
        "model": "demo",
        "nsfw_content_detected": False,
    }


def test_several_images():
    told = output(request(num_images=3), warnings=("look out",))
    images = told.pop("images")
    assert [image["seed"] for image in images] == [5, 6, 7]
    assert all(set(image) == {"image", "seed", "nsfw_content_detected"} for image in images)
    assert [opened(image["image"]).text["parameters"].count(f"Seed: {image['seed']},") for image in images] == [1, 1, 1]
    assert told["warnings"] == ["look out"]
    assert not {"image", "seed", "nsfw_content_detected"} & set(told)


@pytest.mark.parametrize("prompt", ["a cat", "two\nlines", "emoji 🎿", "中文山, Steps: 3", "ünïcödé"])
@pytest.mark.parametrize("negative_prompt", ["", "blurry, 模糊"])
def test_a_saved_picture_can_be_made_again(prompt: str, negative_prompt: str):
    asked = request(prompt=prompt, negative_prompt=negative_prompt, guidance_scale=1 / 3, scheduler="K_EULER")
    text = opened(output(asked)["image"]).text["parameters"]
    assert text == parameters(asked, 5, "demo")
    head, _, last = text.rpartition("\n")
    assert head == prompt + (f"\nNegative prompt: {negative_prompt}" if negative_prompt else "")
    told = dict(re.findall(r"([\w ]+): ([^,]+)(?:, |$)", last))
    assert told == {
        "Steps": "50",
        "Sampler": "K_EULER",
        "CFG scale": repr(1 / 3),
        "Seed": "5",
        "Size": "64x64",
        "Model": "demo",
    }


def test_a_result_over_the_limit_is_refused_and_one_at_it_is_not():
    size = len(json.dumps({"output": output(request())}))
    output(request(), limit=size)
    with pytest.raises(JobError, match="or have a bucket set up") as refused:
        output(request(), limit=size - 1)
    assert str(refused.value).startswith("the result has 0.0 MB, the limit is 0.0 MB: ask for fewer or smaller images")
