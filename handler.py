"""The entry point: arguments -> settings -> pipeline -> engine -> job handler, then RunPod's loop.

python handler.py                  generates what test_input.json asks for
python handler.py --check          starts the worker, logs how long each part took, and exits
python handler.py --rp_serve_api   serves /run, /runsync and /status on localhost:8000
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - pip installs nothing for an older one
    sys.exit(f"handler.py needs Python 3.11 or newer, this is Python {sys.version_info[0]}.{sys.version_info[1]}")

import time
from typing import TYPE_CHECKING

from src.serving import log_output
from src.serving.command_line import Mode, choose_mode, parse_arguments, read_environment
from src.serving.signals import exit_on_signals

if TYPE_CHECKING:
    import torch

    from src.generation.engine import Engine
    from src.job_handler import JobHandler, ProgressReports
    from src.model.repository import Repository
    from src.settings import Settings

NO_PICTURE = (
    "its first picture is NaN: its weights are damaged, or exceed the range of float16, which a GPU uses "
    "(usually the VAE's: use one that was made for float16)"
)


def build_job_handler(settings: "Settings", progress_reports: "ProgressReports | None" = None) -> "JobHandler":
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
    import_libraries(eager=["peft"] if settings.lora else [])
    from runpod import RunPodLogger

    from src.api import picture
    from src.errors import StartError
    from src.generation.batch_runner import NotFinite
    from src.job_handler import JobHandler
    from src.model.loading import memory_in_use

    log = RunPodLogger()
    for hint in typo_hints():
        log.warn(hint)
    log.info(f"imports: {time.monotonic() - begun:.1f} s")
    engine = build_engine(settings, found=found)
    loaded = time.monotonic()
    try:
        engine.warm_up()
    except NotFinite as error:
        with repository.naming(settings, merged=True):
            # the card may be at fault
            raise StartError(NO_PICTURE, may_recover=True) from error
    picture.warm_up()
    log.info(f"warm-up: {time.monotonic() - loaded:.1f} s")
    log.info(f"ready: {memory_in_use()}, {time.monotonic() - begun:.1f} s in all")
    return JobHandler(engine, settings, progress_reports)


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

    from src.api.prompt_warnings import Vocabulary
    from src.generation.acceleration import accelerate
    from src.generation.batch_runner import BatchRunner
    from src.generation.engine import Engine
    from src.model import loading, loras, repository

    log, begun = RunPodLogger(), time.monotonic()
    device = loading.choose_device(settings)
    model = found or repository.find(settings)
    log.info(f"model: {model}, {model.where}, {time.monotonic() - begun:.1f} s")
    begun = time.monotonic()
    pipe = loading.load(model, device, settings, dtype)
    for lora in model.loras:
        log.info(loras.merge(pipe, lora))
    graphs = accelerate(pipe, settings)
    log.info(
        f"weights: {loading.describe(pipe)}, attention slicing {settings.attention_slicing}, "
        f"acceleration {'graphs' if graphs else 'off'}, {time.monotonic() - begun:.1f} s"
    )
    runner = BatchRunner(pipe, model.name, graphs, Vocabulary(**model.words) if model.words else None)
    return Engine(runner, settings.max_batch_images, stall_timeout=settings.stall_timeout)


def main() -> None:
    log_output.install()
    exit_on_signals()
    arguments = parse_arguments()
    faults = read_environment(arguments)
    # the SDK would parse the command line again
    del sys.argv[1:]
    # imported late, so that --help and misspelt arguments are answered at once
    from src.serving import one_job
    from src.settings import Settings
    from src.startup.environment import set_environment

    set_environment()
    mode = choose_mode(arguments)
    job = None
    try:
        settings = Settings.from_environment(other_faults=faults)
        if mode is Mode.ONE_JOB:
            job = one_job.read_job(arguments.test_input)
        job_handler = build_job_handler(settings, one_job.progress_bar if job else None)
    except Exception as error:
        from src.serving.refusal import refuse_to_start

        refuse_to_start(error, takes_jobs=mode is Mode.PLATFORM)
    from src.serving import api_server, worker_loop

    if job:
        one_job.run_job(job_handler.handle, job, quiet=not arguments.rp_log_level)
    elif mode is Mode.PLATFORM:
        worker_loop.serve(job_handler.handle, settings.max_concurrency)
    elif mode is Mode.POD:
        api_server.serve_on_pod(job_handler.handle)
    elif mode is Mode.LOCAL_SERVER:
        api_server.serve(job_handler.handle, arguments.rp_api_host, arguments.rp_api_port)


if __name__ == "__main__":
    main()
