"""Pictures stored over HTTPS in S3-compatible storage, for which moto's server stands in."""

import asyncio
import datetime
import io
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any, get_args
from urllib.parse import unquote, urlsplit

import boto3
import pytest
import requests
from botocore.retries.standard import ExponentialBackoff
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from PIL import Image
from runpod.serverless.modules import rp_job
from werkzeug.serving import make_server

from src.api.bucket import MAX_UPLOADS, Bucket, address
from src.api.request import OutputFormat
from src.errors import JobError
from src.generation.engine import Engine
from src.job_handler import JobHandler
from src.settings import Settings
from tests.support.internals import finish_uploads
from tests.support.processes import ROOT

MOTO = "https://s3.amazonaws.com"
REGIONAL = {
    "https://s3.us-west-2.amazonaws.com": "us-west-2",
    "https://s3-us-west-2.amazonaws.com": "us-west-2",
    "https://s3.dualstack.eu-central-1.amazonaws.com": "eu-central-1",
    "https://s3.amazonaws.com": "us-east-1",
    "https://account.r2.cloudflarestorage.com": "us-east-1",
    "https://s3.us-west-004.backblazeb2.com": "us-west-004",
    "https://storage.googleapis.com": "us-east-1",
    "https://fra1.digitaloceanspaces.com": "fra1",
    "https://s3.fr-par.scw.cloud": "fr-par",
    "https://minio.example.com:9000": "us-east-1",
}
"""Addresses of storage services without a bucket's name, and the region of each."""


@dataclass
class Storage:
    """moto's S3 server over HTTPS, at the addresses of well-known storage services."""

    client: Any
    requests: list[dict[str, str]]
    """The headers of each request, as WSGI names them."""
    answers: list[tuple[Any, ...]]
    """Status, headers and body, if any, of the answers to the next requests, which are then not carried out."""
    barriers: list[threading.Barrier]
    """The next requests each take one and wait at it twice before they are answered."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a certificate for all storage services and their buckets, and its key."""
    names = [urlsplit(address).hostname for address in REGIONAL]
    names = [x509.DNSName(name) for host in names for name in (host, f"*.{host}")]
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "storage")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "storage.pem"
    pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(signed.public_bytes(pem) + key.private_bytes(pem, kind, serialization.NoEncryption()))
    return path


@pytest.fixture(scope="module")
def storage(certificate: Path) -> Iterator[Storage]:
    """A storage service with the bucket ``pictures``. A proxy routes every address to it."""
    moto, received = DomainDispatcherApplication(create_backend_app), list[dict[str, str]]()
    answers, barriers = list[tuple[Any, ...]](), list[threading.Barrier]()

    def recorded(environ: dict[str, Any], start_response: Any) -> Any:
        received.append({name: value for name, value in environ.items() if isinstance(value, str)})
        if barriers:
            barrier = barriers.pop(0)
            for _ in range(2):
                barrier.wait(30)
        if answers:
            status, headers, *body = answers.pop(0)
            start_response(status, [("Content-Length", str(sum(map(len, body)))), *headers.items()])
            return body
        return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, recorded, threaded=True, ssl_context=(str(certificate), str(certificate)))

    class Proxy(StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            with socket.create_connection(("127.0.0.1", server.server_port)) as upstream:
                there = threading.Thread(target=pump, args=(self.connection, upstream), daemon=True)
                there.start()
                pump(upstream, self.connection)

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    class Proxies(ThreadingTCPServer):
        daemon_threads = True

    with pytest.MonkeyPatch.context() as patch, Proxies(("127.0.0.1", 0), Proxy) as proxy:
        for each in (server, proxy):
            threading.Thread(target=each.serve_forever, daemon=True).start()
        patch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_address[1]}")
        patch.setenv("AWS_CA_BUNDLE", str(certificate))
        patch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        patch.setenv("MOTO_S3_CUSTOM_ENDPOINTS", ",".join(REGIONAL))
        client = boto3.client(
            "s3", endpoint_url=MOTO, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
        )
        client.create_bucket(Bucket="pictures")
        yield Storage(client, received, answers, barriers)
        server.shutdown()
        proxy.shutdown()


def settings(address: str = MOTO, name: str = "pictures", region: str | None = None) -> Settings:
    return Settings(
        bucket_endpoint_url=address,
        bucket_access_key_id="key",
        bucket_secret_access_key="secret",
        bucket_name=name,
        bucket_region=region,
    )


@pytest.mark.parametrize("address", REGIONAL)
@pytest.mark.parametrize("form", ["neither", "in the host", "in the path"])
def test_every_form_of_address_stores_the_same_object(storage: Storage, address: str, form: str):
    scheme, host = address.split("//")
    given = {"neither": address, "in the host": f"{scheme}//pictures.{host}", "in the path": f"{address}/pictures/"}
    storage.requests.clear()
    link = Bucket(settings(given[form])).upload(address.encode(), "job-1/picture-1.png", "image/png")
    stored = storage.client.get_object(Bucket="pictures", Key="job-1/picture-1.png")
    assert (stored["Body"].read(), stored["ContentType"]) == (address.encode(), "image/png")
    put = storage.requests[0]
    assert (put["REQUEST_METHOD"], put["CONTENT_LENGTH"]) == ("PUT", str(len(address)))
    assert put["HTTP_HOST"] == (f"pictures.{host}" if form == "in the host" else host)
    assert f"/{REGIONAL[address]}/s3/aws4_request" in put["HTTP_AUTHORIZATION"]
    # R2 and others refuse these
    assert "HTTP_CONTENT_ENCODING" not in put and "HTTP_X_AMZ_TRAILER" not in put
    assert "TRAILER" not in put["HTTP_X_AMZ_CONTENT_SHA256"]
    assert not any("CHECKSUM" in name for name in put)

    fetched = requests.get(link, timeout=10)
    assert (fetched.content, fetched.headers["Content-Type"]) == (address.encode(), "image/png")
    assert "X-Amz-Expires=604800" in link and "job-1/picture-1.png" in link


def test_configured_region_overrides_the_one_in_the_url(storage: Storage):
    storage.requests.clear()
    Bucket(settings("https://s3.us-west-2.amazonaws.com", region="auto")).upload(b"a PNG", "picture.png", "image/png")
    assert "/auto/s3/aws4_request" in storage.requests[0]["HTTP_AUTHORIZATION"]


def test_bucket_may_have_the_name_of_its_storage():
    assert address("https://storage.googleapis.com", "storage") == ("https://storage.googleapis.com", "path")
    assert address("https://s3.local.example.com/s3", "s3") == ("https://s3.local.example.com", "path")
    assert address("https://x.supabase.co/storage/v1/s3/", "a") == ("https://x.supabase.co/storage/v1/s3", "path")


def test_operators_page_lists_only_tested_addresses():
    rows = re.findall(
        r"^\| [^|]+ \| `(https://\S+)` \|", (ROOT / ".runpod" / "README.md").read_text(encoding="utf-8"), re.M
    )
    examples = {"region": "us-west-\\d+", "account": "account", "host": "minio.example.com"}
    assert len(rows) == 5
    for row in rows:
        pattern = re.sub("<(.+?)>", lambda placeholder: examples[placeholder[1]], row)
        assert any(re.fullmatch(pattern, address) for address in REGIONAL), row


def test_upload_is_tried_five_times(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)
    failed = [("503 Slow Down", {}), ("500 Internal Error", {})] * 2
    storage.answers += failed
    Bucket(settings()).upload(b"a PNG", "job-6/picture.png", "image/png")
    assert storage.client.get_object(Bucket="pictures", Key="job-6/picture.png")["Body"].read() == b"a PNG"
    storage.answers += [*failed, ("503 Slow Down", {})]
    with pytest.raises(JobError, match="the endpoint's bucket refused the picture: 503"):
        Bucket(settings()).upload(b"a PNG", "job-6/picture.png", "image/png")


def test_threads_for_uploads_run_before_the_first_upload():
    before = set(threading.enumerate())
    bucket = Bucket(settings())
    started = [thread.name for thread in threading.enumerate() if thread not in before]
    assert sum(name.startswith("upload") for name in started) == MAX_UPLOADS
    del bucket


def test_job_returns_links_in_place_of_pictures(
    storage: Storage, v1_4_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    asked = {"prompt": "a cat", "num_inference_steps": 2, "seed": 1, "num_images": 2}
    there, here = (
        asyncio.run(JobHandler(v1_4_engine, each).handle({"id": "job-2", "input": asked}))
        for each in (settings(), Settings(max_result_bytes=10**7))
    )
    assert [set(image) for image in there["images"]] == [{"image_url", "seed", "nsfw_content_detected"}] * 2
    for linked, given in zip(there["images"], here["images"], strict=True):
        picture = Image.open(io.BytesIO(requests.get(linked["image_url"], timeout=10).content))
        assert picture.text["parameters"].count(f"Seed: {given['seed']},") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("job_id", [".", "..", "../other", "/", "a/../b", "a b", "%2E", "é", "a\\b", "\udcff", "?x#y"])
def test_pictures_of_any_job_are_in_a_folder_of_their_own(storage: Storage, job_id: str):
    (link,) = asyncio.run(Bucket(settings()).upload_all([b"a PNG"], job_id, "png"))
    assert requests.get(link, timeout=10).content == b"a PNG"
    keys = [each["Key"] for each in storage.client.list_objects_v2(Bucket="pictures")["Contents"]]
    folders = [unquote(key.removesuffix("/picture-1.png")) for key in keys if key.count("/") == 1]
    assert job_id.replace("\udcff", "?") in folders
    assert len([*filter(re.compile(r"(^|/)\.*(/|$)").search, keys)]) == 0


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_link_has_the_name_and_content_type_of_its_format(storage: Storage, v1_4_engine: Engine, output_format: str):
    asked = {"prompt": "a cat", "num_inference_steps": 1, "output_format": output_format}
    answer = asyncio.run(JobHandler(v1_4_engine, settings()).handle({"id": "job-5", "input": asked}))
    assert f"job-5/picture-1.{output_format}?" in answer["image_url"]
    fetched = requests.get(answer["image_url"], timeout=10)
    picture = Image.open(io.BytesIO(fetched.content))
    assert fetched.headers["Content-Type"] == Image.MIME[picture.format] == f"image/{output_format}"


def refusal(settings: Settings, engine: Engine) -> str:
    job = {"id": "job-3", "input": {"prompt": "a cat", "num_inference_steps": 2}}
    answer = asyncio.run(JobHandler(engine, settings).handle(job))
    assert set(answer) == {"error"}
    return answer["error"]


def test_failing_bucket_fails_the_job_and_leaves_no_local_file(
    storage: Storage, v1_4_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    refused = "the endpoint's bucket refused the picture: "
    assert refusal(settings(name="nothing-here"), v1_4_engine) == refused + "NoSuchBucket"
    assert refusal(settings("http://127.0.0.1:9"), v1_4_engine) == "the endpoint's bucket could not be reached"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("headers", "place"),
    [
        (
            {"x-amz-bucket-region": "eu-central-1"},
            "in the region eu-central-1: see BUCKET_ENDPOINT_URL and BUCKET_REGION",
        ),
        (
            {"Location": "https://elsewhere.example.com/pictures?x"},
            "at https://elsewhere.example.com: see BUCKET_ENDPOINT_URL",
        ),
        ({}, "at another address, which it does not name: see BUCKET_ENDPOINT_URL"),
        ({"Location": f"https://{'x' * 99}"}, f"at https://{'x' * 32}...: see BUCKET_ENDPOINT_URL"),
    ],
)
@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_redirecting_bucket_fails_the_job_at_once_and_its_place_is_named(
    storage: Storage, status: str, headers: dict[str, str], place: str
):
    storage.requests.clear()
    storage.answers += [(status, headers)] * 100
    try:
        with pytest.raises(JobError) as refused:
            Bucket(settings()).upload(b"a PNG", "job-8/picture-1.png", "image/png")
    finally:
        storage.answers.clear()
    assert str(refused.value) == f"the endpoint's bucket is {place}"
    assert len(storage.requests) == 1


def test_errors_quote_a_storage_in_one_short_line(storage: Storage):
    code = "A\n\u2028" + "x" * 99
    storage.answers.append(("403 Forbidden", {}, f"<Error><Code>{code}</Code></Error>".encode()))
    with pytest.raises(JobError) as refused:
        Bucket(settings()).upload(b"a PNG", "picture.png", "image/png")
    assert str(refused.value) == f"the endpoint's bucket refused the picture: A??{'x' * 37}..."


def test_cancelled_job_stores_no_further_picture_and_delays_no_other_job(storage: Storage, v1_4_engine: Engine):
    barrier = threading.Barrier(2)

    async def cancel_during_the_first_upload() -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        asked = {"prompt": "a cat", "num_inference_steps": 1}
        cancelled = asyncio.create_task(job_handler.handle({"id": "job-9", "input": asked | {"num_images": 4}}))
        await loop.run_in_executor(ThreadPoolExecutor(1), barrier.wait, 30)
        cancelled.cancel()
        try:
            return await asyncio.wait_for(job_handler.handle({"id": "job-10", "input": asked}), 10)
        finally:
            barrier.wait(30)

    storage.requests.clear()
    storage.barriers.append(barrier)
    job_handler = JobHandler(v1_4_engine, settings())
    assert "image_url" in asyncio.run(cancel_during_the_first_upload())
    finish_uploads(job_handler)
    assert [put["PATH_INFO"] for put in storage.requests] == [
        "/pictures/job-9/picture-1.png",
        "/pictures/job-10/picture-1.png",
    ]


def test_log_holds_no_link(
    storage: Storage, v1_4_engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(rp_job.log, "level", "INFO")
    job = {"id": "job-11", "input": {"prompt": "a cat", "num_inference_steps": 1}}
    result = asyncio.run(rp_job.run_job(JobHandler(v1_4_engine, settings()).handle, job))
    assert "X-Amz-Signature" in result["output"]["image_url"]
    log = capsys.readouterr().out
    assert "job-11 | generated 1 " in log and "X-Amz" not in log
