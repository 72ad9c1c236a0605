"""Generates pictures with RunPod's SDK: python examples/generate.py PROMPT [FIELD=VALUE ...]

FIELD=VALUE is any field of the request, such as seed=7 or output_format=webp; image=@photo.jpg sends a file. The
endpoint is that of ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL, such as http://localhost:8000.
"""

import base64
import json
import math
import os
import re
import signal
import sys
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import requests
import runpod
from requests.adapters import HTTPAdapter, Retry

MAX_REQUEST_BYTES = 10_000_000  # RunPod's limit for /run


def read_value(name: str, value: str) -> Any:
    """Returns what FIELD=VALUE sends: a file in base64, a number or text."""
    if name in ("image", "mask") and value.startswith("@"):
        with Path(value[1:]).open("rb") as file:
            return base64.b64encode(file.read(MAX_REQUEST_BYTES)).decode()
    is_text = name in ("prompt", "negative_prompt", "output_format", "scheduler", "image", "mask")
    is_number = re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?", value) and math.isfinite(float(value))
    return json.loads(value) if is_number and not is_text else value


def checked(answer: Any) -> dict[str, Any]:
    if not (isinstance(answer, dict) and answer.get("id") and answer.get("status")):
        sys.exit("generate.py: this is not an answer from RunPod: check ENDPOINT_URL")
    return answer


def generate(endpoint: runpod.Endpoint, job_input: dict[str, Any]) -> dict[str, Any]:
    """Sends a job and returns the last answer about it, with its output or error; cancels the job when interrupted."""
    client, url = endpoint.rp_client, endpoint.endpoint_id
    interrupts = list[int]()
    # which must not cost the answer with the job's id
    signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    job = checked(client.post(f"{url}/run", {"input": job_input}, timeout=120))["id"]
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupts:
            raise KeyboardInterrupt
        return wait(client, f"{url}/status/{job}")
    except KeyboardInterrupt:
        try:
            client.post(f"{url}/cancel/{job}", {})
        except (RuntimeError, OSError) as error:
            print(f"generate.py: cannot cancel job {job}: {error}", file=sys.stderr)
        else:
            print(f"generate.py: cancelled job {job}", file=sys.stderr)
        sys.exit(130)


def wait(client: Any, path: str) -> dict[str, Any]:
    # of GET only
    again = [408, 429, *range(500, 600)]
    retries = Retry(8, backoff_factor=1, status_forcelist=again, respect_retry_after_header=False)
    client.rp_session.mount(client.endpoint_url_base, HTTPAdapter(max_retries=retries))
    while True:
        try:
            answer = checked(client.get(path))
        except requests.HTTPError as error:
            if error.response.status_code != 405:
                raise
            answer = checked(client.post(path, {}, timeout=600))  # the SDK's local server
        if answer["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
            return answer
        time.sleep(1)


if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
    sys.exit(__doc__)
key, endpoint_id = os.environ.get("RUNPOD_API_KEY"), os.environ.get("ENDPOINT_ID")
if url := os.environ.get("ENDPOINT_URL"):
    runpod.endpoint_url_base, _, endpoint_id = url.rstrip("/").rpartition("/")
elif not (endpoint_id and key):
    sys.exit("generate.py: set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL")

try:
    job_input: dict[str, Any] = {"prompt": sys.argv[1]}
    for field in sys.argv[2:]:
        name, equals, value = field.partition("=")
        if not equals:
            sys.exit(f"generate.py: {field} is not FIELD=VALUE; a prompt of several words needs quotes")
        job_input[name] = read_value(name, value)
    if len(json.dumps({"input": job_input})) > MAX_REQUEST_BYTES:
        sys.exit("generate.py: the request is over RunPod's limit of 10 MB: send a smaller picture, or its address")
    job = generate(runpod.Endpoint(endpoint_id, key or "none"), job_input)
    output = job.get("output")
    if not (isinstance(output, dict) and output.keys() & {"image", "image_url", "images"}):
        sys.exit(f"generate.py: job {job['id']} ended as {job['status']}: {job.get('error', 'it has no picture')}")
    images = output.get("images", [output])
    for i, image in enumerate(images, start=1):
        path = Path(f"picture{f'-{i}' if len(images) > 1 else ''}.{output.get('output_format', 'png')}")
        part = Path(f"{path}.part")  # a download that breaks leaves an older file as it was
        with urlopen(image.get("image_url") or f"data:;base64,{image['image']}", timeout=120) as file:
            part.write_bytes(file.read())
        part.replace(path)
        print(f"{path} seed {image.get('seed')}")
    for warning in output.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
except KeyboardInterrupt:
    sys.exit(130)
except (RuntimeError, OSError, ValueError, HTTPException) as error:
    sys.exit(f"generate.py: {error}")
