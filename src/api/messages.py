"""Words errors for the client: pydantic's about a request, and the device's about its size."""

import difflib
import math
import re
from collections.abc import Iterable

from pydantic_core import ErrorDetails

from src.errors import shortened

MAX_REPORTED_ERRORS = 20
MAX_UNKNOWN_FIELDS = 50
"""Looking for what they mean takes 0.1 ms each. A web UI's request has some 30."""
OTHER_NAMES = {
    "prompt": "caption description inputs positive positive_prompt text text_prompt text_prompts",
    "negative_prompt": "n_prompt neg neg_prompt uc undesired_content",
    "width": "image_width img_width output_width target_width w",
    "height": "h image_height img_height output_height target_height",
    "width and height": "aspect_ratio dimensions image_dimensions image_size resolution size target_size",
    "num_inference_steps": "ddim_steps denoising_steps diffusion_steps infer_steps iterations n_steps sample_steps "
    "sampling_steps step",
    "guidance_scale": "cfg cfg_scale cfg_value guidance_strength unconditional_guidance_scale",
    "seed": "manual_seed noise_seed random_seed rng_seed",
    "num_images": "batch_count batch_size count image_count image_num images_per_prompt n n_iter n_samples "
    "num_images_per_prompt num_outputs num_results num_samples number_of_images number_results sample_count samples",
    "output_format": "extension file_format image_format img_format response_extension",
    "output_quality": "image_quality jpeg_quality output_compression",
    "scheduler": "sample_method sampler sampler_index sampler_name sampler_type sampling_method scheduler_class "
    "scheduler_name scheduler_type",
    "image": "base_image image_b64 image_base64 image_url image_urls images init_image init_image_url init_images "
    "init_img input_image input_image_url input_images reference_image source_image starting_image",
    "mask": "inpaint_mask inpainting_mask mask_base64 mask_image mask_image_url mask_url",
    "strength": "denoise denoising_strength image_strength img2img_strength init_strength prompt_strength",
}
"""What web UIs, other workers and APIs call our fields, where that is too different for fuzzy matching."""

_FIELD_OF_OTHER_NAME = {name.replace("_", ""): field for field, names in OTHER_NAMES.items() for name in names.split()}


def describe_errors(errors: list[ErrorDetails], fields: Iterable[str]) -> list[str]:
    """Describes each error, at most ``MAX_REPORTED_ERRORS`` of them, last the fields that mean nothing.

    Args:
        errors: from ``ValidationError.errors()``.
        fields: the names of all fields.
    """
    messages = [_describe(error, list(fields)) for error in errors]
    messages.sort(key=lambda message: message.endswith("unknown field"))
    rest = len(messages) - MAX_REPORTED_ERRORS
    return messages[:MAX_REPORTED_ERRORS] + ([f"and {rest} more"] if rest > 0 else [])


def kind_of(value: object) -> str:
    """Describes a JSON value for an error: numbers and booleans by value, everything else by type."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"{value}".lower()
        case int() | float():
            return shortened(value)
        case str():
            return "a string" if value.strip() else "an empty string"
        case list():
            return "a list"
        case _:
            return "an object"


def quoted(value: object) -> str:
    """Describes a JSON value that should be one of a few names: as ``kind_of``, but strings by value."""
    return shortened(value) if isinstance(value, str) and value.strip() else kind_of(value)


def _describe(error: ErrorDetails, fields: list[str]) -> str:
    if not error["loc"]:
        return error["msg"]
    name, value, bounds = str(error["loc"][0]), error["input"], error.get("ctx", {})
    match error["type"]:
        case "missing":
            message = "required"
        case "extra_forbidden":
            near = _nearest_field(name, fields)
            message = "unknown field" + (f", did you mean {near}?" if near else "")
        case "string_type":
            message = f"must be a string, got {kind_of(value)}"
        case "string_unicode":
            message = "must be valid Unicode, has a lone surrogate"
        case "literal_error":
            allowed = bounds["expected"].replace("'", "")
            message = f"must be {allowed}, got {quoted(value)}"
        case _ if isinstance(value, float) and not math.isfinite(value):
            message = "must be a finite number"
        case "int_type" | "int_from_float":
            message = f"must be an integer, got {kind_of(value)}"
        case "float_type":
            message = f"must be a number, got {kind_of(value)}"
        case "greater_than_equal":
            message = f"must be at least {bounds['ge']}, got {shortened(value)}"
        case "greater_than":
            message = f"must be above {bounds['gt']}, got {shortened(value)}"
        case "less_than_equal":
            message = f"must be at most {bounds['le']}, got {shortened(value)}"
        case "multiple_of":
            message = f"must be a multiple of {bounds['multiple_of']}, got {shortened(value)}"
        case _:
            message = error["msg"]
    return f"{name}: {message}"


def _nearest_field(name: str, fields: list[str]) -> str | None:
    """Guesses which field a name means: another tool's name for it, part of its words, or a misspelling.

    Only the words that differ are compared: ``send_images`` is no misspelt ``num_images``.
    """
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    if field := _FIELD_OF_OTHER_NAME.get("".join(words)):
        return field
    with_these_words = [field for field in fields if set(words) <= set(field.split("_"))]
    if len(with_these_words) == 1:
        return with_these_words[0]

    def similarity(field: str) -> float:
        wanted = field.split("_")
        mine = "_".join(word for word in words if word not in wanted)
        theirs = "_".join(word for word in wanted if word not in words)
        return difflib.SequenceMatcher(None, mine, theirs).ratio()

    nearest = max(fields, key=similarity)
    return nearest if similarity(nearest) >= 0.75 else None


def does_not_fit(width: int, height: int, native_size: int) -> str:
    """Says that an image of this size, in pixels, does not fit in memory even alone, and what to ask for instead."""
    instead = f"{native_size} x {native_size}" if width * height > native_size**2 else "a smaller one"
    return f"an image of {width} x {height} did not fit in GPU memory: ask for {instead}"
