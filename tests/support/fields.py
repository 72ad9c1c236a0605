"""One Hypothesis strategy per request field, with values that every model accepts."""

import re
from typing import Any

from hypothesis import strategies as st

from src.api.limits import INVISIBLE, MAX_SEED, ModelLimits
from src.api.request import ImageRequest
from src.errors import InvalidInput
from src.schedulers import SCHEDULERS
from tests.support.pictures import in_base64, plain

LIMITS = ModelLimits(native_size=64, max_size=128, scheduler="PNDM")
"""The limits of the smallest model in the tests."""

SIZES = st.integers(8, 16).map(lambda eighths: 8 * eighths)
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=50).filter(
    lambda text: re.search(f"[^{INVISIBLE}\U00010000-\U0010ffff]", text)
)
"""Nothing but invisible characters would count as empty."""
PICTURES = st.sampled_from([in_base64(plain(color)) for color in ("red", "black", "white")])

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
    "image": PICTURES,
    "mask": PICTURES,
    "strength": st.floats(0.01, 1),
}

PER_IMAGE = set(FIELDS) - set(ImageRequest.shared_fields())


TASKS = {"text": set(), "picture": {"image", "strength"}, "mask": {"image", "mask", "strength"}}
"""The fields that only some tasks have."""


def valid(job_input: dict[str, Any]) -> bool:
    try:
        return bool(ImageRequest.parse(job_input, LIMITS))
    except InvalidInput:
        return False


def job_inputs(field: str) -> st.SearchStrategy[dict[str, Any]]:
    """Inputs of any task that has ``field``, complete, with fields that fit together."""
    tasks = [task for task, own in TASKS.items() if field in own or field not in TASKS["mask"]]
    others = FIELDS.keys() - TASKS["mask"]
    inputs = (st.fixed_dictionaries({name: FIELDS[name] for name in others | TASKS[task]}) for task in tasks)
    return st.one_of(*inputs).filter(valid)


@st.composite
def two_requests(draw: st.DrawFn, field: str) -> tuple[ImageRequest, ImageRequest]:
    """Draws two requests that differ only in ``field``."""
    first = draw(job_inputs(field))
    # requests are compared, not inputs: parsing trims space and makes 7 of 7.0
    one = ImageRequest.parse(first, LIMITS)
    others = FIELDS[field].map(lambda value: first | {field: value}).filter(valid)
    return one, draw(others.map(lambda other: ImageRequest.parse(other, LIMITS)).filter(one.__ne__))
