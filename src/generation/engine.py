"""The one thread that owns the device: queue -> batches -> pictures."""

import asyncio
import sys
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image

from src.api.messages import does_not_fit
from src.api.request import ImageRequest
from src.errors import JobError
from src.generation import cuda_errors
from src.generation.pending import GenerationResult, PendingImage, PendingRequest, Progress
from src.generation.stall_watch import StallWatch

if TYPE_CHECKING:
    from src.generation.batch_runner import BatchRunner


class _AllCancelled(Exception):
    """All requests in the running batch have been cancelled."""


class Engine:
    """Generates pictures on its own thread, because schedulers keep state and CUDA wants one caller.

    When the device is free, the engine takes the oldest waiting image, and with it every other waiting image that has
    the same ``batch_key``, oldest first, up to ``max_batch_images``. After a batch has run out of memory, batches of
    the same width and height stay as small as the parts that were then tried, until the worker ends.

    If no step completes within ``stall_timeout`` (encoding and decoding included), the device counts as lost: its call
    may never return, and then neither does the engine's thread.

    Args:
        runner: runs the batches.
        max_batch_images: the maximum number of images in a batch.
        stall_timeout: in seconds.
    """

    def __init__(self, runner: "BatchRunner", max_batch_images: int, stall_timeout: float = 300.0) -> None:
        self._runner = runner
        self._max_batch_images = max_batch_images
        self._stall_timeout = stall_timeout
        self._watch = StallWatch(stall_timeout, self._lose_device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._waiting: list[PendingImage] = []
        self._running: list[PendingImage] = []
        self._lock = threading.Lock()
        self._fitting_images: dict[tuple[int, int], int] = {}
        """By width and height, the number of images to try in a batch after a larger one ran out of memory."""
        self._tried_again: PendingImage | None = None
        """The latest image that did not fit alone, after which memory was released."""
        self._device_error: Exception | None = None
        self.model_name = runner.model_name
        self.limits = runner.limits

    async def generate(self, request: ImageRequest, progress: Progress | None = None) -> GenerationResult:
        """Generates the pictures of ``request`` without blocking the event loop, and updates ``progress``.

        Image i is generated from seed + i. A cancelled request never reaches the device, or is stopped within two
        denoising steps, unless others share its batch.

        Raises:
            JobError: if the pictures do not fit in memory, are not finite, or the device failed.
            Exception: any other error of the pipeline, as it was raised.
        """
        return await asyncio.wrap_future(self._submit(request, progress or Progress()))

    def warm_up(self) -> None:
        """Generates a picture of the native size in two steps, so that the first job finds the device ready.

        Raises:
            JobError, Exception: as ``generate`` does.
        """
        size = (self.limits.native_size, self.limits.native_size)
        pictures = dict.fromkeys(("image", "mask"), Image.new("RGB", size)) if self.limits.inpaints_only else {}
        job_input = {"prompt": "warm-up", "num_inference_steps": 2, "seed": 0} | pictures
        request = ImageRequest.parse(job_input, self.limits)
        self._submit(request, Progress()).result()

    def _submit(self, request: ImageRequest, progress: Progress) -> Future[GenerationResult]:
        pending = PendingRequest(request, progress)
        with self._lock:
            if self._device_error:
                pending.fail(cuda_errors.device_fault(self._device_error))
            else:
                self._waiting += [PendingImage(pending, seed) for seed in request.seeds]
        self._thread.submit(self._drain_queue)
        return pending.result

    def _drain_queue(self) -> None:
        while batch := self._next_batch():
            try:
                with self._watch:
                    self._run_with_fallback(batch)
            except Exception as error:
                # even if handling a failure fails, no request may be left waiting
                for image in batch:
                    image.pending.fail(error)

    def _next_batch(self) -> list[PendingImage]:
        with self._lock:
            waiting = [image for image in self._waiting if not image.pending.result.done()]
            alike = [image for image in waiting if image.request.batch_key == waiting[0].request.batch_key]
            batch = alike[: self._max_images(alike[0].request)] if alike else []
            self._waiting = [image for image in waiting if image not in batch]
            self._running = batch
        return batch

    def _max_images(self, request: ImageRequest) -> int:
        return min(self._max_batch_images, self._fitting_images.get((request.width, request.height), sys.maxsize))

    def _run_with_fallback(self, batch: list[PendingImage]) -> None:
        """Runs ``batch``; if that fails, runs parts of it, so that a request fails only if it fails on its own."""
        parts = [batch]
        while parts:
            part = [image for image in parts.pop(0) if not image.pending.result.done()]
            if not part:
                continue
            if self._device_error:
                self._fail(part)
            elif len(part) > self._max_images(part[0].request):
                parts = [*_halves(part), *parts]
            elif error := self._try(part):
                parts = [*self._parts_after(error, part), *parts]

    def _try(self, batch: list[PendingImage]) -> Exception | None:
        """Runs ``batch`` in one pipeline call and gives each picture to its request; returns the error, if any."""
        try:
            pictures = self._runner.run(
                [image.request for image in batch],
                [image.seed for image in batch],
                partial(self._after_step, Counter(image.pending for image in batch)),
            )
            for image, picture in zip(batch, pictures, strict=True):
                if isinstance(picture, JobError):
                    image.pending.fail(picture)
                elif image.pending.add(picture):
                    image.pending.succeed(self._runner.prompt_warnings(image.request))
            return None
        except _AllCancelled:
            return None
        except Exception as error:
            failure = error
        # outside the except block only the traceback still holds the failed call's tensors
        cuda_errors.release_frames(failure)
        return failure

    def _parts_after(self, error: Exception, batch: list[PendingImage]) -> list[list[PendingImage]]:
        """Returns the parts of ``batch`` to try after ``error``; fails the requests that should not be tried again."""
        # asked first, since on a lost device memory cannot be released either
        if cuda_errors.is_device_lost(error):
            self._device_error = error
            return [batch]
        if cuda_errors.is_out_of_memory(error):
            released = self._runner.release_memory()
            request = batch[0].request
            if len(batch) == 1:
                if released and batch[0] is not self._tried_again:
                    self._tried_again = batch[0]
                    return [batch]
                fault = JobError(does_not_fit(request.width, request.height, self.limits.native_size))
                fault.__cause__ = error
                batch[0].pending.fail(fault)
                return []
            halves = _halves(batch)
            self._fitting_images[request.width, request.height] = max(map(len, halves))
            return halves
        by_request: dict[PendingRequest, list[PendingImage]] = {}
        for image in batch:
            by_request.setdefault(image.pending, []).append(image)
        if len(by_request) == 1:
            batch[0].pending.fail(error)
            return []
        return list(by_request.values())

    def _lose_device(self) -> None:
        """Fails all running, waiting and future requests while the engine's thread hangs."""
        stall = TimeoutError(f"no denoising step for {self._stall_timeout:g} s")
        with self._lock:
            self._device_error = stall
            lost, self._waiting = self._running + self._waiting, []
        self._fail(lost)

    def _fail(self, images: list[PendingImage]) -> None:
        """Fails the requests of ``images`` because the device is lost."""
        assert self._device_error
        for image in images:
            image.pending.fail(cuda_errors.device_fault(self._device_error))

    def _after_step(self, images_of: Counter[PendingRequest], share: float) -> None:
        """Updates the progress of the batch's requests. ``images_of`` counts the images that each request has in it."""
        self._watch.step()
        if all(pending.result.cancelled() for pending in images_of):
            raise _AllCancelled
        for pending, images in images_of.items():
            pending.report(images * share)


def _halves(batch: list[PendingImage]) -> list[list[PendingImage]]:
    middle = len(batch) // 2
    return [batch[:middle], batch[middle:]]
