"""Words errors for the client: pydantic's about a request, and the device's about its size."""

import difflib
from collections.abc import Iterable

from pydantic_core import ErrorDetails

from src.errors import shortened

MAX_REPORTED_ERRORS = 20
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
    "size": "width and height",
}
"""Names that web UIs and other workers use, too different from ours for fuzzy matching."""


def describe_errors(errors: list[ErrorDetails], fields: Iterable[str]) -> list[str]:
    """Describes each error, at most ``MAX_REPORTED_ERRORS`` of them.

    Args:
        errors: from ``ValidationError.errors()``.
        fields: the names of all fields.
    """
    messages = [_describe(error, list(fields)) for error in errors[:MAX_REPORTED_ERRORS]]
    if len(errors) > len(messages):
        messages.append(f"and {len(errors) - len(messages)} more")
    return messages


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
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def _describe(error: ErrorDetails, fields: list[str]) -> str:
    if not error["loc"]:
        return error["msg"]
    name, value, bounds = shortened(error["loc"][0]), error["input"], error.get("ctx", {})
    match error["type"]:
        case "missing":
            message = "required"
        case "extra_forbidden":
            near = _nearest_field(name, fields)
            message = "unknown field" + (f", did you mean {near}?" if near else "")
        case "int_type" | "int_from_float":
            message = f"must be an integer, got {kind_of(value)}"
        case "float_type":
            message = f"must be a number, got {kind_of(value)}"
        case "string_type":
            message = f"must be a string, got {kind_of(value)}"
        case "finite_number":
            message = "must be a finite number"
        case "greater_than_equal":
            message = f"must be at least {bounds['ge']}, got {shortened(value)}"
        case "less_than_equal":
            message = f"must be at most {bounds['le']}, got {shortened(value)}"
        case "multiple_of":
            message = f"must be a multiple of {bounds['multiple_of']}, got {shortened(value)}"
        case "literal_error":
            allowed = bounds["expected"].replace("'", "")
            message = f"must be {allowed}, got {shortened(value) if isinstance(value, str) else kind_of(value)}"
        case _:
            message = error["msg"]
    return f"{name}: {message}"


def _nearest_field(name: str, fields: list[str]) -> str | None:
    """Guesses which field a name means: another tool's name for it, part of its words, or a misspelling."""
    name = name.lower()
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    with_these_words = [field for field in fields if set(name.split("_")) <= set(field.split("_"))]
    if len(with_these_words) == 1:
        return with_these_words[0]
    return next(iter(difflib.get_close_matches(name, fields, n=1, cutoff=0.75)), None)


def does_not_fit(width: int, height: int, native_size: int) -> str:
    """Says that an image of this size, in pixels, does not fit in memory even alone, and what to ask for instead."""
    instead = f"{native_size} x {native_size}" if width * height > native_size**2 else "a smaller one"
    return f"an image of {width} x {height} did not fit in GPU memory: ask for {instead}"
