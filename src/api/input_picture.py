"""Pictures that clients send: a file in base64 or at an address -> an upright RGB picture, or why not."""

import base64
import io
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated

# Pillow knows a format once its plugin is imported
from PIL import Image, ImageOps, PngImagePlugin, WebPImagePlugin  # noqa: F401
from PIL.JpegImagePlugin import JpegImageFile
from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError, PydanticKnownError

from src.api.limits import MIN_SIZE

FORMATS = ("PNG", "JPEG", "WEBP")
_SIGNATURE = re.compile(rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)
"""What a file of one of these begins with."""
MAX_SIDE = 4096
"""Width and height in pixels. Such a picture takes 64 MiB, and three times that while it is converted."""
MAX_READS = 100_000
"""A PNG of the largest size has some 10,000 chunks; over a million empty ones Pillow takes seconds."""
MAX_SCANS = 40
"""Of a progressive JPEG, which usually has ten. Each takes 25 ms at the largest size, and 33 bytes of the file."""
TRANSPARENT = "transparent"

_DATA_URL = re.compile(r"\s*data:[^,]*;base64,", re.IGNORECASE)
_OTHER_SPELLINGS = {"%2B": "+", "%2b": "+", "%2F": "/", "%2f": "/", "%3D": "=", "%3d": "=", "-": "+", "_": "/"}
"""Of base64's symbols, in addresses. Decoding every percent sign of a large text would take seconds."""


class _File(io.BytesIO):
    """A file that is read in ``MAX_READS`` pieces at most."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise OSError("too many pieces")
        return super().read(size)


def _unusable(why: str) -> PydanticCustomError:
    # not as a template, whose braces would be filled in
    return PydanticCustomError("unusable_picture", "{why}", {"why": why})


def _picture(value: object) -> object:
    """Decodes a picture that is given in base64, as a ``data:`` URL, or as a file's bytes."""
    match value:
        case str():
            return decode(_file(value))
        case bytes():
            return decode(value)
        case Image.Image() | None:
            return value
        case _:
            raise PydanticKnownError("string_type")


InputPicture = Annotated[Image.Image | None, BeforeValidator(_picture), WithJsonSchema({"type": "string"})]


def _file(text: str) -> bytes:
    try:
        if data_url := _DATA_URL.match(text):
            text = text[data_url.end() :]
        for spelling, symbol in _OTHER_SPELLINGS.items():
            text = text.replace(spelling, symbol)
        symbols = text.encode("ascii").translate(None, b" \t\r\n").rstrip(b"=")
        return base64.b64decode(symbols + b"=" * (-len(symbols) % 4), validate=True)
    except ValueError:
        raise _unusable("must be a file in base64, a data: URL with one, or its http or https address") from None


def decode(file: bytes) -> Image.Image:
    """Decodes a PNG, JPEG or WebP file, of an animation the first frame.

    Returns:
        An upright RGB picture of at most ``MAX_SIDE`` pixels each way, white where the file's is transparent; its
        ``info`` says under ``TRANSPARENT`` whether any of it is by half or more.

    Raises:
        PydanticCustomError: if the file is damaged, too large or of another format.
    """
    too_large = _unusable(f"must have at most {MAX_SIDE} x {MAX_SIDE} pixels")
    if not file:
        raise _unusable("is empty")
    if not _SIGNATURE.match(file):
        raise _unusable("must be a PNG, JPEG or WebP file")
    try:
        # reads the header only
        picture = Image.open(_File(file), formats=FORMATS)
        if max(picture.size) > MAX_SIDE:
            raise too_large
        if isinstance(picture, JpegImageFile) and file.count(b"\xff\xda") > MAX_SCANS:
            raise OSError("too many scans")
        picture.load()
        transparent = picture.info.get("transparency")
        if picture.format == "PNG" and file[24] == 16 and transparent is not None:
            # Pillow turns the pixels' 16 bits into 8, but not those of the colour that is transparent
            grey = isinstance(transparent, int)
            picture.info["transparency"] = transparent >> 8 if grey else tuple(value >> 8 for value in transparent)
        # an EXIF block that cannot be read tells no orientation
        with suppress(Exception):
            ImageOps.exif_transpose(picture, in_place=True)
        return _on_white(picture)
    except PydanticCustomError:
        raise
    except Image.DecompressionBombError:
        raise too_large from None
    except Exception:
        # Pillow's decoders raise errors of a dozen classes
        raise _unusable("is damaged or cut off") from None


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # 16 bit
        picture = picture.point(lambda value: value / 256, "L")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.info[TRANSPARENT] = bool(picture.getchannel("A").point(lambda alpha: 255 * (alpha < 128)).getbbox())
    # alpha_composite would hold the GIL for half a second
    white.paste(picture, mask=picture)
    return white


def fitted_size(size: tuple[int, int], max_size: int, asked: Mapping[str, int]) -> tuple[int, int]:
    """Returns the width and height at which a picture is used, multiples of 8 in pixels.

    Args:
        size: the picture's own width and height.
        max_size: the model's largest.
        asked: ``width``, ``height`` or both. If one of them, the other keeps the picture's proportions; if none, the
            picture is scaled down to ``max_size``, and never up.

    The side that keeps the proportions can be out of bounds.
    """
    width, height = size
    smallest = 0
    if "width" in asked:
        wanted, own = asked["width"], width
    elif "height" in asked:
        wanted, own = asked["height"], height
    else:
        wanted, own, smallest = min(max_size, max(size)), max(size), MIN_SIZE

    def scaled(side: int) -> int:
        return max(side * wanted // own // 8 * 8, smallest)

    return asked.get("width", scaled(width)), asked.get("height", scaled(height))


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Stretches ``picture`` to ``size``, as diffusers does."""
    return picture.resize(size, Image.Resampling.LANCZOS)


def resized_mask(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Returns the mask that diffusers makes of ``picture``, in mode L: 255 where it is light, 0 elsewhere."""
    return resized(picture.convert("L"), size).point(lambda value: 255 * (value >= 128))


def mask_warnings(mask: Image.Image, used: Image.Image, image: Image.Image) -> list[str]:
    """Warns about what a client may not have meant.

    Args:
        mask: as it was sent.
        used: what ``resized_mask`` made of it.
        image: the picture, as it was sent.
    """
    warnings = []
    if mask.info.get(TRANSPARENT):
        warnings.append("mask: its transparent parts count as white, and were painted anew")
    if not 0.95 < (mask.width * image.height) / (mask.height * image.width) < 1.05:
        sizes = f"{mask.width} x {mask.height} for {image.width} x {image.height}"
        warnings.append(f"mask: stretched, because its proportions are not those of image: {sizes}")
    if not used.getbbox():
        warnings.append("mask: nowhere white, so nothing was painted anew")
    return warnings
