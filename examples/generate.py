"""Generates pictures with RunPod's SDK: python examples/generate.py PROMPT [FIELD=VALUE ...]

FIELD=VALUE is any field of the request, such as seed=7 or output_format=webp. The endpoint is that of ENDPOINT_ID and
RUNPOD_API_KEY, or ENDPOINT_URL, such as http://localhost:8000.
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
    """Sends a job and returns the last answer about it, with its output or error; cancels the job when interrupted."""
    client = endpoint.rp_client
    retries = Retry(8, backoff_factor=1, status_forcelist=[429, 500, 502, 503, 504])  # of GET only
    client.rp_session.mount(client.endpoint_url_base, HTTPAdapter(max_retries=retries))
    job = endpoint.run({"input": job_input})
    path = f"{job.endpoint_id}/status/{job.job_id}"
    try:
        # job.status() and job.output() leave out the job's error
        while (answer := client.get(path))["status"] in ("IN_QUEUE", "IN_PROGRESS"):
            time.sleep(1)
    except KeyboardInterrupt:
        job.cancel()
        sys.exit(130)
    except requests.HTTPError as error:
        if error.response.status_code != 405:
            raise
        answer = client.post(path, {}, timeout=600)  # the SDK's local server
    return dict(answer)


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

try:
    job = generate(runpod.Endpoint(endpoint_id, key or "none"), job_input)
    output = job.get("output")
    if not output:
        sys.exit(f"generate.py: job {job['id']} ended as {job['status']}: {job.get('error', 'it has no output')}")
    images = output.get("images", [output])
    for i, image in enumerate(images, start=1):
        path = Path(f"picture{f'-{i}' if len(images) > 1 else ''}.{output.get('output_format', 'png')}")
        with urlopen(image.get("image_url") or f"data:;base64,{image['image']}", timeout=120) as file:
            path.write_bytes(file.read())
        print(f"{path} seed {image['seed']}")
    for warning in output.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
except (RuntimeError, OSError) as error:
    sys.exit(f"generate.py: {error}")
