"""Generates pictures with RunPod's SDK.

ENDPOINT_ID=... RUNPOD_API_KEY=... python examples/generate.py PROMPT [FIELD=VALUE ...]

FIELD=VALUE is any field of the request, such as seed=7 or output_format=webp. ENDPOINT_URL in place of both variables
is the address of another endpoint, such as http://localhost:8000.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import requests
import runpod
from requests.adapters import HTTPAdapter, Retry


def generate(endpoint: runpod.Endpoint, job_input: dict[str, Any]) -> dict[str, Any]:
    """Sends a job and returns its output; cancels the job when interrupted."""
    # requests of GET that fail are sent again
    retries = HTTPAdapter(max_retries=Retry(8, backoff_factor=1, status_forcelist=[429, 500, 502, 503, 504]))
    endpoint.rp_client.rp_session.mount(endpoint.rp_client.endpoint_url_base, retries)
    job = endpoint.run({"input": job_input})
    try:
        while (answer := status(endpoint, job))["status"] in ("IN_QUEUE", "IN_PROGRESS"):
            time.sleep(1)
    except KeyboardInterrupt:
        job.cancel()
        raise
    if not answer.get("output"):
        raise RuntimeError(f"job {job.job_id} ended as {answer['status']}: {answer.get('error', 'it has no output')}")
    return dict(answer["output"])


def status(endpoint: runpod.Endpoint, job: runpod.endpoint.Job) -> dict[str, Any]:
    """The answer of /status, of which ``job.status()`` and ``job.output()`` leave out the error."""
    path = f"{job.endpoint_id}/status/{job.job_id}"
    try:
        return dict(endpoint.rp_client.get(path))
    except requests.HTTPError as error:
        if error.response.status_code != 405:
            raise
        return dict(endpoint.rp_client.post(path, {}, timeout=600))  # the SDK's local server


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    job_input: dict[str, Any] = {"prompt": sys.argv[1]}
    for field in sys.argv[2:]:
        name, equals, value = field.partition("=")
        if not equals:
            sys.exit(f"generate.py: {field} is not FIELD=VALUE; a prompt of several words needs quotes")
        is_number = re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", value)
        job_input[name] = json.loads(value) if is_number else value

    key, endpoint_id = os.environ.get("RUNPOD_API_KEY"), os.environ.get("ENDPOINT_ID")
    if url := os.environ.get("ENDPOINT_URL"):
        runpod.endpoint_url_base, _, endpoint_id = url.rstrip("/").rpartition("/")
    elif not (endpoint_id and key):
        sys.exit("generate.py: set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL")
    output = generate(runpod.Endpoint(endpoint_id, key or "none"), job_input)

    images = output.get("images", [output])
    for i, image in enumerate(images, start=1):
        path = Path(f"picture{f'-{i}' if len(images) > 1 else ''}.{output.get('output_format', 'png')}")
        with urlopen(image.get("image_url") or f"data:;base64,{image['image']}", timeout=120) as file:
            path.write_bytes(file.read())
        print(f"{path} seed {image['seed']}")
    for warning in output.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, OSError) as error:
        sys.exit(f"generate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
