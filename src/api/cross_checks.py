"""Checks of a request's fields that depend on each other."""

import inspect
from collections.abc import Collection
from typing import Any

from PIL import Image

from src.api.input_picture import fitted_size
from src.api.limits import MAX_SEED, MIN_SIZE, ModelLimits


def faults_across(**right: Any) -> list[str]:
    """Describes what does not fit together among the fields that are right by themselves.

    A check names the fields that it compares as its parameters, and is left out unless all of them are right.

    Args:
        right: the model's ``limits``, the names of the fields that are ``given``, and the fields by their names.
    """
    faults = []
    for check in CHECKS:
        names = inspect.signature(check).parameters
        if right.keys() >= names.keys() and (fault := check(**{name: right[name] for name in names})):
            faults.append(fault)
    return faults


def num_steps_done(num_inference_steps: int, strength: float | None) -> int:
    """Returns how many steps diffusers' pipelines do when they start from a picture."""
    return num_inference_steps if strength is None else int(num_inference_steps * strength)


def _steps_of_scheduler(limits: ModelLimits, num_inference_steps: int, scheduler: str) -> str | None:
    maximum = limits.schedulers[scheduler]
    if num_inference_steps <= maximum:
        return None
    return f"num_inference_steps: must be at most {maximum} with {scheduler}, got {num_inference_steps}"


def _last_seed(seed: int, num_images: int) -> str | None:
    maximum = MAX_SEED - num_images + 1
    return f"seed: must be at most {maximum} for {num_images} images, got {seed}" if seed > maximum else None


def _proportions(
    limits: ModelLimits, given: Collection[str], image: Image.Image | None, width: int, height: int
) -> str | None:
    asked = {name: side for name, side in (("width", width), ("height", height)) if name in given}
    if not image or len(asked) != 1:
        return None
    for name, side in zip(("width", "height"), fitted_size(image.size, limits.max_size, asked), strict=True):
        if not MIN_SIZE <= side <= limits.max_size:
            bound = f"at least {MIN_SIZE}" if side < MIN_SIZE else f"at most {limits.max_size}"
            return f"{', '.join(asked)}: with this picture the {name} would be {side}, must be {bound}"
    return None


def _mask_needs_image(given: Collection[str]) -> str | None:
    return "mask: needs image, the picture that it is a mask of" if "mask" in given and "image" not in given else None


def _inpainting_needs_both(limits: ModelLimits, given: Collection[str]) -> str | None:
    missing = [name for name in ("image", "mask") if name not in given]
    return (
        f"{' and '.join(missing)}: required, this model is for inpainting" if limits.inpaints_only and missing else None
    )


def _strength_needs_image(given: Collection[str]) -> str | None:
    needs = "strength" in given and "image" not in given
    return "strength: needs image, the picture that it is about" if needs else None


def _some_steps(num_inference_steps: int, strength: float | None) -> str | None:
    if num_steps_done(num_inference_steps, strength):
        return None
    return f"strength: num_inference_steps x strength must be 1 or more, got {num_inference_steps} x {strength}"


def _strength_of_klms(scheduler: str, strength: float | None) -> str | None:
    # it would start without the derivatives that it needs, and leave noise or lose contrast
    return "scheduler: KLMS needs a strength of 1" if scheduler == "KLMS" and strength and strength < 1 else None


CHECKS = (
    _steps_of_scheduler,
    _last_seed,
    _proportions,
    _mask_needs_image,
    _inpainting_needs_both,
    _strength_needs_image,
    _some_steps,
    _strength_of_klms,
)
