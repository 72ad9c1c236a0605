"""Paints through the platform's stand-in with a worker from an image: ``python -m tests.image.paint CONTAINER``.

CONTAINER is a working container of buildah's.
"""

import sys

from tests.client import Client, picture
from tests.platform_stub import serving

PASSED_ON = ["RUNPOD_POD_ID", "RUNPOD_AI_API_KEY", "RUNPOD_PING_INTERVAL", "MODEL_ID"]
WEBHOOKS = [f"RUNPOD_WEBHOOK_{name}" for name in ("GET_JOB", "POST_OUTPUT", "POST_STREAM", "PING")]


def main(container: str) -> None:
    variables = [f"--env={name}" for name in (*PASSED_ON, *WEBHOOKS)]
    command = ["buildah", "run", *variables, container, "--", "python", "handler.py"]
    with serving() as platform:
        platform.start_worker(command)
        output = Client(platform).finished(Client(platform).run(prompt="a red circle on a blue background"))["output"]
    size = picture(output).size
    assert size == (128, 128), size
    print(f"painted {size} with seed {output['seed']}")


if __name__ == "__main__":
    main(sys.argv[1])
