"""A stand-in for RunPod's platform on this machine: real workers in real processes, driven by real clients.

``python -m tests.platform_stub --workers 1`` serves ``/v2/local/run`` and the other routes on port 8000, with the
key ``local``, and starts workers on it. Webhooks, policies, limits and retention are as RunPod's documents have them.
It misbehaves on demand: see ``Fault``.
"""

from tests.platform_stub.faults import Chaos, Fault
from tests.platform_stub.job import FINAL
from tests.platform_stub.platform import ENDPOINT, HANDLER, Platform
from tests.platform_stub.server import serving

__all__ = ["ENDPOINT", "FINAL", "HANDLER", "Chaos", "Fault", "Platform", "serving"]
