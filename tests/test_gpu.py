"""The worker on a CUDA device, in float16 with a full-size model of random weights: ``python -m pytest -m gpu``.

Otherwise a shrunken model on the CPU runs those that it can. That only shows that the tests themselves work.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from src.api.limits import MAX_IMAGES
from src.errors import JobError
from src.generation.attention import enable_attention_slicing
from src.generation.batch_runner import BatchRunner
from src.generation.cuda_graphs import Capture, CaptureInvalidated, GraphedStep, Inputs
from src.generation.engine import Engine
from src.generation.pending import Progress
from src.schedulers import SCHEDULERS
from tests.bench import cold_start
from tests.support import engines, faulty_worker, internals
from tests.support.client import Client
from tests.support.engines import generate, pipe_of, request_for, runner_of
from tests.support.pictures import TASKS
from tests.support.platform_stub import serving
from tests.support.processes import python
from tests.support.single_files import expected_change, kohya, layers_of, make_checkpoint, trained

pytestmark = pytest.mark.gpu

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if CUDA else ("cpu", torch.float32)
real_device = pytest.mark.skipif(not CUDA, reason="tests the device itself")


@pytest.fixture(scope="module")
def model(v1_4_repository: Path) -> Path:
    if not CUDA:
        return v1_4_repository
    cold_start.ensure_models(cold_start.MODELS)
    return cold_start.MODELS / "baked"


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single file with the weights of ``model``."""
    if not CUDA:
        return make_checkpoint(model, tmp_path_factory.mktemp("single") / "checkpoint.safetensors")
    return cold_start.MODELS / "checkpoint.safetensors"


@pytest.fixture(scope="module", params=["off", "graphs"])
def engine(model: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The engine of a started worker, without acceleration and with it."""
    engine = engines.build(model, acceleration=request.param)
    engine.warm_up()
    yield engine
    engines.shut_down(engine)


@pytest.fixture(scope="module")
def pipe(model: Path) -> StableDiffusionPipeline:
    return pipe_of(engines.build(model))


def pixels(engine: Engine, **job_input: Any) -> np.ndarray:
    """Generates and returns the pictures of a request: (images, height, width, 3), 0 to 255."""
    return np.stack([picture.image for picture in generate(engine, **job_input).pictures]).astype(float)


def difference(some: np.ndarray, others: np.ndarray) -> float:
    """Returns the mean difference of pictures, 0 to 255: 40 for two seeds of the full-size model, as measured."""
    return float(np.abs(some - others).mean())


def test_checkpoint_gives_the_picture_of_the_directory(model: Path, checkpoint: Path, pipe: StableDiffusionPipeline):
    engine = engines.build(checkpoint, base_model=str(model))
    assert difference(pixels(engine), pixels(engines.around(pipe))) < 1
    engines.shut_down(engine)


def test_lora_is_merged_on_the_device(model: Path, pipe: StableDiffusionPipeline, tmp_path: Path):
    tensors = kohya(*layers_of(pipe, trained))
    save_file(tensors, tmp_path / "detail.safetensors")
    merged = pipe_of(engines.build(model, lora=f"{tmp_path}/detail.safetensors:0.7"))
    layer = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    before, after = (each.unet.get_submodule(layer).weight.float().cpu() for each in (pipe, merged))
    torch.testing.assert_close(after - before, expected_change(tensors, layer, 0.7), rtol=1e-2, atol=1e-3)


def unet_inputs(pipe: StableDiffusionPipeline, images: int = 2, shrunk: int = 1) -> Inputs:
    """Random inputs of one step, for latents of ``1 / shrunk`` of the native width and height."""
    config = pipe.unet.config
    size = config.sample_size // shrunk
    shapes = (images, config.in_channels, size, size), (images, 77, config.cross_attention_dim)
    latents, text = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for shape in shapes)
    return latents, torch.randint(1000, (), device=DEVICE), text


@real_device
def test_kernels_that_a_start_loads_exist():
    internals.compute_something_small(DEVICE)


def test_worker_starts(engine: Engine):
    pipe = pipe_of(engine)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.safety_checker):
        assert (part.device.type, part.dtype) == (DEVICE, DTYPE)


@torch.inference_mode()
def test_modules_compute_what_those_of_diffusers_do(engine: Engine, model: Path):
    ours, plain = pipe_of(engine), StableDiffusionPipeline.from_pretrained(model, dtype=DTYPE).to(DEVICE)

    def close(got: torch.Tensor, expected: torch.Tensor) -> None:
        assert (got.float() - expected.float()).norm() / expected.float().norm() < 1e-2

    for images, shrunk in ((2, 1), (8, 1), (2, 2)):
        latents, timestep, text = unet_inputs(ours, images, shrunk)
        picture = torch.rand(1, 3, 8 * latents.shape[2], 8 * latents.shape[3], device=DEVICE, dtype=DTYPE)
        close(*(pipe.unet(latents, timestep, text, return_dict=False)[0] for pipe in (ours, plain)))
        close(*(pipe.vae.decode(latents[:1]).sample for pipe in (ours, plain)))
        close(*(pipe.vae.encode(picture).latent_dist.mean for pipe in (ours, plain)))


def test_picture_in_a_batch_of_four_equals_the_one_made_alone(engine: Engine):
    # with graphs, the second batch of a shape is captured and the third replayed
    together = [pixels(engine, num_images=4, seed=1) for _ in range(3)]
    alone = np.concatenate([pixels(engine, seed=seed) for seed in range(1, 5)])
    for pictures in together:
        assert difference(pictures, alone) < 2
    assert difference(alone[:-1], alone[1:]) > 4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_generates(engine: Engine, scheduler: str):
    first, second = pixels(engine, scheduler=scheduler, num_images=2, num_inference_steps=4)
    assert difference(first, second) > 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("task", ["picture", "mask"])
def test_every_scheduler_generates_from_a_picture(engine: Engine, task: str, scheduler: str):
    # KLMS cannot begin in the middle
    strength = 1 if scheduler == "KLMS" else 0.8
    job_input = TASKS[task] | {"scheduler": scheduler, "num_inference_steps": 5, "strength": strength}
    together = pixels(engine, seed=1, num_images=2, **job_input)
    alone = np.concatenate([pixels(engine, seed=seed, **job_input) for seed in (1, 2)])
    assert difference(together, alone) < 2
    assert difference(*together) > 0


@pytest.mark.parametrize("task", TASKS)
def test_largest_request_fits_in_a_card_of_24_gb(engine: Engine, task: str):
    size = engine.limits.max_size
    if CUDA:
        runner_of(engine).release_memory()
        torch.cuda.reset_peak_memory_stats()
    job_input = TASKS[task] | {"width": size, "height": size, "num_images": MAX_IMAGES}
    assert pixels(engine, **job_input).shape == (MAX_IMAGES, size, size, 3)
    if CUDA:
        # other tests' pipelines included
        assert torch.cuda.max_memory_reserved() < 20 * 2**30


@pytest.mark.parametrize("scheduler", ["K_EULER_ANCESTRAL", "PNDM"])
def test_cancelled_request_frees_the_device(engine: Engine, scheduler: str):
    """K_EULER_ANCESTRAL waits for the device at each step, PNDM never does."""

    async def cancel_one() -> float:
        progress = Progress()
        request = request_for(engine, num_inference_steps=150, num_images=4, scheduler=scheduler)
        running = asyncio.create_task(engine.generate(request, progress))
        while not progress.share:
            await asyncio.sleep(0.01)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await engines.until_idle(engine)
        return progress.share

    assert 0 < asyncio.run(cancel_one()) < 0.5


def test_hanging_device_is_noticed(pipe: StableDiffusionPipeline):
    # the first step loads kernels, which may take longer than the time-out
    engines.around(pipe).warm_up()
    engine, over = Engine(BatchRunner(pipe, "test"), 4, stall_timeout=1), threading.Event()

    def hang(*_: object) -> None:
        if CUDA:
            # 5 s at 2 GHz
            internals.hang_cuda_device(10_000_000_000)
        else:
            over.wait(60)

    hook = pipe.unet.register_forward_pre_hook(hang)
    try:
        with pytest.raises(JobError, match="the GPU failed") as failed:
            generate(engine)
    finally:
        hook.remove()
        over.set()
        engines.shut_down(engine)
    assert failed.value.refresh_worker


@real_device
@pytest.mark.process
def test_worker_with_a_poisoned_device_is_replaced(model: Path):
    with serving() as platform:
        client = Client(platform)
        first = platform.start_worker(faulty_worker.main, MODEL_ID=str(model))
        poison = client.finished(client.run("device-side assert"))
        assert poison["error"] == "the GPU failed and this worker is being replaced: send the job again"
        assert platform.workers[first].process.wait(60) == 1
        done = client.generate()
        assert (done["status"], done["workerId"]) == ("COMPLETED", "worker-2")


@real_device
@pytest.mark.process
def test_out_of_memory_shrinks_batches_and_leaves_a_working_worker(model: Path):
    printed = python(f"from tests.support import out_of_memory; out_of_memory.main({str(model)!r})")
    outcome = json.loads(printed.splitlines()[-1])
    # 16 images of the largest size were requested
    assert 0 < outcome["fitting"] < 16
    assert outcome["pictures"] == 16
    assert outcome["error"] == "an image of 1024 x 1024 did not fit in GPU memory: ask for 512 x 512"
    assert outcome["native"] == 1


@torch.inference_mode()
def test_sliced_attention_equals_plain_attention(pipe: StableDiffusionPipeline):
    inputs = unet_inputs(pipe)
    pipe.disable_attention_slicing()
    plain = pipe.unet(*inputs).sample
    try:
        for setting in ("max", "auto"):
            enable_attention_slicing(pipe, setting)
            torch.testing.assert_close(pipe.unet(*inputs).sample, plain, atol=1e-2, rtol=1e-2)
    finally:
        enable_attention_slicing(pipe, "auto")


@pytest.fixture
def graphed(pipe: StableDiffusionPipeline) -> Iterator[GraphedStep]:
    """A step that captures every shape at once, as in a first batch."""
    graphed = GraphedStep(pipe.unet.forward, Capture() if CUDA else lambda step, inputs: step)
    yield graphed
    graphed.clear()
    torch.cuda.empty_cache()


@torch.inference_mode()
def test_graphs_of_several_shapes_predict_the_same_as_the_unet(graphed: GraphedStep, pipe: StableDiffusionPipeline):
    shapes = [(2, 1), (2, 2), (8, 1), (8, 2)]
    for images, shrunk in shapes * 3:
        inputs = unet_inputs(pipe, images, shrunk)
        (predicted,) = graphed(*inputs, return_dict=False)
        torch.testing.assert_close(predicted, pipe.unet(*inputs).sample, atol=1e-2, rtol=1e-2)
    assert internals.number_of_graphs(graphed) == len(shapes)


@torch.inference_mode()
def test_prediction_of_a_graph_outlives_its_next_replay(graphed: GraphedStep, pipe: StableDiffusionPipeline):
    graphed(*unet_inputs(pipe), return_dict=False)
    (first,) = graphed(*unet_inputs(pipe), return_dict=False)
    before = first.clone()
    graphed(*unet_inputs(pipe), return_dict=False)
    assert torch.equal(first, before)


@real_device
@torch.inference_mode()
def test_dropped_graphs_free_their_memory(graphed: GraphedStep, pipe: StableDiffusionPipeline):
    def reserved() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = reserved()
    inputs = unet_inputs(pipe, images=8)
    (predicted,) = graphed(*inputs, return_dict=False)
    held = reserved() - before
    graphed.clear()
    # a step of a batch of four needs half a GiB; its inputs and the capture stream's workspaces are kept
    assert held > 2**28
    assert reserved() - before < held / 2
    (again,) = graphed(*inputs, return_dict=False)
    torch.testing.assert_close(again, predicted, atol=1e-2, rtol=1e-2)


@real_device
@torch.inference_mode()
def test_invalidated_capture_leaves_a_working_device(pipe: StableDiffusionPipeline):
    def waiting(sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, **options: Any) -> Any:
        # reading a value waits for the device, which cannot be captured
        timestep.item()
        return pipe.unet(sample, timestep, text, **options)

    inputs, stream = unet_inputs(pipe), torch.cuda.current_stream()
    with pytest.raises(CaptureInvalidated, match="captur"):
        Capture()(lambda *each: waiting(*each, return_dict=False)[0], inputs)
    assert torch.cuda.current_stream() == stream
    (predicted,) = GraphedStep(waiting, Capture())(*inputs, return_dict=False)
    torch.testing.assert_close(predicted, pipe.unet(*inputs).sample, atol=1e-2, rtol=1e-2)
