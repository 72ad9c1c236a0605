"""The one thread that owns the device: queue -> batches -> pictures."""

import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol, Self

from src.api.picture import Picture
from src.api.request import ImageRequest, ModelLimits
from src.errors import JobError
from src.generation import cuda_errors

if TYPE_CHECKING:
    from src.model.loading import Model


@dataclass(frozen=True)
class GenerationResult:
    """A request's pictures, in the order of its seeds, and warnings for the client."""

    pictures: list[Picture]
    warnings: list[str]


@dataclass
class Progress:
    """How much of a request's denoising is done: ``share`` grows from 0 to 1."""

    share: float = 0.0


class Runner(Protocol):
    """What the engine needs of ``src.generation.batch_runner.BatchRunner``, whose docstrings say what each does."""

    model_name: str
    limits: ModelLimits

    def prepare_thread(self) -> None: ...

    def run(
        self, requests: Sequence[ImageRequest], seeds: Sequence[int], after_step: Callable[[float], None]
    ) -> list[Picture | JobError]: ...

    def release_memory(self) -> None: ...

    def prompt_warnings(self, request: ImageRequest) -> list[str]: ...


@dataclass(eq=False)
class _PendingRequest:
    """A request on its way through the engine. It is cancelled by cancelling ``result``."""

    request: ImageRequest
    progress: Progress
    result: Future[GenerationResult] = field(default_factory=Future)
    pictures: dict[int, Picture] = field(default_factory=dict)

    _lock: threading.Lock = field(default_factory=threading.Lock)

    def succeed(self, result: GenerationResult) -> None:
        with self._lock:
            if self._still_wanted():
                self.result.set_result(result)

    def fail(self, error: Exception) -> None:
        with self._lock:
            if self._still_wanted():
                self.result.set_exception(error)

    def _still_wanted(self) -> bool:
        return not self.result.done() and self.result.set_running_or_notify_cancel()


@dataclass(frozen=True, eq=False)
class _Image:
    """One image of a request: what batches are made of."""

    pending: _PendingRequest
    seed: int

    @property
    def request(self) -> ImageRequest:
        return self.pending.request


class _StallWatch:
    """Calls ``stalled``, in a thread of its own, when its block goes on for ``timeout`` seconds without a ``step``."""

    def __init__(self, timeout: float, stalled: Callable[[], None]) -> None:
        self._timeout = timeout
        self._stalled = stalled
        self._left = threading.Event()
        self._last_step = time.monotonic()

    def step(self) -> None:
        self._last_step = time.monotonic()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="stall watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _watch(self) -> None:
        while (still := self._last_step + self._timeout - time.monotonic()) > 0:
            if self._left.wait(still):
                return
        if not self._left.is_set():
            self._stalled()


class _AllCancelled(Exception):
    """All requests of the running batch are cancelled."""


class Engine:
    """Generates what requests ask for on a thread of its own: schedulers keep state and CUDA wants one caller.

    When the device is free, the oldest waiting image is generated, and in the same batch every other waiting image
    with the same ``batch_key``, oldest first, up to ``max_batch_images``. Once a batch ran out of memory,
    batches of its width and height stay smaller.

    When a batch makes no denoising step for ``stall_timeout`` seconds, in which encoding the prompt and decoding must
    fit too, the device is lost: its call may never return, nor then the engine's thread.

    Args:
        model: what generates; None only with a ``runner``.
        max_batch_images: the most images of a batch.
        runner: in place of one around ``model``.
        stall_timeout: in seconds.
    """

    def __init__(
        self,
        model: "Model | None",
        max_batch_images: int,
        runner: Runner | None = None,
        stall_timeout: float = 300.0,
    ) -> None:
        if runner is None:
            # here, so that an engine around another runner needs no PyTorch
            from src.generation.batch_runner import BatchRunner

            assert model
            runner = BatchRunner(model)
        self._runner = runner
        self._max_batch_images = max_batch_images
        self._stall_timeout = stall_timeout
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine", initializer=runner.prepare_thread)
        self._waiting: list[_Image] = []
        self._running: list[_Image] = []
        self._watch: _StallWatch
        self._lock = threading.Lock()
        self._most_images: dict[tuple[int, int], int] = {}
        """By width and height, the most images of a batch since one ran out of memory."""
        self._device_error: Exception | None = None
        self.model_name = runner.model_name
        self.limits = runner.limits

    async def generate(self, request: ImageRequest, progress: Progress | None = None) -> GenerationResult:
        """Generates ``request``'s pictures while the event loop stays free, and keeps ``progress`` up to date.

        Image i is generated from seed + i. A cancelled request never reaches the device, or is stopped
        within two denoising steps, unless others share its batch.

        Raises:
            JobError: if the pictures do not fit in memory, are not finite, or the device failed.
            Exception: any other error of the pipeline, as it was raised.
        """
        return await asyncio.wrap_future(self._submit(request, progress or Progress()))

    def warm_up(self) -> None:
        """Generates a picture of the native size in two steps, so that the first job finds the device ready.

        Raises:
            JobError: as ``generate`` does.
        """
        request = ImageRequest.parse({"prompt": "warm-up", "num_inference_steps": 2, "seed": 0}, self.limits)
        self._submit(request, Progress()).result()

    def _submit(self, request: ImageRequest, progress: Progress) -> Future[GenerationResult]:
        pending = _PendingRequest(request, progress)
        with self._lock:
            if self._device_error:
                pending.fail(cuda_errors.device_fault(self._device_error))
            else:
                self._waiting += [_Image(pending, seed) for seed in request.seeds]
        self._thread.submit(self._drain_queue)
        return pending.result

    def _drain_queue(self) -> None:
        while batch := self._next_batch():
            try:
                with _StallWatch(self._stall_timeout, self._lose_device) as self._watch:
                    self._run_with_fallback(batch)
            except Exception as error:
                # an error in handling a failure must not leave a request waiting for ever
                for image in batch:
                    image.pending.fail(error)

    def _next_batch(self) -> list[_Image]:
        with self._lock:
            waiting = [image for image in self._waiting if not image.pending.result.done()]
            same = [image for image in waiting if image.request.batch_key == waiting[0].request.batch_key]
            batch = same[: self._most_images_of(same[0].request)] if same else []
            self._waiting = [image for image in waiting if image not in batch]
            self._running = batch
        return batch

    def _most_images_of(self, request: ImageRequest) -> int:
        return min(self._max_batch_images, self._most_images.get((request.width, request.height), sys.maxsize))

    def _run_with_fallback(self, batch: list[_Image]) -> None:
        """Runs ``batch``; where that fails, its parts, so that only what fails alone fails."""
        batch = [image for image in batch if not image.pending.result.done()]
        if self._device_error:
            for image in batch:
                image.pending.fail(cuda_errors.device_fault(self._device_error))
            return
        if not batch:
            return
        if len(batch) > self._most_images_of(batch[0].request):
            return self._run_parts(_halves(batch))
        try:
            return self._run_batch(batch)
        except _AllCancelled:
            return
        except Exception as error:
            failure = error
        # out here nothing but the traceback holds the failed call's tensors
        cuda_errors.release_frames(failure)
        self._run_parts(self._parts_after(failure, batch))

    def _run_parts(self, parts: list[list[_Image]]) -> None:
        for part in parts:
            self._run_with_fallback(part)

    def _parts_after(self, error: Exception, batch: list[_Image]) -> list[list[_Image]]:
        """The parts of ``batch`` to try after ``error``; fails what is not to be tried again."""
        if cuda_errors.is_out_of_memory(error):
            self._runner.release_memory()
            request, images = batch[0].request, len(batch)
            if images == 1:
                batch[0].pending.fail(cuda_errors.does_not_fit(request, self.limits, error))
                return []
            self._most_images[request.width, request.height] = images - 1
            return _halves(batch)
        if cuda_errors.is_device_lost(error):
            self._device_error = error
            return [batch]
        by_request: dict[_PendingRequest, list[_Image]] = {}
        for image in batch:
            by_request.setdefault(image.pending, []).append(image)
        if len(by_request) == 1:
            batch[0].pending.fail(error)
            return []
        return list(by_request.values())

    def _run_batch(self, batch: list[_Image]) -> None:
        """Runs ``batch`` in one call of the pipeline and hands each picture to its request."""
        pictures = self._runner.run(
            [image.request for image in batch],
            [image.seed for image in batch],
            partial(self._after_step, Counter(image.pending for image in batch)),
        )
        for image, picture in zip(batch, pictures, strict=True):
            if isinstance(picture, JobError):
                image.pending.fail(picture)
            else:
                self._add(image.pending, picture)

    def _lose_device(self) -> None:
        """Fails the requests that run or wait, and all that come later, while the engine's thread hangs."""
        stall = TimeoutError(f"no denoising step for {self._stall_timeout:g} s")
        with self._lock:
            self._device_error = stall
            lost, self._waiting = self._running + self._waiting, []
        for pending in dict.fromkeys(image.pending for image in lost):
            pending.fail(cuda_errors.device_fault(stall))

    def _after_step(self, images_of: Counter[_PendingRequest], share: float) -> None:
        """Updates the progress of the batch's requests. ``images_of`` counts the images that each request has in it."""
        self._watch.step()
        if all(pending.result.cancelled() for pending in images_of):
            raise _AllCancelled
        for pending, images in images_of.items():
            done = len(pending.pictures) + images * share
            # a batch that is run again must not take progress back
            pending.progress.share = max(pending.progress.share, done / pending.request.num_images)

    def _add(self, pending: _PendingRequest, picture: Picture) -> None:
        pending.pictures[picture.seed] = picture
        if len(pending.pictures) == pending.request.num_images:
            pictures = [pending.pictures[seed] for seed in pending.request.seeds]
            warnings = self._runner.prompt_warnings(pending.request) + _safety_warnings(pictures)
            pending.succeed(GenerationResult(pictures, warnings))


def _halves(batch: list[_Image]) -> list[list[_Image]]:
    middle = len(batch) // 2
    return [batch[:middle], batch[middle:]]


def _safety_warnings(pictures: list[Picture]) -> list[str]:
    return [
        f"image {i} of {len(pictures)} (seed {picture.seed}) was blanked by the safety checker"
        for i, picture in enumerate(pictures, start=1)
        if picture.nsfw
    ]
