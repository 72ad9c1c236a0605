"""The bounds of a request's fields: those that all models share, and a model's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from src.schedulers import SCHEDULERS

MAX_PROMPT_LENGTH = 2_000
"""In characters: well beyond the text encoder's 77 tokens."""
INVISIBLE = (
    r"\u0000-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f"
    r"\u205f-\u206f\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8"
)
"""What shows nothing, up to U+FFFF: white space, control characters, Default_Ignorable_Code_Point, the Braille blank.
As a class of a regular expression that Python and JavaScript read alike, unlike ``\\s``."""
MIN_SIZE = 64
"""Width and height in pixels: latents of 8 x 8, which the UNet still halves three times."""
MAX_STEPS = 150
MAX_GUIDANCE = 30
"""This and ``MAX_STEPS`` are the maxima of AUTOMATIC1111's sliders."""
MAX_IMAGES = 4
"""As in Cog's Stable Diffusion. Four PNGs of 1024 x 1024 come near the platform's limit for a result."""
RANDOM_SEED = -1
"""Means the default, as in web UIs and RunPod's public endpoints."""
MAX_SEED = 2**53 - 1
"""The largest integer that a JSON client can hold exactly (IEEE 754 double)."""


@dataclass(frozen=True)
class ModelLimits:
    """A model's defaults for a request, and its limits.

    ``native_size`` and ``max_size`` are in pixels, for width and height alike.
    """

    native_size: int
    max_size: int
    scheduler: str
    schedulers: Mapping[str, int] = field(
        default_factory=lambda: {name: each.max_steps or MAX_STEPS for name, each in SCHEDULERS.items()}
    )
    """Those that the model can use, its own included, and the most denoising steps of each."""
    inpaints_only: bool = False
    """Whether the model was made to paint over a part of a picture, and can do nothing else."""
