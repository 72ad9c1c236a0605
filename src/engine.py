"""The one thread that owns the pipeline: waiting requests -> calls -> pictures."""

import asyncio
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

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


PRODUCED_NAN = "the model produced NaN instead of a picture: try another seed, scheduler or a lower guidance_scale"


@dataclass(frozen=True)
class Painted:
    """What became of a request: its pictures, in the order of its seeds, and what the client should know."""

    pictures: list[Picture]
    warnings: list[str]


@dataclass
class Progress:
    """How much of a request's denoising is done: ``share`` grows from 0 to 1."""

    share: float = 0.0


@dataclass(eq=False)
class _Painting:
    """A request on its way through the engine. Who asked cancels it by cancelling ``result``."""

    request: ImageRequest
    progress: Progress
    result: Future[Painted] = field(default_factory=Future)
    pictures: dict[int, Picture] = field(default_factory=dict)

    def succeed(self, painted: Painted) -> None:
        if self._still_wanted():
            self.result.set_result(painted)

    def fail(self, error: Exception) -> None:
        if self._still_wanted():
            self.result.set_exception(error)

    def _still_wanted(self) -> bool:
        return not self.result.done() and self.result.set_running_or_notify_cancel()


@dataclass(frozen=True, eq=False)
class _Image:
    """One image of a painting: what calls are made of."""

    painting: _Painting
    seed: int

    @property
    def request(self) -> ImageRequest:
        return self.painting.request

    @property
    def call_key(self) -> tuple[int, int, int, float, str]:
        """Images with the same key can share a call of the pipeline."""
        request = self.request
        return (
            request.width,
            request.height,
            request.num_inference_steps,
            request.guidance_scale,
            request.scheduler,
        )


class _AllCancelled(Exception):
    """Nobody waits for the pictures of the running call any more."""


class Engine:
    """Paints requests on a thread of its own: schedulers keep state and CUDA wants one caller.

    When the device falls free, the oldest waiting image is painted, and in the same call of the pipeline every other
    waiting image of the same size, steps, guidance scale and scheduler, oldest first, up to ``max_batch_images``.
    A picture depends on its own request alone.
    """

    def __init__(self, model: Model, max_batch_images: int) -> None:
        self._pipe = model.pipe
        self._max_batch_images = max_batch_images
        # DDIM's default clips to -1 and 1, which is for pixels: latents go beyond
        self._scheduler_config = {**model.pipe.scheduler.config, "clip_sample": False}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._waiting: list[_Image] = []
        self._lock = threading.Lock()
        self._device_failed = False
        kind = type(model.pipe.scheduler)
        own = next((name for name, scheduler in SCHEDULERS.items() if scheduler is kind), kind.__name__)
        self._own_scheduler = (own, kind)
        self.model_name = model.name
        self.limits = ModelLimits(native_size=model.native_size, max_size=2 * model.native_size, scheduler=own)

    async def generate(self, request: ImageRequest, progress: Progress | None = None) -> Painted:
        """Paints ``request``'s pictures while the event loop stays free, and keeps ``progress`` up to date.

        Image i is painted from seed + i, drawn on the CPU, so that a seed means the same picture on every device.
        Cancelled, it never reaches the device, or leaves it at the next denoising step unless others share its call.

        Raises:
            JobError: if they do not fit in memory, are not finite, or the device failed.
        """
        return await asyncio.wrap_future(self._submit(request, progress or Progress()))

    def warm_up(self) -> None:
        """Paints a picture of the native size in two steps, so that the first job finds the device ready.

        Raises:
            JobError: as ``generate`` does.
        """
        request = ImageRequest.parse({"prompt": "warm-up", "num_inference_steps": 2, "seed": 0}, self.limits)
        self._submit(request, Progress()).result()

    def _submit(self, request: ImageRequest, progress: Progress) -> Future[Painted]:
        painting = _Painting(request, progress)
        with self._lock:
            self._waiting += [_Image(painting, seed) for seed in request.seeds]
        self._thread.submit(self._paint_waiting)
        return painting.result

    def _paint_waiting(self) -> None:
        while call := self._next_call():
            try:
                self._paint(call)
            except Exception as error:
                # whatever went wrong in handling a failure, nobody waits for ever
                for image in call:
                    image.painting.fail(error)

    def _next_call(self) -> list[_Image]:
        with self._lock:
            waiting = [image for image in self._waiting if not image.painting.result.done()]
            same = [image for image in waiting if image.call_key == waiting[0].call_key]
            call = same[: self._max_batch_images]
            self._waiting = [image for image in waiting if image not in call]
        return call

    def _paint(self, call: list[_Image]) -> None:
        """Paints ``call``; where that fails, its parts, so that only what fails alone fails."""
        try:
            self._run([image for image in call if not image.painting.result.done()])
            return
        except _AllCancelled:
            return
        except Exception as error:
            failure, parts = self._after_failure(call, error)
        if len(parts) == 1:
            call[0].painting.fail(failure)
            return
        # with its traceback it holds the failed call's tensors
        del failure
        if not self._device_failed:
            torch.cuda.empty_cache()
        for part in parts:
            self._paint(part)

    def _after_failure(self, call: list[_Image], error: Exception) -> tuple[Exception, list[list[_Image]]]:
        """What to tell the client if ``call`` cannot be divided further, and the parts that it divides into."""
        if _is_out_of_memory(error):
            failure = JobError(_does_not_fit(call[0].request, self.limits))
            # the traceback would keep the failed call's tensors
            failure.__cause__ = error.with_traceback(None)
            middle = len(call) // 2
            return failure, [part for part in (call[:middle], call[middle:]) if part]
        paintings = dict.fromkeys(image.painting for image in call)
        parts = [[image for image in call if image.painting is painting] for painting in paintings]
        if not self._device_failed and _is_device_lost(error):
            self._device_failed = True
            return _device_fault(error), parts
        return error, parts

    def _run(self, call: list[_Image]) -> None:
        """Paints ``call`` in one call of the pipeline and hands each picture to its painting."""
        if self._device_failed:
            raise _device_fault()
        if not call:
            raise _AllCancelled
        request = call[0].request
        name, kind = self._own_scheduler
        scheduler = kind if request.scheduler == name else SCHEDULERS[request.scheduler]
        self._pipe.scheduler = scheduler.from_config(self._scheduler_config)
        painted = self._pipe(
            prompt=[image.request.prompt for image in call],
            negative_prompt=[image.request.negative_prompt for image in call],
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=[torch.Generator().manual_seed(image.seed) for image in call],
            output_type="pt",
            callback_on_step_end=partial(self._after_step, Counter(image.painting for image in call)),
        )
        blanked = painted.nsfw_content_detected or [None] * len(call)
        for image, pixels, nsfw in zip(call, painted.images, blanked, strict=True):
            if pixels.isfinite().all():
                (picture,) = self._pipe.image_processor.postprocess(pixels[None], do_denormalize=[False])
                self._add(image.painting, Picture(picture, image.seed, nsfw))
            else:
                image.painting.fail(JobError(PRODUCED_NAN))

    def _after_step(
        self, paintings: Counter[_Painting], pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """diffusers' ``callback_on_step_end``. ``paintings`` counts the images that each has in this call."""
        if all(painting.result.cancelled() for painting in paintings):
            raise _AllCancelled
        for painting, images in paintings.items():
            done = len(painting.pictures) + images * (step + 1) / pipe.num_timesteps
            # a call that is run again must not take progress back
            painting.progress.share = max(painting.progress.share, done / painting.request.num_images)
        return kwargs

    def _add(self, painting: _Painting, picture: Picture) -> None:
        painting.pictures[picture.seed] = picture
        if len(painting.pictures) == painting.request.num_images:
            pictures = [painting.pictures[seed] for seed in painting.request.seeds]
            painting.succeed(Painted(pictures, self._dropped(painting.request) + _blanked(pictures)))

    def _dropped(self, request: ImageRequest) -> list[str]:
        """Quotes what lies beyond the text encoder's last token."""
        warnings = []
        for field_name in ("prompt", "negative_prompt"):
            text, most = getattr(request, field_name), self._pipe.tokenizer.model_max_length
            spans = self._pipe.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            if len(spans) > most:
                # the last place of a full prompt is the end token's
                rest = text[spans[most - 1][0] :]
                warnings.append(f'{field_name}: longer than {most} tokens, this part was not used: "{rest}"')
        return warnings


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch's allocator has an exception for it; cuBLAS, cuDNN and the driver say it in words."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in ("ALLOC_FAILED", "out of memory"))
    )


def _is_device_lost(error: Exception) -> bool:
    """Whether the CUDA context is poisoned: from then on it answers every call with an error."""
    if isinstance(error, torch.AcceleratorError):
        return True
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _device_fault(cause: Exception | None = None) -> JobError:
    fault = JobError("the GPU failed and this worker is being replaced: send the job again", refresh_worker=True)
    fault.__cause__ = cause
    return fault


def _does_not_fit(request: ImageRequest, limits: ModelLimits) -> str:
    native = limits.native_size
    instead = f"{native} x {native}" if request.width * request.height > native**2 else "a smaller one"
    return f"an image of {request.width} x {request.height} did not fit in GPU memory: ask for {instead}"


def _blanked(pictures: list[Picture]) -> list[str]:
    return [
        f"image {i} of {len(pictures)} (seed {picture.seed}) was blanked by the safety checker"
        for i, picture in enumerate(pictures, start=1)
        if picture.nsfw
    ]
