"""The worker's schedulers, made from the configuration of any scheduler that a model may have."""

from typing import Any

import diffusers
import pytest
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers

from src.errors import JobError
from src.schedulers import SCHEDULERS
from tests.support import engines
from tests.support.engines import generate

# schedulers of the pinned diffusers call NumPy in a deprecated way
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NO_BETAS = {"EDMEulerScheduler"}
NOT_INSTALLED = {"DPMSolverSDEScheduler"}
OWN = sorted(
    {each.name for each in KarrasDiffusionSchedulers} - NO_BETAS - NOT_INSTALLED | {"LCMScheduler", "TCDScheduler"}
)
"""Every scheduler of diffusers that works with a StableDiffusionPipeline."""


def set_scheduler(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, class_name: str, **config: Any
) -> None:
    """Sets the model's own scheduler, as read from a file that holds only ``config``."""
    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, class_name).from_config(config))


@pytest.mark.parametrize("own", OWN)
def test_schedulers_keep_the_models_training_configuration(
    own: str, v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    trained = STABLE_DIFFUSION | {"num_train_timesteps": 900, "prediction_type": "v_prediction"}
    # only PNDM reads skip_prk_steps
    set_scheduler(v1_4_pipe, monkeypatch, own, **trained, skip_prk_steps=True)
    engine = engines.around(v1_4_pipe)
    for name in SCHEDULERS:
        scheduler = engines.new_scheduler(engine, name)
        assert {key: scheduler.config[key] for key in trained} == trained
        assert (scheduler.alphas_cumprod == v1_4_pipe.scheduler.alphas_cumprod).all()
        generate(engine, scheduler=name, num_inference_steps=2, guidance_scale=0)


@pytest.mark.parametrize("own", ["HeunDiscreteScheduler", "LCMScheduler"])
def test_schedulers_keep_betas_that_the_models_file_leaves_to_class_defaults(
    own: str, v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    set_scheduler(v1_4_pipe, monkeypatch, own, beta_schedule="scaled_linear")
    engine = engines.around(v1_4_pipe)
    for name in SCHEDULERS:
        config = engines.new_scheduler(engine, name).config
        assert {key: config[key] for key in STABLE_DIFFUSION} == STABLE_DIFFUSION


def test_only_three_schedulers_lose_zero_terminal_snr(
    v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    set_scheduler(v1_4_pipe, monkeypatch, "DDIMScheduler", **STABLE_DIFFUSION, rescale_betas_zero_snr=True)
    engine = engines.around(v1_4_pipe)
    first_alphas = {name: engines.new_scheduler(engine, name).alphas_cumprod[-1].item() for name in SCHEDULERS}
    lost = {name for name, alpha in first_alphas.items() if alpha > 1e-6}
    assert lost == {"PNDM", "KLMS", "DPMSolverSinglestep"}


@pytest.mark.parametrize("own", ["LCMScheduler", "TCDScheduler"])
def test_more_steps_than_a_distilled_model_supports_are_refused(
    own: str, v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    set_scheduler(v1_4_pipe, monkeypatch, own, original_inference_steps=10)
    engine = engines.around(v1_4_pipe)
    assert generate(engine, num_inference_steps=10).pictures
    with pytest.raises(JobError) as refused:
        generate(engine, num_inference_steps=11)
    assert str(refused.value) == f"invalid input: num_inference_steps: must be at most 10 with {own}, got 11"
    assert generate(engine, num_inference_steps=11, scheduler="DDIM").pictures
