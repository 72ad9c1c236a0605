"""The host's NVIDIA driver, and the reason why PyTorch finds no device."""

import ctypes
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from src.errors import StartError

KERNEL_MODULE = Path("/proc/driver/nvidia/version")
"""Where the driver's kernel module states its version, also in containers."""


@dataclass(frozen=True)
class Driver:
    """What the host's driver says about itself, even without a device."""

    version: str | None
    """Of the kernel module, such as ``550.54.14``; None if it is not loaded."""
    cuda: str | None
    """The newest CUDA version that it supports, such as ``12.4``; None if its library is not in the container."""
    devices: int = 0
    """How many devices this process can see."""


def find() -> Driver:
    """Returns this machine's driver."""
    version = cuda = None
    devices = ctypes.c_int()
    with suppress(OSError):
        version = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", KERNEL_MODULE.read_text())
    with suppress(OSError):
        library, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(number)) == 0:
            # 12040 is 12.4
            cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
        # if this fails, the count stays 0
        if library.cuInit(0) == 0:
            library.cuDeviceGetCount(ctypes.byref(devices))
    return Driver(version and version[0], cuda, devices.value)


def shows_device() -> bool:
    """Whether PyTorch should find a CUDA device, without importing it."""
    return find().devices > 0 and not metadata.version("torch").endswith("+cpu")


def check_kernels(architectures: Sequence[str], capability: tuple[int, int], device: str) -> None:
    """Checks that PyTorch's build has kernels for a device.

    A kernel for ``sm_86`` runs on devices with compute capability 8.6 to 8.9; one for ``compute_86`` can be compiled
    for any device from 8.6 on.

    Args:
        architectures: those of the build, from ``torch.cuda.get_arch_list``.
        capability: the device's compute capability, major and minor.
        device: its name.

    Raises:
        StartError: if there are none.
    """
    for architecture in architectures:
        # sm_90a, for example, is skipped: no other device runs it
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)", architecture):
            kind, major, minor = found[1], int(found[2]), int(found[3])
            if (major, minor) <= capability and (kind == "compute" or major == capability[0]):
                return
    raise StartError(
        f"PyTorch's build has no kernels for {device} (compute capability {capability[0]}.{capability[1]}), only for "
        f"{', '.join(architectures)}: choose another GPU for the endpoint, or build the image with "
        "--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130",
        may_recover=True,
    )


def why_no_device(driver: Driver, built_for: str | None, visible: str | None = None) -> str:
    """Explains to the operator, in one line, why PyTorch has no device and what to do about it.

    Args:
        driver: the host's.
        built_for: the CUDA version that PyTorch is built for, such as ``12.6``; None if it is built for the CPU.
        visible: ``CUDA_VISIBLE_DEVICES``, if it is set.
    """
    if built_for is None:
        return "PyTorch is built for the CPU: install its build for CUDA 12.6 or 13.0"
    named = f"the host's driver{f' {driver.version}' if driver.version else ''}"
    if driver.cuda is None:
        found = f"{named} is not in the container" if driver.version else "the host has no NVIDIA driver"
        return (
            f"{found}, and PyTorch is built for CUDA {built_for}: "
            "choose a GPU for the endpoint (with Docker, start the container with --gpus all)"
        )
    if _major(driver.cuda) < _major(built_for):
        return (
            f"{named} runs CUDA up to {driver.cuda}, and PyTorch is built for CUDA {built_for}: "
            f"restrict the endpoint to hosts with CUDA {_major(built_for)}.0 or newer, "
            "or build the image for an older CUDA"
        )
    if visible is not None and not driver.devices:
        return f"CUDA_VISIBLE_DEVICES={visible} hides the host's GPUs: unset it"
    return (
        f"{named} runs CUDA up to {driver.cuda}, which suits PyTorch's CUDA {built_for}, but it shows no usable GPU: "
        "terminate this worker, so that RunPod starts one on another host"
    )


def _major(cuda: str) -> int:
    """A driver supports every minor release of its CUDA major version, and all older majors."""
    return int(cuda.split(".")[0])
