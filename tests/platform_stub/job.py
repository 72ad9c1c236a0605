"""A job as the platform keeps it."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


@dataclass
class Job:
    """A job as the platform keeps it; ``posts`` holds all that workers sent for it, in order, with the time."""

    input: Any
    sync: bool = False
    execution_timeout: float | None = None
    id: str = field(default_factory=lambda: f"{uuid.uuid4()}-local")
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

    def public(self) -> dict[str, Any]:
        """What ``/status`` tells."""
        told = {"id": self.id, "status": self.status}
        if self.started:
            told["delayTime"] = round(1000 * (self.started - self.created))
            told["workerId"] = self.worker
        if self.started and self.finished:
            told["executionTime"] = round(1000 * (self.finished - self.started))
        return told | {
            name: value for name, value in (("output", self.output), ("error", self.error)) if value is not None
        }
