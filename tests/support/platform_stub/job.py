"""A job as clients ask for it, and as the platform keeps it."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictBool, StrictInt

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
MAX_RUN_BYTES, MAX_RUNSYNC_BYTES = 10_000_000, 20_000_000
"""What a request may have, and a result."""
WEEK = 7 * 24 * 3600 * 1000
"""In milliseconds, as all of the API's durations."""


class Policy(BaseModel):
    """``policy`` of a request, with RunPod's documented defaults and bounds."""

    executionTimeout: Annotated[StrictInt, Field(ge=5_000, le=WEEK)] = 600_000
    ttl: Annotated[StrictInt, Field(ge=10_000, le=WEEK)] = 24 * 3600 * 1000
    lowPriority: StrictBool = False
    """Whether the job leaves the number of workers as it is, which this platform always does."""


class JobRequest(BaseModel):
    """The body of ``/run`` and ``/runsync``."""

    input: Any
    webhook: Annotated[str, Field(pattern="^https?://")] | None = None
    policy: Policy = Policy()


class RunsyncQuery(BaseModel):
    wait: Annotated[int, Field(ge=1_000, le=300_000)] = 90_000


@dataclass
class Job:
    """A job as the platform keeps it; ``posts`` holds all that workers sent for it, in order, with the time."""

    request: JobRequest
    id: str
    status: str = "IN_QUEUE"
    output: Any = None
    error: str | None = None
    worker: str | None = None
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    finished: float | None = None
    retries: int = 0
    posts: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    stream: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def new(cls, request: JobRequest, *, sync: bool) -> "Job":
        return cls(request, f"{'sync-' if sync else ''}{uuid.uuid4()}-local")

    @property
    def sync(self) -> bool:
        """Whether it came through ``/runsync``."""
        return self.id.startswith("sync-")

    def for_worker(self) -> bytes:
        """Returns what a worker that takes it gets. An input of ``{"raw_json": text}`` is ``text``, JSON or not.

        In that, lone surrogates are bytes that are not UTF-8.
        """
        match self.request.input:
            case {"raw_json": str(text)}:
                return f'{{"id": {json.dumps(self.id)}, "input": {text}}}'.encode("utf-8", "surrogateescape")
        return json.dumps({"id": self.id, "input": self.request.input}).encode()

    def public(self) -> dict[str, Any]:
        """What ``/status`` answers."""
        answer: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.started:
            answer["delayTime"] = round(1000 * (self.started - self.created))
            answer["workerId"] = self.worker
        if self.started and self.finished:
            answer["executionTime"] = round(1000 * (self.finished - self.started))
        return answer | {
            name: value for name, value in (("output", self.output), ("error", self.error)) if value is not None
        }

    def notification(self) -> dict[str, Any]:
        """What its webhook gets: the whole job."""
        return self.public() | {"input": self.request.input, "webhook": self.request.webhook}
