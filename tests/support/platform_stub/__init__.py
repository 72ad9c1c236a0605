"""A stand-in for RunPod's platform on this machine: real workers in real processes, driven by real clients.

``python -m tests.support.platform_stub --workers 1`` serves ``/v2/local/run`` and the other routes on port 8000, with
the key ``local``, and starts workers on it. It keeps every job, ignores policies, and misbehaves on demand: see
``Fault``.
"""

from tests.support.platform_stub.faults import Chaos, Fault
from tests.support.platform_stub.job import FINAL
from tests.support.platform_stub.platform import ENDPOINT, HANDLER, Platform
from tests.support.platform_stub.server import serving

__all__ = ["ENDPOINT", "FINAL", "HANDLER", "Chaos", "Fault", "Platform", "serving"]
