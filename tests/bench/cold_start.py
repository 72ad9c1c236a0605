"""What a cold start takes: ``python -m tests.bench.cold_start``.

From the start of the process to ready for the first job, with a full-size v1-4 of random weights: the baseline's way
(import everything, load the float32 repository, cast it) against this worker's (``handler.py`` with the baked float16
model, or with a checkpoint of the same weights), in turns, with the page cache dropped and warm. On a CUDA device the
weights end there, and this worker's start includes its first picture. Elsewhere all end in float16 in memory, every
page touched, and nothing is generated.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
MODELS = Path(tempfile.gettempdir()) / "stable-diffusion-v1-4-random"
START_FILES = Path(tempfile.gettempdir()) / "start_files.txt"
"""What the image records when it is built."""
WAYS = {"baseline": "hub", "worker": "baked", "single file": "checkpoint.safetensors"}
"""Whose start is measured, and with which of the models."""
TARGETS = {"dropped": 0.28, "warm": 0.43}
Parts = dict[str, float]
"""The parts of a start, in order, and the seconds that each took."""


def baseline(model: str, done: Callable[[str], None]) -> None:
    import runpod  # noqa: F401
    import torch
    from diffusers import StableDiffusionPipeline

    done("imports")
    pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float16)
    pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.enable_attention_slicing()
    touch_weights(pipe)
    done("weights")


def worker(model: str, done: Callable[[str], None]) -> None:
    """What ``handler.build_job_handler`` does, in float16 on a CPU too."""
    import handler
    from src.model import repository
    from src.settings import Settings
    from src.startup import prefetch
    from src.startup.import_libraries import import_libraries

    settings = Settings(model_id=model, base_model=str(Path(model).with_name("baked")))
    prefetch.START_FILES = START_FILES
    found = repository.find_local(settings)
    prefetch.begin(found)
    done("settings, model found")
    import_libraries(done)
    import torch

    from src.job_handler import JobHandler  # noqa: F401

    done("the worker's own imports")
    engine = handler.build_engine(settings, torch.float16, found=found)
    touch_weights(engine._runner._pipe)
    done("weights")
    if torch.cuda.is_available():
        engine.warm_up()
        done("warm-up")


def touch_weights(pipe: object) -> None:
    """Waits until all weights are there: on a CPU they may be no more than mapped."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.synchronize()
    for model in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.safety_checker):
        for weights in model.parameters():
            # one number of each page
            weights.flatten()[::2048].sum()


def measure_start(way: str, model: Path) -> Parts:
    """Starts a process, and returns how long each part of its start took."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "tests.bench.cold_start", "--way", way, "--model", model]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(ran.stderr)
    done = json.loads(ran.stdout.splitlines()[-1])
    between = pairwise([begun, *done.values()])
    return {part: after - before for part, (before, after) in zip(done, between, strict=True)}


def run_start(way: str, model: str) -> None:
    marks = {"interpreter": time.monotonic()}

    def done(what: str) -> None:
        marks[what] = time.monotonic()

    (baseline if way == "baseline" else worker)(model, done)
    print(json.dumps(marks), flush=True)
    # nobody waits for the process to end
    os._exit(0)


def ensure_models(folder: Path) -> None:
    """Makes the models where ``folder`` lacks them: as the hub has it, and as it is baked into the image."""
    if not all((folder / model).exists() for model in WAYS.values()):
        # in a process of its own, whose memory is free again before anything is measured
        command = [sys.executable, "-m", "tests.bench.cold_start", "--make", "--models", folder]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def make_models(folder: Path) -> None:
    import torch

    from builder.fetch_model import fetch
    from tests.support.single_files import make_checkpoint
    from tests.support.v1_4 import FULL, make_repository

    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        make_repository(Path(unfinished) / "hub", FULL).rename(folder / "hub")
    fetch(str(folder / "hub"), None, folder / "baked")
    make_checkpoint(folder / "baked", folder / WAYS["single file"], torch.float16)


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a cold start takes.")
    parser.add_argument("--runs", type=int, default=7, help="pairs of starts, for each state of the page cache")
    parser.add_argument("--models", type=Path, default=MODELS, help="where the models are made, once: 10 GB")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        return run_start(arguments.way, arguments.model)
    models: Path = arguments.models
    if arguments.make:
        return make_models(models)
    ensure_models(models)
    record = [sys.executable, "-m", "builder.record_start", "--output", START_FILES]
    subprocess.run(record, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    caches = ["dropped", "warm"]
    try:
        drop_page_cache()
    except OSError as error:
        print(f"the page cache cannot be dropped here: {error}")
        caches.remove("dropped")
    runs: dict[tuple[str, str], list[Parts]] = {}
    for cache in caches:
        for run in range(arguments.runs + (cache == "warm")):
            for way, model in WAYS.items():
                if cache == "dropped":
                    drop_page_cache()
                taken = measure_start(way, models / model)
                # the first of the warm ones warms the cache
                if cache == "dropped" or run:
                    runs.setdefault((way, cache), []).append(taken)

    def totals(way: str, cache: str) -> list[float]:
        return [sum(run.values()) for run in runs[way, cache]]

    print(f"{'page cache':<22}{'baseline':>12}{'this worker':>14}{'ratio':>8}{'of the pairs':>16}{'target':>9}")
    for cache, way in product(caches, ("worker", "single file")):
        ours, theirs = totals(way, cache), totals("baseline", cache)
        # pair by pair, since how fast a shared machine is changes
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        row = cache if way == "worker" else f"{cache}, {way}"
        print(
            f"{row:<22}{median(theirs):>10.1f} s{median(ours):>12.1f} s{median(ratios):>8.2f}"
            f"{f'{min(ratios):.2f} to {max(ratios):.2f}':>16}{TARGETS[cache]:>9}"
        )
    print()
    print(f"{'part of this worker: share of its start':<42}" + "".join(f"{cache:>10}" for cache in caches))
    for part in runs["worker", caches[0]][0]:
        shares = [median(run[part] / sum(run.values()) for run in runs["worker", cache]) for cache in caches]
        print(f"{part:<42}" + "".join(f"{share:>10.0%}" for share in shares))


if __name__ == "__main__":
    main()
