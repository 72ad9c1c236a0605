"""OpenAI's images API, mapped to the worker's own: https://platform.openai.com/docs/api-reference/images/create.

RunPod turns a call to an endpoint's ``/openai/v1/...`` into a job with the input
``{"openai_route": "/v1/...", "openai_input": {...}}``, and returns the job's output to the client.
"""

import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from src.errors import JobError, shortened

IMAGES, MODELS = "/v1/images/generations", "/v1/models"
"""The supported routes."""
NAMES = {"n": "num_images", "output_compression": "output_quality"}
"""OpenAI's names for fields that are called otherwise here."""
WITHOUT_EFFECT = {"background", "model", "moderation", "quality", "safety_identifier", "style", "user"}
"""OpenAI's fields that mean nothing here. There is only one model, whatever ``model`` says."""

Answer = Callable[[dict[str, Any], bool], Awaitable[dict[str, Any]]]
"""Takes a job and whether its pictures may go to the bucket; returns the job's output or ``error``."""


async def answer(job: dict[str, Any], answer_job: Answer, model_name: str, has_bucket: bool) -> dict[str, Any]:
    """Answers a job that came through OpenAI's API in that API's shape, and any other with ``answer_job``."""
    call = job.get("input")
    if not (isinstance(call, dict) and "openai_route" in call):
        return await answer_job(job, True)
    route, body = call["openai_route"], call.get("openai_input")
    if route == MODELS:
        return {"object": "list", "data": [{"id": model_name, "object": "model", "created": 0, "owned_by": "runpod"}]}
    try:
        if route != IMAGES:
            raise JobError(f"invalid input: no such route, there are {IMAGES} and {MODELS}")
        wants_file = isinstance(body, dict) and _wants_file(body, has_bucket)
        output = await answer_job(job | {"input": request_input(body)}, not wants_file)
    except JobError as error:
        output = {"error": str(error)}
    if "error" in output:
        return output | {"error": _error(output["error"])}
    return {
        "created": int(time.time()),
        "data": [_image(image) for image in output.get("images", [output])],
        "output_format": output.get("output_format", "png"),
        "size": f"{output['width']}x{output['height']}",
    }


def request_input(body: object) -> object:
    """Converts the body of a call to ``IMAGES`` to the input of an ``ImageRequest``.

    Raises:
        JobError: if ``size`` is invalid.
    """
    if not isinstance(body, dict):
        return body
    no_fields = WITHOUT_EFFECT | {"response_format", "size"}
    fields = {NAMES.get(name, name): value for name, value in body.items() if name not in no_fields}
    size = body.get("size")
    if size not in (None, "auto"):
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size) if isinstance(size, str) else None
        if not match:
            raise JobError(f"invalid input: size: must be auto or such as 512x512, got {shortened(size)}")
        fields |= {"width": int(match[1]), "height": int(match[2])}
    return fields


def _wants_file(body: dict[str, Any], has_bucket: bool) -> bool:
    """Whether the client asks for the picture itself, even if there is a bucket."""
    wanted = body.get("response_format")
    if wanted not in (None, "b64_json", "url") or (wanted == "url" and not has_bucket):
        allowed = "b64_json or url" if has_bucket else "b64_json, since this endpoint has no bucket"
        raise JobError(f"invalid input: response_format: must be {allowed}, got {shortened(wanted)}")
    return wanted == "b64_json"


def _image(image: dict[str, Any]) -> dict[str, Any]:
    file = {"url": image["image_url"]} if "image_url" in image else {"b64_json": image["image"]}
    return file | {"seed": image["seed"]}


def _error(message: str) -> dict[str, Any]:
    """Converts a job's error to OpenAI's shape, with OpenAI's names of the fields."""
    is_invalid = message.startswith("invalid input: ")
    if is_invalid:
        theirs = {ours: name for name, ours in NAMES.items()} | {"width": "size", "height": "size"}
        message = re.sub(r"(?<=: |; )(\w+)(?=: )", lambda name: theirs.get(name[1], name[1]), message)
    field = re.match(r"invalid input: (\w+): ", message)
    return {
        "message": message,
        "type": "invalid_request_error" if is_invalid else "server_error",
        "param": field[1] if field else None,
        "code": None,
    }
