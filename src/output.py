"""From pictures to the job's output: files, base64, the parameters inside the file, the platform's limit."""

import base64
import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NotRequired

from PIL import ExifTags, Image, TiffTags
from PIL.PngImagePlugin import PngInfo
from pydantic import Field
from typing_extensions import TypedDict

from src.request import ImageRequest, JobError, OutputFormat


@dataclass(frozen=True)
class Picture:
    """One generated image, RGB, of the request's size.

    ``nsfw`` says whether the safety checker blanked it; None where the model has no checker.
    """

    image: Image.Image
    seed: int
    nsfw: bool | None


def parameters(request: ImageRequest, seed: int, model_name: str) -> str:
    """The text from which Stable Diffusion tools read how a picture was made."""
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(
        f"Steps: {request.num_inference_steps}, Sampler: {request.scheduler}, CFG scale: {request.guidance_scale}, "
        f"Seed: {seed}, Size: {request.width}x{request.height}, Model: {model_name}"
    )
    return "\n".join(lines)


def encode(image: Image.Image, text: str, output_format: OutputFormat, quality: int) -> bytes:
    """``image`` as a file, with ``text`` where Stable Diffusion tools look for it.

    That is a PNG's ``parameters`` chunk, and EXIF's UserComment in the other formats.

    Args:
        image: the picture, RGB.
        text: what ``parameters`` returns.
        output_format: of the file.
        quality: 1 to 100, of formats that lose something.
    """
    file = io.BytesIO()
    if output_format == "png":
        info = PngInfo()
        info.add_text("parameters", text)
        image.save(file, format="PNG", pnginfo=info)
    else:
        image.save(file, format=output_format, quality=quality, exif=_exif(b"UNICODE\0" + text.encode("utf-16-be")))
    return file.getvalue()


def _exif(comment: bytes) -> bytes:
    """EXIF with ``comment`` as its UserComment, in big-endian order.

    Pillow's own Exif writes bytes as BYTE; the standard wants UNDEFINED here, and tools read nothing else.
    """
    header = struct.pack(">2sHI", b"MM", 42, 8)
    # each directory: the number of its entries; tag, type, count, offset; no directory after it
    main = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, TiffTags.LONG, 1, 26, 0)
    nested = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, TiffTags.UNDEFINED, len(comment), 44, 0)
    return b"Exif\0\0" + header + main + nested + comment


class OutputImage(TypedDict):
    """One image of a job's output: the picture itself, or a link to it where a bucket is set up."""

    image: Annotated[NotRequired[str], Field(description="The picture's file in base64, without a data: prefix")]
    image_url: Annotated[NotRequired[str], Field(description="A link to the picture's file that works for a week")]
    seed: Annotated[int, Field(description="The seed that generates this picture again")]
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
    output_format: Annotated[
        NotRequired[OutputFormat], Field(description="The picture's file format; left out for png")
    ]
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
    upload: Callable[[bytes, str, str], str] | None = None,
) -> JobOutput:
    """What the client reads of a finished job.

    Args:
        request: what was asked.
        pictures: the generated ones, in the order of the seeds.
        warnings: what the client should know; left out of the output when empty.
        model_name: what clients know the model by.
        max_result_bytes: the largest result that the platform takes, in bytes.
        upload: stores a file under a name, with its media type, and returns a link to it; without it the output holds
            the pictures.

    Raises:
        JobError: if the result is larger than the platform takes, or as ``upload`` does.
    """
    images = []
    for i, picture in enumerate(pictures, start=1):
        text = parameters(request, picture.seed, model_name)
        file = encode(picture.image, text, request.output_format, request.output_quality)
        image: OutputImage = {"seed": picture.seed, "nsfw_content_detected": picture.nsfw}
        if upload:
            image["image_url"] = upload(file, f"picture-{i}.{request.output_format}", f"image/{request.output_format}")
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
    if request.output_format != "png":
        shared["output_format"] = request.output_format
    if warnings:
        shared["warnings"] = warnings
    output: JobOutput = {**images[0], **shared} if len(images) == 1 else {"images": images, **shared}
    size = len(json.dumps({"output": output}))
    if size > max_result_bytes:
        way_out = "jpeg or webp as output_format" if request.output_format == "png" else "a lower output_quality"
        raise JobError(
            f"the result has {size / 1e6:.1f} MB, the limit is {max_result_bytes / 1e6:.1f} MB: "
            f"ask for fewer or smaller images, for {way_out}, or have a bucket set up for the endpoint"
        )
    return output
