"""Runs one batch through the diffusers pipeline."""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from src.api.limits import MAX_STEPS, ModelLimits
from src.api.picture import Picture
from src.api.prompt_warnings import Vocabulary, syntax_warning, truncation_warning, vocabulary_warnings
from src.api.request import ImageRequest, Task
from src.errors import JobError
from src.generation.cuda_graphs import GraphedStep
from src.generation.timesteps import keep_on_cpu
from src.model.loading import take_a_step
from src.schedulers import SCHEDULERS, TRAINED

PIPELINES: dict[Task, Any] = {
    "text": StableDiffusionPipeline,
    "picture": StableDiffusionImg2ImgPipeline,
    "mask": StableDiffusionInpaintPipeline,
}
SHARED = ImageRequest.shared_fields()


class NotFinite(JobError):
    """The model produced NaN."""

    def __init__(self) -> None:
        super().__init__(
            "the model produced NaN instead of a picture: try another seed, scheduler or a lower guidance_scale"
        )


class BatchRunner:
    """Runs batches of images through a pipeline, one at a time.

    Args:
        pipe: loaded, on its device.
        model_name: the name that clients see.
        graphs: the UNet's CUDA graphs, if they are used.
        vocabulary: the words that the model knows, if it knows only a few.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        model_name: str,
        graphs: GraphedStep | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._pipe = pipe
        self._pipes: dict[Task, Any] = {"text": pipe}
        self._vocabulary = vocabulary
        self._graphs = graphs
        self._own_scheduler = _name_of(pipe.scheduler)
        native_size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.model_name = model_name
        self.limits = ModelLimits(
            native_size=native_size,
            max_size=2 * native_size,
            scheduler=self._own_scheduler,
            schedulers=self._usable_schedulers(),
            inpaints_only=pipe.unet.config.in_channels == 9,
        )

    @torch.inference_mode()
    # the safety checker is given NaN as a picture, too
    @np.errstate(invalid="ignore")
    def run(
        self, requests: Sequence[ImageRequest], seeds: Sequence[int], after_step: Callable[[float], None]
    ) -> list[Picture | JobError]:
        """Generates an image for each request and seed, in one call of the pipeline.

        Args:
            requests: one per image, all with the same ``batch_key``.
            seeds: one per image; noise is drawn on the CPU so a seed means the same image on every device.
            after_step: called after each denoising step with the share of steps done, from 0 to 1. If it raises an
                exception, that ends the call.

        Returns:
            For each image the picture, or why there is none.
        """
        own_scheduler, pipe = self._pipe.scheduler, self._pipe_for(requests[0].task)
        pipe.scheduler = keep_on_cpu(self._new_scheduler(requests[0].scheduler))
        try:
            generated = pipe(
                **_arguments(pipe, requests),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
                callback_on_step_end=partial(_report_step, after_step),
                # with any name, diffusers calls locals(), which keeps all tensors of a step alive
                callback_on_step_end_tensor_inputs=[],
            )
        finally:
            # a used scheduler keeps the tensors of its latest steps alive
            pipe.scheduler = own_scheduler
            if self._graphs:
                self._graphs.end_batch()
        pixels, finite = _to_host(generated.images)
        blanked = generated.nsfw_content_detected or [None] * len(seeds)
        return [
            Picture(_finished(Image.fromarray(image), request, nsfw), seed, nsfw) if is_finite else NotFinite()
            for image, is_finite, request, seed, nsfw in zip(pixels, finite, requests, seeds, blanked, strict=True)
        ]

    def release_memory(self) -> bool:
        """Frees what is kept for later batches: CUDA graphs and the allocator's cache.

        Returns:
            Whether there were graphs.
        """
        dropped = bool(self._graphs and self._graphs.clear())
        torch.cuda.empty_cache()
        return dropped

    def prompt_warnings(self, request: ImageRequest) -> list[str]:
        """Warns about text beyond the token limit, web UIs' syntax, and words that the model does not know."""
        warnings = vocabulary_warnings(request.prompt, self._vocabulary) if self._vocabulary else []
        for name in ("prompt", "negative_prompt"):
            text = getattr(request, name)
            warnings += syntax_warning(name, text)
            warnings += truncation_warning(name, text, self._token_starts(text), self._pipe.tokenizer.model_max_length)
        return warnings

    def _token_starts(self, text: str) -> list[int]:
        """Returns where in ``text`` each token begins that the pipeline encodes: a word that was learnt by textual
        inversion has as many of them as it has vectors."""
        tokenizer = self._pipe.tokenizer
        learnt = tokenizer.added_tokens_encoder
        starts = []
        for begin, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]:
            word = text[begin:end]
            # the further vectors' names are the word and a number
            vectors = self._pipe.maybe_convert_prompt(word, tokenizer).count(word) if word in learnt else 1
            starts += [begin] * vectors
        return starts

    def _pipe_for(self, task: Task) -> Any:
        """Returns the pipeline of a task, which shares the modules of the one that was loaded."""
        if task not in self._pipes:
            components = self._pipe.components
            if task == "mask" and not self.limits.inpaints_only:
                components["unet"] = _for_inpainting(components["unet"])
            self._pipes[task] = PIPELINES[task](**components, requires_safety_checker=False)
            self._pipes[task].set_progress_bar_config(disable=True)
        return self._pipes[task]

    def _new_scheduler(self, name: str) -> Any:
        """Creates a scheduler without state from the configuration of the model's own."""
        own = self._pipe.scheduler
        if name == self._own_scheduler:
            # from_config would undo what the pipeline corrects in old configurations
            return copy.deepcopy(own)
        # another class may have left its keys in the file; and recent diffusers save defaults too, which must not
        # override those of the wanted class, such as its timestep spacing
        defaults = inspect.signature(type(own)).parameters
        config = {
            key: value
            for key, value in own.config.items()
            if key in TRAINED or (key in defaults and value != defaults[key].default)
        }
        # diffusers' own list of what to drop, which includes what the model was trained with
        config.pop("_use_default_values", None)
        scheduler = SCHEDULERS[name]
        return getattr(diffusers, scheduler.class_name).from_config(config, **scheduler.options)

    def _usable_schedulers(self) -> dict[str, int]:
        """Returns the schedulers that work with the model's configuration, and the most denoising steps of each."""
        # LCM and TCD can do no more than they were distilled from
        own_steps = self._pipe.scheduler.config.get("original_inference_steps", MAX_STEPS)
        usable = {name: each.max_steps or MAX_STEPS for name, each in SCHEDULERS.items() if self._works(name)}
        return usable | {self._own_scheduler: own_steps}

    def _works(self, name: str) -> bool:
        try:
            scheduler = self._new_scheduler(name)
            # each of ours knows these two, and a step of KLMS would import scipy for half a second
            if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
                take_a_step(scheduler)
        except (NotImplementedError, ValueError):
            return False
        return True


def _name_of(scheduler: Any) -> str:
    """Returns the name of the row that has the scheduler's class, and its options if one has."""
    kind = type(scheduler).__name__
    rows = [name for name, each in SCHEDULERS.items() if each.class_name == kind]
    exact = [name for name in rows if SCHEDULERS[name].options.items() <= scheduler.config.items()]
    return next(iter(exact + rows), kind)


def _arguments(pipe: Any, requests: Sequence[ImageRequest]) -> dict[str, Any]:
    """Returns the fields that a pipeline takes: one value for all images, or a list with one for each."""
    parameters, arguments = inspect.signature(pipe.__call__).parameters, dict[str, Any]()
    for name in ImageRequest.model_fields:
        argument = "mask_image" if name == "mask" else name
        if argument in parameters:
            values = [getattr(request, name) for request in requests]
            arguments[argument] = values[0] if name in SHARED else values
    return arguments


def _for_inpainting(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Returns a UNet that diffusers' inpainting accepts.

    It refuses latents of more than 4 channels by the UNet's configuration alone: nothing in it depends on the number.
    """
    stand_in = copy.copy(unet)
    stand_in.register_to_config(in_channels=4)
    return stand_in


def _finished(image: Image.Image, request: ImageRequest, nsfw: bool | None) -> Image.Image:
    """Puts back the pixels outside of the mask, which have been encoded and decoded, unless the picture is blanked."""
    if nsfw or not request.image or not request.mask:
        return image
    return Image.composite(image, request.image, request.mask)


def _report_step(
    after_step: Callable[[float], None], pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """diffusers' ``callback_on_step_end``."""
    after_step((step + 1) / pipe.num_timesteps)
    return kwargs


def _to_host(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Copies a batch to the host in one go, to wait for the device only once.

    Args:
        images: floating point, (images, 3, height, width), from 0 to 1, or NaN.

    Returns:
        Pixels, uint8 (images, height, width, 3), and whether every value of an image is finite, bool (images,).
    """
    count, channels, height, width = images.shape
    finite = images.isfinite().flatten(1).all(1, keepdim=True)
    # rounded as diffusers does
    pixels = (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    packed = torch.cat([pixels.flatten(1), finite.to(torch.uint8)], dim=1).cpu().numpy()
    return packed[:, :-1].reshape(count, height, width, channels), packed[:, -1].astype(bool)
