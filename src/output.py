"""From pictures to the job's output: PNG, base64, the parameters inside the file, the platform's limit."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NotRequired

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import Field
from typing_extensions import TypedDict

from src.request import ImageRequest, JobError


@dataclass(frozen=True)
class Picture:
    """One painted image, RGB, of the request's size.

    ``nsfw`` says whether the safety checker blanked it; None where the model has no checker.
    """

    image: Image.Image
    seed: int
    nsfw: bool | None


def parameters(request: ImageRequest, seed: int, model_name: str) -> str:
    """The text that Stable Diffusion tools read from a PNG's ``parameters`` chunk."""
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(
        f"Steps: {request.num_inference_steps}, Sampler: {request.scheduler}, CFG scale: {request.guidance_scale}, "
        f"Seed: {seed}, Size: {request.width}x{request.height}, Model: {model_name}"
    )
    return "\n".join(lines)


def png(image: Image.Image, text: str) -> bytes:
    """``image`` as a PNG file with ``text`` in its ``parameters`` chunk."""
    info = PngInfo()
    info.add_text("parameters", text)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


class OutputImage(TypedDict):
    """One image of a job's output: the picture itself, or a link to it where a bucket is set up."""

    image: Annotated[NotRequired[str], Field(description="The PNG in base64, without a data: prefix")]
    image_url: Annotated[NotRequired[str], Field(description="A link to the PNG that works for a week")]
    seed: Annotated[int, Field(description="The seed that paints this picture again")]
    nsfw_content_detected: Annotated[
        bool | None, Field(description="Whether the safety checker blanked the picture; null without a checker")
    ]


class OutputParameters(TypedDict):
    """What all images of a job's output share."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    model: Annotated[str, Field(description="The model's name")]
    warnings: Annotated[NotRequired[list[str]], Field(description="What the client should know")]


class OneImage(OutputImage, OutputParameters):
    """The output of a job that asked for one image."""


class SeveralImages(OutputParameters):
    """The output of a job that asked for several images."""

    images: list[OutputImage]


JobOutput = OneImage | SeveralImages


def job_output(
    request: ImageRequest,
    pictures: list[Picture],
    warnings: list[str],
    *,
    model_name: str,
    max_result_bytes: int,
    upload: Callable[[bytes, str], str] | None = None,
) -> JobOutput:
    """What the client reads of a finished job.

    Args:
        request: what was asked.
        pictures: what was painted, in the order of the seeds.
        warnings: what the client should know; left out of the output when empty.
        model_name: the model's name.
        max_result_bytes: the largest result that the platform takes, in bytes.
        upload: stores a PNG file under a name and gives a link to it; without it the output holds the pictures.

    Raises:
        JobError: if the result is larger than the platform takes, or as ``upload`` does.
    """
    images = []
    for i, picture in enumerate(pictures, start=1):
        file = png(picture.image, parameters(request, picture.seed, model_name))
        image: OutputImage = {"seed": picture.seed, "nsfw_content_detected": picture.nsfw}
        if upload:
            image["image_url"] = upload(file, f"picture-{i}.png")
        else:
            image["image"] = base64.b64encode(file).decode()
        images.append(image)
    shared: OutputParameters = {
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "scheduler": request.scheduler,
        "model": model_name,
    }
    if warnings:
        shared["warnings"] = warnings
    output: JobOutput = {**images[0], **shared} if len(images) == 1 else {"images": images, **shared}
    size = len(json.dumps({"output": output}))
    if size > max_result_bytes:
        raise JobError(
            f"the result has {size / 1e6:.1f} MB, the limit is {max_result_bytes / 1e6:.1f} MB: "
            "ask for fewer or smaller images, or have a bucket set up for the endpoint"
        )
    return output
