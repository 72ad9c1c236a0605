"""A picture, and its file, which includes the parameters that it was generated with."""

import io
import json
import re
import struct
from dataclasses import dataclass
from typing import get_args

# without this import, the first WebP picture would make Pillow import the plugins of all formats
from PIL import ExifTags, Image, TiffTags, WebPImagePlugin  # noqa: F401
from PIL.PngImagePlugin import PngInfo

from src.api.request import ImageRequest, OutputFormat

NAMED_FIELDS = {"width", "height", "num_inference_steps", "guidance_scale", "scheduler", "strength"}
"""Fields that Stable Diffusion tools have their own names for in a picture's parameters."""


@dataclass(frozen=True)
class Picture:
    """One generated image, RGB, of the request's size.

    ``nsfw`` says whether the safety checker blanked it; None without a checker.
    """

    image: Image.Image
    seed: int
    nsfw: bool | None


def parameters(request: ImageRequest, seed: int, model_name: str) -> str:
    """Returns the text in which Stable Diffusion tools look for a picture's parameters."""
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
    if request.strength:
        values["Denoising strength"] = request.strength
    for name in ImageRequest.shared_fields():
        value = getattr(request, name)
        if name not in NAMED_FIELDS and value != ImageRequest.model_fields[name].default:
            values[name.replace("_", " ").capitalize()] = value
    values["Model"] = model_name
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items()))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    """Quotes a value as web UIs do, if it would end too early without quotes, or lose its own."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search('[,:\n]|^"', text) else text


def encode(image: Image.Image, text: str, output_format: OutputFormat, quality: int) -> bytes:
    """Encodes ``image``, with ``text`` where Stable Diffusion tools look for it.

    That is the ``parameters`` chunk of a PNG, and EXIF's UserComment in other formats.

    Args:
        image: the picture, RGB.
        text: what ``parameters`` returns.
        output_format: of the file.
        quality: 1 to 100, for lossy formats.
    """
    file = io.BytesIO()
    if output_format == "png":
        info = PngInfo()
        # sharp takes tEXt's Latin-1 for UTF-8
        add = info.add_text if text.isascii() else info.add_itxt
        add("parameters", text)
        image.save(file, format="PNG", pnginfo=info)
    else:
        image.save(file, format=output_format, quality=quality, exif=_exif(b"UNICODE\0" + text.encode("utf-16-be")))
    return file.getvalue()


def warm_up() -> None:
    """Encodes a picture in each format, so that Pillow has imported its plugins before the first job."""
    for output_format in get_args(OutputFormat):
        encode(Image.new("RGB", (8, 8)), "", output_format, quality=90)


def _exif(comment: bytes) -> bytes:
    """EXIF with ``comment`` as its UserComment, in big-endian order.

    Pillow's Exif class writes bytes as BYTE, but the standard requires UNDEFINED here, and tools read nothing else.
    """
    header = struct.pack(">2sHI", b"MM", 42, 8)
    # each directory: the number of its entries; tag, type, count, offset; no directory after it
    main = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, TiffTags.LONG, 1, 26, 0)
    nested = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, TiffTags.UNDEFINED, len(comment), 44, 0)
    return b"Exif\0\0" + header + main + nested + comment
