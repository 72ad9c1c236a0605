"""From pictures to the job's output: PNG, base64, the parameters inside the file, the platform's limit."""

import base64
import io
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from src.request import ImageRequest, JobError


@dataclass(frozen=True)
class Picture:
    """One painted image, RGB, of the request's size.

    ``nsfw`` says whether the safety checker blanked it; None where the model has no checker.
    """

    image: Image.Image
    seed: int
    nsfw: bool | None


def parameters(request: ImageRequest, seed: int, model_name: str) -> str:
    """The text that Stable Diffusion tools read from a PNG's ``parameters`` chunk."""
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(
        f"Steps: {request.num_inference_steps}, Sampler: {request.scheduler}, CFG scale: {request.guidance_scale}, "
        f"Seed: {seed}, Size: {request.width}x{request.height}, Model: {model_name}"
    )
    return "\n".join(lines)


def png(image: Image.Image, text: str) -> bytes:
    """``image`` as a PNG file with ``text`` in its ``parameters`` chunk."""
    info = PngInfo()
    info.add_text("parameters", text)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def job_output(
    request: ImageRequest,
    pictures: list[Picture],
    warnings: list[str],
    *,
    model_name: str,
    max_result_bytes: int,
) -> dict[str, Any]:
    """What the client reads of a finished job.

    Args:
        request: what was asked.
        pictures: what was painted, in the order of the seeds.
        warnings: what the client should know; left out of the output when empty.
        model_name: the model's name.
        max_result_bytes: the largest result that the platform takes, in bytes.

    Raises:
        JobError: if the result is larger than that.
    """
    images = [
        {
            "image": base64.b64encode(png(picture.image, parameters(request, picture.seed, model_name))).decode(),
            "seed": picture.seed,
            "nsfw_content_detected": picture.nsfw,
        }
        for picture in pictures
    ]
    shared = {
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "scheduler": request.scheduler,
        "model": model_name,
    } | ({"warnings": warnings} if warnings else {})
    output = images[0] | shared if len(images) == 1 else {"images": images} | shared
    size = len(json.dumps({"output": output}))
    if size > max_result_bytes:
        raise JobError(
            f"the result has {size / 1e6:.1f} MB, the limit is {max_result_bytes / 1e6:.1f} MB: "
            "ask for fewer or smaller images"
        )
    return output
