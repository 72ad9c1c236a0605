"""Keeps timesteps on the CPU, where diffusers' schedulers keep their tables.

The lookup of a value in such a table with a timestep on a CUDA device waits until the device has finished all its work.
"""

import types
import weakref
from typing import Any

import torch


def keep_on_cpu(scheduler: Any) -> Any:
    """Makes ``scheduler.set_timesteps`` ignore the device that the pipeline gives; returns ``scheduler``."""
    # a strong reference would be a cycle, which would keep the scheduler's tensors alive until the garbage is collected
    set_timesteps, owner = type(scheduler).set_timesteps, weakref.proxy(scheduler)
    scheduler.set_timesteps = lambda steps, device, **others: set_timesteps(owner, steps, device="cpu", **others)
    return scheduler


def accept_from_cpu(unet: torch.nn.Module) -> None:
    """Makes ``unet`` accept timesteps from the CPU without waiting for its device."""
    # no hook of PyTorch's, because the traceback of a call that fails would keep a hooked module's inputs alive
    unet.forward = types.MethodType(_forward, unet)


def on_device(timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Returns ``timestep``, (), on the device of ``sample``: a value that is filled in, as a copy might wait."""
    if timestep.device == sample.device:
        return timestep
    return sample.new_full((), timestep.item(), dtype=timestep.dtype)


def _forward(unet: torch.nn.Module, sample: torch.Tensor, timestep: torch.Tensor, *others: Any, **options: Any) -> Any:
    return type(unet).forward(unet, sample, on_device(timestep, sample), *others, **options)
