"""Requests on their way through the engine, and their results."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

from src.api.picture import Picture
from src.api.request import ImageRequest


@dataclass(frozen=True)
class GenerationResult:
    """A request's pictures, in the order of its seeds, and warnings for the client."""

    pictures: list[Picture]
    warnings: list[str]


@dataclass
class Progress:
    """How much of a request's denoising is done: ``share`` goes from 0 to 1."""

    share: float = 0.0


@dataclass(eq=False)
class PendingRequest:
    """A request that is not finished. Cancelling ``result`` cancels it."""

    request: ImageRequest
    progress: Progress
    result: Future[GenerationResult] = field(default_factory=Future)
    pictures: dict[int, Picture] = field(default_factory=dict)
    """By seed."""

    _lock: threading.Lock = field(default_factory=threading.Lock)

    def report(self, done: float) -> None:
        """Updates the progress; ``done`` counts images of the running batch, in fractions: 0.5 is half an image."""
        share = (len(self.pictures) + done) / self.request.num_images
        # progress must not go back when a batch is run again
        self.progress.share = max(self.progress.share, share)

    def add(self, picture: Picture) -> bool:
        """Adds a finished picture; returns whether it was the last one."""
        self.pictures[picture.seed] = picture
        return len(self.pictures) == self.request.num_images

    def succeed(self, warnings: list[str]) -> None:
        pictures = [self.pictures[seed] for seed in self.request.seeds]
        with self._lock:
            if self._is_wanted():
                self.result.set_result(GenerationResult(pictures, warnings))

    def fail(self, error: Exception) -> None:
        with self._lock:
            if self._is_wanted():
                self.result.set_exception(error)

    def _is_wanted(self) -> bool:
        return not self.result.done() and self.result.set_running_or_notify_cancel()


@dataclass(frozen=True, eq=False)
class PendingImage:
    """One image of a request. Batches consist of these."""

    pending: PendingRequest
    seed: int

    @property
    def request(self) -> ImageRequest:
        return self.pending.request
