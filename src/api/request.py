"""What ``job["input"]`` may hold, and what it means."""

import math
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from src.api.cross_checks import faults_across, num_steps_done
from src.api.input_picture import InputPicture, fitted_size, mask_warnings, resized, resized_mask
from src.api.limits import (
    INVISIBLE,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_PROMPT_LENGTH,
    MAX_SEED,
    MAX_STEPS,
    MIN_SIZE,
    RANDOM_SEED,
    ModelLimits,
)
from src.api.messages import MAX_UNKNOWN_FIELDS, describe_errors, kind_of, quoted
from src.errors import InvalidInput, shortened
from src.schedulers import SCHEDULERS

Task = Literal["text", "picture", "mask"]
"""What a picture is made from, beside the prompt: nothing, a picture, or the part of one that a mask leaves."""
OutputFormat = Literal["png", "jpeg", "webp"]
"""The names that Replicate's and OpenAI's image APIs share; Pillow, media types and file endings use them too."""

_VISIBLE = re.compile(f"[^{INVISIBLE}\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class _Parsing:
    """A request that is being read: the model's limits, and the fields that were found right so far."""

    limits: ModelLimits
    right: dict[str, Any] = field(default_factory=dict)


class PerImage:
    """Marks a field in which the images of one batch may differ. A batch shares all others."""


def _whole_number(value: object) -> object:
    """JSON has only one kind of number, so 512.0 is the integer 512."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real_number(value: object) -> object:
    try:
        return float(value) if type(value) is int else value
    except OverflowError:
        return math.inf


Integer = Annotated[StrictInt, BeforeValidator(_whole_number)]
Number = Annotated[StrictFloat, BeforeValidator(_real_number), Field(allow_inf_nan=False)]
# the bounds come first, or they would be lost in the JSON Schema of a field that can be None
Strength = Annotated[StrictFloat, Field(gt=0, le=1, allow_inf_nan=False), BeforeValidator(_real_number)]


class ImageRequest(BaseModel):
    """One job's input, complete and within bounds."""

    # Everything that depends on a field is derived from its line here: the pipeline's call, what can share a batch, a
    # job's output, a picture's parameters, the JSON Schemas, the README's table.

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, arbitrary_types_allowed=True)

    prompt: Annotated[StrictStr, PerImage] = Field(description="What to generate")
    negative_prompt: Annotated[StrictStr, PerImage] = Field("", description="What to keep out of the picture")
    width: Integer = Field(ge=MIN_SIZE, multiple_of=8, description="In pixels; by default the model's native size")
    height: Integer = Field(ge=MIN_SIZE, multiple_of=8, description="In pixels; by default the model's native size")
    num_inference_steps: Integer = Field(50, ge=1, le=MAX_STEPS, description="Denoising steps")
    guidance_scale: Number = Field(7.5, ge=0, le=MAX_GUIDANCE, description="How closely to follow the prompt")
    seed: Annotated[Integer, PerImage] = Field(
        RANDOM_SEED,
        ge=RANDOM_SEED,
        le=MAX_SEED,
        description="Seed of the first image; image i uses seed + i; -1 draws one below 2^32",
    )
    num_images: Annotated[Integer, PerImage] = Field(1, ge=1, le=MAX_IMAGES, description="Number of images")
    output_format: Annotated[OutputFormat, PerImage] = Field("png", description="The picture's file format")
    output_quality: Annotated[Integer, PerImage] = Field(
        90, ge=1, le=100, description="Quality of `jpeg` and `webp`; `png` is lossless"
    )
    scheduler: str = Field(description="Sampler; by default the model's own. `LCM` does at most 50 steps")
    image: Annotated[InputPicture, PerImage] = Field(
        None,
        description="A picture to start from: a PNG, JPEG or WebP file in base64, as a `data:` URL, or its address; "
        "up to 4,096 x 4,096",
    )
    mask: Annotated[InputPicture, PerImage] = Field(
        None, description="A picture that is white where `image` is to be painted anew, and black where it stays"
    )
    strength: Strength | None = Field(
        None, description="How much of `image` is changed; by default 0.8, and 1 with `mask`"
    )

    _warnings: list[str] = PrivateAttr(default_factory=list)

    @classmethod
    def parse(cls, job_input: object, limits: ModelLimits, known_faults: Collection[str] = ()) -> Self:
        """Validates a job's input for a model.

        Args:
            job_input: ``job["input"]``, as parsed from JSON, with pictures in base64, as files or decoded.
            limits: the model's defaults and bounds.
            known_faults: those of the job that have been found before.

        Raises:
            InvalidInput: listing every fault.
        """
        if not isinstance(job_input, dict):
            raise InvalidInput(f'must be an object such as {{"prompt": "..."}}, got {kind_of(job_input)}')
        unknown = len(job_input.keys() - cls.model_fields.keys())
        if unknown > MAX_UNKNOWN_FIELDS:
            # with a million of them, pydantic would block the event loop for seconds
            raise InvalidInput(f"{unknown:,} unknown fields; the fields are {', '.join(cls.model_fields)}")
        given = {name for name, value in job_input.items() if value is not None}
        parsing, faults = _Parsing(limits), [*known_faults]
        try:
            request = cls.model_validate(job_input, context=parsing)
        except ValidationError as error:
            faults += describe_errors(error.errors(), cls.model_fields)
        faults += faults_across(limits, given, parsing.right)
        if faults:
            raise InvalidInput(*faults)
        asked = {name: getattr(request, name) for name in ("width", "height") if name in given}
        return request._fitted(asked, limits.max_size)

    def _fitted(self, asked: dict[str, int], max_size: int) -> Self:
        """Returns the request with its pictures at the size at which they are used, which is the result's."""
        if not self.image:
            return self
        width, height = size = fitted_size(self.image.size, max_size, asked)
        mask = self.mask and resized_mask(self.mask, size)
        pictures = {"image": resized(self.image, size), "mask": mask}
        fitted = self.model_copy(update={"width": width, "height": height} | pictures)
        if self.mask and mask:
            fitted._warnings += mask_warnings(self.mask, mask, self.image)
        return fitted

    @property
    def warnings(self) -> list[str]:
        """What the client may not have meant."""
        return self._warnings

    @classmethod
    def shared_fields(cls) -> list[str]:
        """The names of the fields that all images of a batch share."""
        return [name for name, field in cls.model_fields.items() if PerImage not in field.metadata]

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Requests with the same key can share a batch."""
        return (self.task, *(getattr(self, name) for name in self.shared_fields()))

    @property
    def task(self) -> Task:
        return "mask" if self.mask else "picture" if self.image else "text"

    @property
    def denoising_steps(self) -> int:
        """The steps that are done: with ``strength`` below 1, those at the start are left out."""
        return num_steps_done(self.num_inference_steps, self.strength)

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [self.seed + i for i in range(self.num_images)]

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, job_input: dict[str, Any], info: ValidationInfo[_Parsing]) -> dict[str, Any]:
        limits = info.context.limits
        own = {"width": limits.native_size, "height": limits.native_size, "scheduler": limits.scheduler}
        given = {shortened(name): value for name, value in job_input.items() if value is not None}
        if "image" in given:
            # diffusers' defaults
            own["strength"] = 1.0 if "mask" in given else 0.8
        return own | given

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _plain_text(cls, value: str, info: ValidationInfo[_Parsing]) -> str:
        value = value.replace("\r\n", "\n")
        text = value.strip() if _VISIBLE.search(value) else ""
        minimum, faults = int(info.field_name == "prompt"), list[str]()
        if _LONE_SURROGATE.search(value):
            faults.append("must be valid Unicode, has a lone surrogate")
        if _CONTROL_CHARACTER.search(value):
            faults.append("must not hold control characters other than newline and tab")
        if not minimum <= len(text) <= MAX_PROMPT_LENGTH:
            faults.append(f"must have {minimum} to {MAX_PROMPT_LENGTH:,} characters, got {len(text):,}")
        if faults:
            raise PydanticCustomError("text", "{faults}", {"faults": ", and ".join(faults)})
        return text

    @field_validator("seed")
    @classmethod
    def _drawn(cls, value: int) -> int:
        return secrets.randbits(32) if value == RANDOM_SEED else value

    @field_validator("width", "height")
    @classmethod
    def _not_too_large(cls, value: int, info: ValidationInfo[_Parsing]) -> int:
        if value > info.context.limits.max_size:
            raise PydanticCustomError(
                "too_large",
                "must be at most {maximum}, got {value}",
                {"maximum": info.context.limits.max_size, "value": shortened(value)},
            )
        return value

    @field_validator("scheduler", mode="before")
    @classmethod
    def _known_scheduler(cls, value: object, info: ValidationInfo[_Parsing]) -> object:
        usable = info.context.limits.schedulers
        if isinstance(value, str) and value not in usable:
            why = ", which does not work with this model" if value in SCHEDULERS else ""
            raise PydanticCustomError(
                "unknown_scheduler",
                "must be one of {names}, got {value}{why}",
                {"names": ", ".join(usable), "value": quoted(value), "why": why},
            )
        return value

    @field_validator("*")
    @classmethod
    def _is_right(cls, value: object, info: ValidationInfo[_Parsing]) -> object:
        # the last validator, so that it sees only what the others have accepted
        info.context.right[str(info.field_name)] = value
        return value
