"""The worker's schedulers, made from the configuration of any scheduler that a model may have."""

import copy
import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers

from src.errors import JobError
from src.model.loading import take_a_step
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


@pytest.mark.parametrize("quick_unet", ["v1_4_pipe"], indirect=True)
@pytest.mark.parametrize("own", OWN)
def test_schedulers_keep_the_models_training_configuration(
    own: str, quick_unet: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    trained = STABLE_DIFFUSION | {"num_train_timesteps": 900, "prediction_type": "v_prediction"}
    # only PNDM reads skip_prk_steps
    set_scheduler(quick_unet, monkeypatch, own, **trained, skip_prk_steps=True)
    engine = engines.around(quick_unet)
    for name in SCHEDULERS:
        scheduler = engines.new_scheduler(engine, name)
        assert {key: scheduler.config[key] for key in trained} == trained
        assert (scheduler.alphas_cumprod == quick_unet.scheduler.alphas_cumprod).all()
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


FITS_NO_DPM_SOLVER = {"DPMSolverMultistepScheduler": ["DEISMultistepScheduler"]}
FITS_NO_DPM_SOLVER["DPMSolverSinglestepScheduler"] = FITS_NO_DPM_SOLVER["DPMSolverMultistepScheduler"]
"""What diffusers itself cannot load: ``algorithm_type: deis`` in the file of a class that does without."""


@pytest.mark.parametrize("own", OWN)
def test_every_scheduler_works_whichever_class_the_models_file_was_saved_from(
    own: str, v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    refused = []
    for saved_from in [*OWN, *NO_BETAS]:
        parameters = inspect.signature(getattr(diffusers, saved_from)).parameters
        # few timesteps, because some classes loop over all of them when they are made
        ours = STABLE_DIFFUSION | {"num_train_timesteps": 100, "skip_prk_steps": True}
        config = {name: each.default for name, each in parameters.items()} | ours
        try:
            set_scheduler(v1_4_pipe, monkeypatch, own, **config)
        except ValueError:
            refused.append(saved_from)
            continue
        take_a_step(copy.deepcopy(v1_4_pipe.scheduler))
        engine = engines.around(v1_4_pipe)
        assert engine.limits.schedulers.keys() == {*SCHEDULERS, engine.limits.scheduler}
        for name in SCHEDULERS:
            take_a_step(engines.new_scheduler(engine, name))
    assert refused == FITS_NO_DPM_SOLVER.get(own, [])


@pytest.mark.parametrize(
    ("own", "trained", "unusable"),
    [
        ("DDIMScheduler", {"prediction_type": "sample"}, {"PNDM", "K_EULER_ANCESTRAL"}),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}, set(SCHEDULERS)),
    ],
)
def test_scheduler_that_does_not_work_with_a_model_is_refused_in_words(
    own: str,
    trained: dict[str, Any],
    unusable: set[str],
    v1_4_pipe: StableDiffusionPipeline,
    monkeypatch: pytest.MonkeyPatch,
):
    set_scheduler(v1_4_pipe, monkeypatch, own, **STABLE_DIFFUSION | trained)
    engine = engines.around(v1_4_pipe)
    usable = list(engine.limits.schedulers)
    assert SCHEDULERS.keys() - usable == unusable and engine.limits.scheduler in usable
    for name in usable:
        assert generate(engine, scheduler=name).pictures
    for name in unusable:
        with pytest.raises(JobError) as refused:
            generate(engine, scheduler=name)
        said = f"must be one of {', '.join(usable)}, got {name}, which does not work with this model"
        assert str(refused.value) == f"invalid input: scheduler: {said}"


@pytest.mark.parametrize("quick_unet", ["v1_4_pipe"], indirect=True)
@pytest.mark.parametrize(("own", "name"), [("LCMScheduler", "LCM"), ("TCDScheduler", "TCDScheduler")])
def test_more_steps_than_a_scheduler_can_do_are_refused(
    own: str, name: str, quick_unet: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    set_scheduler(quick_unet, monkeypatch, own, original_inference_steps=10)
    engine = engines.around(quick_unet)
    assert generate(engine, num_inference_steps=10).pictures
    for scheduler, maximum in {"LCM": 50, name: 10}.items():
        assert generate(engine, num_inference_steps=maximum, scheduler=scheduler).pictures
        with pytest.raises(JobError) as refused:
            generate(engine, num_inference_steps=maximum + 1, scheduler=scheduler)
        said = f"num_inference_steps: must be at most {maximum} with {scheduler}, got {maximum + 1}"
        assert str(refused.value) == f"invalid input: {said}"
    assert generate(engine, num_inference_steps=51, scheduler="DDIM").pictures


@pytest.mark.parametrize("spacing", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_only_karras_dpm_has_karras_sigmas_whatever_the_models_own_scheduler_has(
    spacing: str, v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    set_scheduler(v1_4_pipe, monkeypatch, "DPMSolverMultistepScheduler", **STABLE_DIFFUSION, **{spacing: True})
    engine = engines.around(v1_4_pipe)
    own = "KarrasDPM" if spacing == "use_karras_sigmas" else "DPMSolverMultistep"
    assert engine.limits.scheduler == own
    karras = {}
    for name in ("KarrasDPM", "DPMSolverMultistep"):
        scheduler = engines.new_scheduler(engine, name)
        scheduler.set_timesteps(20)
        # evenly spaced after the 7th root (Karras et al. 2022, equation 5)
        steps = scheduler.sigmas[:-1].pow(1 / 7).diff()
        karras[name] = torch.allclose(steps, steps.mean(), rtol=1e-3)
    assert karras == {"KarrasDPM": True, "DPMSolverMultistep": False}
