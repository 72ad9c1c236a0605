"""How an application calls the worker: with the SDK's own client.

ENDPOINT_ID=... RUNPOD_API_KEY=... python examples/generate.py "a red circle on a blue background"
"""

import argparse
import base64
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import runpod

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def generate(endpoint: runpod.Endpoint, job_input: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
    """Sends one job and waits for its output.

    Raises:
        RuntimeError: with the worker's own words, if the job does not end as COMPLETED.
        TimeoutError: if it has not ended within ``timeout`` seconds; the job is then cancelled.
    """
    job = endpoint.run({"input": job_input})
    deadline = time.monotonic() + timeout
    try:
        while True:
            answer = endpoint.rp_client.get(f"{endpoint.endpoint_id}/status/{job.job_id}")
            if answer["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job.job_id} has not ended within {timeout:.0f} s")
            time.sleep(1)
    except (KeyboardInterrupt, TimeoutError):
        job.cancel()
        raise
    if answer["status"] != "COMPLETED":
        raise RuntimeError(f"{answer['status']}: {answer.get('error', 'no reason given')}")
    output: dict[str, Any] = answer["output"]
    return output


def picture(image: dict[str, Any]) -> bytes:
    """The file of one image of an output, from the output itself or from the endpoint's bucket."""
    if "image" in image:
        return base64.b64decode(image["image"])
    with urllib.request.urlopen(image["image_url"], timeout=120) as link:
        file: bytes = link.read()
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask an endpoint for pictures.")
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", type=Path, help="where the picture goes (default: picture.png)")
    parser.add_argument("--format", choices=FORMATS.values(), help="of the picture (default: by the output's ending)")
    parser.add_argument("--quality", type=int, help="quality of jpeg and webp, 1 to 100")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    by_ending = FORMATS.get(arguments.output.suffix.lower()) if arguments.output else None
    output_format = arguments.format or by_ending or "png"
    if by_ending not in (None, output_format):
        parser.error(f"{arguments.output} is the name of a {by_ending}, --format says {output_format}")
    path = arguments.output or Path(f"picture.{output_format}")

    endpoint = runpod.Endpoint(os.environ["ENDPOINT_ID"], api_key=os.environ["RUNPOD_API_KEY"])
    job_input = {
        "prompt": arguments.prompt,
        "num_images": arguments.images,
        "seed": arguments.seed,
        "output_format": output_format,
        "output_quality": arguments.quality,
    }
    try:
        output = generate(endpoint, job_input)
    except (RuntimeError, TimeoutError) as error:
        sys.exit(f"generate.py: {error}")
    images = output.get("images", [output])
    for i, image in enumerate(images, start=1):
        file = path.with_stem(f"{path.stem}-{i}") if len(images) > 1 else path
        file.write_bytes(picture(image))
        print(f"{file} seed {image['seed']}")


if __name__ == "__main__":
    main()
