"""Pictures at addresses, over real HTTP, and an event loop that goes on while pictures are read."""

import asyncio
import base64
import datetime
import gzip
import ipaddress
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image
from runpod.serverless.utils import rp_ssrf

from src.api import request_reader
from src.api.limits import ModelLimits
from src.api.request import ImageRequest
from src.api.request_reader import MAX_FILE_BYTES, read_request
from src.errors import InvalidInput
from src.generation.engine import Engine
from src.job_handler import JobHandler
from src.settings import Settings
from tests.support import engines
from tests.support.client import until
from tests.support.pictures import file, in_base64, plain

LIMITS = ModelLimits(native_size=512, max_size=1024, scheduler="PNDM")
RED, WHITE = file(plain("red")), file(plain("white"))
NO_PUBLIC_HOST = "could not be fetched, its address leads to no public host, or through too many redirects"


def read(**job_input: object) -> ImageRequest:
    return asyncio.run(read_request({"prompt": "a cat", **job_input}, LIMITS))


def refusal(**job_input: object) -> str:
    with pytest.raises(InvalidInput) as refused:
        read(**job_input)
    return str(refused.value).removeprefix("invalid input: ")


class Host:
    """A web server. ``paths`` are those that were asked for; each of ``PAGES`` takes the handler that answers."""

    def __init__(self, server: ThreadingHTTPServer, paths: list[str]) -> None:
        self.port, self.paths = server.server_port, paths
        self.url = f"http://127.0.0.1:{server.server_port}"


class Handler(BaseHTTPRequestHandler):
    paths: list[str]

    def log_message(self, *_: object) -> None: ...

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.paths.append(self.path)
        name, _, more = self.path.lstrip("/").partition("?")
        try:
            getattr(self, name)(more)
        except OSError:
            # the client is gone
            self.close_connection = True

    def red(self, _: str) -> None:
        self.answer(RED)

    def white(self, _: str) -> None:
        self.answer(WHITE)

    def redirect(self, target: str) -> None:
        self.answer(b"", 302, Location=target)

    def page(self, _: str) -> None:
        self.answer(b"<html>a secret</html>", **{"Content-Type": "image/png"})

    def missing(self, _: str) -> None:
        self.answer(b"", 404)

    def endless(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + RED)
        while True:
            self.wfile.write(bytes(2**16))

    def bomb(self, _: str) -> None:
        """Twice as much as is read, in a few kilobytes."""
        body = gzip.compress(bytes(2 * MAX_FILE_BYTES))
        self.answer(body, **{"Content-Encoding": "gzip"})

    def drip(self, begin: str) -> None:
        self.wfile.write({"body": b"HTTP/1.1 200 OK\r\n\r\n", "headers": b"HTTP/1.1 200 OK\r\nX: "}[begin])
        while True:
            self.wfile.write(b"x")
            time.sleep(0.05)

    def cut(self, _: str) -> None:
        self.answer(RED[:-60], **{"Content-Length": str(len(RED))})
        self.close_connection = True


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host at a private address, which may be fetched from."""
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    paths: list[str] = []
    server = ThreadingHTTPServer(("0.0.0.0", 0), type("Pages", (Handler,), {"paths": paths}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield Host(server, paths)
    server.shutdown()
    server.server_close()


def downloads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "download"]


@pytest.mark.parametrize(
    "written", ["{url}/red", "{url}/redirect?{url}/redirect?/red", "HTTP://127.0.0.1:{port}/red", "\n {url}/red "]
)
def test_picture_at_an_address_is_fetched(host: Host, written: str):
    request = read(image=written.format(url=host.url, port=host.port))
    assert request.image and request.image.tobytes() == plain("red").tobytes()


def test_picture_and_mask_are_fetched_beside_one_in_base64(host: Host):
    request = read(image=f"{host.url}/red", mask=f"{host.url}/white", width=128)
    assert request.image and request.mask
    assert (request.image.size, request.mask.getextrema(), request.strength) == ((128, 128), (255, 255), 1)
    assert read(image=in_base64(plain("red")), mask=f"{host.url}/white").mask
    assert read(image=f"{host.url}/red", mask=in_base64(plain("red"))).mask


def test_nothing_is_fetched_for_a_request_that_is_invalid_without_it(host: Host):
    assert refusal(image=f"{host.url}/red", mask="x!").startswith("mask: must be a file in base64")
    assert refusal(image=f"{host.url}/red", num_inference_steps=1).startswith("strength: ")
    assert host.paths == []


def test_faults_of_both_addresses_are_reported(host: Host):
    said = "could not be fetched, its host answered 404"
    assert refusal(image=f"{host.url}/missing", mask=f"{host.url}/missing") == f"image: {said}; mask: {said}"
    no_picture = "must be a PNG, JPEG or WebP file"
    assert refusal(image=f"{host.url}/missing", mask=f"{host.url}/page") == f"image: {said}; mask: {no_picture}"


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("page", "must be a PNG, JPEG or WebP file"),
        ("endless", "must have at most 20 MB"),
        ("bomb", "must have at most 20 MB"),
        ("cut", "could not be fetched, its host does not answer as it should"),
        ("redirect?/redirect?/redirect?/redirect?/redirect?/redirect?/red", NO_PUBLIC_HOST),
        ("redirect?file:///etc/passwd", NO_PUBLIC_HOST),
        ("redirect?ftp://127.0.0.1/red", NO_PUBLIC_HOST),
    ],
)
def test_answer_that_is_no_picture_is_refused_in_words(host: Host, page: str, said: str):
    assert refusal(image=f"{host.url}/{page}") == f"image: {said}"


@pytest.mark.parametrize(
    "name",
    [
        *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "localhost"),
        *("pictures.example", "0.0.0.0", "10.0.0.1", "169.254.169.254", "[fd00:ec2::254]", "100.64.0.1", "no.invalid"),
    ],
)
def test_private_addresses_are_refused_alike_and_never_asked(host: Host, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.delenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS")
    resolve = socket.getaddrinfo

    def resolves_to_this_machine(asked: Any, *arguments: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if asked == "pictures.example" else asked, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolves_to_this_machine)
    assert refusal(image=f"http://{name}:{host.port}/red") == f"image: {NO_PUBLIC_HOST}"
    assert host.paths == []


def test_redirects_to_private_addresses_are_refused(host: Host, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS")
    is_safe = rp_ssrf.is_safe_address
    # as if the host itself were public
    monkeypatch.setattr(rp_ssrf, "is_safe_address", lambda ip: ip == "127.0.0.1" or is_safe(ip))
    assert read(image=f"{host.url}/redirect?{host.url}/red").image
    for target in (f"http://127.0.0.2:{host.port}/red", "http://169.254.169.254/latest/meta-data"):
        assert refusal(image=f"{host.url}/redirect?{target}") == f"image: {NO_PUBLIC_HOST}"
    assert host.paths.count("/red") == 1


@pytest.mark.parametrize("address", ["http://me:secret@{host}/red", "http://example.com@{host}/red"])
def test_address_with_a_user_name_is_refused(host: Host, address: str):
    url = address.format(host=f"127.0.0.1:{host.port}")
    assert refusal(image=url) == "image: must be an address without a user name"
    assert host.paths == []


@pytest.mark.parametrize("address", ["ftp://127.0.0.1/red", "file:///etc/passwd", "//127.0.0.1/red", "/etc/passwd"])
def test_other_schemes_and_paths_are_no_addresses(address: str):
    assert refusal(image=address).startswith("image: must be ")


@pytest.mark.parametrize(
    "address",
    [
        *("http://", "http://[::1", "http:///red", "http://127.0.0.1:99999/", "http://127.0.0.1:abc/", "https://\0/"),
        *("http://127.0.0.1/a\r\nX: y", "http://127.0.0.1\n/", "http://a host/"),
    ],
)
def test_malformed_address_is_told_as_none(address: str):
    assert refusal(image=address) == "image: is not an address"


def test_name_that_no_host_can_have_is_refused_in_words():
    assert refusal(image="http://" + "a" * 300).startswith("image: could not be fetched, its ")


def test_host_with_a_wrong_certificate_is_refused(host: Host, tmp_path: Path):
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    today = datetime.datetime.now(datetime.UTC)
    this_machine = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, today, today + datetime.timedelta(1))
    signed = certificate.add_extension(this_machine, False).sign(key, hashes.SHA256())
    pem, plain_text = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain_text)
    (tmp_path / "host.pem").write_bytes(signed.public_bytes(pem) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "host.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    said = refusal(image=f"https://127.0.0.1:{server.server_port}/red")
    server.shutdown()
    server.server_close()
    assert said == "image: could not be fetched, its host has no valid certificate"


@pytest.mark.parametrize("begin", ["body", "headers"])
def test_download_that_drips_ends_by_the_clock(host: Host, monkeypatch: pytest.MonkeyPatch, begin: str):
    monkeypatch.setattr(request_reader, "FETCH_SECONDS", 0.5)
    assert refusal(image=f"{host.url}/drip?{begin}") == "image: could not be fetched within 0.5 s"
    until(lambda: not downloads())


@pytest.mark.parametrize("begin", ["body", "headers"])
def test_cancelled_job_leaves_no_download_behind(host: Host, begin: str):
    async def cancel() -> None:
        job = asyncio.create_task(read_request({"prompt": "x", "image": f"{host.url}/drip?{begin}"}, LIMITS))
        await asyncio.to_thread(until, lambda: host.paths)
        assert downloads()
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)

    asyncio.run(cancel())
    until(lambda: not downloads())


def noisy(size: int) -> str:
    """A picture that no format makes small, of 3 bytes a pixel."""
    return in_base64(Image.frombytes("RGB", (size, size), os.urandom(3 * size**2)), compress_level=0)


LARGE = {"14 MB": lambda: noisy(1900), "4096 x 4096": lambda: in_base64(plain("red", (4096, 4096)))}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_event_loop_goes_on_while_pictures_are_read(make: Callable[[], str]):
    picture = make()

    async def watched() -> int:
        reading = asyncio.create_task(read_request({"prompt": "x", "image": picture, "mask": picture}, LIMITS))
        turns = 0
        while not reading.done():
            turns += 1
            await asyncio.sleep(0.01)
        assert (await reading).image
        return turns

    assert asyncio.run(watched()) > 3


def test_waiting_job_holds_no_text_of_its_picture(v1_4_engine: Engine):
    text = base64.b64encode(RED).decode()
    job = {"id": "1", "input": {"prompt": "a cat", "num_inference_steps": 2, "image": text}}
    free = threading.Event()

    async def wait() -> None:
        engines.occupy(v1_4_engine, free)
        answer = asyncio.create_task(JobHandler(v1_4_engine, Settings()).handle(job))
        await asyncio.to_thread(until, lambda: engines.waiting(v1_4_engine))
        holders = sys.getrefcount(text)
        free.set()
        assert "image" in await answer
        # the variable and the argument
        assert holders == 2

    asyncio.run(wait())
