"""Finds what a setting names: a path on this machine, or a file in a repository on the hub."""

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from src.errors import StartError
from src.model.hub import LICENCES, HubRepository, download_errors
from src.model.single_file import Shapes, read_shapes
from src.settings import DEMO_MODEL_ID, Settings

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class File:
    """A weight file."""

    path: Path
    where: str
    """For the log."""
    revision: str | None
    """The commit, if it is known."""
    folder: Path
    """Of its repository, if it is in one, or else its own."""


def find_file(
    source: str, revision: str | None, settings: Settings, download: bool, check: Callable[[Shapes], None]
) -> File | None:
    """Finds a safetensors file.

    Args:
        source: its path, or the hub's ``owner/name/file.safetensors``.
        revision: the hub's, if the operator chose one.
        settings: for the token.
        download: whether to download what is not on this machine; otherwise the result is None then.
        check: raises a StartError for a file that is of no use, by its header, before the rest is downloaded.

    Raises:
        StartError: if it cannot be found, or cannot be used.
    """
    local = local_path(source)
    if local.is_file():
        check(read_shapes(local))
        return File(local, f"file {local}", None, local.parent)
    if local.is_dir():
        raise StartError("a directory: name the .safetensors file that you want")
    owner, name, path = (*source.split("/", 2), "", "")[:3]
    hub = hub_repository(f"{owner}/{name}", revision, settings)
    if not path:
        raise StartError("no such file; one on the hub is named owner/name/file.safetensors")
    for folder, where in hub.snapshots(glob.escape(path)):
        if (folder / path).is_file():
            check(read_shapes(folder / path))
            return File(folder / path, where, folder.name, folder)
    if not download:
        return None
    with download_errors():
        if path not in hub.list_files():
            raise StartError(f"{owner}/{name} has no file {path}")
        check(hub.read_shapes(path))
        folder = hub.download([glob.escape(path), *LICENCES])
    return File(folder / path, "downloaded", folder.name, folder)


def hub_repository(model_id: str, revision: str | None, settings: Settings) -> HubRepository:
    """The repository of a hub id that no path on this machine hides."""
    if model_id == DEMO_MODEL_ID:
        raise StartError("the embedded model is no base for others: name a directory or hub id")
    if model_id.startswith(("/", ".", "~")):
        raise StartError("no such file or directory")
    return HubRepository(model_id, revision, settings.hf_token.get_secret_value() if settings.hf_token else None)


def local_path(model_id: str) -> Path:
    """The path that a setting may mean.

    Raises:
        StartError: if this user cannot get there.
    """
    try:
        path = Path(model_id).expanduser()
    except RuntimeError:
        raise StartError("no such home directory: write the whole path in place of ~") from None
    for folder in reversed(path.parents):
        if folder.is_dir() and not os.access(folder, os.X_OK):
            raise StartError(f"this user may not enter {folder}")
    return path
