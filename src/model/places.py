"""Finds what a setting names: a path on this machine, or a file in a repository on the hub."""

import glob
import os
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from src.errors import StartError
from src.model.hub import LICENCES, HubRepository, download_errors
from src.model.single_file import Shapes, read_shapes
from src.settings import DEMO_MODEL_ID, Settings

SUFFIX = ".safetensors"


class Reach(Enum):
    """Where a model is looked for, and what is downloaded."""

    MACHINE = auto()  # only on this machine
    HEADERS = auto()  # also on the hub, of which all is read that is small and says whether the model can be used
    WEIGHTS = auto()  # also on the hub, and everything is downloaded


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
    shapes: Shapes


def find_file(source: str, revision: str | None, settings: Settings, reach: Reach) -> File | None:
    """Finds a safetensors file, or returns None if it is not within ``reach``.

    Args:
        source: its path, or the hub's ``owner/name/file.safetensors``.
        revision: the hub's, if the operator chose one.
        settings: for the token.
        reach: where to look for it. With ``HEADERS``, a file that is on the hub only is not at ``path`` afterwards.

    Raises:
        StartError: if there is none, or it is no such file.
    """
    local = local_path(source)
    if local.is_file():
        return File(local, f"file {local}", None, local.parent, read_shapes(local))
    if local.is_dir():
        raise StartError("a directory: name the .safetensors file that you want")
    owner, name, path = (*source.split("/", 2), "", "")[:3]
    hub = hub_repository(f"{owner}/{name}", revision, settings)
    if not path:
        raise StartError("no such file; one on the hub is named owner/name/file.safetensors")
    for folder, where in hub.snapshots(glob.escape(path)):
        if (folder / path).is_file():
            return File(folder / path, where, folder.name, folder, read_shapes(folder / path))
    if reach is Reach.MACHINE:
        return None
    with download_errors():
        if path not in hub.list_files():
            raise StartError(f"{owner}/{name} has no file {path}")
        shapes = hub.read_shapes(path)
        folder = hub.download(LICENCES if reach is Reach.HEADERS else [glob.escape(path), *LICENCES])
    return File(folder / path, "downloaded", folder.name, folder, shapes)


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
