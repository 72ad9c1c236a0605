"""A model's directory in diffusers' format: finds it on this machine or downloads it, and checks it."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from src.errors import StartError
from src.model import checks
from src.model.hub import LICENCES, download_errors
from src.model.places import hub_repository, local_path
from src.settings import Settings

SMALL_FILES = [
    "model_index.json",
    *(f"{component}/*.json" for component in (*checks.REQUIRED, *checks.OPTIONAL)),
    # the tokenizer's merges
    "tokenizer/*.txt",
    *LICENCES,
]
"""The files that are downloaded along with the weights."""

ORIGIN = "_baked_from"
"""Key in a baked model's model_index.json, for its hub id and commit. Fine-tunes would inherit ``_name_or_path``."""


@dataclass(frozen=True)
class Directory:
    """A model's directory."""

    path: Path
    where: str
    """For the log."""
    name: str
    """The name that clients see, never a path."""
    revision: str | None
    """The commit, if it is known."""
    weights: Mapping[str, str]
    """The weight file to load for each component."""

    def __str__(self) -> str:
        return self.name + (f" at {self.revision[:12]}" if self.revision else "")


def find_directory(
    model_id: str,
    revision: str | None,
    settings: Settings,
    download: bool,
    parts: Collection[str] = checks.WEIGHTS.keys(),
) -> Directory | None:
    """Finds a model by its path or hub id.

    Args:
        model_id: the path or the id.
        revision: the hub's, if the operator chose one.
        settings: for the token, and whether a safety checker is wanted.
        download: whether to download what is not on this machine; otherwise the result is None then.
        parts: the components whose weights are wanted.

    Raises:
        StartError: if it cannot be found, or cannot be used.
    """
    if not settings.safety_checker:
        parts = [part for part in parts if part != "safety_checker"]
    local = local_path(model_id)
    if local.is_dir():
        weights = check_directory(local, parts)
        return Directory(local, f"directory {local}", *_origin(local), weights)
    if local.exists():
        raise StartError("a file: name a directory or hub id")
    hub = hub_repository(model_id, revision, settings)
    unusable: StartError | None = None
    for path, where in hub.snapshots("model_index.json"):
        try:
            return Directory(path, where, model_id, path.name, check_directory(path, parts))
        except StartError as error:
            unusable = unusable or error
    if unusable and constants.HF_HUB_OFFLINE:
        raise unusable
    if not download:
        return None
    with download_errors():
        files = hub.list_files()
        path = hub.download(SMALL_FILES)
        weights = checks.check(path, files, parts)
        _check_tokenizer(path)
        hub.download(weights.values())
    return Directory(path, "downloaded", model_id, path.name, weights)


def _origin(folder: Path) -> tuple[str, str | None]:
    """The name and the commit of what is in a directory: as baked, as cached, or else its own name."""
    if baked_from := checks.read_json(folder, "model_index.json").get(ORIGIN):
        return baked_from["model"], baked_from["commit"]
    *_, cached, snapshots, name = ("", "", *folder.resolve().parts)
    if snapshots == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/"), name
    return name, None


def check_directory(path: Path, parts: Collection[str] = checks.WEIGHTS.keys()) -> Mapping[str, str]:
    """Runs ``checks.check`` on a directory, and checks that this user may read it and that its weights are there."""
    for name in ("", *checks.REQUIRED, *checks.OPTIONAL):
        if (path / name).is_dir() and not os.access(path / name, os.R_OK | os.X_OK):
            raise StartError(f"{name or 'it'} may not be read by this user")
    snapshots = path if path.name == "snapshots" else path / "snapshots"
    if example := next(snapshots.glob("*/model_index.json"), None):
        raise StartError(f"a folder of a Hugging Face cache: name a commit in it, such as {example.parent}")
    # links into a cache may be broken
    files = {file.relative_to(path).as_posix() for file in (*path.glob("*"), *path.glob("*/*")) if file.is_file()}
    weights = checks.check(path, files, parts)
    for file in weights.values():
        if not os.access(path / file, os.R_OK):
            raise StartError(f"{file} may not be read by this user")
        checks.check_downloaded(path, file)
    return weights


def _check_tokenizer(folder: Path) -> None:
    """Runs ``checks.check_tokenizer`` on a directory."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        text_encoder = CLIPTextConfig.from_pretrained(folder / "text_encoder", local_files_only=True)
    except Exception as error:
        raise StartError(f"the tokenizer cannot be read: {type(error).__name__}") from error
    checks.check_tokenizer(tokenizer, text_encoder)
