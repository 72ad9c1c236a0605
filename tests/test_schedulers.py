"""Each of the worker's schedulers, made from the configuration of whichever scheduler a model has."""

from typing import Any

import diffusers
import pytest
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers

from src.errors import JobError
from src.generation.batch_runner import BatchRunner
from src.schedulers import SCHEDULERS
from tests.support import engines
from tests.support.engines import generate

# the schedulers of the pinned diffusers call NumPy in an old way
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NO_BETAS = {"EDMEulerScheduler"}
NOT_INSTALLED = {"DPMSolverSDEScheduler"}
OWN = sorted(
    {each.name for each in KarrasDiffusionSchedulers} - NO_BETAS - NOT_INSTALLED | {"LCMScheduler", "TCDScheduler"}
)
"""Every scheduler that diffusers offers a StableDiffusionPipeline."""


def set_scheduler(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, class_name: str, **config: Any
) -> None:
    """Sets the model's own scheduler, read from a file that holds no more than ``config``."""
    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, class_name).from_config(config))


@pytest.mark.parametrize("own", OWN)
def test_every_scheduler_keeps_what_the_model_was_trained_with(
    own: str, v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    trained = STABLE_DIFFUSION | {"num_train_timesteps": 900, "prediction_type": "v_prediction"}
    # of PNDM: the others ignore it
    set_scheduler(v1_4_pipe, monkeypatch, own, **trained, skip_prk_steps=True)
    runner = BatchRunner(v1_4_pipe, "test")
    for name in SCHEDULERS:
        scheduler = runner._new_scheduler(name)
        assert {key: scheduler.config[key] for key in trained} == trained
        assert (scheduler.alphas_cumprod == v1_4_pipe.scheduler.alphas_cumprod).all()
        generate(engines.around(v1_4_pipe), scheduler=name, num_inference_steps=2, guidance_scale=0)


@pytest.mark.parametrize("own", ["HeunDiscreteScheduler", "LCMScheduler"])
def test_betas_that_are_the_class_defaults_are_kept_where_the_file_leaves_them_out(
    own: str, v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    set_scheduler(v1_4_pipe, monkeypatch, own, beta_schedule="scaled_linear")
    for name in SCHEDULERS:
        config = BatchRunner(v1_4_pipe, "test")._new_scheduler(name).config
        assert {key: config[key] for key in STABLE_DIFFUSION} == STABLE_DIFFUSION


def test_zero_terminal_snr_is_lost_with_three_schedulers_only(
    v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    set_scheduler(v1_4_pipe, monkeypatch, "DDIMScheduler", **STABLE_DIFFUSION, rescale_betas_zero_snr=True)
    runner = BatchRunner(v1_4_pipe, "test")
    first_alphas = {name: runner._new_scheduler(name).alphas_cumprod[-1].item() for name in SCHEDULERS}
    lost = {name for name, alpha in first_alphas.items() if alpha > 1e-6}
    assert lost == {"PNDM", "KLMS", "DPMSolverSinglestep"}


@pytest.mark.parametrize("own", ["LCMScheduler", "TCDScheduler"])
def test_more_steps_than_a_distilled_model_can_do_are_invalid(
    own: str, v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    set_scheduler(v1_4_pipe, monkeypatch, own, original_inference_steps=10)
    engine = engines.around(v1_4_pipe)
    assert generate(engine, num_inference_steps=10).pictures
    with pytest.raises(JobError) as refused:
        generate(engine, num_inference_steps=11)
    assert str(refused.value) == f"invalid input: num_inference_steps: must be at most 10 with {own}, got 11"
    assert generate(engine, num_inference_steps=11, scheduler="DDIM").pictures
