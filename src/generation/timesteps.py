"""Keeps timesteps on the CPU, where diffusers' schedulers keep their tables.

A lookup in such a table with a timestep on a CUDA device, or a copy of the table to the device, waits until the device
has finished all its work.
"""

import types
import weakref
from typing import Any

import torch


def keep_on_cpu(scheduler: Any) -> Any:
    """Makes ``set_timesteps`` and ``add_noise`` of ``scheduler`` work on the CPU, and returns it."""
    # a strong reference would be a cycle, which would keep the scheduler's tensors alive until the garbage is collected
    kind, owner = type(scheduler), weakref.proxy(scheduler)

    def add_noise(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        # the images of a batch have the same timestep, from which the shares of latents and noise follow
        one, zero = latents.new_ones(1, device="cpu"), latents.new_zeros(1, device="cpu")
        kept, added = (float(kind.add_noise(owner, *each, timesteps[:1])) for each in ((one, zero), (zero, one)))
        return latents * kept + noise * added

    scheduler.set_timesteps = lambda steps, device, **others: kind.set_timesteps(owner, steps, device="cpu", **others)
    scheduler.add_noise = add_noise
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
