"""Jobs: requests for them, and their state on the platform."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictBool, StrictInt

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
MAX_RUN_BYTES, MAX_RUNSYNC_BYTES = 10_000_000, 20_000_000
"""The maximum size of a request and of a result."""
WEEK = 7 * 24 * 3600 * 1000
"""In milliseconds, like all durations of the API."""


class Policy(BaseModel):
    """A request's ``policy``, with RunPod's documented defaults and bounds."""

    executionTimeout: Annotated[StrictInt, Field(ge=5_000, le=WEEK)] = 600_000
    ttl: Annotated[StrictInt, Field(ge=10_000, le=WEEK)] = 24 * 3600 * 1000
    lowPriority: StrictBool = False
    """Whether the job does not trigger scaling. This platform never scales."""


class JobRequest(BaseModel):
    """The body of ``/run`` and ``/runsync``."""

    input: Any
    webhook: Annotated[str, Field(pattern="^https?://")] | None = None
    policy: Policy = Policy()


class RunsyncQuery(BaseModel):
    wait: Annotated[int, Field(ge=1_000, le=300_000)] = 90_000


@dataclass
class Job:
    """A job's state. ``posts`` holds everything that workers sent for it, in order, with the time."""

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
        """Returns the body for its worker. The input ``{"raw_json": text}`` becomes ``text``, valid or not.

        Lone surrogates in ``text`` stand for bytes that are not UTF-8.
        """
        match self.request.input:
            case {"raw_json": str(text)}:
                return f'{{"id": {json.dumps(self.id)}, "input": {text}}}'.encode("utf-8", "surrogateescape")
        return json.dumps({"id": self.id, "input": self.request.input}).encode()

    def public(self) -> dict[str, Any]:
        """Returns the answer of ``/status``."""
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
        """Returns the body for its webhook: the whole job."""
        return self.public() | {"input": self.request.input, "webhook": self.request.webhook}
