"""OpenAI's images API, called by OpenAI's own clients through the stand-in for RunPod."""

import asyncio
import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from PIL import Image

from src.api import openai
from src.api.bucket import Bucket
from src.api.limits import ModelLimits
from src.api.request import ImageRequest
from src.errors import InvalidInput, JobError
from src.generation.engine import Engine
from src.job_handler import JobHandler
from src.settings import Settings
from tests.support.client import Client
from tests.support.examples import run
from tests.support.pictures import in_base64, plain
from tests.support.platform_stub import Platform

QUICK = {"num_inference_steps": 2}


@pytest.fixture
def images(platform: Platform, client: Client) -> OpenAI:
    return OpenAI(base_url=f"{client.url}/openai/v1", api_key=platform.key, max_retries=0)


def test_python_client_gets_pictures(images: OpenAI):
    ours = QUICK | {"seed": 3, "negative_prompt": "blur", "guidance_scale": 5, "scheduler": "DDIM"}
    without_effect = dict.fromkeys(
        ["quality", "complexity", "background", "moderation", "user", "safety_identifier", "style"], "x"
    )
    answer = images.images.generate(
        model="gpt-image-1",
        prompt="the sea",
        n=2,
        size="64x72",
        response_format="b64_json",
        output_format="webp",
        output_compression=50,
        extra_body=ours,
        **without_effect,
    )
    assert abs(answer.created - time.time()) < 60
    assert (answer.size, answer.output_format) == ("64x72", "webp")
    assert [image.seed for image in answer.data] == [3, 4]
    for image in answer.data:
        picture = Image.open(io.BytesIO(base64.b64decode(image.b64_json)))
        assert (picture.format, picture.size) == ("WEBP", (64, 72))


@pytest.mark.parametrize("size", ["auto", None])
def test_prompt_alone_gets_one_picture_of_native_size(images: OpenAI, size: Any):
    answer = images.images.generate(prompt="the sea", size=size, extra_body=QUICK)
    (image,) = answer.data
    assert Image.open(io.BytesIO(base64.b64decode(image.b64_json))).format == "PNG"
    assert (answer.size, answer.output_format) == ("128x128", "png")


def test_model_list_has_the_one_model(images: OpenAI):
    assert [model.id for model in images.models.list()] == ["demo"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 9}, "n", "invalid input: n: must be at most 4, got 9"),
        ({"size": "65x64"}, "size", "invalid input: size: must be a multiple of 8, got 65"),
        ({"size": "512x512"}, "size", "invalid input: size: must be at most 256, got 512"),
        ({"stream": True}, "stream", "invalid input: stream: not supported"),
        ({"size": "large"}, "size", "invalid input: size: must be auto or such as 512x512, got large"),
        (
            {"response_format": "url"},
            "response_format",
            "invalid input: response_format: must be b64_json, since this endpoint has no bucket, got url",
        ),
        (
            {"stream": True, "size": "large", "n": 9, "extra_body": {"seed": -2, "image": "http://127.0.0.1/"}},
            "stream",
            "invalid input: stream: not supported; size: must be auto or such as 512x512, got large; "
            "seed: must be at least -1, got -2; n: must be at most 4, got 9",
        ),
        (
            {"output_compression": 0, "extra_body": {"promt": "x"}},
            "output_compression",
            "invalid input: output_compression: must be at least 1, got 0; promt: unknown field, did you mean prompt?",
        ),
    ],
)
def test_bad_request_is_an_error_in_openais_format(images: OpenAI, fields: dict[str, Any], param: str, message: str):
    with pytest.raises(BadRequestError) as caught:
        images.images.generate(prompt="the sea", **fields)
    assert caught.value.body == {"message": message, "type": "invalid_request_error", "param": param, "code": None}


def test_error_for_another_route_names_the_supported_routes(images: OpenAI):
    with pytest.raises(BadRequestError, match="no such route; the routes are /v1/images/generations and /v1/models"):
        images.chat.completions.create(model="demo", messages=[{"role": "user", "content": "hello"}])


def test_picture_to_start_from_goes_beside_openais_fields(images: OpenAI):
    ours = QUICK | {"image": in_base64(plain("red", (64, 72))), "strength": 0.5, "seed": 3}
    masked = ours | {"mask": in_base64(plain("black"))}
    for fields, is_as_sent in ((ours, False), (masked, True)):
        answer = images.images.generate(prompt="the sea", size="auto", extra_body=fields)
        picture = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
        assert (picture.size, answer.size) == ((64, 72), "64x72")
        assert (picture.getcolors() == [(64 * 72, (255, 0, 0))]) is is_as_sent


def test_route_for_edits_names_the_one_that_takes_pictures(images: OpenAI):
    refused = "/v1/images/edits is not supported: send image, and mask, white where it changes, in base64 to "
    with pytest.raises(BadRequestError, match=refused):
        images.post("/images/edits", body={"prompt": "the sea", "image": "..."}, cast_to=object)


def test_javascript_client_gets_pictures(node_modules: Path, platform: Platform, client: Client, tmp_path: Path):
    (tmp_path / "node_modules").symlink_to(node_modules)
    code = """
        import OpenAI from "openai";
        const [, apiKey, baseURL] = process.argv;
        const openai = new OpenAI({ apiKey, baseURL, maxRetries: 0 });
        const { data } = await openai.images.generate({ prompt: "the sea", size: "64x64", num_inference_steps: 2 });
        const models = await openai.models.list();
        const error = await openai.images.generate({ prompt: "the sea", n: 9 }).catch((error) => error);
        console.log(JSON.stringify([data[0].b64_json, models.data[0].id, error.status, error.error]));
    """
    ran = run(["node", "--input-type=module", "-e", code, platform.key, f"{client.url}/openai/v1"], tmp_path)
    assert ran.returncode == 0, ran.stderr
    file, model, status, error = json.loads(ran.stdout)
    assert Image.open(io.BytesIO(base64.b64decode(file))).size == (64, 64)
    assert (model, status) == ("demo", 400)
    assert (error["param"], error["message"]) == ("n", "invalid input: n: must be at most 4, got 9")


@pytest.mark.parametrize(("wanted", "is_link"), [(None, True), ("url", True), ("b64_json", False)])
def test_answer_has_links_if_there_is_a_bucket_and_no_file_is_requested(
    v1_4_engine: Engine, monkeypatch: pytest.MonkeyPatch, wanted: str | None, is_link: bool
):
    async def upload_all(_: Bucket, files: list[bytes], *names: object) -> list[str]:
        return ["https://storage.example/picture.png" for _ in files]

    monkeypatch.setattr(Bucket, "upload_all", upload_all)
    settings = Settings(
        bucket_endpoint_url="https://storage.example",
        bucket_access_key_id="key",
        bucket_secret_access_key="secret",
        bucket_name="pictures",
    )
    body = {"prompt": "a cat", "response_format": wanted} | QUICK
    job = {"id": "1", "input": {"openai_route": openai.IMAGES, "openai_input": body}}
    (image,) = asyncio.run(JobHandler(v1_4_engine, settings).handle(job))["data"]
    assert set(image) == {"url" if is_link else "b64_json", "seed"}


@pytest.mark.parametrize("body", [None, [], "the sea", {}, {"prompt": None, "size": ["64x64"]}])
def test_malformed_body_is_logged_and_refused_in_openais_format(
    v1_4_engine: Engine, capsys: pytest.CaptureFixture, body: object
):
    job = {"id": "job-1", "input": {"openai_route": openai.IMAGES, "openai_input": body}}
    error = asyncio.run(JobHandler(v1_4_engine, Settings()).handle(job))["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("invalid input: ")
    assert "job-1 | failed: invalid input\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        pytest.param(
            {"model": "dall-e-2", "n": 1, "size": "512x512", "response_format": "b64_json"},
            {"width": 512, "height": 512, "num_images": 1},
            id="Open WebUI",
        ),
        pytest.param(
            {
                "model": "gpt-image-1",
                "n": 1,
                "background": "auto",
                "output_format": "png",
                "quality": "auto",
                "size": "auto",
            },
            {"num_images": 1, "output_format": "png"},
            id="LibreChat's image_gen_oai",
        ),
        pytest.param(
            {"model": "dall-e-3", "n": 1, "quality": "standard", "style": "vivid", "size": "1024x1024"},
            {"width": 1024, "height": 1024, "num_images": 1},
            id="LibreChat's dalle",
        ),
        pytest.param({"model": "gpt-image-1", "stream": False, "partial_images": 0}, {}, id="TanStack AI"),
        pytest.param(
            {"n": None, "size": "auto", "num_images": 2, "width": 64},
            {"num_images": 2, "width": 64},
            id="ours beside nothing of OpenAI's",
        ),
    ],
)
def test_request_of_a_known_client_is_accepted(body: dict[str, Any], fields: dict[str, Any]):
    call = {"openai_route": openai.IMAGES, "openai_input": {"prompt": "the sea"} | body}
    job_input, _, _ = openai.read_input(call, has_bucket=False)
    assert job_input == {"prompt": "the sea"} | fields
    ImageRequest.parse(job_input, ModelLimits(native_size=512, max_size=1024, scheduler="PNDM"))


@pytest.mark.parametrize(
    ("body", "faults"),
    [
        ({"stream": True}, ["stream: not supported"]),
        ({"partial_images": 2, "stream": "false"}, ["partial_images: not supported", "stream: not supported"]),
        ({"n": 2, "num_images": 3}, ["n: contradicts num_images, send one of them"]),
        (
            {"output_compression": 50, "output_quality": 60},
            ["output_compression: contradicts output_quality, send one of them"],
        ),
        (
            {"size": "64x64", "width": 64, "height": 64},
            ["size: contradicts width, send one of them", "size: contradicts height, send one of them"],
        ),
        ({"size": ""}, ["size: must be auto or such as 512x512, got an empty string"]),
        (
            {"response_format": "", "size": [64]},
            [
                "response_format: must be b64_json, since this endpoint has no bucket, got an empty string",
                "size: must be auto or such as 512x512, got a list",
            ],
        ),
    ],
)
def test_what_is_not_supported_or_contradicts_itself_is_refused(body: dict[str, Any], faults: list[str]):
    call = {"openai_route": openai.IMAGES, "openai_input": {"prompt": "the sea"} | body}
    _, _, found = openai.read_input(call, has_bucket=False)
    assert found == faults
    assert openai.word_error(InvalidInput(*found))["param"] == faults[0].split(":")[0]


def test_lost_device_is_a_server_error_and_replaces_the_worker(v1_4_engine: Engine, monkeypatch: pytest.MonkeyPatch):
    async def lose(*_: object) -> None:
        raise JobError("the GPU failed: send the job again", refresh_worker=True)

    monkeypatch.setattr(v1_4_engine, "generate", lose)
    job = {"id": "1", "input": {"openai_route": openai.IMAGES, "openai_input": {"prompt": "a cat"}}}
    assert asyncio.run(JobHandler(v1_4_engine, Settings()).handle(job)) == {
        "error": {
            "message": "the GPU failed: send the job again",
            "type": "server_error",
            "param": None,
            "code": None,
        },
        "refresh_worker": True,
    }
