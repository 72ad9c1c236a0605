"""What the value of a setting must be."""

import math
import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic_core import PydanticCustomError

_LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
"""What botocore accepts as a region, and as each part of a host name. Importing it here would delay the start."""
_HOST = rf"(?=.{{1,255}}$)({_LABEL}\.)*{_LABEL}\.?"
_ACCESS_POINT = r"arn:aws.*:[0-9]{12}:(accesspoint|outpost)[/:][\w.:/-]+"


def _digits(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"[+-]?[0-9]+", value):
        # int() and pydantic also accept 1_0 and the digits of other scripts
        raise PydanticCustomError("int_parsing", "not an integer")
    return value


def _filled_in(value: SecretStr) -> SecretStr:
    if "RUNPOD_SECRET_" in value.get_secret_value():
        raise PydanticCustomError("secret", "must be a secret of your account: RunPod found none with that name")
    return value


def _token(value: SecretStr) -> SecretStr:
    token = value.get_secret_value()
    if not (token.isascii() and token.isprintable()) or set(token) & set(" \"'`{}"):
        raise PydanticCustomError("secret", "must be just a token, without spaces, quotes or control characters")
    return value


def _address(value: str) -> str:
    if "@" in value:
        raise PydanticCustomError("secret", "must hold no user and no password")
    try:
        url = urlsplit(value)
        host = (url.hostname or "") if url.port != 0 else ""
    except ValueError:
        host = ""
    if not (
        (":" in host or re.fullmatch(_HOST, host))
        and url.scheme in ("http", "https")
        and re.fullmatch(r"[\w.~%!$&'()*+,;=:/-]*", url.path, re.ASCII)
        and not (url.query or url.fragment)
    ):
        raise PydanticCustomError("bucket", "must be https:// or http:// and a host, perhaps with a port and a path")
    return value


def _bucket_name(value: str) -> str:
    if not re.fullmatch(rf"[A-Za-z0-9][\w.-]{{0,254}}|{_ACCESS_POINT}", value, re.ASCII):
        raise PydanticCustomError("bucket", "must be a name of letters, digits, dots, hyphens and underscores")
    return value


def _region(value: str) -> str:
    if not re.fullmatch(_LABEL, value) or value.isdecimal():
        raise PydanticCustomError("bucket", "must be a region such as us-east-1")
    return value


def _lora(part: str) -> tuple[str, float]:
    form = re.fullmatch(r"(.+\.safetensors)(?::\s*([^:]*))?", part)
    if not form:
        raise PydanticCustomError("lora", "must be a .safetensors file, or owner/name/file.safetensors on the hub")
    try:
        scale = float(form[2] or 1)
    except ValueError:
        scale = math.nan
    # with 0 it would have no effect
    if not 0 < abs(scale) <= 10:
        raise PydanticCustomError("lora", "the scale must be a number from -10 to 10, and not 0")
    return form[1], scale


def _parts(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


Integer = Annotated[int, BeforeValidator(_digits)]
"""An upper bound without a stated source is there to catch typos."""
Secret = Annotated[SecretStr, AfterValidator(_filled_in)]
Token = Annotated[Secret, AfterValidator(_token)]
Address = Annotated[str, AfterValidator(_address)]
BucketName = Annotated[str, AfterValidator(_bucket_name)]
Region = Annotated[str, AfterValidator(_region)]
AnyCase = BeforeValidator(str.lower)
Loras = Annotated[tuple[Annotated[tuple[str, float], BeforeValidator(_lora)], ...], BeforeValidator(_parts)]
"""Paths, or the hub's ``owner/name/file.safetensors``, and scales."""
