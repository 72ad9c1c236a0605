"""One Hypothesis strategy per request field, with values that every model accepts."""

import re
from typing import Any

from hypothesis import strategies as st

from src.api.limits import INVISIBLE, MAX_SEED, ModelLimits
from src.api.request import ImageRequest
from src.schedulers import SCHEDULERS

LIMITS = ModelLimits(native_size=64, max_size=128, scheduler="PNDM")
"""The limits of the smallest model in the tests."""

SIZES = st.integers(8, 16).map(lambda eighths: 8 * eighths)
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=50).filter(
    lambda text: re.search(f"[^{INVISIBLE}\U00010000-\U0010ffff]", text)
)
"""Nothing but invisible characters would count as empty."""

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": TEXT,
    "negative_prompt": TEXT | st.just(""),
    "width": SIZES,
    "height": SIZES,
    "num_inference_steps": st.integers(1, min(LIMITS.schedulers.values())),
    "guidance_scale": st.floats(0, 30) | st.integers(0, 30),
    "seed": st.integers(0, MAX_SEED - 3),
    "num_images": st.integers(1, 4),
    "output_format": st.sampled_from(["png", "jpeg", "webp"]),
    "output_quality": st.integers(1, 100),
    "scheduler": st.sampled_from([*SCHEDULERS]),
}

PER_IMAGE = set(FIELDS) - set(ImageRequest.shared_fields())


@st.composite
def two_requests(draw: st.DrawFn, field: str) -> tuple[ImageRequest, ImageRequest]:
    """Draws two requests that differ only in ``field``."""
    first = {name: draw(values) for name, values in FIELDS.items()}
    # requests are compared, not inputs: parsing trims space and makes 7 of 7.0
    one = ImageRequest.parse(first, LIMITS)
    other = draw(FIELDS[field].map(lambda value: ImageRequest.parse(first | {field: value}, LIMITS)).filter(one.__ne__))
    return one, other
