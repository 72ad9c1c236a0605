"""The one thread that owns the pipeline: requests in, pictures out."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import diffusers
import torch

from src.output import Picture
from src.pipeline import Model
from src.request import ImageRequest, JobError, ModelLimits

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


@dataclass(frozen=True)
class Painted:
    """What became of a request: its pictures, in the order of its seeds, and what the client should know."""

    pictures: list[Picture]
    warnings: list[str]


class Engine:
    """Paints one request at a time, on a thread of its own: schedulers keep state and CUDA wants one caller."""

    def __init__(self, model: Model) -> None:
        self._pipe = model.pipe
        # DDIM's default clips to -1 and 1, which is for pixels: latents go beyond
        self._scheduler_config = {**model.pipe.scheduler.config, "clip_sample": False}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        kind = type(model.pipe.scheduler)
        own = next((name for name, scheduler in SCHEDULERS.items() if scheduler is kind), kind.__name__)
        self._own_scheduler = (own, kind)
        self.model_name = model.name
        self.limits = ModelLimits(native_size=model.native_size, max_size=2 * model.native_size, scheduler=own)

    async def generate(self, request: ImageRequest) -> Painted:
        """Paints ``request``'s pictures while the event loop stays free.

        Image i is painted from seed + i, drawn on the CPU, so that a seed means the same picture on every device.

        Raises:
            JobError: if they do not fit in memory, are not finite, or the device failed.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._paint, request)

    def warm_up(self) -> None:
        """Paints a picture of the native size in two steps, so that the first job finds the device ready.

        Raises:
            JobError: as ``generate`` does.
        """
        request = ImageRequest.parse({"prompt": "warm-up", "num_inference_steps": 2, "seed": 0}, self.limits)
        self._thread.submit(self._paint, request).result()

    def _paint(self, request: ImageRequest) -> Painted:
        name, kind = self._own_scheduler
        scheduler = kind if request.scheduler == name else SCHEDULERS[request.scheduler]
        self._pipe.scheduler = scheduler.from_config(self._scheduler_config)
        try:
            painted = self._pipe(
                prompt=[request.prompt] * request.num_images,
                negative_prompt=[request.negative_prompt] * request.num_images,
                width=request.width,
                height=request.height,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in request.seeds],
                output_type="pt",
            )
            if not painted.images.isfinite().all():
                raise JobError(
                    "the model produced NaN instead of a picture: try another seed, scheduler or a lower guidance_scale"
                )
            images = self._pipe.image_processor.numpy_to_pil(self._pipe.image_processor.pt_to_numpy(painted.images))
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise JobError(_does_not_fit(request, self.limits)) from error
        except torch.AcceleratorError as error:
            raise JobError(
                "the GPU failed and this worker is being replaced: send the job again", refresh_worker=True
            ) from error
        blanked = painted.nsfw_content_detected or [None] * request.num_images
        pictures = [Picture(*parts) for parts in zip(images, request.seeds, blanked, strict=True)]
        return Painted(pictures, self._dropped(request) + _blanked(pictures))

    def _dropped(self, request: ImageRequest) -> list[str]:
        """Quotes what lies beyond the text encoder's last token."""
        warnings = []
        for field in ("prompt", "negative_prompt"):
            text, most = getattr(request, field), self._pipe.tokenizer.model_max_length
            spans = self._pipe.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            if len(spans) > most:
                # the last place of a full prompt is the end token's
                rest = text[spans[most - 1][0] :]
                warnings.append(f'{field}: longer than {most} tokens, this part was not used: "{rest}"')
        return warnings


def _does_not_fit(request: ImageRequest, limits: ModelLimits) -> str:
    asked = f"{request.num_images} image{'s' * (request.num_images > 1)} of {request.width} x {request.height}"
    if request.num_images > 1:
        instead = f"num_images 1, or {limits.native_size} x {limits.native_size}"
    elif request.width * request.height > limits.native_size**2:
        instead = f"{limits.native_size} x {limits.native_size}"
    else:
        instead = "a GPU with more memory"
    return f"{asked} did not fit in GPU memory: ask for {instead}"


def _blanked(pictures: list[Picture]) -> list[str]:
    return [
        f"image {i} of {len(pictures)} (seed {picture.seed}) was blanked by the safety checker"
        for i, picture in enumerate(pictures, start=1)
        if picture.nsfw
    ]
