"""Checks of a request's fields that depend on each other."""

from collections.abc import Iterator, Mapping, Set
from typing import Any

from src.api.input_picture import fitted_size
from src.api.limits import MAX_SEED, MIN_SIZE, ModelLimits


def num_steps_done(num_inference_steps: int, strength: float | None) -> int:
    """Returns how many steps diffusers' pipelines do when they start from a picture."""
    return num_inference_steps if strength is None else int(num_inference_steps * strength)


def faults_across(limits: ModelLimits, given: Set[str], right: Mapping[str, Any]) -> Iterator[str]:
    """Describes what does not fit together among the fields that are right by themselves.

    Args:
        limits: the model's.
        given: the names of the fields that the client sent.
        right: the values of those that are right, defaults included.
    """
    names = ("num_inference_steps", "scheduler", "seed", "num_images", "image", "strength")
    steps, scheduler, seed, num_images, image, strength = map(right.get, names)
    if steps and scheduler and steps > (maximum := limits.schedulers[scheduler]):
        yield f"num_inference_steps: must be at most {maximum} with {scheduler}, got {steps}"
    if seed and num_images and seed > (maximum := MAX_SEED - num_images + 1):
        yield f"seed: must be at most {maximum} for {num_images} images, got {seed}"
    sides = given & {"width", "height"}
    if image and len(sides) == 1 and sides <= right.keys():
        size = fitted_size(image.size, limits.max_size, {side: right[side] for side in sides})
        for name, side in zip(("width", "height"), size, strict=True):
            if not MIN_SIZE <= side <= limits.max_size:
                bound = f"at least {MIN_SIZE}" if side < MIN_SIZE else f"at most {limits.max_size}"
                yield f"{', '.join(sides)}: with this picture the {name} would be {side}, must be {bound}"
    if "mask" in given and "image" not in given:
        yield "mask: needs image, the picture that it is a mask of"
    missing = [name for name in ("image", "mask") if name not in given]
    if limits.inpaints_only and missing:
        yield f"{' and '.join(missing)}: required, this model is for inpainting"
    if "strength" in given and "image" not in given:
        yield "strength: needs image, the picture that it is about"
    if steps and not num_steps_done(steps, strength):
        yield f"strength: num_inference_steps x strength must be 1 or more, got {steps} x {strength}"
    if scheduler == "KLMS" and strength and strength < 1:
        # it would start without the derivatives that it needs, and leave noise or lose contrast
        yield "scheduler: KLMS needs a strength of 1"
