"""How fast a picture can be, and which settings make it so: ``python -m tests.bench.gpu``.

One run on one device, with a full-size v1-4 of random weights, which is as fast as the real one: plain diffusers, this
worker with each of its settings and without its patches of the memory layout, and the baseline's handler, for one
picture and for a batch of four. The columns:

- ``x plain``: times as fast as plain diffusers without slicing;
- ``GiB``: the most memory that PyTorch reserved on the device;
- ``host ms``: how long the host needs to launch a step, which is one call of the UNet with guidance;
- ``device ms``: how long the device needs to compute it once it is launched; the longer of the two is what it takes;
- ``idle ms``: how long the device waits between two queued calls of one picture;
- ``$/1000``: what 1,000 pictures cost, with ``--price``.

Then the memory of the largest requests, the floor (a picture's operations by count over the device's measured matrix
rate), and what to set on this device.

``--small`` does the same with a shrunken model, which any CPU can: it shows that the bench works, its advice means
nothing.
"""

import argparse
import asyncio
import functools
import gc
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, ClassVar

from src.startup.import_libraries import import_libraries

# read at import: PyTorch's own kernels are measured, not those that it would have Triton compile meanwhile
os.environ.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")
import_libraries()

import torch
from diffusers import StableDiffusionPipeline
from runpod import RunPodLogger
from torch.utils.flop_counter import FlopCounterMode

from src.api.limits import MAX_IMAGES
from src.generation.memory_layout import FASTER, ChannelsLastGroupNorm
from src.model import loading
from tests.bench import cold_start
from tests.support import engines
from tests.support.pictures import TASKS
from tests.support.v1_4 import make_repository

PLAIN = "plain diffusers"
PROMPT = "A double-black diamond mountain to ski on near Seattle."
BATCH_SIZES = (1, 4)
"""Images in one call."""
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.float16 if CUDA else torch.float32
WARM_UPS = 2
"""Calls that are not counted: graphs are captured in the second with a shape."""
HEAD_START_CYCLES = 400_000_000
"""The device's cycles, about 0.2 s, in which the host launches a whole step before the device begins with it."""
FLOORS = {
    "L4": (0.70, 1.50),
    "A5000": (0.76, 1.01),
    "3090": (1.19, 1.38),
    "4090": (0.51, 0.70),
    "H100": (0.086, 0.151),
    "H200": (0.086, 0.128),
}
"""Seconds a picture, by a card's peak operations and by the roofline of each kernel (src/README.md, Decisions)."""
MIN_GAIN = 1.03
"""Times as fast: less is noise."""


@dataclass(frozen=True)
class Measurement:
    """Medians of calls with the same number of images."""

    seconds: float
    """Of one call."""
    memory: int
    """The most bytes that PyTorch reserved on the device: allocated bytes do not include the graphs' buffers."""
    host: float = float("nan")
    """Milliseconds of a step."""
    device: float = float("nan")
    idle: float = float("nan")
    """Milliseconds for which the device waits between two queued calls of one picture."""


Rows = list[Measurement]
"""One for each of ``BATCH_SIZES``."""


class TimedPipeline(StableDiffusionPipeline):
    """Remembers when each call begins and ends on the device."""

    calls: ClassVar[list[tuple[Any, Any]]] = []

    @functools.wraps(StableDiffusionPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begun = timestamp()
        generated = super().__call__(*args, **kwargs)
        self.calls.append((begun, timestamp()))
        return generated


def restore(pipe: StableDiffusionPipeline, faster: Collection[type[torch.nn.Module]]) -> None:
    """Gives the modules of these classes their own classes back."""
    for model in (pipe.unet, pipe.vae):
        for module in model.modules():
            if type(module) in faster:
                module.__class__ = type(module).__base__


def use_default_layout(pipe: StableDiffusionPipeline) -> None:
    restore(pipe, FASTER.values())
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.contiguous_format)


DEFAULTS, EAGER = "this worker", "ACCELERATION=off"
SETTINGS: dict[str, dict[str, Any]] = {
    DEFAULTS: {},
    "ATTENTION_SLICING=off": {"attention_slicing": "off"},
    EAGER: {"acceleration": "off"},
    f"{EAGER} ATTENTION_SLICING=off": {"acceleration": "off", "attention_slicing": "off"},
}
"""By what is set."""
CHANGES: dict[str, Callable[[StableDiffusionPipeline], None]] = {
    "PyTorch's group norms": lambda pipe: restore(pipe, [ChannelsLastGroupNorm]),
    "default memory layout": use_default_layout,
}
"""What is undone in the pipeline of this worker: it tells when it can go."""


def timestamp() -> Any:
    """Returns the current time of the device, without making the host wait for it."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(before: Any, after: Any) -> float:
    if not CUDA:
        return 1000 * (after - before)
    torch.cuda.synchronize()
    return float(before.elapsed_time(after))


def measure_calls(
    generate: Callable[[int], object], images: int, runs: int, *, warm_ups: int = WARM_UPS
) -> Measurement:
    """Generates ``images`` in a call, ``runs`` times after those that are not counted."""
    for _ in range(warm_ups):
        generate(images)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        generate(images)
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return Measurement(median(times), torch.cuda.max_memory_reserved() if CUDA else 0)


@torch.inference_mode()
def step_times(pipe: StableDiffusionPipeline, images: int, runs: int) -> dict[str, float]:
    """Milliseconds of one step with guidance: of the host to launch it, of the device to compute it.

    The launch queue takes about 1,024 kernels. With more, as diffusers' slicing has, each waits for the other.
    """
    inputs = unet_inputs(pipe.unet, images)
    host, device = [], []
    # the first is not counted
    for _ in range(1 + runs):
        if CUDA:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        pipe.unet(*inputs, return_dict=False)
        host.append(1000 * (time.perf_counter() - begun))
        if CUDA:
            torch.cuda._sleep(HEAD_START_CYCLES)
        begun = timestamp()
        pipe.unet(*inputs, return_dict=False)
        device.append(milliseconds(begun, timestamp()))
    return {"host": median(host[1:]), "device": median(device[1:])}


def unet_inputs(unet: torch.nn.Module, images: int) -> list[torch.Tensor]:
    """Random inputs of one step with guidance: devices compute zeros faster."""
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    shapes = (2 * images, unet.config.in_channels, size, size), (), (2 * images, 77, width)
    return [torch.randn(shape, device=DEVICE, dtype=DTYPE) for shape in shapes]


def free_device() -> None:
    """Frees the memory of an earlier variant."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def load_plain(folder: Path, *, sliced: bool) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=DTYPE).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    if sliced:
        pipe.enable_attention_slicing()
    return pipe


def measure_baseline(models: Path, steps: int, runs: int) -> Rows:
    def generate(images: int) -> None:
        free_device()
        pipe = load_plain(models / "hub", sliced=True)
        pipe([PROMPT] * images, num_inference_steps=steps)

    # it has nothing to warm up
    return [measure_calls(generate, images, runs, warm_ups=0) for images in BATCH_SIZES]


def measure(
    pipe: StableDiffusionPipeline, generate: Callable[[int], object], runs: int, *, warm_ups: int = WARM_UPS
) -> Rows:
    """Calls of ``generate``, and steps of the pipeline that it uses."""
    return [
        replace(measure_calls(generate, images, runs, warm_ups=warm_ups), **step_times(pipe, images, runs))
        for images in BATCH_SIZES
    ]


def measure_plain(models: Path, steps: int, runs: int, *, sliced: bool) -> Rows:
    free_device()
    pipe = load_plain(models / "baked", sliced=sliced)
    return measure(pipe, lambda images: pipe([PROMPT] * images, num_inference_steps=steps), runs, warm_ups=1)


def measure_worker(
    models: Path,
    steps: int,
    runs: int,
    settings: dict[str, Any],
    change: Callable[[StableDiffusionPipeline], None] = lambda pipe: None,
) -> Rows:
    free_device()
    engine = engines.build(models / "baked", max_batch_images=max(BATCH_SIZES), **settings)
    asked = {"prompt": PROMPT, "num_inference_steps": steps}

    async def generate_both() -> None:
        # of different guidance, so that they cannot share a batch
        requests = [engines.request_for(engine, guidance_scale=scale, **asked) for scale in (7, 8)]
        await asyncio.gather(*map(engine.generate, requests))

    pipe, waits = engines.pipe_of(engine), []
    change(pipe)
    measured = measure(pipe, lambda images: engines.generate(engine, num_images=images, **asked), runs)
    for _ in range(runs):
        TimedPipeline.calls.clear()
        asyncio.run(generate_both())
        (_, first_ends), (second_begins, _) = TimedPipeline.calls
        waits.append(milliseconds(first_ends, second_begins))
    engines.shut_down(engine)
    return [replace(measured[0], idle=median(waits)), *measured[1:]]


def measure_largest(models: Path) -> dict[str, int]:
    """The most bytes that PyTorch reserves for a request of the largest size and number of images, by its task."""
    free_device()
    engine = engines.build(models / "baked", max_batch_images=MAX_IMAGES)
    size = engine.limits.max_size

    def memory_of(task: str) -> int:
        generate = functools.partial(engines.generate, engine, width=size, height=size, **TASKS[task])
        measured = measure_calls(lambda images: generate(num_images=images), MAX_IMAGES, runs=1)
        engines.runner_of(engine).release_memory()
        return measured.memory

    memory = {task: memory_of(task) for task in TASKS}
    engines.shut_down(engine)
    return memory


def floor(models: Path, steps: int) -> tuple[float, float]:
    """The floating-point operations of a whole picture, and how many a second the device does in a matrix product."""
    free_device()
    pipe = load_plain(models / "baked", sliced=False)
    with FlopCounterMode(display=False) as counted:
        pipe(PROMPT, num_inference_steps=steps)
    n = 8192 if CUDA else 1024
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in "ab")
    rate = 2 * n**3 / measure_calls(lambda _: a @ b, 1, 20).seconds
    return float(counted.get_total_flops()), rate


def times_as_fast(measured: Rows, reference: Rows) -> list[float]:
    return [other.seconds / one.seconds for one, other in zip(measured, reference, strict=True)]


def advice(rows: dict[str, Rows]) -> Iterator[str]:
    """What to set on this device and why, and whether a patch can go."""

    def gain(name: str) -> float:
        return geometric_mean(times_as_fast(rows[name], rows[DEFAULTS]))

    def compared(name: str) -> str:
        gains = zip(BATCH_SIZES, times_as_fast(rows[name], rows[DEFAULTS]), strict=True)
        more = max(one.memory - other.memory for one, other in zip(rows[name], rows[DEFAULTS], strict=True))
        speeds = ", ".join(f"{gain:.2f} times as fast for {images}" for images, gain in gains)
        return f"{speeds}, {more / 2**30:+.2f} GiB"

    best = max(SETTINGS, key=gain)
    if gain(best) < MIN_GAIN:
        yield f"set nothing: no setting makes {DEFAULTS} {MIN_GAIN - 1:.0%} faster"
    else:
        yield f"set {best}: {compared(best)}"
    for images, one in zip(BATCH_SIZES, rows[EAGER], strict=True):
        limit = "host is the limit, which graphs relieve" if one.host > one.device else "device is the limit"
        took = f"the host {one.host:.1f} ms, the device {one.device:.1f} ms"
        yield f"why: without graphs, a step of {images} takes {took}: the {limit}"
    for name in CHANGES:
        verdict = "the patch pays" if gain(name) * MIN_GAIN < 1 else "the patch can go"
        yield f"with {name}, {verdict}: {compared(name)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast a picture can be.")
    parser.add_argument("--runs", type=int, default=5, help="calls of each row, after those that are not counted")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of a picture")
    parser.add_argument("--memory", type=float, help="GiB of the device's memory that may be used, such as 24")
    parser.add_argument("--price", type=float, help="of a second of the device, in dollars")
    parser.add_argument("--small", action="store_true", help="with a shrunken model")
    parser.add_argument("--models", type=Path, default=cold_start.MODELS, help="where the models are made, once: 8 GB")
    arguments = parser.parse_args()
    if not CUDA and not arguments.small:
        parser.error("there is no CUDA device: on a CPU only --small makes sense")
    if min(arguments.runs, arguments.steps) < 1:
        parser.error("--runs and --steps must be 1 or more")
    RunPodLogger().set_level("WARN")
    if CUDA and arguments.memory:
        share = arguments.memory * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    loading.StableDiffusionPipeline = TimedPipeline  # type: ignore[misc]

    with tempfile.TemporaryDirectory() as small:
        models = arguments.models
        if arguments.small:
            models = Path(small)
            make_repository(models / "hub")
            (models / "baked").symlink_to("hub")
        else:
            cold_start.ensure_models(models)
        report(models, arguments.steps, arguments.runs, arguments.price)


def report(models: Path, steps: int, runs: int, price: float | None) -> None:
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, PyTorch {torch.__version__}, {steps} steps")
    columns = f"{'':<42}{'images':>7}{'s/picture':>11}{'pictures/s':>12}{'x plain':>9}{'GiB':>7}"
    columns += f"{'host ms':>9}{'device ms':>11}{'idle ms':>9}"
    print(columns + (f"{'$/1000':>9}" if price else ""))
    rows: dict[str, Rows] = {}

    def show(name: str, measured: Rows) -> None:
        rows[name] = measured
        speeds = times_as_fast(measured, rows[PLAIN])
        for images, one, speed in zip(BATCH_SIZES, measured, speeds, strict=True):
            rate = images / one.seconds
            print(
                f"{name:<42}{images:>7}{1 / rate:>11.3f}{rate:>12.3f}{speed:>9.2f}{one.memory / 2**30:>7.2f}"
                f"{one.host:>9.1f}{one.device:>11.1f}{one.idle:>9.1f}"
                + (f"{1000 * price / rate:>9.3f}" if price else ""),
                flush=True,
            )

    show(PLAIN, measure_plain(models, steps, runs, sliced=False))
    for name, settings in SETTINGS.items():
        show(name, measure_worker(models, steps, runs, settings))
    for name, change in CHANGES.items():
        show(name, measure_worker(models, steps, runs, {}, change))
    for task, memory in measure_largest(models).items():
        print(f"{f'{DEFAULTS}, largest request ({task})':<42}{MAX_IMAGES:>7}{memory / 2**30:>39.2f}", flush=True)
    show(f"{PLAIN}, slicing", measure_plain(models, steps, runs, sliced=True))
    show("baseline handler, loads each time", measure_baseline(models, steps, min(runs, 3)))
    print()
    operations, rate = floor(models, steps)
    print(f"floor: {operations / 1e12:.3g} TFLOP a picture / {rate / 1e12:.3g} TFLOP/s = {operations / rate:.3f} s")
    for card, (by_operations, by_roofline) in FLOORS.items():
        if CUDA and card in torch.cuda.get_device_name().split():
            print(f"floor of a {card} for 50 steps by its datasheet: {by_operations} s, by roofline {by_roofline} s")
    print(*advice(rows), sep="\n")


if __name__ == "__main__":
    main()
