"""Does in the background what a cold start will need, while the imports keep one core busy."""

import ctypes
import subprocess
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from src.model.repository import Repository

START_FILES = Path(__file__).parents[1] / "start_files.txt"
"""Lists the files of Python and its packages that a start reads, one path per line. ``builder/record_start.py`` writes
it into the image."""
MAX_FILE_BYTES = 16 * 2**20
"""How much of each file in ``START_FILES`` is read ahead. A start maps 3 GB of CUDA libraries and touches a third of
that; reading all of it would keep the disk from the weights."""


def begin(found: Repository | None) -> None:
    """Starts what does not need PyTorch: reading packages and weights, creating the CUDA context.

    Args:
        found: the model, if it is already on this machine.
    """
    in_background(_read_ahead, found.weight_files if found else [])
    in_background(_make_cuda_context)


def in_background(work: Callable[..., Any], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def load_kernels() -> None:
    """Makes cuDNN, cuBLAS and fused attention load their kernels, if there is a CUDA device.

    Nothing depends on it: whatever fails here fails again in the warm-up, which reports it.
    """
    import torch

    if torch.cuda.is_available():
        with suppress(RuntimeError):
            _compute_something_small("cuda")


def _read_ahead(files: Iterable[Path]) -> None:
    """Reads ``START_FILES``, then ``files``, so that they are in the page cache when they are needed.

    Nothing depends on it. posix_fadvise would need no buffer, but the kernel may read less than it is asked to.
    """
    if START_FILES.exists():
        # thousands of small files: read in parallel, by processes that do not wait for the GIL
        head = ["head", "-qc", str(MAX_FILE_BYTES)]
        command = ["xargs", "-a", str(START_FILES), "-d", r"\n", "-n", "64", "-P", "4", *head]
        with suppress(OSError):
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # large, because after each read this thread waits for the GIL, which the imports hold
    buffer = bytearray(32 * 2**20)
    with suppress(OSError):
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass


def _make_cuda_context() -> None:
    """Creates the primary context of the first CUDA device, which PyTorch then uses; does nothing without a driver.

    ctypes releases the GIL during these calls, so the imports continue meanwhile.
    """
    with suppress(OSError):
        cuda = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        # each returns 0 (CUDA_SUCCESS) or an error, which PyTorch will run into again and report
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _compute_something_small(device: str) -> None:
    """Computes a convolution, a matrix product and attention, in float16."""
    import torch

    with torch.inference_mode():
        images = torch.zeros(2, 64, 32, 32, dtype=torch.float16, device=device)
        filters = torch.zeros(64, 64, 3, 3, dtype=torch.float16, device=device)
        features = torch.nn.functional.conv2d(images, filters, padding=1).flatten(2).mT
        heads = (features @ features.new_zeros(64, 64)).unflatten(2, (1, 64)).transpose(1, 2)
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
