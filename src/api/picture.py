"""A picture, and its file with the parameters that it was generated with."""

import io
import struct
from dataclasses import dataclass
from typing import get_args

# without WebP's plugin, Pillow would import those of all formats for the first of its pictures
from PIL import ExifTags, Image, TiffTags, WebPImagePlugin  # noqa: F401
from PIL.PngImagePlugin import PngInfo

from src.api.request import ImageRequest, Mark, OutputFormat

NAMED_FIELDS = {"width", "height", "num_inference_steps", "guidance_scale", "scheduler"}
"""The fields that Stable Diffusion tools call by names of their own in a picture's parameters."""


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
    values = {
        "Steps": request.num_inference_steps,
        "Sampler": request.scheduler,
        "CFG scale": request.guidance_scale,
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
    }
    for name in ImageRequest.fields_without(Mark.PER_IMAGE):
        value = getattr(request, name)
        if name not in NAMED_FIELDS and value != ImageRequest.model_fields[name].default:
            values[name.replace("_", " ").capitalize()] = value
    values["Model"] = model_name
    lines.append(", ".join(f"{name}: {value}" for name, value in values.items()))
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


def warm_up() -> None:
    """Encodes a picture in each format, so that what Pillow imports for it is there before the first job."""
    for output_format in get_args(OutputFormat):
        encode(Image.new("RGB", (8, 8)), "", output_format, quality=90)


def _exif(comment: bytes) -> bytes:
    """EXIF with ``comment`` as its UserComment, in big-endian order.

    Pillow's own Exif writes bytes as BYTE; the standard wants UNDEFINED here, and tools read nothing else.
    """
    header = struct.pack(">2sHI", b"MM", 42, 8)
    # each directory: the number of its entries; tag, type, count, offset; no directory after it
    main = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, TiffTags.LONG, 1, 26, 0)
    nested = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, TiffTags.UNDEFINED, len(comment), 44, 0)
    return b"Exif\0\0" + header + main + nested + comment
