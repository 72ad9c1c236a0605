"""The entry point: arguments -> settings -> pipeline -> engine -> worker, then RunPod's loop.

python handler.py                  generates what test_input.json asks for
python handler.py --check          starts the worker, logs how long each part took, and exits
python handler.py --rp_serve_api   serves /run, /runsync and /status on localhost:8000
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - pip installs nothing for an older one
    sys.exit(f"handler.py needs Python 3.11 or newer, this is Python {sys.version_info[0]}.{sys.version_info[1]}")

import os
import time
from typing import TYPE_CHECKING

from src.serving.command_line import parse_arguments
from src.serving.log_output import open_closed_streams
from src.serving.signals import exit_on_signals

if TYPE_CHECKING:
    import torch

    from src.generation.engine import Engine
    from src.model.repository import Repository
    from src.settings import Settings
    from src.worker import ProgressReports, Worker

NO_PICTURE = (
    "its first picture is NaN: its weights are damaged, or do not fit into float16, in which a GPU runs them "
    "(most often the VAE's: use one that was made for float16)"
)


def build_worker(settings: "Settings", progress_reports: "ProgressReports | None" = None) -> "Worker":
    """Imports the libraries, loads the model and generates a first picture; logs how long each step took.

    Args:
        settings: the worker's settings.
        progress_reports: replaces the reports to the platform.

    Raises:
        StartError: if the model cannot be loaded, or makes no picture.
        JobError, Exception: if it cannot generate pictures.
    """
    from src.model import repository
    from src.settings import typo_hints
    from src.startup import prefetch
    from src.startup.import_libraries import import_libraries

    begun = time.monotonic()
    # imports dominate a cold start, so disk reads are started first
    found = repository.find_local(settings)
    prefetch.begin(found)
    import_libraries()
    from runpod import RunPodLogger

    from src.api import picture
    from src.errors import JobError, StartError
    from src.generation.batch_runner import PRODUCED_NAN
    from src.model.loading import memory_in_use
    from src.worker import Worker

    log = RunPodLogger()
    for hint in typo_hints():
        log.warn(hint)
    log.info(f"imports: {time.monotonic() - begun:.1f} s")
    engine = build_engine(settings, found=found)
    loaded = time.monotonic()
    try:
        engine.warm_up()
    except JobError as error:
        if str(error) != PRODUCED_NAN:
            raise
        with repository.naming(settings):
            # the card may be at fault
            raise StartError(NO_PICTURE, may_recover=True) from error
    picture.warm_up()
    log.info(f"warm-up: {time.monotonic() - loaded:.1f} s")
    log.info(f"ready: {memory_in_use()}, {time.monotonic() - begun:.1f} s in all")
    return Worker(engine, settings, progress_reports)


def build_engine(
    settings: "Settings", dtype: "torch.dtype | None" = None, *, found: "Repository | None" = None
) -> "Engine":
    """Loads the model and builds the engine around it, without a warm-up.

    Args:
        settings: which model, and how to run it.
        dtype: of the weights. By default float16 on a CUDA device, float32 on the CPU.
        found: the model, if it has been found on this machine; otherwise it is looked for or downloaded.

    Raises:
        StartError: if there is no usable device or no usable model.
    """
    from runpod import RunPodLogger

    from src.generation.acceleration import accelerate
    from src.generation.batch_runner import BatchRunner
    from src.generation.engine import Engine
    from src.model import loading, repository

    log, begun = RunPodLogger(), time.monotonic()
    device = loading.choose_device(settings)
    model = found or repository.find(settings)
    log.info(f"model: {model}, {model.where}, {time.monotonic() - begun:.1f} s")
    begun = time.monotonic()
    pipe = loading.load(model, device, settings, dtype)
    graphs = accelerate(pipe, settings)
    log.info(
        f"weights: {loading.describe(pipe)}, attention slicing {settings.attention_slicing}, "
        f"CUDA graphs {'on' if graphs else 'off'}, {time.monotonic() - begun:.1f} s"
    )
    runner = BatchRunner(pipe, model.name, graphs)
    return Engine(runner, settings.max_batch_images, stall_timeout=settings.stall_timeout)


def main() -> None:
    exit_on_signals()
    open_closed_streams()
    arguments = parse_arguments()
    if arguments.rp_log_level:
        os.environ["RUNPOD_LOG_LEVEL"] = arguments.rp_log_level
    # imported late, so that --help and misspelt arguments are answered at once
    from src.serving import api_server, one_job
    from src.serving.shared_memory import check_shared_memory
    from src.settings import Settings, on_pod, on_runpod
    from src.startup.import_libraries import set_environment

    set_environment()
    serves_pod = on_pod() and not arguments.rp_serve_api and arguments.test_input is None
    runs_one_job = not arguments.rp_serve_api and (arguments.test_input is not None or not (on_runpod() or on_pod()))
    try:
        if on_runpod():
            check_shared_memory()
        settings = Settings.from_environment()
        if arguments.rp_serve_api:
            api_server.check_address(arguments.rp_api_host, arguments.rp_api_port)
        elif runs_one_job and not arguments.check:
            one_job.check_job(arguments.test_input)
        elif serves_pod and not arguments.check:
            api_server.prepare_pod()
        worker = build_worker(settings, one_job.progress_bar if runs_one_job else None)
    except Exception as error:
        from src.serving.refusal import refuse_to_start

        refuse_to_start(error, takes_jobs=on_runpod() and not (arguments.check or runs_one_job))
    if arguments.check:
        return
    if serves_pod:
        api_server.announce_pod()
    if runs_one_job:
        one_job.run_job(worker.handle, quiet=not arguments.rp_log_level)
    else:
        from src.serving import worker_loop

        worker_loop.start(worker.handle, settings.max_concurrency)


if __name__ == "__main__":
    main()
