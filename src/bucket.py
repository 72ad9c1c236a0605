"""S3-compatible storage for pictures, in place of base64 in the result."""

from collections.abc import Callable
from typing import Any

from runpod.serverless.utils.rp_upload import get_boto_client

from src.request import JobError
from src.settings import Settings

LINK_SECONDS = 7 * 24 * 3600
"""How long a link works, in seconds: a week, the most that signature version 4 allows."""


class Bucket:
    """A bucket that pictures go to.

    The client is the SDK's. The SDK's own upload functions are not used: without credentials they write to the local
    disk and return its path as if it were a link, and they send pictures without their content type.
    """

    def __init__(self, settings: Settings) -> None:
        key, secret = settings.bucket_access_key_id, settings.bucket_secret_access_key
        assert key and secret
        self._name = settings.bucket_name
        self._client: Any
        self._client, _ = get_boto_client(
            {
                "endpointUrl": settings.bucket_endpoint_url,
                "accessId": key.get_secret_value(),
                "accessSecret": secret.get_secret_value(),
            }
        )

    def uploads_under(self, folder: str) -> Callable[[bytes, str, str], str]:
        """``upload`` into a folder: from a file, its name and its media type to a link."""
        return lambda file, name, media_type: self.upload(file, f"{folder}/{name}", media_type)

    def upload(self, file: bytes, key: str, media_type: str) -> str:
        """Stores a picture's file under ``key`` and gives a link to it that works for a week.

        Raises:
            JobError: if the bucket cannot be reached or refuses.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client.put_object(Bucket=self._name, Key=key, Body=file, ContentType=media_type)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "unknown")
            raise JobError(f"the endpoint's bucket refused the picture: {code}") from error
        except BotoCoreError as error:
            raise JobError("the endpoint's bucket could not be reached") from error
        link: str = self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self._name, "Key": key}, ExpiresIn=LINK_SECONDS
        )
        return link
