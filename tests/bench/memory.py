"""What attention slicing costs and saves: ``python -m tests.bench.memory``.

One step of the full-size v1-4's UNet with guidance, in float16, on tensors that have a shape and no content, so any
CPU can count it in seconds: the most memory that activations take at once, and the kernels that are launched. PyTorch's
fused attention counts as one kernel, as on a GPU.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.generation.attention import enable_attention_slicing
from tests.support.v1_4 import FULL

SIZES = ((1, 512), (4, 512), (1, 1024), (4, 1024))
"""Images in a batch, and their width and height in pixels."""
SLICINGS: dict[str, Callable[[StableDiffusionPipeline], None]] = {
    "`off`": lambda pipe: enable_attention_slicing(pipe, "off"),
    "`auto`": lambda pipe: enable_attention_slicing(pipe, "auto"),
    "`max`": lambda pipe: enable_attention_slicing(pipe, "max"),
    "diffusers' `auto`": lambda pipe: pipe.enable_attention_slicing("auto"),
    "diffusers' `max`": lambda pipe: pipe.enable_attention_slicing("max"),
}


class Counter(TorchDispatchMode):
    """Counts kernels, and the bytes of the tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)}
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in operation._schema.arguments)
        made = [tensor.untyped_storage() for tensor in tree_leaves(result) if is_tensor(tensor)]
        new = [storage for storage in made if storage._cdata not in given | self._seen]
        # what makes nothing new is a view, and "empty" only takes memory
        self.kernels += (bool(new) or writes) and "empty" not in operation.name()
        for storage in new:
            self._seen.add(storage._cdata)
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def full_size_unet() -> UNet2DConditionModel:
    torch.set_default_dtype(torch.float16)
    try:
        return UNet2DConditionModel(attention_head_dim=8, **FULL["unet"]).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def count_step(enable: Callable[[StableDiffusionPipeline], None], images: int, size: int) -> tuple[float, int]:
    """Returns the peak of activations in GiB, and the number of kernels, of one step."""
    with FakeTensorMode(), torch.no_grad():
        unet = full_size_unet()
        # a pipeline of which nothing but the UNet is there
        enable(StableDiffusionPipeline(None, None, None, unet, None, None, None, requires_safety_checker=False))
        latents = torch.empty(2 * images, 4, size // 8, size // 8, dtype=torch.float16)
        text = torch.empty(2 * images, 77, unet.config.cross_attention_dim, dtype=torch.float16)
        with Counter() as counter:
            unet(latents, torch.tensor(0.0), encoder_hidden_states=text, return_dict=False)
    return counter.peak / 2**30, counter.kernels


def main() -> None:
    print("| images x size | " + " | ".join(SLICINGS) + " |")
    print("|---" * (len(SLICINGS) + 1) + "|")
    for images, size in SIZES:
        counted = (count_step(enable, images, size) for enable in SLICINGS.values())
        cells = (f"{gib:.2f} GiB, {kernels:,}" for gib, kernels in counted)
        print(f"| {images} x {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
