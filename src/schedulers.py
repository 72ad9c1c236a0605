"""The schedulers that a request can name."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scheduler:
    """One of diffusers' schedulers, set up for Stable Diffusion."""

    class_name: str
    """Its class in diffusers, which is imported when it is first asked for."""
    options: dict[str, Any] = field(default_factory=dict)
    """What Stable Diffusion needs where the model's own scheduler is another one. Sources: the documentation of
    diffusers' schedulers, and its conversion of Stable Diffusion checkpoints."""


SCHEDULERS = {
    # without the Runge-Kutta steps at the start, which quadruple the cost of the first three steps and need four steps
    "PNDM": Scheduler("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    # the last step ends at the noise of the first training step; clipping to [-1, 1] is for pixels, latents exceed it
    "DDIM": Scheduler("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
    "KLMS": Scheduler("LMSDiscreteScheduler"),
    "K_EULER": Scheduler("EulerDiscreteScheduler"),
    "K_EULER_ANCESTRAL": Scheduler("EulerAncestralDiscreteScheduler"),
    "DPMSolverMultistep": Scheduler("DPMSolverMultistepScheduler"),
    "DPMSolverSinglestep": Scheduler("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "UniPCMultistep": Scheduler("UniPCMultistepScheduler"),
}
"""The names that Cog's Stable Diffusion and RunPod's SDXL worker use, and one more (UniPC) in the same style."""

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
"""The configuration that is the model's rather than a scheduler's: with other values, every scheduler paints noise."""
