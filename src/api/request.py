"""What ``job["input"]`` may hold, and what the client reads when it holds something else."""

import difflib
import math
import re
import secrets
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from src.errors import JobError
from src.schedulers import SCHEDULERS

OutputFormat = Literal["png", "jpeg", "webp"]
"""The names that Replicate's and OpenAI's image APIs share; also Pillow's, media types' and file endings."""

MAX_PROMPT_LENGTH = 2_000
"""In characters: well beyond the text encoder's 77 tokens."""
MIN_SIZE = 64
"""Width and height in pixels: 8 x 8 latents, which the UNet still halves three times."""
MAX_STEPS = 150
MAX_GUIDANCE = 30
"""Both are where the sliders of AUTOMATIC1111's web UI end."""
MAX_IMAGES = 4
"""As in Cog's Stable Diffusion. Four PNGs of 1024 x 1024 come near the platform's limit for a result."""
MAX_SEED = 2**53 - 1
"""The largest integer that a JSON client can hold exactly (IEEE 754 double)."""
OTHER_NAMES = {
    "batch_size": "num_images",
    "n": "num_images",
    "n_iter": "num_images",
    "num_images_per_prompt": "num_images",
    "num_outputs": "num_images",
    "num_samples": "num_images",
    "samples": "num_images",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "sampler": "scheduler",
    "sampler_index": "scheduler",
    "sampler_name": "scheduler",
}
"""Names that web UIs and other workers use, and that likeness to a field's name would not find."""
MAX_REPORTED_ERRORS = 20
MAX_QUOTED_CHARACTERS = 40
"""What an error quotes of a value before it is cut."""


@dataclass(frozen=True)
class ModelLimits:
    """A model's defaults for a request, and the largest image that it generates.

    ``native_size`` and ``max_size`` are in pixels, for width and height alike.
    """

    native_size: int
    max_size: int
    scheduler: str


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _whole_number(value: object) -> object:
    """JSON has one kind of number: 512.0 is the integer 512."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real_number(value: object) -> object:
    try:
        return float(value) if type(value) is int else value
    except OverflowError:
        return math.inf


def _plain_text(value: str) -> str:
    value = value.replace("\r\n", "\n")
    if _LONE_SURROGATE.search(value):
        raise PydanticCustomError("lone_surrogate", "must be valid Unicode, has a lone surrogate")
    if _CONTROL_CHARACTER.search(value):
        raise PydanticCustomError("control_character", "must not hold control characters other than newline and tab")
    return value.strip()


Integer = Annotated[StrictInt, BeforeValidator(_whole_number)]
Number = Annotated[StrictFloat, BeforeValidator(_real_number), Field(allow_inf_nan=False)]
Size = Annotated[Integer, Field(ge=MIN_SIZE, multiple_of=8)]
Text = Annotated[StrictStr, AfterValidator(_plain_text)]


class FieldScope(Enum):
    """Marks a field in which the images of one batch may differ."""

    IMAGE = "image"
    """One image's own: the pipeline takes a value for each image."""
    OUTPUT = "output"
    """Of no concern to the pipeline."""


class ImageRequest(BaseModel):
    """One job's input, complete and within bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[Text, FieldScope.IMAGE, Field(description="What to generate")]
    negative_prompt: Annotated[Text, FieldScope.IMAGE, Field(description="What to keep out of the picture")] = ""
    width: Annotated[Size, Field(description="Width in pixels")]
    height: Annotated[Size, Field(description="Height in pixels")]
    num_inference_steps: Annotated[Integer, Field(ge=1, le=MAX_STEPS, description="Denoising steps")] = 50
    guidance_scale: Annotated[Number, Field(ge=0, le=MAX_GUIDANCE, description="How closely to follow the prompt")] = (
        7.5
    )
    seed: Annotated[
        Integer,
        FieldScope.IMAGE,
        Field(ge=0, le=MAX_SEED, description="Seed of the first image; image i uses seed + i"),
    ] = Field(default_factory=lambda: secrets.randbits(32))
    num_images: Annotated[Integer, FieldScope.IMAGE, Field(ge=1, le=MAX_IMAGES, description="Number of images")] = 1
    output_format: Annotated[OutputFormat, FieldScope.OUTPUT, Field(description="The picture's file format")] = "png"
    output_quality: Annotated[
        Integer, FieldScope.OUTPUT, Field(ge=1, le=100, description="Quality of `jpeg` and `webp`; `png` loses nothing")
    ] = 90
    scheduler: Annotated[str, Field(description="Sampler")]

    @classmethod
    def parse(cls, job_input: object, limits: ModelLimits) -> Self:
        """Validates a job's input for a model.

        Args:
            job_input: ``job["input"]``, as JSON made it.
            limits: the model's defaults and bounds.

        Raises:
            JobError: naming every fault at once.
        """
        if not isinstance(job_input, dict):
            raise JobError(f'invalid input: must be an object such as {{"prompt": "..."}}, got {_kind(job_input)}')
        try:
            return cls.model_validate(job_input, context=limits)
        except ValidationError as error:
            errors = error.errors()
            reported = [_format_error(each) for each in errors[:MAX_REPORTED_ERRORS]]
            if len(errors) > len(reported):
                reported.append(f"and {len(errors) - len(reported)} more")
            raise JobError(f"invalid input: {'; '.join(reported)}") from None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, job_input: dict[str, Any], info: ValidationInfo[ModelLimits]) -> dict[str, Any]:
        limits = info.context
        own = {"width": limits.native_size, "height": limits.native_size, "scheduler": limits.scheduler}
        return own | {_printable(name): value for name, value in job_input.items() if value is not None}

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _length(cls, value: str, info: ValidationInfo[ModelLimits]) -> str:
        least = 1 if info.field_name == "prompt" else 0
        if not least <= len(value) <= MAX_PROMPT_LENGTH:
            raise PydanticCustomError(
                "length",
                "must have {least} to {most} characters, got {length}",
                {"least": least, "most": f"{MAX_PROMPT_LENGTH:,}", "length": f"{len(value):,}"},
            )
        return value

    @field_validator("width", "height")
    @classmethod
    def _not_too_large(cls, value: int, info: ValidationInfo[ModelLimits]) -> int:
        if value > info.context.max_size:
            raise PydanticCustomError(
                "too_large",
                "must be at most {most}, got {value}",
                {"most": info.context.max_size, "value": _short(value)},
            )
        return value

    @field_validator("scheduler", mode="before")
    @classmethod
    def _known_scheduler(cls, value: object, info: ValidationInfo[ModelLimits]) -> object:
        if isinstance(value, str) and value not in (*SCHEDULERS, info.context.scheduler):
            raise PydanticCustomError(
                "unknown_scheduler",
                "must be one of {names}, got {value}",
                {"names": ", ".join(SCHEDULERS), "value": _short(value)},
            )
        return value

    @model_validator(mode="after")
    def _last_seed(self) -> Self:
        most = MAX_SEED - self.num_images + 1
        if self.seed > most:
            raise PydanticCustomError(
                "last_seed",
                "seed: must be at most {most} for {num_images} images, got {seed}",
                {"most": most, "num_images": self.num_images, "seed": self.seed},
            )
        return self

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Images of requests with the same key may share a batch: the pipeline takes one value of each for all."""
        return tuple(
            getattr(self, name)
            for name, field in type(self).model_fields.items()
            if not any(isinstance(each, FieldScope) for each in field.metadata)
        )

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [self.seed + i for i in range(self.num_images)]


def _format_error(error: ErrorDetails) -> str:
    """One of pydantic's errors in the client's words."""
    if not error["loc"]:
        return error["msg"]
    name, value, bounds = _short(error["loc"][0]), error["input"], error.get("ctx", {})
    match error["type"]:
        case "missing":
            said = "required"
        case "extra_forbidden":
            near = _nearest_field(name)
            said = "unknown field" + (f", did you mean {near}?" if near else "")
        case "int_type" | "int_from_float":
            said = f"must be an integer, got {_kind(value)}"
        case "float_type":
            said = f"must be a number, got {_kind(value)}"
        case "string_type":
            said = f"must be a string, got {_kind(value)}"
        case "finite_number":
            said = "must be a finite number"
        case "greater_than_equal":
            said = f"must be at least {bounds['ge']}, got {_short(value)}"
        case "less_than_equal":
            said = f"must be at most {bounds['le']}, got {_short(value)}"
        case "multiple_of":
            said = f"must be a multiple of {bounds['multiple_of']}, got {_short(value)}"
        case "literal_error":
            allowed = bounds["expected"].replace("'", "")
            said = f"must be {allowed}, got {_short(value) if isinstance(value, str) else _kind(value)}"
        case _:
            said = error["msg"]
    return f"{name}: {said}"


def _nearest_field(name: str) -> str | None:
    """The field that a name most likely means: another tool's name for it, part of its words, or a misspelling."""
    fields = list(ImageRequest.model_fields)
    name = name.lower()
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    within = [field for field in fields if set(name.split("_")) <= set(field.split("_"))]
    if len(within) == 1:
        return within[0]
    return next(iter(difflib.get_close_matches(name, fields, n=1, cutoff=0.75)), None)


def _kind(value: object) -> str:
    """How an error names a JSON value: a number or a boolean as it is, others by their type."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"{value}".lower()
        case int() | float():
            return _short(value)
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _short(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    text = _printable(str(value))
    return text if len(text) <= MAX_QUOTED_CHARACTERS else text[:MAX_QUOTED_CHARACTERS] + "..."
