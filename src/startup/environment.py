"""What the libraries find when they are imported, and how much they log afterwards."""

import logging
import math
import os
from contextlib import suppress
from pathlib import Path

ENVIRONMENT = {
    # the SDK's default, DEBUG, logs prompts and pictures
    "RUNPOD_LOG_LEVEL": "INFO",
    # the warm-up picture already exercises GPU, driver and memory; the SDK's own checks would only delay the first job
    "RUNPOD_SKIP_GPU_CHECK": "true",
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
    # drivers 525 and 530 would load every kernel of CUDA's libraries at once
    "CUDA_MODULE_LOADING": "LAZY",
    # transformers warns at every import of optional packages that are not installed
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Defaults of the libraries' environment variables, most of which are read at import."""

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A container's CPU limit (cgroup v2): microseconds of CPU time, and the period in which it may use them."""


def set_environment() -> None:
    """Sets those variables of ``ENVIRONMENT`` that are not set, and how many threads PyTorch computes with on the CPU.

    PyTorch's default is one per core of the host, more than a container with a quota can run at once.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # no such file, or "max"
    with suppress(OSError, ValueError):
        quota, period = map(int, CPU_QUOTA.read_text().split())
        cores = min(len(os.sched_getaffinity(0)), math.ceil(quota / period))
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def quieten_libraries() -> None:
    """Keeps the log to the worker's own lines and the libraries' errors, once the libraries are imported."""
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    # importing the SDK turns on every library's INFO lines: several for each file of a download
    logging.getLogger().setLevel(logging.WARNING)
