"""Which steps are captured, kept and replayed; the capture itself needs a CUDA device."""

from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionPipeline

from src.generation import acceleration
from src.generation.cuda_graphs import Capture, GraphedStep, Inputs, Pace, Step


def inputs(size: int = 8, images: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(size)
    return (
        torch.randn(images, 4, size, size, generator=generator),
        torch.tensor(7),
        torch.randn(images, 77, 32, generator=generator),
    )


class Captures:
    """Stands in for ``Capture``: a step is recorded by remembering it. Counts captures and replays by size."""

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


@torch.no_grad()
def test_a_shape_is_captured_once_and_then_replayed(captures: Captures, forward: Callable):
    graphed = GraphedStep(forward, captures)
    for size in (8, 8, 16, 8):
        (predicted,) = graphed(*inputs(size)[:2], encoder_hidden_states=inputs(size)[2], return_dict=False)
        assert torch.equal(predicted, forward(*inputs(size), return_dict=False)[0])
    assert captures.captured == [8, 16]
    assert captures.replayed == [8, 8, 16, 8]


@torch.no_grad()
def test_images_and_dtypes_are_shapes_of_their_own(captures: Captures):
    graphed = GraphedStep(lambda sample, *_, **__: (sample,), captures)
    variants = [
        inputs(),
        inputs(images=4),
        tuple(each.half() for each in inputs()),
        (*inputs()[:2], inputs()[2][:, :9]),
    ]
    for variant in variants * 2:
        graphed(*variant, return_dict=False)
    assert len(captures.captured) == len(variants)


def test_only_so_many_are_kept_and_the_one_unused_for_longest_goes(captures: Captures):
    graphed = GraphedStep(lambda sample, *_, **__: (sample,), captures, max_graphs=2)
    for size in (8, 16, 8, 24, 8, 16):
        graphed(*inputs(size), return_dict=False)
    # 24 took the place of 16, which took the place of 24
    assert captures.captured == [8, 16, 24, 16]


def test_after_a_failed_capture_the_graphs_that_are_kept_go_on_and_no_other_is_tried(
    captures: Captures, forward: Callable, capsys: pytest.CaptureFixture
):
    graphed = GraphedStep(forward, captures)
    with torch.no_grad():
        graphed(*inputs(8), return_dict=False)
        captures.error = RuntimeError("operation not permitted when stream is capturing")
        for size in (16, 16, 24, 8):
            (predicted,) = graphed(*inputs(size), return_dict=False)
            assert torch.equal(predicted, forward(*inputs(size), return_dict=False)[0])
    assert captures.captured == [8, 16]
    assert captures.replayed == [8, 8]
    (line,) = capsys.readouterr().out.splitlines()
    assert "no CUDA graph for latents of 2 x 4 x 16 x 16, computed without: RuntimeError: operation not" in line


def capture_invalidated_by(cause: Exception) -> Exception:
    """What PyTorch raises when ``cause`` ends a capture."""
    error = torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        capture_invalidated_by(RuntimeError("GET was unable to find an engine to execute this computation")),
    ],
)
def test_out_of_memory_gives_up_the_graphs_that_are_kept(captures: Captures, error: Exception):
    graphed = GraphedStep(lambda sample, *_, **__: (sample,), captures, max_graphs=2)
    graphed(*inputs(8), return_dict=False)
    captures.error = error
    graphed(*inputs(16), return_dict=False)
    captures.error = None
    # what did not fit is not tried again, and takes no graph's place
    for size in (16, 8, 24, 16, 8, 24):
        graphed(*inputs(size), return_dict=False)
    assert captures.captured == [8, 16, 8, 24]
    assert captures.replayed == [8, 8, 24, 8, 24]


def test_dropped_graphs_are_captured_anew(captures: Captures):
    graphed = GraphedStep(lambda sample, *_, **__: (sample,), captures)
    for _ in "ab":
        graphed(*inputs(8), return_dict=False)
        graphed.clear()
    assert captures.captured == [8, 8]


def test_a_schedulers_integer_and_float_timesteps_are_one_graph(captures: Captures):
    graphed = GraphedStep(lambda sample, timestep, *_, **__: (timestep,), captures)
    for timestep in (torch.tensor(7), torch.tensor(7.0), torch.tensor(7.0, dtype=torch.float64)):
        (seen,) = graphed(inputs()[0], timestep, inputs()[2], return_dict=False)
        assert (seen.item(), seen.dtype) == (7.0, torch.float32)
    assert captures.captured == [8]


def test_the_host_is_at_most_one_step_ahead_of_the_device():
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


def test_arguments_that_a_graph_does_not_know_are_heeded(captures: Captures, forward: Callable):
    graphed = GraphedStep(forward, captures)
    with torch.no_grad():
        assert torch.equal(graphed(*inputs()).sample, forward(*inputs()).sample)
        graphed(*inputs(), cross_attention_kwargs={}, return_dict=False)
    assert captures.captured == []


def test_the_pipeline_calls_the_graphed_step(
    captures: Captures, v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    def generate() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return v1_4_pipe("sea", num_inference_steps=5, generator=generator, output_type="pt").images

    plain = generate()
    unet = v1_4_pipe.unet
    monkeypatch.setattr(unet, "forward", GraphedStep(unet.forward, captures))
    assert torch.equal(generate(), plain)
    assert captures.captured == [8]
    # PNDM takes one step more than it is asked for
    assert len(captures.replayed) == 6


def test_attention_is_fused_only_where_it_is_not_sliced(v1_4_repository, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(acceleration, "Capture", Captures)
    plain = {}
    for sliced in (False, True):
        pipe = StableDiffusionPipeline.from_pretrained(v1_4_repository)
        generator = torch.Generator().manual_seed(1)
        options = {"num_inference_steps": 3, "output_type": "pt"}
        plain[sliced] = pipe("sea", generator=generator, **options).images
        if sliced:
            pipe.enable_attention_slicing()
        acceleration.enable_cuda_graphs(pipe, sliced=sliced)
        assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert hasattr(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1, "to_qkv") is not sliced
        generated = pipe("sea", generator=torch.Generator().manual_seed(1), **options).images
        torch.testing.assert_close(generated, plain[sliced], atol=1e-3, rtol=0)


@pytest.mark.gpu
def test_a_real_graph_predicts_what_the_unet_does():
    unet = torch.nn.Conv2d(4, 4, 3, padding=1, device="cuda", dtype=torch.float16)

    def forward(sample: torch.Tensor, timestep: torch.Tensor, _: torch.Tensor, return_dict: bool) -> tuple:
        return (unet(sample) + timestep,)

    graphed = GraphedStep(forward, Capture())
    with torch.no_grad():
        for timestep in range(3):
            sample = torch.randn(2, 4, 8, 8, device="cuda", dtype=torch.float16)
            given = (sample, torch.tensor(timestep, device="cuda"), torch.zeros(2, 77, 8, device="cuda"))
            (predicted,) = graphed(*given, return_dict=False)
            torch.testing.assert_close(predicted, forward(*given, return_dict=False)[0])
