"""OpenAI's images API, mapped to the worker's own: https://platform.openai.com/docs/api-reference/images/create.

RunPod turns a call to an endpoint's ``/openai/v1/...`` into a job with the input
``{"openai_route": "/v1/...", "openai_input": {...}}``, and returns the job's output to the client.
"""

import re
import time
from typing import Any

from src.api.messages import quoted
from src.errors import InvalidInput, JobError

IMAGES, MODELS = "/v1/images/generations", "/v1/models"
"""The supported routes."""
EDITS = "/v1/images/edits"
"""OpenAI's route for pictures as input. Its clients send them as a form, and RunPod forwards only JSON."""
NAMES = {"n": ["num_images"], "output_compression": ["output_quality"], "size": ["width", "height"]}
"""OpenAI's names for fields that have other names here."""
NOT_SUPPORTED = ("partial_images", "stream")
"""OpenAI's fields that may only be 0 or false."""
WITHOUT_EFFECT = {"background", "complexity", "model", "moderation", "quality", "safety_identifier", "style", "user"}
"""OpenAI's fields that mean nothing here. There is only one model, whatever ``model`` says."""


def is_call(job: dict[str, Any]) -> bool:
    """Whether a job came through OpenAI's API."""
    return isinstance(job.get("input"), dict) and "openai_route" in job["input"]


def list_models(model_name: str) -> dict[str, Any]:
    """Returns the answer to a call of ``MODELS``."""
    return {"object": "list", "data": [{"id": model_name, "object": "model", "created": 0, "owned_by": "runpod"}]}


def read_input(call: Any, has_bucket: bool) -> tuple[object, bool, list[str]]:
    """Converts the input of a call.

    Returns:
        The input of an ``ImageRequest``, whether its pictures may go to the bucket, and what is wrong with the rest.

    Raises:
        InvalidInput: if the route is not supported.
    """
    if call["openai_route"] == EDITS:
        instead = f"send image, and mask, white where it changes, in base64 to {IMAGES}"
        raise InvalidInput(f"{EDITS} is not supported: {instead}")
    if call["openai_route"] != IMAGES:
        raise InvalidInput(f"no such route; the routes are {IMAGES} and {MODELS}")
    body = call.get("openai_input")
    if not isinstance(body, dict):
        return body, False, []
    fields = {name: value for name, value in body.items() if value is not None and name not in WITHOUT_EFFECT}
    faults = [f"{name}: not supported" for name in NOT_SUPPORTED if fields.pop(name, 0) not in (0, False)]
    wanted, size = fields.pop("response_format", None), fields.get("size", "auto")
    if wanted not in (None, "b64_json", "url") or (wanted == "url" and not has_bucket):
        allowed = "b64_json or url" if has_bucket else "b64_json, since this endpoint has no bucket"
        faults.append(f"response_format: must be {allowed}, got {quoted(wanted)}")
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size) if isinstance(size, str) else None
    if not match:
        fields.pop("size", None)
        if size != "auto":
            faults.append(f"size: must be auto or such as 512x512, got {quoted(size)}")
    for theirs, ours in NAMES.items():
        if theirs in fields:
            faults += [f"{theirs}: contradicts {name}, send one of them" for name in ours if name in fields]
            fields |= dict.fromkeys(ours, fields.pop(theirs))
    if match:
        fields |= {"width": int(match[1]), "height": int(match[2])}
    return fields, wanted != "b64_json", faults


def shape_output(output: dict[str, Any]) -> dict[str, Any]:
    """Puts a job's output into OpenAI's shape."""
    return {
        "created": int(time.time()),
        "data": [_image(image) for image in output.get("images", [output])],
        "output_format": output.get("output_format", "png"),
        "size": f"{output['width']}x{output['height']}",
    }


def _image(image: dict[str, Any]) -> dict[str, Any]:
    file = {"url": image["image_url"]} if "image_url" in image else {"b64_json": image["image"]}
    return file | {"seed": image["seed"]}


def word_error(error: JobError) -> dict[str, Any]:
    """Puts a job's error into OpenAI's shape, with OpenAI's names of the fields."""
    message, fields = str(error), list[str]()
    if isinstance(error, InvalidInput):
        theirs = {name: openais for openais, ours in NAMES.items() for name in ours}
        renamed = [re.sub(r"^\w+(?=: )", lambda name: theirs.get(name[0], name[0]), fault) for fault in error.faults]
        # one value of size can be wrong for both width and height
        message = str(InvalidInput(*dict.fromkeys(renamed)))
        fields = re.findall(r"^\w+(?=: )", renamed[0])
    return {
        "message": message,
        "type": "invalid_request_error" if isinstance(error, InvalidInput) else "server_error",
        "param": fields[0] if fields else None,
        "code": None,
    }


def error_text(error: Any) -> str:
    """The text of a job's ``error``, which ``word_error`` may have made an object, for callers that take text only."""
    return str(error["message"] if isinstance(error, dict) else error)
