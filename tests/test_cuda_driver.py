"""Diagnosis of missing drivers, devices and kernels."""

import ctypes
import re
from pathlib import Path

import pytest

from src.errors import StartError
from src.model import cuda_driver
from src.model.cuda_driver import Driver

MODULES = {
    "550.54.14": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n",
    "580.65.06": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n",
    "590.48": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  590.48  Mon Dec  8 11:12:13 UTC 2025\n",
}


def store(target: object, value: int) -> None:
    """Writes through a pointer to an integer, as a C function does."""
    ctypes.cast(target, ctypes.POINTER(ctypes.c_int))[0] = value


class Libcuda:
    """Stands in for NVIDIA's driver library."""

    def __init__(self, number: int, error: int = 0, devices: int = 0):
        self.number, self.error, self.devices = number, error, devices

    def cuDriverGetVersion(self, number) -> int:
        store(number, self.number)
        return self.error

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuDeviceGetCount(self, number) -> int:
        store(number, self.devices)
        return 0


@pytest.mark.parametrize(
    ("version", "libcuda", "found"),
    [
        ("550.54.14", Libcuda(12040), Driver("550.54.14", "12.4")),
        ("580.65.06", Libcuda(13000, devices=2), Driver("580.65.06", "13.0", devices=2)),
        ("590.48", Libcuda(13010), Driver("590.48", "13.1")),
        ("550.54.14", Libcuda(0, error=34), Driver("550.54.14", None)),
        (None, Libcuda(12080), Driver(None, "12.8")),
        ("550.54.14", None, Driver("550.54.14", None)),
        (None, None, Driver(None, None)),
    ],
)
def test_driver_is_detected_with_and_without_a_device(
    monkeypatch, tmp_path: Path, version: str | None, libcuda: Libcuda | None, found: Driver
):
    def load(name: str) -> Libcuda:
        if libcuda is None:
            raise OSError(f"{name}: cannot open shared object file")
        return libcuda

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(cuda_driver, "KERNEL_MODULE", tmp_path / "version")
    if version:
        (tmp_path / "version").write_text(MODULES[version] + "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n")
    assert cuda_driver.find() == found
    # a PyTorch built for the CPU uses no device
    for build, shows in (("2.13.0", found.devices > 0), ("2.13.0+cu126", found.devices > 0), ("2.13.0+cpu", False)):
        monkeypatch.setattr(cuda_driver.metadata, "version", lambda package, build=build: build)
        assert cuda_driver.shows_device() is shows


@pytest.mark.parametrize(
    ("found", "built_for", "said"),
    [
        (Driver(None, None), "12.6", "the host has no NVIDIA driver, and PyTorch is built for CUDA 12.6: choose a GPU"),
        (
            Driver("550.54.14", None),
            "12.6",
            "the host's driver 550.54.14 is not in the container.*--gpus",
        ),
        (
            Driver("550.54.14", "12.4"),
            "13.0",
            "the host's driver 550.54.14 runs CUDA up to 12.4, and PyTorch is built for CUDA 13.0: "
            "restrict the endpoint to hosts with CUDA 13.0 or newer",
        ),
        (Driver(None, "11.8"), "12.6", "the host's driver runs CUDA up to 11.8, .*hosts with CUDA 12.0 or newer"),
        (
            Driver("550.54.14", "12.4"),
            "12.6",
            "up to 12.4, which suits PyTorch's CUDA 12.6, but it shows no usable",
        ),
        (
            Driver("580.65.06", "13.0"),
            "12.6",
            "up to 13.0, which suits PyTorch's CUDA 12.6, but it shows no usable",
        ),
        (Driver("580.65.06", "13.0"), None, "PyTorch is built for the CPU"),
    ],
)
def test_message_explains_why_there_is_no_device(found: Driver, built_for: str | None, said: str):
    line = cuda_driver.why_no_device(found, built_for)
    assert re.search(said, line)
    assert "\n" not in line


def test_message_names_an_empty_list_of_visible_devices():
    line = cuda_driver.why_no_device(Driver("550.54.14", "12.4"), "12.6", visible="")
    assert line == "CUDA_VISIBLE_DEVICES= hides the host's GPUs: unset it"


CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
"""The architectures for which PyTorch's build for CUDA 12.6 has kernels."""


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)])
def test_kernels_run_on_later_devices_of_their_major_version(capability: tuple[int, int]):
    cuda_driver.check_kernels(CUDA_12_6, capability, "a GPU")


@pytest.mark.parametrize("capability", [(10, 0), (12, 0), (3, 7)])
def test_device_without_kernels_is_refused_and_a_suitable_build_named(capability: tuple[int, int]):
    with pytest.raises(StartError) as refused:
        cuda_driver.check_kernels([*CUDA_12_6, "sm_100a", "sm_120a"], capability, "NVIDIA GeForce RTX 5090")
    assert re.search(r"no kernels for NVIDIA GeForce RTX 5090 \(compute .*whl/cu130$", str(refused.value))
    assert refused.value.may_recover


def test_portable_kernels_run_on_any_later_device():
    cuda_driver.check_kernels(["sm_90", "compute_90"], (12, 0), "a GPU")
