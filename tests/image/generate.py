"""Generates through the platform's stand-in with a worker from an image: ``python -m tests.image.generate CONTAINER``.

CONTAINER is a working container of buildah's.
"""

import os
import sys

from tests.support.client import Client, picture
from tests.support.platform_stub import serving


def be_a_worker(container: str) -> None:
    """Runs the image's own command in ``container``, with the settings that the platform gave this process."""
    settings = [f"--env={k}={v}" for k, v in os.environ.items() if k.startswith("RUNPOD_") or k == "MODEL_ID"]
    os.execvp("buildah", ["buildah", "run", *settings, container, "--", "python", "handler.py"])


def main(container: str) -> None:
    with serving() as platform:
        platform.start_worker([sys.executable, "-m", "tests.image.generate", container, "--worker"])
        answer = Client(platform).generate("a red circle on a blue background")
    assert answer["status"] == "COMPLETED", answer
    print(f"generated {picture(answer['output']).size} with seed {answer['output']['seed']}")


if __name__ == "__main__":
    be_a_worker(sys.argv[1]) if "--worker" in sys.argv else main(sys.argv[1])
