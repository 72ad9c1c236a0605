"""The entry point: arguments -> settings -> pipeline -> engine -> worker, then RunPod's loop.

python handler.py                  generates what test_input.json asks for
python handler.py --check          starts the worker, logs how long each part took, and exits
python handler.py --rp_serve_api   serves /run, /runsync and /status on localhost:8000
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - pip installs nothing for an older one
    sys.exit(f"handler.py needs Python 3.11 or newer, this is Python {sys.version_info[0]}.{sys.version_info[1]}")

import os
import signal
import time
from typing import TYPE_CHECKING, NoReturn

from src.serving.command_line import parse_arguments

if TYPE_CHECKING:
    from src.settings import Settings
    from src.worker import ProgressReports, Worker

ENVIRONMENT = {
    # the SDK's default, DEBUG, logs prompts and pictures
    "RUNPOD_LOG_LEVEL": "INFO",
    # the picture generated at start tests more of the machine than the SDK's own checks, which would run after it
    "RUNPOD_SKIP_GPU_CHECK": "true",
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
    # transformers warns at every import of optional packages that are not installed
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Defaults of the libraries' environment variables, most of which are read at import."""


def build_worker(settings: "Settings", progress_reports: "ProgressReports | None" = None) -> "Worker":
    """Imports the libraries, loads the model and generates a first picture; the log says how long each took.

    Args:
        settings: the worker's settings.
        progress_reports: in place of those to the platform.

    Raises:
        StartError: if the model cannot be loaded.
        JobError: if it cannot generate.
    """
    from src.settings import misspelt
    from src.startup import import_libraries, prefetch

    begun = time.monotonic()
    prefetch.begin(settings)
    # these imports are most of a cold start: they wait until the disk is at work
    import torch  # noqa: F401

    import_libraries.defer()
    prefetch.load_kernels()
    from src.generation.engine import Engine
    from src.model import loading
    from src.worker import Worker

    log = loading.log
    for hint in misspelt():
        log.warn(hint)
    log.info(f"imports: {time.monotonic() - begun:.1f} s")
    engine = Engine(loading.load(settings), settings.max_batch_images, stall_timeout=settings.stall_timeout)
    loaded = time.monotonic()
    engine.warm_up()
    log.info(f"warm-up: {time.monotonic() - loaded:.1f} s")
    prefetch.finish()
    log.info(f"ready: {loading.memory_in_use()}, {time.monotonic() - begun:.1f} s in all")
    return Worker(engine, settings, progress_reports)


def refuse_to_start(error: Exception) -> NoReturn:
    """Says why and exits with code 1. On RunPod through the SDK, which reports the worker as unhealthy."""
    import runpod

    from src.settings import on_runpod

    runpod.RunPodLogger().error(f"the worker cannot start: {error}")
    if on_runpod():

        def the_worker_can_start() -> None:
            raise error

        runpod.serverless.register_fitness_check(the_worker_can_start)
        runpod.serverless.start({"handler": None})
    sys.stdout.flush()
    # Python's own exit would wait for the engine's thread, which hangs with the GPU
    os._exit(1)


def main() -> None:
    arguments = parse_arguments()
    if arguments.rp_log_level:
        os.environ["RUNPOD_LOG_LEVEL"] = arguments.rp_log_level
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C ends a start, without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    # imported late, so that --help and a misspelt argument are answered at once
    from src.errors import JobError, StartError
    from src.serving import one_job
    from src.settings import Settings, on_runpod

    runs_one_job = not arguments.rp_serve_api and (arguments.test_input is not None or not on_runpod())
    try:
        settings = Settings.from_environment()
        if arguments.rp_serve_api:
            one_job.check_address(arguments.rp_api_host, arguments.rp_api_port)
        elif runs_one_job and not arguments.check:
            one_job.check_job(arguments.test_input)
        worker = build_worker(settings, one_job.progress_bar if runs_one_job else None)
    except (StartError, JobError) as error:
        refuse_to_start(error)
    if arguments.check:
        return
    if runs_one_job:
        one_job.run_job(worker.handle, quiet=not arguments.rp_log_level)
    else:
        from src.serving import worker_loop

        worker_loop.start(worker.handle, settings.max_concurrency)


if __name__ == "__main__":
    main()
