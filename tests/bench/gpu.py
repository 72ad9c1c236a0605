"""How fast a picture can be: ``python -m tests.bench.gpu``.

One run, on one device, with a full-size v1-4 of random weights, which is as fast as the real one: the baseline's
handler, plain diffusers, and this worker, for one picture and for a batch of four. Also the time that the device
waits between two queued calls, and the floor: the UNet's operations by count over the device's measured matrix rate.

``--small`` does the same with a shrunken model, which any CPU can: it shows that the bench works and nothing else.
"""

import argparse
import asyncio
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from runpod import RunPodLogger
from torch.utils.flop_counter import FlopCounterMode

import handler
from src.api.request import ImageRequest
from src.model import loading
from src.settings import Settings
from src.startup.import_libraries import import_libraries
from tests.bench import cold_start
from tests.support.v1_4 import make_repository

PROMPT = "A double-black diamond mountain to ski on near Seattle."
CALLS = (1, 4)
"""Images in a call."""
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.float16 if CUDA else torch.float32


@dataclass(frozen=True)
class Measured:
    seconds: float
    """Of a call, the median."""
    memory: int
    """Bytes that PyTorch has taken of the device at most; what graphs replay into counts only so."""


class TimedPipeline(StableDiffusionPipeline):
    """Remembers when each call begins and ends on the device."""

    calls: ClassVar[list[tuple[Any, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begun = now()
        generated = super().__call__(*args, **kwargs)
        self.calls.append((begun, now()))
        return generated


def now() -> Any:
    """A point in the device's own time, which the host does not wait for."""
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


def measure(generate: Callable[[int], object], images: int, runs: int, *, warm: bool = True) -> Measured:
    """Generates ``images`` in a call, ``runs`` times, after one that is not counted if ``warm``."""
    if warm:
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
    return Measured(median(times), torch.cuda.max_memory_reserved() if CUDA else 0)


def empty_device() -> None:
    """Gives back what an earlier way to generate has left on the device."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def load_plain(folder: Path, *, sliced: bool) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=DTYPE).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    if sliced:
        pipe.enable_attention_slicing()
    return pipe


def baseline(models: Path, steps: int, runs: int) -> list[Measured]:
    def generate(images: int) -> None:
        empty_device()
        pipe = load_plain(models / "hub", sliced=True)
        pipe([PROMPT] * images, num_inference_steps=steps)

    # it has nothing to warm up
    return [measure(generate, images, runs, warm=False) for images in CALLS]


def plain(models: Path, steps: int, runs: int, *, sliced: bool) -> list[Measured]:
    empty_device()
    pipe = load_plain(models / "baked", sliced=sliced)
    return [
        measure(lambda images: pipe([PROMPT] * images, num_inference_steps=steps), images, runs) for images in CALLS
    ]


def worker(models: Path, steps: int, runs: int, **settings: Any) -> tuple[list[Measured], float]:
    """What its calls take, and the median of what the device waits between two of them that are queued."""
    empty_device()
    given = Settings(model_id=str(models / "baked"), max_batch_images=max(CALLS), **settings)
    engine = handler.build_engine(given)

    def request(**job_input: Any) -> ImageRequest:
        return ImageRequest.parse({"prompt": PROMPT, "num_inference_steps": steps} | job_input, engine.limits)

    async def generate_both() -> None:
        # of different guidance, so that they cannot share a batch
        await asyncio.gather(*(engine.generate(request(guidance_scale=scale)) for scale in (7, 8)))

    measured = [
        measure(lambda images: asyncio.run(engine.generate(request(num_images=images))), images, runs)
        for images in CALLS
    ]
    waits = []
    for _ in range(runs):
        TimedPipeline.calls.clear()
        asyncio.run(generate_both())
        (_, first_ends), (second_begins, _) = TimedPipeline.calls
        waits.append(milliseconds(first_ends, second_begins))
    return measured, median(waits)


def floor(models: Path, steps: int) -> tuple[float, float]:
    """The UNet's floating-point operations for one picture with guidance, and how many a second the device does."""
    empty_device()
    with torch.no_grad():
        unet = load_plain(models / "baked", sliced=False).unet
        size, channels = unet.config.sample_size, unet.config.in_channels
        inputs = [
            torch.zeros(2, channels, size, size),
            torch.zeros(()),
            torch.zeros(2, 77, unet.config.cross_attention_dim),
        ]
        with FlopCounterMode(display=False) as counted:
            unet(*(each.to(DEVICE, DTYPE) for each in inputs))
        n = 8192 if CUDA else 1024
        a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in "ab")
        rate = 2 * n**3 / measure(lambda _: a @ b, 1, 20).seconds
    return float(counted.get_total_flops() * steps), rate


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast a picture can be.")
    parser.add_argument("--runs", type=int, default=5, help="of each kind, after one that is not counted")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--memory", type=float, help="GiB of the device's memory that may be used, such as 24")
    parser.add_argument("--price", type=float, help="of a second of the device, in dollars")
    parser.add_argument("--small", action="store_true", help="with a shrunken model")
    parser.add_argument("--models", type=Path, default=cold_start.MODELS, help="where the models are made, once: 8 GB")
    arguments = parser.parse_args()
    if not CUDA and not arguments.small:
        parser.error("there is no CUDA device: on a CPU only --small makes sense")
    import_libraries()
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
            cold_start.make_once(models)
        report(models, arguments.steps, arguments.runs, arguments.price)


def report(models: Path, steps: int, runs: int, price: float | None) -> None:
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, PyTorch {torch.__version__}, {steps} steps")
    columns = f"{'':<36}{'images':>7}{'s/picture':>11}{'pictures/s':>12}{'GiB':>7}{'x plain':>9}"
    print(columns + (f"{'$/1000':>9}" if price else ""))
    reference = plain(models, steps, runs, sliced=False)

    def show(name: str, measured: list[Measured]) -> None:
        for images, one, plain_one in zip(CALLS, measured, reference, strict=True):
            rate = images / one.seconds
            print(
                f"{name:<36}{images:>7}{1 / rate:>11.3f}{rate:>12.3f}{one.memory / 2**30:>7.2f}"
                f"{plain_one.seconds / one.seconds:>9.2f}" + (f"{1000 * price / rate:>9.3f}" if price else ""),
                flush=True,
            )

    show("plain diffusers", reference)
    show("plain diffusers, slicing", plain(models, steps, runs, sliced=True))
    show("baseline handler, loads each time", baseline(models, steps, min(runs, 3)))
    waits = {}
    for name, settings in (
        ("this worker", {}),
        ("this worker, no slicing", {"attention_slicing": "off"}),
        ("this worker, graphs", {"acceleration": "graphs"}),
        ("this worker, graphs, no slicing", {"acceleration": "graphs", "attention_slicing": "off"}),
    ):
        measured, waits[name] = worker(models, steps, runs, **settings)
        show(name, measured)
    print()
    for name, wait in waits.items():
        print(f"device idle between two queued calls, {name}: {wait:.1f} ms")
    operations, rate = floor(models, steps)
    print(
        f"floor: {operations / 1e12:.3g} TFLOP of the UNet a picture / {rate / 1e12:.3g} TFLOP/s = "
        f"{operations / rate:.3f} s"
    )


if __name__ == "__main__":
    main()
