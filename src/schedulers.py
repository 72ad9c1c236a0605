"""The schedulers that a request can name."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scheduler:
    """One of diffusers' schedulers, set up for Stable Diffusion."""

    class_name: str
    """The name of its class in diffusers, which is imported on first use."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options that Stable Diffusion needs when the model's own scheduler is another one. Sources: diffusers' docs on
    schedulers, and its conversion of Stable Diffusion checkpoints."""
    max_steps: int | None = None
    """The maximum number of denoising steps that the class supports, if a request may ask for more."""


SCHEDULERS = {
    # no Runge-Kutta steps at the start: they make three steps four times as expensive, and need at least four steps
    "PNDM": Scheduler("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    # the last step ends at the noise of the first training step; clipping to [-1, 1] is for pixels, latents exceed it
    "DDIM": Scheduler("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
    "KLMS": Scheduler("LMSDiscreteScheduler"),
    "K_EULER": Scheduler("EulerDiscreteScheduler"),
    "K_EULER_ANCESTRAL": Scheduler("EulerAncestralDiscreteScheduler"),
    "DPMSolverMultistep": Scheduler("DPMSolverMultistepScheduler", {"use_karras_sigmas": False}),
    # diffusers takes one spacing of sigmas at a time
    "KarrasDPM": Scheduler(
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False},
    ),
    "DPMSolverSinglestep": Scheduler("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "UniPCMultistep": Scheduler("UniPCMultistepScheduler"),
    # takes its timesteps from so many of the distillation's
    "LCM": Scheduler("LCMScheduler", {"original_inference_steps": 50}, max_steps=50),
}
"""The names that Cog's Stable Diffusion and RunPod's SDXL worker use, Replicate's for DPM++ 2M with Karras sigmas
(``KarrasDPM``), and two more (``UniPCMultistep``, ``LCM``) in the same style."""

TRAINED = frozenset(
    (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    )
)
"""Configuration that belongs to the model, not to its scheduler: with other values, any scheduler generates noise."""
