"""Every environment variable that the worker reads, validated once, at start."""

import os
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

DEFAULT_MODEL_ID = "CompVis/stable-diffusion-v1-4"
DEFAULT_MODEL_REVISION = "133a221b8aa7292a167afc5127cb63fb5005638b"
"""The commit of ``DEFAULT_MODEL_ID`` that the worker was made for."""
DEMO_MODEL_ID = "demo"
"""The embedded model."""


class StartError(Exception):
    """Why the worker cannot start, in one line for its operator."""


class Settings(BaseModel):
    """The worker's settings. Each field is read from the environment variable of its name in capitals."""

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
        "auto", description="`auto`, `max` or `off`: attention in slices, which needs less memory"
    )
    safety_checker: bool = Field(True, description="`true` or `false`: the model's safety checker")
    max_concurrency: int = Field(
        2, ge=1, le=100, description="Jobs the worker holds at once: one on the device, the rest ready"
    )
    max_batch_images: int = Field(4, ge=1, le=64, description="Images in one shared call")
    max_result_bytes: int = Field(
        10_000_000, ge=1_000, description="Largest result in bytes; the default is the platform's limit for `/run`"
    )

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
            faults = (f"{str(fault['loc'][0]).upper()}={fault['input']}: {fault['msg']}" for fault in error.errors())
            raise StartError("; ".join(faults)) from error


def on_runpod(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether RunPod's platform runs this process: it gives its workers the address to take jobs from."""
    return bool(environment.get("RUNPOD_WEBHOOK_GET_JOB"))
