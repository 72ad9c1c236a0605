"""Pictures for tests to send, and their files."""

import base64
import io
from typing import Any

from PIL import Image


def plain(color: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def file(picture: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    saved = io.BytesIO()
    picture.save(saved, file_format, **options)
    return saved.getvalue()


def in_base64(picture: Image.Image, file_format: str = "PNG", **options: Any) -> str:
    return base64.b64encode(file(picture, file_format, **options)).decode()


_RAMP = {"image": in_base64(Image.linear_gradient("L").convert("RGB"))}
TASKS: dict[str, dict[str, str]] = {
    "text": {},
    "picture": _RAMP,
    "mask": _RAMP | {"mask": in_base64(Image.radial_gradient("L"))},
}
"""The pictures that a job of a task comes with, of 256 x 256."""
