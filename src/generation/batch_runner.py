"""One batch through the pipeline: from what images are asked for to pictures."""

import inspect
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from src.api.picture import Picture
from src.api.request import ImageRequest, ModelLimits
from src.errors import JobError
from src.model.demo.vocabulary import vocabulary_warnings
from src.model.loading import Model
from src.schedulers import SCHEDULERS
from src.settings import DEMO_MODEL_ID

_thread = threading.local()

PRODUCED_NAN = "the model produced NaN instead of a picture: try another seed, scheduler or a lower guidance_scale"


class BatchRunner:
    """Runs batches of images through a model's pipeline, one at a time."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._pipe = model.pipe
        kind = type(model.pipe.scheduler).__name__
        self._own_scheduler = next((name for name, each in SCHEDULERS.items() if each.class_name == kind), kind)
        self.model_name = model.name
        self.limits = ModelLimits(
            native_size=model.native_size, max_size=2 * model.native_size, scheduler=self._own_scheduler
        )

    def prepare_thread(self) -> None:
        """Puts the thread that will run the batches into PyTorch's inference mode, which is a thread's own."""
        # kept by the thread: a guard that another thread drops resets that thread's mode
        _thread.inference_mode = torch.inference_mode()
        _thread.inference_mode.__enter__()

    def run(
        self, requests: Sequence[ImageRequest], seeds: Sequence[int], after_step: Callable[[float], None]
    ) -> list[Picture | JobError]:
        """Generates an image for each request and seed, in one call of the pipeline.

        Args:
            requests: one for each image, all with the same ``batch_key``.
            seeds: one for each image, drawn from on the CPU, so that a seed means the same image on every device.
            after_step: called after each denoising step with the share of the steps that are done, from 0 to 1. What
                it raises ends the call.

        Returns:
            For each image the picture, or why there is none.
        """
        shared, own = requests[0], self._pipe.scheduler
        self._pipe.scheduler = self._new_scheduler(shared.scheduler)
        try:
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
                # any name makes diffusers call locals(), which keeps all tensors of a step
                callback_on_step_end_tensor_inputs=[],
            )
        finally:
            # a scheduler keeps the latest steps' tensors
            self._pipe.scheduler = own
        pixels, finite = _to_host(generated.images)
        blanked = generated.nsfw_content_detected or [None] * len(seeds)
        return [
            Picture(Image.fromarray(image), seed, nsfw) if is_finite else JobError(PRODUCED_NAN)
            for image, is_finite, seed, nsfw in zip(pixels, finite, seeds, blanked, strict=True)
        ]

    def release_memory(self) -> None:
        """Gives back to the device what is kept for later batches: CUDA graphs, and the allocator's cache."""
        if self._model.graphs:
            self._model.graphs.clear()
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

    def _new_scheduler(self, name: str) -> Any:
        """A scheduler without state, made from the configuration of the model's own."""
        own = self._pipe.scheduler
        if name == self._own_scheduler:
            return type(own).from_config(own.config)
        # newer diffusers write defaults into the file too: a value that equals the own class's default must not
        # override another class's, such as its timestep spacing
        defaults = inspect.signature(type(own)).parameters
        config = {
            key: value for key, value in own.config.items() if key not in defaults or value != defaults[key].default
        }
        scheduler = SCHEDULERS[name]
        return getattr(diffusers, scheduler.class_name).from_config(config, **scheduler.options)


def _report_step(
    after_step: Callable[[float], None], pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """diffusers' ``callback_on_step_end``."""
    after_step((step + 1) / pipe.num_timesteps)
    return kwargs


def _to_host(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Brings a batch to the host in one copy, and so with one wait for the device.

    Args:
        images: (images, 3, height, width) of numbers from 0 to 1, or NaN.

    Returns:
        Pixels, uint8 (images, height, width, 3), and whether all numbers of an image are finite, bool (images,).
    """
    count, channels, height, width = images.shape
    finite = images.isfinite().flatten(1).all(1, keepdim=True)
    # rounded as diffusers does
    pixels = (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    packed = torch.cat([pixels.flatten(1), finite.to(torch.uint8)], dim=1).cpu().numpy()
    return packed[:, :-1].reshape(count, height, width, channels), packed[:, -1].astype(bool)
