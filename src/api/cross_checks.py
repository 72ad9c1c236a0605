"""Checks of a request's fields that depend on each other."""

import inspect
from typing import Any

from src.api.limits import MAX_SEED, ModelLimits


def faults_across(**right: Any) -> list[str]:
    """Describes what does not fit together among the fields that are right by themselves.

    A check names the fields that it compares as its parameters, and is left out unless all of them are right.

    Args:
        right: the model's ``limits``, and the fields by their names.
    """
    faults = []
    for check in (_steps_of_scheduler, _last_seed):
        names = inspect.signature(check).parameters
        if right.keys() >= names.keys() and (fault := check(**{name: right[name] for name in names})):
            faults.append(fault)
    return faults


def _steps_of_scheduler(limits: ModelLimits, num_inference_steps: int, scheduler: str) -> str | None:
    maximum = limits.schedulers[scheduler]
    if num_inference_steps <= maximum:
        return None
    return f"num_inference_steps: must be at most {maximum} with {scheduler}, got {num_inference_steps}"


def _last_seed(seed: int, num_images: int) -> str | None:
    maximum = MAX_SEED - num_images + 1
    return f"seed: must be at most {maximum} for {num_images} images, got {seed}" if seed > maximum else None
