"""What an exception of the device means, and what the client reads of it."""

import sys

from src.request import ImageRequest, JobError, ModelLimits


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device's memory did not suffice.

    PyTorch's allocator has an exception for it; cuBLAS, cuDNN and the driver say it in words.
    """
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("ALLOC_FAILED", "out of memory"))


def is_device_lost(error: Exception) -> bool:
    """Whether the CUDA context is poisoned: from then on it answers every call with an error."""
    torch = sys.modules.get("torch")
    if not torch:
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def device_fault(cause: Exception | None = None) -> JobError:
    """What every job in flight is answered with when the device is lost."""
    fault = JobError("the GPU failed and this worker is being replaced: send the job again", refresh_worker=True)
    fault.__cause__ = cause
    return fault


def does_not_fit(request: ImageRequest, limits: ModelLimits, cause: Exception) -> JobError:
    """What a request is answered with of which a single image does not fit in memory."""
    native = limits.native_size
    instead = f"{native} x {native}" if request.width * request.height > native**2 else "a smaller one"
    fault = JobError(f"an image of {request.width} x {request.height} did not fit in GPU memory: ask for {instead}")
    fault.__cause__ = cause
    return fault
