"""The steps of a start, their order and their log."""

import ctypes
import mmap
import os
import re
import sys
from pathlib import Path

import pytest
import runpod
import torch

from src.errors import StartError
from src.model import repository
from src.serving.command_line import parse_arguments, read_environment
from src.settings import Settings
from src.startup import prefetch
from tests.support import forks, internals
from tests.support.processes import python


@pytest.mark.process
def test_check_starts_the_worker_and_logs_the_time_of_each_part(v1_4_repository: Path, tmp_path: Path):
    ran = forks.run_handler(tmp_path, "--check", MODEL_ID=str(v1_4_repository), MAX_CONCURRENCY="1")
    assert ran.returncode == 0
    assert re.fullmatch(
        r"INFO   \| imports: \d+\.\d s\n"
        rf"INFO   \| model: {v1_4_repository.name}, directory {v1_4_repository}, \d+\.\d s\n"
        r"INFO   \| weights: on the CPU in float32, safety checker on, attention slicing auto, acceleration off, "
        r"\d+\.\d s\n"
        r"INFO   \| warm-up: \d+\.\d s\n"
        r"INFO   \| ready: no GPU, \d+\.\d s in all\n",
        ran.stdout,
    )
    assert ran.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_help_and_invalid_arguments_are_answered_before_any_import():
    for argument, code in (("--help", 0), ("--chek", 2)):
        ended = (
            "import sys; own = set(sys.modules)\n"
            f"import handler; sys.argv = ['handler.py', {argument!r}]\n"
            "try: handler.main()\n"
            "except SystemExit as end: print(end.code, *{name.split('.')[0] for name in sys.modules} - own)\n"
        )
        *_, last = python(ended).splitlines()
        status, *imported = last.split()
        assert status == str(code)
        assert set(imported) - set(sys.stdlib_module_names) == {"handler", "src"}


def test_every_argument_of_the_sdk_is_accepted():
    options = internals.options_of_the_sdk()
    assert len(options) == 8 and "--rp_serve_api" in options
    values = {
        "--rp_api_host": ["0.0.0.0"],
        "--rp_api_port": ["8001"],
        "--rp_api_concurrency": ["1"],
        "--rp_log_level": ["debug"],
        "--test_input": ['{"input": {}}'],
    }
    for option in options[1:]:
        given = [option, *values.get(option, [])]
        ours, theirs = parse_arguments(given), runpod.serverless.parser.parse_args(given)
        for name, value in vars(theirs).items():
            assert (getattr(ours, name) or None) == (value.upper() if name == "rp_log_level" and value else value)


@pytest.mark.parametrize("name", ["RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"])
def test_log_level_is_read_in_every_usual_spelling(monkeypatch: pytest.MonkeyPatch, name: str):
    spellings = {
        "WARNING": "WARN",
        "FATAL ": "ERROR",
        "Critical": "ERROR",
        "info": "INFO",
        " TRACE\n": "TRACE",
        "": None,
    }
    for spelling, level in spellings.items():
        monkeypatch.setenv("RUNPOD_LOG_LEVEL", "")
        monkeypatch.setenv(name, spelling)
        arguments = parse_arguments([])
        assert read_environment(arguments) == []
        assert arguments.rp_log_level == os.environ.get("RUNPOD_LOG_LEVEL") == level
    assert parse_arguments(["--rp_log_level", "warning"]).rp_log_level == "WARN"


def test_variables_that_the_sdk_could_not_parse_are_named_and_removed(monkeypatch: pytest.MonkeyPatch):
    numbers = ["PING_INTERVAL", "REALTIME_PORT", "REALTIME_CONCURRENCY", "GPU_TEST_TIMEOUT", "GPU_MAX_ERROR_MESSAGES"]
    for value, bad in {"": 0, " 1 ": 1, "10s": 5, "1e4": 5, "-1": 5, "9" * 5000: 5}.items():
        for number in numbers:
            monkeypatch.setenv(f"RUNPOD_{number}", value)
        faults = read_environment(parse_arguments([]))
        assert len(faults) == bad
        assert all(f"{fault.split('=')[0]}" not in os.environ for fault in faults)
        assert {os.environ.get(f"RUNPOD_{number}") for number in numbers} <= {None, "1"}


@pytest.mark.process
def test_nothing_heavy_is_imported_before_the_read_ahead():
    heavy = {"torch", "diffusers", "transformers", "runpod"}
    imported = set(python("import handler, sys; print(*sys.modules)").split())
    assert not heavy & imported


@pytest.mark.process
def test_imports_are_exempt_from_garbage_collection():
    code = (
        "import gc\n"
        "gc.unfreeze()\n"
        "from src.startup.import_libraries import import_libraries\n"
        "enabled = []\n"
        "import_libraries(lambda library: enabled.append(gc.isenabled()))\n"
        "print(*enabled, gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
    )
    assert forks.python(code) == "False False False True True\n"


def test_unusable_model_is_refused_before_the_imports(tmp_path: Path):
    with pytest.raises(StartError, match="it has no model_index"):
        repository.find_local(Settings(model_id=str(tmp_path)))


@pytest.mark.process
def test_read_ahead_brings_files_into_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def share_cached(path: Path) -> float:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            pages = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(mapped)
            assert ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages) == 0
            # a mapping with a reference to it cannot be closed
            del start
            return sum(page & 1 for page in pages) / len(pages)

    def uncached(name: str, size: int = prefetch.MAX_FILE_BYTES // 2) -> Path:
        path = tmp_path / name
        with path.open("wb") as file:
            file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if share_cached(path):
            pytest.skip("this file system keeps files in the page cache")
        return path

    weights, module, missing = uncached("weights"), uncached("a module.py"), tmp_path / "missing"
    library = uncached("a library.so", 2 * prefetch.MAX_FILE_BYTES)
    start_files = tmp_path / "start_files.txt"
    monkeypatch.setattr(prefetch, "START_FILES", start_files)
    internals.read_ahead([weights, missing])
    assert (share_cached(weights), share_cached(module)) == (1, 0)
    start_files.write_text(f"{missing}\n{module}\n{library}\n")
    internals.read_ahead([])
    assert share_cached(module) == 1 and 0 < share_cached(library) < 1


def test_kernels_are_loaded_by_computing_something():
    internals.compute_something_small("cpu")


def test_kernels_are_loaded_only_onto_a_cuda_device(monkeypatch: pytest.MonkeyPatch):
    computed = internals.record_kernel_loading(monkeypatch)
    for available, expected in ((False, []), (True, ["cuda"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        prefetch.load_kernels()
        assert computed == expected
