"""Every environment variable that the worker reads, validated once, at start."""

import difflib
import os
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from src.errors import StartError

DEFAULT_MODEL_ID = "CompVis/stable-diffusion-v1-4"
DEFAULT_MODEL_REVISION = "133a221b8aa7292a167afc5127cb63fb5005638b"
"""The commit of ``DEFAULT_MODEL_ID`` that the worker was made for."""
DEMO_MODEL_ID = "demo"
"""The embedded model."""


class Settings(BaseModel):
    """The worker's settings. Each field is read from the environment variable of its name in capitals.

    A number's upper bound is there to catch a slipped digit, unless it has a source.
    """

    model_config = ConfigDict(frozen=True, str_strip_whitespace=True)

    model_id: str | None = Field(
        None,
        description="Hub id, local directory, or `demo` for the embedded model. "
        f"Default: `{DEFAULT_MODEL_ID}` on a CUDA device, `demo` otherwise",
    )
    model_revision: str | None = Field(
        None, description="Hub revision. Default: a pinned commit for the default model, `main` for others"
    )
    hf_token: SecretStr | None = Field(None, description="Hugging Face token, for gated or private models")
    attention_slicing: Literal["auto", "max", "off"] = Field(
        "auto", description="`auto`, `max` or `off`: attention by half of the heads at a time, by one, or by all"
    )
    acceleration: Literal["off", "graphs"] = Field(
        "off", description="`off` or `graphs`: runs the UNet as CUDA graphs, which need more memory"
    )
    safety_checker: bool = Field(
        True, description="`true` or `false`; with `false` pictures are not checked, and none is blanked"
    )
    max_concurrency: int = Field(
        2,
        ge=1,
        le=100,
        description="1 to 100: jobs that the worker holds at once, one batch on the GPU and the rest queued",
    )
    max_batch_images: int = Field(4, ge=1, le=64, description="1 to 64: images of one batch, of one job or several")
    stall_timeout: int = Field(
        300,
        ge=1,
        le=3600,
        description="1 to 3,600: seconds without a denoising step after which the GPU counts as lost",
    )
    max_result_bytes: int = Field(
        10_000_000,
        ge=1_000,
        le=20_000_000,  # the platform's limit for /runsync
        description="1,000 to 20,000,000: largest result in bytes; the default is the platform's limit for `/run`",
    )
    bucket_endpoint_url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = Field(
        None,
        description="S3-compatible storage for pictures; with it, results hold links. Needs the next three too",
    )
    bucket_access_key_id: SecretStr | None = Field(None, description="Access key ID of the bucket's storage")
    bucket_secret_access_key: SecretStr | None = Field(None, description="Secret access key of the bucket's storage")
    bucket_name: str | None = Field(None, description="The bucket's name")
    bucket_region: str | None = Field(
        None, description="The region that requests are signed for. Default: the one in the address, else `us-east-1`"
    )

    @field_validator("model_id")
    @classmethod
    def _embedded_model(cls, value: str | None) -> str | None:
        return DEMO_MODEL_ID if value and value.lower() == DEMO_MODEL_ID else value

    @model_validator(mode="after")
    def _whole_bucket(self) -> Self:
        wanted = ("bucket_endpoint_url", "bucket_access_key_id", "bucket_secret_access_key", "bucket_name")
        missing = [name.upper() for name in wanted if getattr(self, name) is None]
        if missing and (len(missing) < len(wanted) or self.bucket_region):
            raise PydanticCustomError(
                "bucket", "{missing} not set: set all of BUCKET_* or none", {"missing": ", ".join(missing)}
            )
        return self

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Reads the settings; an empty variable counts as unset.

        Raises:
            StartError: naming each bad variable, its value and what is allowed.
        """
        given = {name: environment.get(name.upper(), "").strip() for name in cls.model_fields}
        try:
            return cls.model_validate({name: value for name, value in given.items() if value})
        except ValidationError as error:
            raise StartError("; ".join([*map(_format_error, error.errors()), *typo_hints(environment)])) from None


def typo_hints(environment: Mapping[str, str] = os.environ) -> list[str]:
    """A line for each variable that is set and is no setting, but is named nearly like one."""
    names = [name.upper() for name in Settings.model_fields]
    lines = []
    for variable in environment.keys() - set(names):
        for near in difflib.get_close_matches(variable.upper(), names, n=1, cutoff=0.8):
            lines.append(f"{variable} is not a setting: did you mean {near}?")
    return sorted(lines)


def _format_error(error: ErrorDetails) -> str:
    """One of pydantic's errors, worded for the operator."""
    if not error["loc"]:
        return error["msg"]
    name = str(error["loc"][0])
    match error["type"]:
        case "literal_error":
            said = f"must be {error['ctx']['expected']}".replace("'", "")
        case "bool_parsing":
            said = "must be true or false"
        case "int_parsing" | "int_parsing_size" | "greater_than_equal" | "less_than_equal":
            least, most = Settings.model_fields[name].metadata
            said = f"must be an integer from {least.ge} to {most.le}"
        case "string_pattern_mismatch":
            said = "must begin with http:// or https:// and have no spaces"
        case _:
            said = error["msg"]
    return f"{name.upper()}={error['input']}: {said}"


def on_runpod(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether RunPod's platform runs this process: it gives its workers the address to take jobs from."""
    return bool(environment.get("RUNPOD_WEBHOOK_GET_JOB"))
