"""One batch through the pipeline: from what images are asked for to pictures."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import diffusers
import torch

from src.output import Picture
from src.pipeline import Model
from src.request import ImageRequest, JobError, ModelLimits
from src.settings import DEMO_MODEL_ID
from src.vocabulary import vocabulary_warnings

SCHEDULERS = {
    "PNDM": diffusers.PNDMScheduler,
    "DDIM": diffusers.DDIMScheduler,
    "KLMS": diffusers.LMSDiscreteScheduler,
    "K_EULER": diffusers.EulerDiscreteScheduler,
    "K_EULER_ANCESTRAL": diffusers.EulerAncestralDiscreteScheduler,
    "DPMSolverMultistep": diffusers.DPMSolverMultistepScheduler,
    "DPMSolverSinglestep": diffusers.DPMSolverSinglestepScheduler,
    "UniPCMultistep": diffusers.UniPCMultistepScheduler,
}

PRODUCED_NAN = "the model produced NaN instead of a picture: try another seed, scheduler or a lower guidance_scale"


class BatchRunner:
    """Runs batches of images through a model's pipeline, one at a time."""

    def __init__(self, model: Model) -> None:
        self._pipe = model.pipe
        # DDIM's default clips to -1 and 1, which is for pixels: latents go beyond
        self._scheduler_config = {**model.pipe.scheduler.config, "clip_sample": False}
        kind = type(model.pipe.scheduler)
        own = next((name for name, scheduler in SCHEDULERS.items() if scheduler is kind), kind.__name__)
        self._own_scheduler = (own, kind)
        self.model_name = model.name
        self.limits = ModelLimits(native_size=model.native_size, max_size=2 * model.native_size, scheduler=own)

    def run(
        self, requests: Sequence[ImageRequest], seeds: Sequence[int], after_step: Callable[[float], None]
    ) -> list[Picture | JobError]:
        """Generates an image for each request and seed, in one call of the pipeline.

        Args:
            requests: one for each image; all of them may share a batch.
            seeds: one for each image, drawn from on the CPU, so that a seed means the same image on every device.
            after_step: called after each denoising step with the share of the steps that are done, from 0 to 1. What
                it raises ends the call.

        Returns:
            For each image the picture, or why there is none.
        """
        shared = requests[0]
        name, kind = self._own_scheduler
        scheduler = kind if shared.scheduler == name else SCHEDULERS[shared.scheduler]
        self._pipe.scheduler = scheduler.from_config(self._scheduler_config)
        generated = self._pipe(
            prompt=[request.prompt for request in requests],
            negative_prompt=[request.negative_prompt for request in requests],
            width=shared.width,
            height=shared.height,
            num_inference_steps=shared.num_inference_steps,
            guidance_scale=shared.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            callback_on_step_end=partial(_report_step, after_step),
        )
        blanked = generated.nsfw_content_detected or [None] * len(seeds)
        return [
            self._picture(pixels, seed, nsfw)
            for pixels, seed, nsfw in zip(generated.images, seeds, blanked, strict=True)
        ]

    def release_memory(self) -> None:
        """Gives back to the device what is cached and not in use."""
        torch.cuda.empty_cache()

    def prompt_warnings(self, request: ImageRequest) -> list[str]:
        """Quotes what lies beyond the text encoder's last token; says if the embedded model knows too few words."""
        warnings = vocabulary_warnings(request.prompt) if self.model_name == DEMO_MODEL_ID else []
        for field_name in ("prompt", "negative_prompt"):
            text, most = getattr(request, field_name), self._pipe.tokenizer.model_max_length
            spans = self._pipe.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            if len(spans) > most:
                # the last place of a full prompt is the end token's
                rest = text[spans[most - 1][0] :]
                warnings.append(f'{field_name}: longer than {most} tokens, this part was not used: "{rest}"')
        return warnings

    def _picture(self, pixels: torch.Tensor, seed: int, nsfw: bool | None) -> Picture | JobError:
        if not pixels.isfinite().all():
            return JobError(PRODUCED_NAN)
        (image,) = self._pipe.image_processor.postprocess(pixels[None], do_denormalize=[False])
        return Picture(image, seed, nsfw)


def _report_step(
    after_step: Callable[[float], None], pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """diffusers' ``callback_on_step_end``."""
    after_step((step + 1) / pipe.num_timesteps)
    return kwargs
