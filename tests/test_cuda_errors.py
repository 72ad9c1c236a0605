"""Recognition of exhausted memory and lost devices in the libraries' own error messages."""

import gc
import weakref

import pytest
import torch

from src.generation import cuda_errors

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
]
SURVIVED = [
    torch.AcceleratorError("CUDA error: invalid configuration argument"),
    torch.AcceleratorError("CUDA error: too many resources requested for launch"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    ValueError("anything"),
]
LOST = [
    torch.AcceleratorError(f"CUDA error: {words}\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.")
    for words in (
        "an illegal memory access was encountered",
        "device-side assert triggered",
        "uncorrectable ECC error encountered",
        "unspecified launch failure",
        "misaligned address",
        "an illegal instruction was encountered",
        "the launch timed out and was terminated",
    )
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_out_of_memory_is_recognized_in_every_form(error: Exception):
    assert cuda_errors.is_out_of_memory(error)
    assert not cuda_errors.is_device_lost(error)


@pytest.mark.parametrize("error", [*SURVIVED, *LOST], ids=str)
def test_other_errors_are_not_out_of_memory(error: Exception):
    assert not cuda_errors.is_out_of_memory(error)
    assert cuda_errors.is_device_lost(error) == (error in LOST)


def test_out_of_memory_during_a_graph_capture_is_found_in_the_context():
    with pytest.raises(RuntimeError) as raised:
        try:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        finally:
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
    assert cuda_errors.is_out_of_memory(raised.value)


@pytest.mark.parametrize("lost", [False, True])
def test_device_is_lost_when_synchronizing_fails(lost: bool, monkeypatch: pytest.MonkeyPatch):
    def synchronize() -> None:
        if lost:
            raise torch.AcceleratorError("CUDA error: unknown error")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert cuda_errors.is_device_lost(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")) is lost


def test_releasing_frames_frees_tensors_and_keeps_the_traceback():
    tensors = []

    def fail(depth: int) -> None:
        tensor = torch.zeros(1)
        tensors.append(weakref.ref(tensor))
        if depth:
            try:
                fail(depth - 1)
            except RuntimeError as error:
                raise RuntimeError("outer") from error
        raise RuntimeError("inner")

    gc.disable()
    try:
        try:
            fail(1)
        except RuntimeError as error:
            kept = error
        assert all(tensor() is not None for tensor in tensors)
        cuda_errors.release_frames(kept)
        assert all(tensor() is None for tensor in tensors)
    finally:
        gc.enable()
    assert kept.__traceback__ and kept.__traceback__.tb_next
