"""Reads a job's input without blocking the event loop, and downloads the pictures that it has addresses of."""

import asyncio
import ctypes
import re
import threading
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import suppress
from urllib.parse import urlsplit

from PIL import Image

from src.api.limits import ModelLimits
from src.api.request import ImageRequest

FETCH_SECONDS = 10.0
MAX_FILE_BYTES = 20_000_000

_ADDRESS = re.compile(r"\s*https?://", re.IGNORECASE)
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
_PLACEHOLDER = Image.new("RGB", (1, 1))
_one_at_a_time = threading.Lock()
"""Held while pictures are decoded, because one of the largest size takes 200 MB meanwhile."""


class _NotFetched(str):
    """Why there is no file, in words for the client."""


async def read_request(job_input: object, limits: ModelLimits, faults: Collection[str] = ()) -> ImageRequest:
    """Returns the request that ``job_input`` is, with its pictures.

    An address is fetched once everything else has been found valid.

    Args:
        job_input: as ``ImageRequest.parse`` takes it, with the addresses of pictures too.
        limits: the model's defaults and bounds.
        faults: those of the job that are known already.

    Raises:
        InvalidInput: listing every fault.
    """
    if not isinstance(job_input, dict) or not {"image", "mask"} & job_input.keys():
        return ImageRequest.parse(job_input, limits, faults)

    def parse(files: dict[str, object], faults: Collection[str]) -> ImageRequest:
        with _one_at_a_time:
            return ImageRequest.parse({**job_input, **files}, limits, faults)

    addresses = {
        name: value.strip()
        for name in ("image", "mask")
        if isinstance(value := job_input.get(name), str) and _ADDRESS.match(value)
    }
    placeholders: dict[str, object] = dict.fromkeys(addresses, _PLACEHOLDER)
    request = await asyncio.to_thread(parse, placeholders, faults)
    if not addresses:
        return request
    files = dict(zip(addresses, await asyncio.gather(*map(_fetch, addresses.values())), strict=True))
    not_fetched = [f"{name}: {why}" for name, why in files.items() if isinstance(why, _NotFetched)]
    fetched = {name: file for name, file in files.items() if isinstance(file, bytes)}
    return await asyncio.to_thread(parse, placeholders | fetched, not_fetched)


async def _fetch(address: str) -> bytes | _NotFetched:
    download = _Download(address)
    download.start()
    try:
        return await asyncio.wait_for(asyncio.wrap_future(download.outcome), FETCH_SECONDS)
    except TimeoutError:
        return _NotFetched(f"could not be fetched within {FETCH_SECONDS:g} s")
    finally:
        download.stop()


class _Download(threading.Thread):
    """Downloads a file on a thread of its own.

    ``stop`` ends it when the host sends the next byte, or has sent none for ``FETCH_SECONDS``.
    """

    def __init__(self, address: str) -> None:
        super().__init__(name="download", daemon=True)
        self._address = address
        self._ending = threading.Lock()
        self.outcome = Future[bytes | _NotFetched]()
        self.outcome.set_running_or_notify_cancel()

    def run(self) -> None:
        with suppress(SystemExit):
            outcome = _get(self._address)
            with self._ending:
                self.outcome.set_result(outcome)

    def stop(self) -> None:
        # a thread that has ended may have given its number to another
        with self._ending:
            if self.ident and not self.outcome.done():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit))


def _get(address: str) -> bytes | _NotFetched:
    # of what this imports, api needs nothing else
    import requests
    from runpod.serverless.utils import rp_ssrf

    try:
        if _CONTROL_CHARACTER.search(address):
            raise requests.exceptions.InvalidURL
        requests.Request("GET", address).prepare()
        if "@" in urlsplit(address).netloc:
            return _NotFetched("must be an address without a user name")
        # compressed, a small answer could become a huge one
        headers = {"Accept-Encoding": "identity"}
        with rp_ssrf.safe_get(address, headers=headers, timeout=FETCH_SECONDS) as response:
            if response.status_code != 200:
                return _NotFetched(f"could not be fetched, its host answered {response.status_code}")
            file = bytearray()
            for part in response.iter_content(2**16):
                file += part
                if len(file) > MAX_FILE_BYTES:
                    return _NotFetched(f"must have at most {MAX_FILE_BYTES // 10**6} MB")
            return bytes(file)
    except requests.exceptions.InvalidURL:
        return _NotFetched("is not an address")
    except rp_ssrf.SSRFError:
        # the same for a name that does not exist, so that nobody learns which names the endpoint's network has
        return _NotFetched("could not be fetched, its address leads to no public host, or through too many redirects")
    except requests.exceptions.SSLError:
        return _NotFetched("could not be fetched, its host has no valid certificate")
    except Exception:
        # requests and urllib3 raise errors of a dozen classes, with the address in them
        return _NotFetched("could not be fetched, its host does not answer as it should")
