"""S3-compatible storage for pictures, in place of base64 in the result."""

import asyncio
import re
from typing import Any
from urllib.parse import quote, urlsplit

import boto3
from botocore import exceptions
from botocore.config import Config

from src.errors import JobError, shortened
from src.settings import Settings
from src.threads import start_pool

LINK_SECONDS = 7 * 24 * 3600
"""How long a link works, in seconds: a week, the maximum of signature version 4."""
DEFAULT_REGION = "us-east-1"
"""The region that requests are signed for if the storage has none, as in boto3."""
MAX_UPLOADS = 32
"""At once. More than a worker's jobs, because a cancelled job's upload continues until it times out."""


class Bucket:
    """A bucket for pictures.

    The SDK's upload functions are not used: without credentials they write to the local disk and return the path as if
    it were a link, and they set no content type. Its client is not used either: it recognizes the region in few
    addresses, and sends checksums in a form that few storages other than AWS accept.
    """

    def __init__(self, settings: Settings) -> None:
        key, secret = settings.bucket_access_key_id, settings.bucket_secret_access_key
        assert settings.bucket_endpoint_url and settings.bucket_name and key and secret
        self._name = settings.bucket_name
        endpoint, addressing = address(settings.bucket_endpoint_url, self._name)
        self._client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=key.get_secret_value(),
            aws_secret_access_key=secret.get_secret_value(),
            region_name=settings.bucket_region or region(endpoint),
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": addressing},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                connect_timeout=10,
                read_timeout=30,
                max_pool_connections=MAX_UPLOADS,
                # exponential backoff with jitter, at most 20 s per pause
                retries={"mode": "standard", "total_max_attempts": 5},
            ),
        )

        # if a storage redirects every request, boto3 would look for the bucket's region endlessly
        self._client.meta.events.register_first("needs-retry.s3", _refuse_redirect)
        # separate threads, so that a hung upload cannot block the encoding of other jobs
        self._threads = start_pool(MAX_UPLOADS, "upload")

    async def upload_all(self, files: list[bytes], job_id: str, output_format: str) -> list[str]:
        """Stores a job's pictures in its folder, one after another, and returns a link to each.

        Raises:
            JobError: as ``upload`` does.
        """
        folder = quote(job_id, safe="", errors="replace")
        if folder in (".", ".."):
            # urllib3 would leave out such a folder
            folder = folder.replace(".", "%2E")
        loop = asyncio.get_running_loop()
        return [
            await loop.run_in_executor(
                self._threads,
                self.upload,
                file,
                f"{folder}/picture-{i}.{output_format}",
                f"image/{output_format}",
            )
            for i, file in enumerate(files, start=1)
        ]

    def upload(self, file: bytes, key: str, media_type: str) -> str:
        """Stores a picture's file under ``key`` and returns a link to it that works for a week.

        Raises:
            JobError: if the bucket cannot be reached, refuses the picture or is somewhere else.
        """
        try:
            self._client.put_object(Bucket=self._name, Key=key, Body=file, ContentType=media_type)
        except exceptions.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "unknown")
            raise JobError(f"the endpoint's bucket refused the picture: {shortened(code)}") from error
        except (exceptions.ConnectionError, exceptions.HTTPClientError) as error:
            raise JobError("the endpoint's bucket could not be reached") from error
        link: str = self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self._name, "Key": key}, ExpiresIn=LINK_SECONDS
        )
        return link


def _refuse_redirect(response: tuple[Any, dict[str, Any]] | None, **_: Any) -> None:
    """A handler of botocore's event ``needs-retry``.

    Args:
        response: the HTTP response, and what botocore parsed from it; None if there was none.
    """
    if not response or not 300 <= response[0].status_code < 400:
        return
    headers = response[0].headers
    if region := headers.get("x-amz-bucket-region"):
        place = f"in the region {shortened(region)}: see BUCKET_ENDPOINT_URL and BUCKET_REGION"
    elif target := re.match("https?://[^/?#]+", headers.get("Location", "")):
        place = f"at {shortened(target[0])}: see BUCKET_ENDPOINT_URL"
    else:
        place = "at another address, which it does not name: see BUCKET_ENDPOINT_URL"
    raise JobError(f"the endpoint's bucket is {place}")


def address(url: str, name: str) -> tuple[str, str]:
    """Removes the bucket's name from ``url``, where it may begin the host or end the path.

    It stays in the host if fewer than three labels would remain: then it belongs to the storage itself.

    Returns:
        The endpoint, and boto3's ``addressing_style``: ``virtual`` if the host held the name, otherwise ``path``.
    """
    parts = urlsplit(url.rstrip("/"))
    if parts.path.endswith(f"/{name}"):
        return parts._replace(path=parts.path.removesuffix(f"/{name}")).geturl(), "path"
    host = parts.netloc.removeprefix(f"{name}.")
    if host != parts.netloc and host.count(".") >= 2:
        return parts._replace(netloc=host).geturl(), "virtual"
    return parts.geturl(), "path"


def region(endpoint: str) -> str:
    """Finds the region in a storage's address.

    Examples: ``s3.us-west-2.amazonaws.com``, ``s3.us-west-004.backblazeb2.com``, ``s3.fr-par.scw.cloud``,
    ``fra1.digitaloceanspaces.com``.
    """
    host = urlsplit(endpoint).hostname or ""
    found = re.match(r"s3[.-](?:dualstack\.)?([a-z]+(?:-[a-z0-9]+)+)\.|([a-z0-9]+)\.digitaloceanspaces\.com$", host)
    return (found and (found[1] or found[2])) or DEFAULT_REGION
