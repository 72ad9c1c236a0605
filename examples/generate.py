"""How a Python application calls the worker: with RunPod's SDK.

ENDPOINT_ID=... RUNPOD_API_KEY=... python examples/generate.py PROMPT [-o FILE] [FIELD=VALUE ...]

FIELD=VALUE is any field of the request, such as seed=7 or num_images=2. FILE's ending sets output_format.
ENDPOINT_URL in place of both variables is the address of another endpoint, such as http://localhost:8000.
"""

import argparse
import base64
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
import runpod


def generate(endpoint: runpod.Endpoint, job_input: dict[str, Any]) -> dict[str, Any]:
    """Sends one job and returns its output; cancels the job when it is interrupted."""
    job, method = endpoint.run({"input": job_input}), "GET"
    try:
        while not has_ended(job):
            time.sleep(1)
        if output := job.output():
            return dict(output)
    except KeyboardInterrupt:
        job.cancel()
        raise
    except requests.HTTPError as error:
        if error.response.status_code != 405:
            raise
        method = "POST"  # the SDK's local server answers /status to nothing else
    # the SDK does not say why a job failed, the endpoint does
    url = f"{runpod.endpoint_url_base}/{job.endpoint_id}/status/{job.job_id}"
    headers = {"Authorization": f"Bearer {runpod.api_key}"}
    answer = requests.request(method, url, headers=headers, timeout=600).json()
    if not answer.get("output"):
        raise RuntimeError(f"job {job.job_id} ended as {answer['status']}: {answer.get('error', 'it has no output')}")
    return dict(answer["output"])


def has_ended(job: runpod.endpoint.Job) -> bool:
    try:
        return job.status() not in ("IN_QUEUE", "IN_PROGRESS")
    except requests.RequestException as error:
        # one failed request does not end the job, unless the endpoint refuses it
        if error.response is not None and error.response.status_code < 429:
            raise
        return False


def picture(image: dict[str, Any]) -> bytes:
    """The file of one image of an output, from the output itself or from the endpoint's bucket."""
    if "image" in image:
        return base64.b64decode(image["image"])
    link = requests.get(image["image_url"], timeout=120)
    link.raise_for_status()
    return link.content


def field(argument: str) -> tuple[str, Any]:
    """FIELD=VALUE: a JSON number is a number, anything else is text."""
    name, value = argument.split("=", 1)
    with suppress(ValueError):
        if type(number := json.loads(value, parse_constant=str)) in (int, float):
            return name, number
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt")
    parser.add_argument("fields", nargs="*", type=field, metavar="FIELD=VALUE")
    parser.add_argument("-o", type=Path, dest="path", metavar="FILE", help="default: picture.png")
    arguments = parser.parse_intermixed_args()
    job_input = {"prompt": arguments.prompt} | dict(arguments.fields)
    path = arguments.path or Path(f"picture.{job_input.get('output_format', 'png')}")
    if (ending := path.suffix[1:].lower()).isalpha():
        job_input.setdefault("output_format", "jpeg" if ending == "jpg" else ending)

    runpod.api_key, endpoint_id = os.environ.get("RUNPOD_API_KEY", ""), os.environ.get("ENDPOINT_ID", "")
    if url := os.environ.get("ENDPOINT_URL", "").rstrip("/"):
        runpod.endpoint_url_base, _, endpoint_id = url.rpartition("/")
    elif not (endpoint_id and runpod.api_key):
        parser.error("set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL")
    try:
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            sys.exit(f"generate.py: cannot write {path}")
        output = generate(runpod.Endpoint(endpoint_id), job_input)
        images = output.get("images", [output])
        for i, image in enumerate(images, start=1):
            name = path.with_stem(f"{path.stem}-{i}") if len(images) > 1 else path
            name.write_bytes(picture(image))
            print(f"{name} seed {image['seed']}")
        for warning in output.get("warnings", []):
            print(f"warning: {warning}", file=sys.stderr)
    except (RuntimeError, OSError) as error:
        sys.exit(f"generate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
