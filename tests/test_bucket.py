"""Pictures in S3-compatible storage, over HTTP, against moto's server."""

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import boto3
import pytest
import requests
from moto.server import ThreadedMotoServer
from PIL import Image

from src.bucket import Bucket
from src.engine import Engine
from src.request import JobError, OutputFormat
from src.settings import Settings
from src.worker import Worker


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    """The address of a storage with one bucket, ``pictures``."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=address,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="pictures")
    yield address
    server.stop()


def settings(address: str, name: str = "pictures") -> Settings:
    return Settings(
        bucket_endpoint_url=address,
        bucket_access_key_id="key",
        bucket_secret_access_key="secret",
        bucket_name=name,
    )


def test_what_is_uploaded_can_be_fetched_by_its_link(storage: str):
    link = Bucket(settings(storage)).upload(b"a PNG", "job-1/picture-1.png", "image/png")
    fetched = requests.get(link, timeout=10)
    assert (fetched.content, fetched.headers["Content-Type"]) == (b"a PNG", "image/png")
    assert "X-Amz-Expires=604800" in link and "job-1/picture-1.png" in link


def test_a_job_gives_links_in_place_of_pictures(
    storage: str, v1_4_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    job = {"id": "job-2", "input": {"prompt": "a cat", "num_inference_steps": 2, "seed": 1, "num_images": 2}}
    there, here = (
        asyncio.run(Worker(v1_4_engine, each).handle(job))
        for each in (settings(storage), Settings(max_result_bytes=10**7))
    )
    assert [set(image) for image in there["images"]] == [{"image_url", "seed", "nsfw_content_detected"}] * 2
    for linked, given in zip(there["images"], here["images"], strict=True):
        picture = Image.open(io.BytesIO(requests.get(linked["image_url"], timeout=10).content))
        assert picture.text["parameters"].count(f"Seed: {given['seed']},") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_a_link_is_named_and_typed_by_its_format(storage: str, v1_4_engine: Engine, output_format: str):
    asked = {"prompt": "a cat", "num_inference_steps": 1, "output_format": output_format}
    told = asyncio.run(Worker(v1_4_engine, settings(storage)).handle({"id": "job-5", "input": asked}))
    assert f"job-5/picture-1.{output_format}?" in told["image_url"]
    fetched = requests.get(told["image_url"], timeout=10)
    picture = Image.open(io.BytesIO(fetched.content))
    assert fetched.headers["Content-Type"] == Image.MIME[picture.format] == f"image/{output_format}"


def refusal(settings: Settings, engine: Engine) -> str:
    job = {"id": "job-3", "input": {"prompt": "a cat", "num_inference_steps": 2}}
    told = asyncio.run(Worker(engine, settings).handle(job))
    assert set(told) == {"error"}
    return told["error"]


def test_a_bucket_that_fails_fails_the_job_and_leaves_nothing_behind(
    storage: str, v1_4_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    refused = "the endpoint's bucket refused the picture: "
    assert refusal(settings(storage, "nothing-here"), v1_4_engine) == refused + "NoSuchBucket"
    assert refusal(settings("http://127.0.0.1:9"), v1_4_engine) == "the endpoint's bucket could not be reached"
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_key_is_refused(storage: str):
    # moto checks keys once it has been told after how many requests to begin
    requests.post(f"{storage}/moto-api/reset-auth", data="0", timeout=10)
    try:
        with pytest.raises(JobError, match=r"the endpoint's bucket refused the picture: InvalidAccessKeyId"):
            Bucket(settings(storage)).upload(b"a PNG", "job-4/picture-1.png", "image/png")
    finally:
        requests.post(f"{storage}/moto-api/reset-auth", data="inf", timeout=10)
