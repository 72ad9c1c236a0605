"""The job's output: its shape, and the check of its size."""

import base64
import json
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from src.api.picture import Picture, encode, parameters
from src.api.request import ImageRequest, OutputFormat
from src.errors import JobError

SHARED_FIELDS = ImageRequest.shared_fields()


class OutputImage(TypedDict):
    """One image of a job's output: the picture, or a link to it if there is a bucket."""

    image: Annotated[NotRequired[str], Field(description="The picture's file in base64, without a `data:` prefix")]
    image_url: Annotated[
        NotRequired[str],
        Field(description="With a bucket, instead of `image`: a link to the file, valid for a week"),
    ]
    seed: Annotated[int, Field(description="The seed that generates this picture again")]
    nsfw_content_detected: Annotated[
        bool | None,
        Field(
            description="Whether the safety checker blanked the picture, which is then black; `null` without a checker"
        ),
    ]


OutputParameters = TypedDict(
    "OutputParameters",
    {
        **{name: ImageRequest.model_fields[name].annotation for name in SHARED_FIELDS},  # type: ignore[misc]
        "strength": Annotated[NotRequired[float], Field(description="As used, with `image`; left out without")],
        "model": Annotated[str, Field(description="The model's name")],
        "output_format": Annotated[
            NotRequired[OutputFormat], Field(description="The picture's file format; omitted for `png`")
        ],
        "warnings": Annotated[
            NotRequired[list[str]], Field(description="What the client should know; omitted if there is nothing")
        ],
    },
)
"""What all images of a job's output share: the fields that a batch shares, as they were used, and a few more."""


class OneImage(OutputImage, OutputParameters):
    """The output of a job that asked for one image."""


class SeveralImages(OutputParameters):
    """The output of a job that asked for several images."""

    images: list[OutputImage]


def encode_all(request: ImageRequest, pictures: list[Picture], model_name: str) -> list[bytes]:
    """Encodes each picture in the format and quality that ``request`` asks for."""
    return [
        encode(
            picture.image,
            parameters(request, picture.seed, model_name),
            request.output_format,
            request.output_quality,
        )
        for picture in pictures
    ]


def job_output(
    request: ImageRequest,
    pictures: list[Picture],
    warnings: list[str],
    *,
    model_name: str,
    max_result_bytes: int,
    links: list[str] | None = None,
) -> dict[str, Any]:
    """Builds the output of a finished job.

    Args:
        request: the job's request.
        pictures: the generated pictures, in the order of the seeds.
        warnings: for the client, apart from those about the mask and about blanked pictures.
        model_name: the name that clients see.
        max_result_bytes: the largest result that the platform accepts, in bytes.
        links: where each picture is stored; without links, the output holds the pictures.

    Raises:
        JobError: if the result is larger than that.
    """
    images: list[OutputImage] = [{"seed": picture.seed, "nsfw_content_detected": picture.nsfw} for picture in pictures]
    if links:
        for image, link in zip(images, links, strict=True):
            image["image_url"] = link
    else:
        for image, file in zip(images, encode_all(request, pictures, model_name), strict=True):
            image["image"] = base64.b64encode(file).decode()
    shared = request.model_dump(include=set(SHARED_FIELDS), exclude_none=True) | {"model": model_name}
    if request.output_format != "png":
        shared["output_format"] = request.output_format
    if warnings := warnings + request.warnings + _safety_warnings(pictures):
        shared["warnings"] = warnings
    output = {**images[0], **shared} if len(images) == 1 else {"images": images, **shared}
    size = len(json.dumps({"output": output}))
    if size > max_result_bytes:
        way_out = "jpeg or webp as output_format" if request.output_format == "png" else "a lower output_quality"
        raise JobError(
            f"the result has {size / 1e6:.8g} MB, the limit is {max_result_bytes / 1e6:.8g} MB: "
            f"ask for fewer or smaller images, for {way_out}, or have a bucket set up for the endpoint"
        )
    return output


def _safety_warnings(pictures: list[Picture]) -> list[str]:
    return [
        f"image {i} of {len(pictures)} (seed {picture.seed}) was blanked by the safety checker"
        for i, picture in enumerate(pictures, start=1)
        if picture.nsfw
    ]
