"""How an application calls the worker: with the SDK's own client.

ENDPOINT_ID=... RUNPOD_API_KEY=... python examples/generate.py "a red circle on a blue background"

ENDPOINT_URL in place of both is the address of another endpoint, such as http://localhost:8000.
"""

import argparse
import base64
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import requests
import runpod

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def endpoint_of_environment() -> runpod.Endpoint:
    """The endpoint of ``ENDPOINT_URL``, or of ``ENDPOINT_ID`` and ``RUNPOD_API_KEY``."""
    url, key = os.environ.get("ENDPOINT_URL", "").rstrip("/"), os.environ.get("RUNPOD_API_KEY")
    endpoint_id = os.environ.get("ENDPOINT_ID")
    if url:
        runpod.endpoint_url_base, _, endpoint_id = url.rpartition("/")
    elif not (endpoint_id and key):
        sys.exit("generate.py: set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL")
    return runpod.Endpoint(endpoint_id, api_key=key or "none")


def status(job: Any) -> dict[str, Any]:
    """The job's state, progress, and output or error."""
    path = f"{job.endpoint_id}/status/{job.job_id}"
    try:
        answer: dict[str, Any] = job.rp_client.get(path)
    except requests.HTTPError as error:
        if error.response.status_code != 405:
            raise
        # the SDK's local server wants POST, which then runs the job
        answer = job.rp_client.post(path, data=None, timeout=600)
    return answer


def generate(endpoint: runpod.Endpoint, job_input: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
    """Sends one job and waits for its output.

    Raises:
        RuntimeError: with the worker's own words, if the job does not end as COMPLETED.
        TimeoutError: if it has not ended within ``timeout`` seconds; the job is then cancelled.
        requests.RequestException: if the endpoint cannot be reached, or refuses the job.
    """
    job = endpoint.run({"input": job_input})
    deadline = time.monotonic() + timeout
    answer: dict[str, Any] = {"status": "IN_QUEUE"}
    try:
        while answer["status"] in ("IN_QUEUE", "IN_PROGRESS"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job.job_id} has not ended within {timeout:.0f} s")
            time.sleep(1)
            try:
                answer = status(job)
            except requests.RequestException as error:
                # one failed request does not end the job, unless the endpoint refuses it
                if error.response is not None and 400 <= error.response.status_code < 429:
                    raise
    except (KeyboardInterrupt, TimeoutError):
        with suppress(requests.RequestException):
            job.cancel()
        raise
    if answer["status"] != "COMPLETED":
        raise RuntimeError(f"{answer['status']}: {answer.get('error', 'no reason given')}")
    if not answer.get("output"):
        raise RuntimeError("the job is completed but has no output: its result was over the platform's limit")
    output: dict[str, Any] = answer["output"]
    return output


def picture(image: dict[str, Any]) -> bytes:
    """The file of one image of an output, from the output itself or from the endpoint's bucket."""
    if "image" in image:
        return base64.b64decode(image["image"])
    link = requests.get(image["image_url"], timeout=120)
    link.raise_for_status()
    return link.content


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask an endpoint for pictures.")
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", type=Path, help="where the picture goes (default: picture.png)")
    parser.add_argument("--format", choices=FORMATS.values(), help="of the picture (default: by the output's ending)")
    parser.add_argument("--quality", type=int, help="quality of jpeg and webp, 1 to 100")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    by_ending = FORMATS.get(arguments.output.suffix.lower()) if arguments.output else None
    if by_ending and arguments.format not in (None, by_ending):
        parser.error(f"{arguments.output} is the name of a {by_ending}, --format says {arguments.format}")
    arguments.format = arguments.format or by_ending or "png"
    arguments.output = arguments.output or Path(f"picture.{arguments.format}")
    try:
        # before a job is paid for
        TemporaryFile(dir=arguments.output.parent).close()
        if arguments.output.is_dir():
            parser.error(f"{arguments.output} is a directory: -o wants the name of a file")
    except OSError as error:
        parser.error(f"cannot write {arguments.output}: {error.strerror}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    job_input = {
        "prompt": arguments.prompt,
        "num_images": arguments.images,
        "seed": arguments.seed,
        "output_format": arguments.format,
        "output_quality": arguments.quality,
    }
    try:
        output = generate(endpoint_of_environment(), job_input)
        images = output.get("images", [output])
        for i, image in enumerate(images, start=1):
            path = arguments.output
            if len(images) > 1:
                path = path.with_stem(f"{path.stem}-{i}")
            path.write_bytes(picture(image))
            print(f"{path} seed {image['seed']}")
        for warning in output.get("warnings", []):
            print(f"warning: {warning}", file=sys.stderr)
    except requests.ConnectionError as error:
        sys.exit(f"generate.py: no answer from {error.request.url if error.request else 'the endpoint'}")
    except requests.HTTPError as error:
        sys.exit(f"generate.py: the endpoint answered {error}")
    except (RuntimeError, OSError) as error:
        sys.exit(f"generate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
