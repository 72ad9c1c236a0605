"""Every environment variable that the worker reads, validated once at startup."""

import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from src.errors import StartError, shortened
from src.setting_types import Address, AnyCase, BucketName, Integer, Loras, Region, Secret, Token

DEFAULT_MODEL_ID = "CompVis/stable-diffusion-v1-4"
DEFAULT_MODEL_REVISION = "133a221b8aa7292a167afc5127cb63fb5005638b"
"""The commit of ``DEFAULT_MODEL_ID`` that is used by default."""
DEMO_MODEL_ID = "demo"
"""The embedded model."""


class Settings(BaseModel):
    """The worker's settings. Each field is read from the environment variable of its name in capitals."""

    # The README's table and the settings in RunPod's Hub are generated from these fields.

    model_config = ConfigDict(frozen=True, str_strip_whitespace=True)

    model_id: str | None = Field(
        None,
        title="Model",
        description="Hub id, directory, `.safetensors` file (a path, or `owner/name/file.safetensors` on the hub), or "
        "`demo` for the embedded model. "
        f"Default: `{DEFAULT_MODEL_ID}` on RunPod or with a CUDA device, `demo` otherwise",
        json_schema_extra={
            "description": "Hub id, directory or .safetensors file of another Stable Diffusion 1.x or 2.x "
            "model; /model is the image's own",
            "default": "/model",
        },
    )
    model_revision: str | None = Field(
        None,
        title="Model revision",
        description="Hub revision. Default: a pinned commit for the default model, `main` for others",
    )
    hf_token: Token | None = Field(
        None, title="Hugging Face token", description="Hugging Face token, for gated or private models"
    )
    base_model: str | None = Field(
        None,
        title="Base model",
        description="Directory or hub id of the model that lends a single file all but the weights: configurations, "
        f"tokenizer, scheduler, safety checker. Default: `/model` in an image with a model, else `{DEFAULT_MODEL_ID}`",
        json_schema_extra={"default": "/model"},
    )
    lora: Loras | None = Field(
        None,
        title="LoRAs",
        description="LoRAs to merge into the weights at start: `.safetensors` files, paths or "
        "`owner/name/file.safetensors` on the hub, each with `:scale` behind it if that is not 1, separated by commas",
        json_schema_extra={"advanced": False},
    )
    attention_slicing: Annotated[Literal["auto", "max", "off"], AnyCase] = Field(
        "auto",
        title="Attention slicing",
        description="Computes attention for half of the heads at a time, for one, or for all",
        json_schema_extra={"advanced": False},
    )
    acceleration: Annotated[Literal["off", "graphs"], AnyCase] = Field(
        "graphs",
        title="Acceleration",
        description="`graphs` uses CUDA graphs and a GPU's fastest memory layout, `off` neither",
    )
    safety_checker: bool = Field(
        True,
        title="Safety checker",
        description="With `false`, pictures are not checked, and none are blanked",
        json_schema_extra={"advanced": False},
    )
    max_concurrency: Integer = Field(
        2,
        ge=1,
        le=100,
        title="Jobs at once",
        description="Jobs that the worker holds at once: one batch on the GPU, the rest queued; "
        "from 3 on, queued jobs can share a batch",
        json_schema_extra={"advanced": False},
    )
    max_batch_images: Integer = Field(
        4, ge=1, le=64, title="Images in one batch", description="Images in one batch, from one job or several"
    )
    stall_timeout: Integer = Field(
        300,
        ge=1,
        le=3600,
        title="Stall timeout",
        description="Seconds without a denoising step after which the GPU counts as lost",
    )
    max_result_bytes: Integer = Field(
        10_000_000,
        ge=1_000,
        le=20_000_000,  # the platform's limit for /runsync
        title="Largest result",
        description="Largest result in bytes; the default is the platform's limit for `/run`",
    )
    bucket_endpoint_url: Address | None = Field(
        None,
        title="Bucket endpoint URL",
        description="S3-compatible storage for pictures; results then hold links. Requires the next three as well",
    )
    bucket_access_key_id: Token | None = Field(
        None, title="Bucket access key ID", description="Access key ID for the bucket"
    )
    bucket_secret_access_key: Secret | None = Field(
        None, title="Bucket secret access key", description="Secret access key for the bucket"
    )
    bucket_name: BucketName | None = Field(None, title="Bucket name", description="The bucket's name")
    bucket_region: Region | None = Field(
        None,
        title="Bucket region",
        description="The region that requests are signed for. Default: from the address, else `us-east-1`",
    )

    @field_validator("model_id", "base_model")
    @classmethod
    def _embedded_model(cls, value: str | None) -> str | None:
        return DEMO_MODEL_ID if value and value.lower() == DEMO_MODEL_ID else value

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] = os.environ, other_faults: Sequence[str] = ()
    ) -> "Settings":
        """Reads the settings; an empty variable counts as unset.

        Args:
            environment: the variables.
            other_faults: what is wrong with those that are not settings.

        Raises:
            StartError: naming each bad variable, its value and what is allowed.
        """
        stripped = {name: environment.get(name.upper(), "").strip() for name in cls.model_fields}
        given = {name: value for name, value in stripped.items() if value}
        faults = [*other_faults, *_missing_of_bucket(given.keys())]
        try:
            settings = cls.model_validate(given)
        except ValidationError as error:
            faults += map(_format_error, error.errors())
        if faults:
            raise StartError("; ".join([*faults, *typo_hints(environment)]))
        return settings


def _missing_of_bucket(given: Collection[str]) -> list[str]:
    """Describes what a bucket lacks, if any setting of one is given."""
    names = ("bucket_endpoint_url", "bucket_access_key_id", "bucket_secret_access_key", "bucket_name")
    missing = ", ".join(name.upper() for name in names if name not in given)
    begun = any(name in given for name in (*names, "bucket_region"))
    return [f"{missing} not set: set all of BUCKET_* or none"] if missing and begun else []


def bounds(name: str) -> tuple[int, int]:
    """The smallest and the largest value of an integer setting."""
    limits = {type(each): each for each in Settings.model_fields[name].metadata}
    return int(limits[Ge].ge), int(limits[Le].le)


def typo_hints(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Returns a line for each environment variable whose name is almost that of a setting."""
    names = [name.upper() for name in Settings.model_fields]
    lines = []
    for variable in environment.keys() - set(names):
        for near in difflib.get_close_matches(variable.upper(), names, n=1, cutoff=0.8):
            lines.append(f"{shortened(variable)} is not a setting: did you mean {near}?")
    return sorted(lines)


def _format_error(error: ErrorDetails) -> str:
    """Words one of pydantic's errors for the operator."""
    name = str(error["loc"][0])
    match error["type"]:
        case "lora":
            # whole, because its end may be at fault
            return f"{name.upper()}={error['input']}: {error['msg']}"
        case "secret":
            return f"{name.upper()}: {error['msg']}"
        case "string_type" | "string_unicode":
            return f"{name.upper()}: must be text in UTF-8"
        case "literal_error":
            message = f"must be {error['ctx']['expected']}".replace("'", "")
        case "bool_parsing":
            message = "must be true or false"
        case "int_parsing" | "int_parsing_size" | "greater_than_equal" | "less_than_equal":
            minimum, maximum = bounds(name)
            message = f"must be an integer from {minimum} to {maximum}"
        case _:
            message = error["msg"]
    return f"{name.upper()}={shortened(error['input'])}: {message}"


def on_runpod(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a worker of a RunPod endpoint: these are given an address to take jobs from."""
    return bool(environment.get("RUNPOD_WEBHOOK_GET_JOB"))


def on_pod(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this runs on a RunPod Pod, where no jobs arrive."""
    return bool(environment.get("RUNPOD_POD_ID")) and not on_runpod(environment)
