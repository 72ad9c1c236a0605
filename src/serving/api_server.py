"""The SDK's HTTP server with /run, /runsync and /status, for your own machine and for RunPod Pods."""

import errno
import os
import socket

from src.errors import StartError

POD_PORT = "8000"
"""The default on a Pod; ``RUNPOD_REALTIME_PORT`` overrides it."""


def check_address(host: str, port: int) -> None:
    """Checks that a server can listen there.

    Raises:
        StartError: if the address is in use, forbidden or unknown. Other errors are left to the server.
    """
    problem = f"cannot serve on port {port} of {host}"
    try:
        for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            with socket.socket(family, socket.SOCK_STREAM) as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind(address)
    except socket.gaierror as error:
        raise StartError(f"{problem}: {error.strerror}; see --rp_api_host") from None
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise StartError(f"{problem}: {error.strerror}; see --rp_api_port") from None


def prepare_pod() -> None:
    """Makes the SDK serve on all of this Pod's addresses, on ``RUNPOD_REALTIME_PORT``, when it starts.

    Raises:
        StartError: if it cannot listen there.
    """
    port = os.environ.setdefault("RUNPOD_REALTIME_PORT", POD_PORT)
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise StartError(f"RUNPOD_REALTIME_PORT={port}: must be an integer from 1 to {2**16 - 1}")
    check_address("0.0.0.0", int(port))


def announce_pod() -> None:
    from runpod import RunPodLogger

    port = os.environ["RUNPOD_REALTIME_PORT"]
    RunPodLogger().info(f"this is a Pod, to which no jobs are sent: serving /run, /runsync and /status on port {port}")
