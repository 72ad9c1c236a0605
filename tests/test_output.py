import base64
import io
import json
import re
from typing import get_args

import piexif
import piexif.helper
import pytest
from PIL import ExifTags, Image, ImageChops, ImageStat
from PIL.PngImagePlugin import PngInfo

from builder.docs import V1_4
from src.api.output import job_output
from src.api.picture import Picture, parameters
from src.api.request import ImageRequest, OutputFormat
from src.errors import JobError
from src.model.repository import DEMO_MODEL
from tests.support.pictures import in_base64, plain

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


def test_output_of_one_image():
    result = output(request())
    picture = opened(result.pop("image"))
    assert (picture.format, picture.mode, picture.size, picture.getpixel((0, 0))) == (
        "PNG",
        "RGB",
        (64, 64),
        (255, 0, 0),
    )
    assert result == {
        "seed": 5,
        "width": 64,
        "height": 64,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "scheduler": "PNDM",
        "model": "demo",
        "nsfw_content_detected": False,
    }


def test_warnings_about_the_mask_come_behind_those_about_the_prompt():
    masked = output(request(image=in_base64(RED), mask=in_base64(plain("black"))), warnings=("look out",))
    assert masked["warnings"] == ["look out", "mask: nowhere white, so nothing was painted anew"]


def test_blanked_pictures_are_named_after_other_warnings():
    pictures = [Picture(RED, 5, True), Picture(RED, 6, False)]
    result = job_output(request(num_images=2), pictures, ["look out"], model_name="demo", max_result_bytes=10**7)
    assert result["warnings"] == ["look out", "image 1 of 2 (seed 5) was blanked by the safety checker"]


def test_output_of_several_images():
    result = output(request(num_images=3), warnings=("look out",))
    images = result.pop("images")
    assert [image["seed"] for image in images] == [5, 6, 7]
    assert all(set(image) == {"image", "seed", "nsfw_content_detected"} for image in images)
    assert [opened(image["image"]).text["parameters"].count(f"Seed: {image['seed']},") for image in images] == [1, 1, 1]
    assert result["warnings"] == ["look out"]
    assert not {"image", "seed", "nsfw_content_detected"} & set(result)


def test_png_is_what_pillow_saves_with_the_parameters():
    info = PngInfo()
    info.add_text("parameters", parameters(request(), 5, "demo"))
    file = io.BytesIO()
    RED.save(file, "PNG", pnginfo=info)
    for asked in (request(), request(output_format="png", output_quality=1)):
        assert base64.b64decode(output(asked)["image"]) == file.getvalue()


@pytest.mark.parametrize("output_format", [name for name in get_args(OutputFormat) if name != "png"])
def test_jpeg_and_webp_carry_the_parameters_and_grow_with_quality(output_format: str):
    # a few of the embedded model's own pictures
    image = Image.open(DEMO_MODEL / "grid.png").convert("RGB").crop((0, 0, 256, 256))
    sizes, differences = [], []
    for quality in (1, 30, 60, 90, 100):
        asked = request(prompt="中文山 🎿\nünïcödé", output_format=output_format, output_quality=quality)
        result = output(asked, image=image)
        assert result["output_format"] == output_format
        picture = opened(result["image"])
        assert (picture.format, picture.mode, picture.size) == (output_format.upper(), "RGB", image.size)
        comment = picture.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        assert (comment[:8], comment[8:].decode("utf-16-be")) == (b"UNICODE\0", parameters(asked, 5, "demo"))
        # AUTOMATIC1111's web UI and similar tools read it this way
        read = piexif.load(base64.b64decode(result["image"]))["Exif"][piexif.ExifIFD.UserComment]
        assert piexif.helper.UserComment.load(read) == parameters(asked, 5, "demo")
        sizes.append(len(result["image"]))
        differences.append(sum(ImageStat.Stat(ImageChops.difference(image, picture)).mean))
    assert sizes == sorted(sizes) and sizes[-1] < len(output(request(), image=image)["image"])
    assert differences == sorted(differences, reverse=True) and differences[-1] < 6
    assert (
        output(request(output_format=output_format), image=image)["image"]
        == output(request(output_format=output_format, output_quality=90), image=image)["image"]
    )


@pytest.mark.parametrize("prompt", ["a cat", "two\nlines", "emoji 🎿", "中文山, Steps: 3", "ünïcödé"])
@pytest.mark.parametrize("negative_prompt", ["", "blurry, 模糊"])
def test_saved_picture_holds_all_parameters_to_make_it_again(prompt: str, negative_prompt: str):
    asked = request(prompt=prompt, negative_prompt=negative_prompt, guidance_scale=1 / 3, scheduler="K_EULER")
    text = opened(output(asked)["image"]).text["parameters"]
    assert text == parameters(asked, 5, "demo")
    head, _, last = text.rpartition("\n")
    assert head == prompt + (f"\nNegative prompt: {negative_prompt}" if negative_prompt else "")
    result = dict(re.findall(r"([\w ]+): ([^,]+)(?:, |$)", last))
    assert result == {
        "Steps": "50",
        "Sampler": "K_EULER",
        "CFG scale": repr(1 / 3),
        "Seed": "5",
        "Size": "64x64",
        "Model": "demo",
    }


@pytest.mark.parametrize(("prompt", "chunk"), [("cafe", b"tEXt"), ("café", b"iTXt"), ("中文山 café", b"iTXt")])
def test_png_has_text_that_is_not_ascii_in_utf8(prompt: str, chunk: bytes):
    file = base64.b64decode(output(request(prompt=prompt))["image"])
    assert chunk + b"parameters\0" in file
    assert prompt.encode() in file


@pytest.mark.parametrize(
    "name",
    [
        "realistic vision, v5.1",
        "style + detail:0.7",
        "a: b, Steps: 3",
        "two\nlines",
        '"all"',
        'back\\slash, "x"',
        "山, 水",
    ],
)
def test_value_that_would_break_the_parameters_is_quoted_as_web_uis_do(name: str):
    *_, last = parameters(request(), 5, name).split("\n")
    values = dict(re.findall(r"([\w ]+): (\"(?:[^\"\\]|\\.)*\"|[^,]*)(?:, |$)", last))
    assert json.loads(values.pop("Model")) == name
    assert list(values) == ["Steps", "Sampler", "CFG scale", "Seed", "Size"]
    assert "\\u" not in last


def test_value_that_needs_no_quotes_has_none():
    assert parameters(request(), 5, 'a "b" c\\d-v1.4').endswith(', Model: a "b" c\\d-v1.4')


def test_result_over_the_limit_is_refused_and_one_at_the_limit_is_not():
    size = len(json.dumps({"output": output(request())}))
    output(request(), limit=size)
    with pytest.raises(JobError, match="or have a bucket set up") as refused:
        output(request(), limit=size - 1)
    assert str(refused.value) == (
        f"the result has {size / 1e6} MB, the limit is {(size - 1) / 1e6} MB: ask for fewer or smaller images, "
        "for jpeg or webp as output_format, or have a bucket set up for the endpoint"
    )
    with pytest.raises(JobError, match=r"images, for a lower output_quality, or have a bucket set up"):
        output(request(output_format="jpeg"), limit=size)
