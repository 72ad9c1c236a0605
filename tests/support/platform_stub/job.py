"""Jobs: requests for them, and their state on the platform."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


@dataclass
class Job:
    """A job's state. ``posts`` holds everything that workers sent for it, in order, with the time."""

    input: Any
    id: str
    webhook: str | None = None
    status: str = "IN_QUEUE"
    output: Any = None
    error: str | None = None
    worker: str | None = None
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    finished: float | None = None
    posts: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    @classmethod
    def new(cls, job_input: Any, webhook: str | None = None, *, sync: bool) -> "Job":
        return cls(job_input, f"{'sync-' if sync else ''}{uuid.uuid4()}-local", webhook)

    def for_worker(self) -> bytes:
        """Returns the body for its worker. The input ``{"raw_json": text}`` becomes ``text``, valid or not.

        Lone surrogates in ``text`` stand for bytes that are not UTF-8.
        """
        match self.input:
            case {"raw_json": str(text)}:
                return f'{{"id": {json.dumps(self.id)}, "input": {text}}}'.encode("utf-8", "surrogateescape")
        return json.dumps({"id": self.id, "input": self.input}).encode()

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
