"""What an exception from the device means, and what the client is told."""

import sys
import traceback
from collections.abc import Iterator

from src.errors import JobError

OUT_OF_MEMORY = (
    # PyTorch's allocator, and the CUDA driver
    "out of memory",
    # cuBLAS, and cuDNN before version 9
    "STATUS_ALLOC_FAILED",
    # cuDNN 9
    "DEVICE_ALLOCATION_FAILED",
    # PyTorch, when every engine that cuDNN offers needs more memory than there is
    "unable to find an engine to execute this computation",
)
"""Parts of the messages of out-of-memory errors."""

DEVICE_LOST = (
    "an illegal memory access was encountered",
    "an illegal instruction was encountered",
    "device-side assert triggered",
    "hardware stack error",
    "invalid program counter",
    "misaligned address",
    "operation not supported on global/shared address space",
    "the launch timed out and was terminated",
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error detected",
    "unspecified launch failure",
)
"""CUDA errors after which only a new process can use the device, according to CUDA's documentation of ``cudaError_t``.

The two uncorrectable errors are an exception: the documentation does not say so.
"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device ran out of memory, judging by the messages of PyTorch, cuBLAS, cuDNN and the driver.

    While a CUDA graph is captured, a generic error is raised and the cause is its ``__context__``.
    """
    return _says(error, OUT_OF_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Whether the CUDA context is corrupted, so that every later call fails as well.

    Other launch errors, such as an invalid configuration, fail only one call.
    """
    if _says(error, DEVICE_LOST):
        return True
    # a process without PyTorch has no device to lose
    torch = sys.modules.get("torch")
    if not torch or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def release_frames(error: BaseException) -> None:
    """Frees the local variables, tensors included, that an exception's traceback keeps alive; its text stays."""
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)


def device_fault(cause: BaseException) -> JobError:
    """The error for every job that the worker holds when the device is lost."""
    fault = JobError("the GPU failed and this worker is being replaced: send the job again", refresh_worker=True)
    fault.__cause__ = cause
    return fault


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    """Whether a RuntimeError, or one that led to it, contains any of ``phrases``."""
    texts = [str(each) for each in _chain(error) if isinstance(each, RuntimeError)]
    return any(phrase in text for phrase in phrases for text in texts)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen, waiting = set[int](), [error]
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [other for other in (each.__cause__, each.__context__) if other]
