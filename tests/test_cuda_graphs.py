"""Which steps are captured, kept and replayed; the capture itself needs a CUDA device."""

import copy
import itertools
from collections.abc import Callable
from typing import Literal
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from src.generation import acceleration
from src.generation.attention import FusedSlicedAttnProcessor
from src.generation.batch_runner import BatchRunner
from src.generation.cuda_graphs import WARM_UP_RUNS, Capture, CaptureInvalidated, GraphedStep, Inputs, Pace, Step
from src.generation.engine import Engine
from src.settings import Settings
from tests.support import engines, internals


def inputs(size: int = 8, images: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(size)
    return (
        torch.randn(images, 4, size, size, generator=generator),
        torch.tensor(7),
        torch.randn(images, 77, 32, generator=generator),
    )


class Captures:
    """Stands in for ``Capture``, keeps the step in place of a graph, and lists the sizes of captures and replays."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []
        self.error: Exception | None = None

    def __call__(self, step: Step, inputs: Inputs) -> Step:
        self.captured.append(inputs[0].shape[-1])
        if self.error:
            raise self.error

        def replay(*new: torch.Tensor) -> torch.Tensor:
            self.replayed.append(new[0].shape[-1])
            return step(*new)

        return replay


@pytest.fixture
def captures() -> Captures:
    return Captures()


@pytest.fixture
def forward(v1_4_pipe: StableDiffusionPipeline) -> Callable:
    return v1_4_pipe.unet.forward


def echo(sample: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
    """A UNet that predicts its own input."""
    return (sample,)


def run_batches(graphed: GraphedStep, *sizes: int, steps: int = 1) -> None:
    """Runs a batch of each size and compares each step with the UNet without graphs."""
    for size in sizes:
        for _ in range(steps):
            (predicted,) = graphed(*inputs(size)[:2], encoder_hidden_states=inputs(size)[2], return_dict=False)
            (expected,) = internals.without_graphs(graphed)(*inputs(size), return_dict=False)
            assert torch.equal(predicted, expected)
        graphed.end_batch()


@torch.no_grad()
def test_first_shape_is_captured_at_once_and_others_on_their_second_use(captures: Captures, forward: Callable):
    graphed = GraphedStep(forward, captures)
    run_batches(graphed, 8, 16, 8, 24, steps=3)
    assert captures.captured == [8]
    assert captures.replayed == [8] * 6
    run_batches(graphed, 16, steps=3)
    assert captures.captured == [8, 16]
    assert captures.replayed == [8] * 6 + [16] * 3


def test_number_of_images_and_dtype_are_part_of_the_shape(captures: Captures):
    graphed = GraphedStep(echo, captures)
    variants = [
        inputs(),
        inputs(images=4),
        tuple(each.half() for each in inputs()),
        (*inputs()[:2], inputs()[2][:, :9]),
    ]
    for variant in variants * 3:
        graphed(*variant, return_dict=False)
        graphed.end_batch()
    assert len(captures.captured) == len(variants)


def test_least_recently_used_graph_is_dropped(captures: Captures):
    graphed = GraphedStep(echo, captures, max_graphs=2)
    run_batches(graphed, 8, 16, 16, 24, 8, 24)
    assert captures.captured == [8, 16, 24]
    # 24 took the place of 16
    run_batches(graphed, 8, 16)
    assert captures.captured == [8, 16, 24, 16]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            CaptureInvalidated("AcceleratorError: CUDA error: operation not permitted when stream is capturing"),
            "CaptureInvalidated: AcceleratorError: CUDA error: operation not permitted when stream is capturing",
        ),
        (CaptureInvalidated("OutOfMemoryError: CUDA out of memory"), "CaptureInvalidated: OutOfMemoryError: CUDA out"),
        (RuntimeError("no kernel image is available"), "RuntimeError: no kernel image is available"),
    ],
)
def test_invalidated_capture_ends_capturing_but_existing_graphs_stay_in_use(
    captures: Captures, error: Exception, message: str, capsys: pytest.CaptureFixture
):
    graphed = GraphedStep(echo, captures)
    run_batches(graphed, 8)
    captures.error = error
    run_batches(graphed, 16, 16)
    captures.error = None
    run_batches(graphed, 16, 24, 24, 8)
    assert captures.captured == [8, 16]
    assert captures.replayed == [8, 8]
    (line,) = capsys.readouterr().out.splitlines()
    assert f"no CUDA graph for latents of 2 x 4 x 16 x 16, computed without: {message}" in line


def test_shape_that_does_not_fit_drops_the_other_graphs_and_is_not_tried_again(captures: Captures):
    graphed = GraphedStep(echo, captures)
    run_batches(graphed, 8)
    captures.error = torch.OutOfMemoryError("CUDA out of memory")
    run_batches(graphed, 16, 16)
    captures.error = None
    run_batches(graphed, 16, 8, 24, 16, 24)
    assert captures.captured == [8, 16, 8, 24]
    assert captures.replayed == [8, 8, 24]


def test_memory_is_released_only_if_there_were_graphs(captures: Captures, v1_4_pipe: StableDiffusionPipeline):
    graphed = GraphedStep(echo, captures)
    runner = BatchRunner(v1_4_pipe, "test", graphed)
    assert not runner.release_memory()
    run_batches(graphed, 8)
    assert runner.release_memory()
    assert not runner.release_memory()


def test_integer_and_float_timesteps_share_a_graph(captures: Captures):
    graphed = GraphedStep(lambda sample, timestep, *_, **__: (timestep,), captures)
    for timestep in (torch.tensor(7), torch.tensor(7.0), torch.tensor(7.0, dtype=torch.float64)):
        (seen,) = graphed(inputs()[0], timestep, inputs()[2], return_dict=False)
        assert (seen.item(), seen.dtype) == (7.0, torch.float32)
    assert captures.captured == [8]


@pytest.mark.parametrize(
    ("failing_run", "kind"), [(WARM_UP_RUNS, RuntimeError), (WARM_UP_RUNS + 1, CaptureInvalidated)]
)
def test_only_a_failure_during_the_capture_itself_invalidates_it(
    failing_run: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    cuda, runs = MagicMock(), itertools.count(1)
    monkeypatch.setattr(torch, "cuda", cuda)

    def step(*_: torch.Tensor) -> torch.Tensor:
        if next(runs) == failing_run:
            raise RuntimeError("CUDA out of memory")
        return torch.zeros(())

    with pytest.raises(RuntimeError, match="CUDA out of memory") as raised:
        Capture()(step, inputs())
    assert raised.type is kind
    # such a failure may leave the thread on the stream of the capture
    cuda.set_stream.assert_called_once_with(cuda.current_stream())


def test_host_is_at_most_one_step_ahead_of_the_device():
    log: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.name = f"step {sum(line.startswith('record') for line in log) + 1}"

        def record(self) -> None:
            log.append(f"record {self.name}")

        def synchronize(self) -> None:
            log.append(f"wait for {self.name}")

    pace = Pace(Event)
    for _ in range(3):
        pace.wait_for_previous_step()
    assert log == ["record step 1", "record step 2", "wait for step 1", "record step 3", "wait for step 2"]


def test_call_with_arguments_unknown_to_graphs_bypasses_them(captures: Captures, forward: Callable):
    graphed = GraphedStep(forward, captures)
    with torch.no_grad():
        assert torch.equal(graphed(*inputs()).sample, forward(*inputs()).sample)
        graphed(*inputs(), cross_attention_kwargs={}, return_dict=False)
    assert captures.captured == []


@pytest.mark.parametrize("slicing", ["auto", "off"])
def test_worker_captures_the_native_shape_at_start_and_others_on_their_second_use(
    slicing: Literal["auto", "off"],
    captures: Captures,
    v1_4_pipe: StableDiffusionPipeline,
    monkeypatch: pytest.MonkeyPatch,
):
    def generate(engine: Engine, images: int) -> list[bytes]:
        pictures = engines.generate(engine, num_images=images).pictures
        return [picture.image.tobytes() for picture in pictures]

    pipe = copy.deepcopy(v1_4_pipe)
    monkeypatch.setattr(acceleration, "Capture", lambda: captures)
    with monkeypatch.context() as pretended:
        pretended.setattr(StableDiffusionPipeline, "device", torch.device("cuda"))
        graphs = acceleration.accelerate(pipe, Settings(acceleration="graphs", attention_slicing=slicing))
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert attention.fused_projections
    assert isinstance(attention.processor, FusedSlicedAttnProcessor)

    engine = Engine(BatchRunner(pipe, "test", graphs), 4)
    engine.warm_up()
    assert captures.captured == [8]
    # PNDM takes one step more than it is asked for
    assert len(captures.replayed) == 3
    eager = [generate(engines.around(v1_4_pipe), images) for images in (1, 3)]
    for _ in "ab":
        for images, pictures in zip((1, 3), eager, strict=True):
            generated = generate(engine, images)
            deltas = [
                np.frombuffer(a, np.uint8) - np.frombuffer(b, np.uint8).astype(int)
                for a, b in zip(generated, pictures, strict=True)
            ]
            assert np.abs(deltas).max() <= 1
    assert captures.captured == [8, 8]
    assert len(captures.replayed) == 3 + 3 * 3
