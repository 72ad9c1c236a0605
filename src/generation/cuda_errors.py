"""What an exception of the device means, and what the client reads of it."""

import sys
import traceback
from collections.abc import Iterator

from src.api.request import ImageRequest, ModelLimits
from src.errors import JobError

OUT_OF_MEMORY = (
    # PyTorch's allocator, and the CUDA driver
    "out of memory",
    # cuBLAS, and cuDNN before version 9
    "STATUS_ALLOC_FAILED",
    # cuDNN 9
    "DEVICE_ALLOCATION_FAILED",
    # PyTorch, when every engine that cuDNN offers asks for more than there is
    "unable to find an engine to execute this computation",
)
"""Parts of the messages when the device's memory does not suffice."""

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
"""CUDA errors after which, by CUDA's documentation of ``cudaError_t``, only a new process can use the device.

Of the two that are uncorrectable it does not say so.
"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory did not suffice, by the messages of PyTorch, cuBLAS, cuDNN and the driver.

    A CUDA graph's capture reports another error in place of the first one, which is then its context.
    """
    return _says(error, OUT_OF_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Whether the CUDA context is poisoned, so that it answers every later call with an error.

    Other errors of a launch, such as an invalid configuration, fail one call alone.
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
    """Lets go of the local variables that an exception's traceback keeps, tensors among them; its text stays."""
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)


def device_fault(cause: BaseException) -> JobError:
    """The error of every job that the worker holds when the device is lost."""
    fault = JobError("the GPU failed and this worker is being replaced: send the job again", refresh_worker=True)
    fault.__cause__ = cause
    return fault


def does_not_fit(request: ImageRequest, limits: ModelLimits, cause: BaseException) -> JobError:
    """The error of a request of which a single image does not fit in memory."""
    native = limits.native_size
    instead = f"{native} x {native}" if request.width * request.height > native**2 else "a smaller one"
    fault = JobError(f"an image of {request.width} x {request.height} did not fit in GPU memory: ask for {instead}")
    fault.__cause__ = cause
    return fault


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    """Whether an exception of the device, or one that led to it, has any of the phrases in it."""
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
