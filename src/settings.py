"""Every environment variable that the worker reads, validated once at startup."""

import difflib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from annotated_types import Ge, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from src.errors import StartError, shortened

DEFAULT_MODEL_ID = "CompVis/stable-diffusion-v1-4"
DEFAULT_MODEL_REVISION = "133a221b8aa7292a167afc5127cb63fb5005638b"
"""The commit of ``DEFAULT_MODEL_ID`` that is used by default."""
DEMO_MODEL_ID = "demo"
"""The embedded model."""


_LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
"""What botocore accepts as a region, and as each part of a host name. Importing it here would delay the start."""
_HOST = rf"(?=.{{1,255}}$)({_LABEL}\.)*{_LABEL}\.?"
_ACCESS_POINT = r"arn:aws.*:[0-9]{12}:(accesspoint|outpost)[/:][\w.:/-]+"


def _digits(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"[+-]?[0-9]+", value):
        # int() and pydantic also accept 1_0 and the digits of other scripts
        raise PydanticCustomError("int_parsing", "not an integer")
    return value


def _filled_in(value: SecretStr) -> SecretStr:
    if "RUNPOD_SECRET_" in value.get_secret_value():
        raise PydanticCustomError("secret", "must be a secret of your account: RunPod found none with that name")
    return value


def _token(value: SecretStr) -> SecretStr:
    token = value.get_secret_value()
    if not (token.isascii() and token.isprintable()) or set(token) & set(" \"'`{}"):
        raise PydanticCustomError("secret", "must be just a token, without spaces, quotes or control characters")
    return value


def _address(value: str) -> str:
    if "@" in value:
        raise PydanticCustomError("secret", "must hold no user and no password")
    try:
        url = urlsplit(value)
        host = (url.hostname or "") if url.port != 0 else ""
    except ValueError:
        host = ""
    if not (
        (":" in host or re.fullmatch(_HOST, host))
        and url.scheme in ("http", "https")
        and re.fullmatch(r"[\w.~%!$&'()*+,;=:/-]*", url.path, re.ASCII)
        and not (url.query or url.fragment)
    ):
        raise PydanticCustomError("bucket", "must be https:// or http:// and a host, perhaps with a port and a path")
    return value


def _bucket_name(value: str) -> str:
    if not re.fullmatch(rf"[A-Za-z0-9][\w.-]{{0,254}}|{_ACCESS_POINT}", value, re.ASCII):
        raise PydanticCustomError("bucket", "must be a name of letters, digits, dots, hyphens and underscores")
    return value


def _region(value: str) -> str:
    if not re.fullmatch(_LABEL, value) or value.isdecimal():
        raise PydanticCustomError("bucket", "must be a region such as us-east-1")
    return value


Integer = Annotated[int, BeforeValidator(_digits)]
"""An upper bound without a stated source is there to catch typos."""
Secret = Annotated[SecretStr, AfterValidator(_filled_in)]


class Settings(BaseModel):
    """The worker's settings. Each field is read from the environment variable of its name in capitals."""

    # The README's table and the settings in RunPod's Hub are generated from these fields.

    model_config = ConfigDict(frozen=True, str_strip_whitespace=True)

    model_id: str | None = Field(
        None,
        title="Model",
        description="Hub id, local directory, or `demo` for the embedded model. "
        f"Default: `{DEFAULT_MODEL_ID}` on RunPod or with a CUDA device, `demo` otherwise",
        json_schema_extra={
            "description": "Hub id or local directory of another Stable Diffusion 1.x model; /model is the image's own",
            "default": "/model",
        },
    )
    model_revision: str | None = Field(
        None,
        title="Model revision",
        description="Hub revision. Default: a pinned commit for the default model, `main` for others",
    )
    hf_token: Annotated[Secret, AfterValidator(_token)] | None = Field(
        None, title="Hugging Face token", description="Hugging Face token, for gated or private models"
    )
    attention_slicing: Literal["auto", "max", "off"] = Field(
        "auto",
        title="Attention slicing",
        description="Computes attention for half of the heads at a time, for one, or for all",
        json_schema_extra={"advanced": False},
    )
    acceleration: Literal["off", "graphs"] = Field(
        "off", title="Acceleration", description="`graphs` runs the UNet as CUDA graphs, which need more memory"
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
        description="Jobs that the worker holds at once: one batch on the GPU, the rest queued",
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
    bucket_endpoint_url: Annotated[str, AfterValidator(_address)] | None = Field(
        None,
        title="Bucket endpoint URL",
        description="S3-compatible storage for pictures; results then hold links. Requires the next three as well",
    )
    bucket_access_key_id: Annotated[Secret, AfterValidator(_token)] | None = Field(
        None, title="Bucket access key ID", description="Access key ID for the bucket"
    )
    bucket_secret_access_key: Secret | None = Field(
        None, title="Bucket secret access key", description="Secret access key for the bucket"
    )
    bucket_name: Annotated[str, AfterValidator(_bucket_name)] | None = Field(
        None, title="Bucket name", description="The bucket's name"
    )
    bucket_region: Annotated[str, AfterValidator(_region)] | None = Field(
        None,
        title="Bucket region",
        description="The region that requests are signed for. Default: from the address, else `us-east-1`",
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
    if not error["loc"]:
        return error["msg"]
    name = str(error["loc"][0])
    match error["type"]:
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
