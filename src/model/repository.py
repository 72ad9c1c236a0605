"""Finds a model's files."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from src.errors import StartError
from src.model import checks, cuda_driver
from src.model.hub import download_errors
from src.settings import DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION, DEMO_MODEL_ID, Settings, on_runpod

DEMO_MODEL = Path(__file__).parent / "demo"
RUNPOD_CACHE = Path("/runpod-volume/huggingface-cache/hub")
"""Where a worker finds RunPod's cached models, in the layout of the Hugging Face cache."""

SMALL_FILES = [
    "model_index.json",
    *(f"{component}/*.json" for component in (*checks.REQUIRED, *checks.OPTIONAL)),
    # the tokenizer's merges
    "tokenizer/*.txt",
    # a copy of a model must keep its licence
    "LICENSE*",
    "README.md",
]
"""The files that are downloaded along with the weights."""

ORIGIN = "_baked_from"
"""Key in a baked model's model_index.json, for its hub id and commit. Fine-tunes would inherit ``_name_or_path``."""


@dataclass(frozen=True)
class Repository:
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
    words: Mapping[str, Collection[str]] | None = None
    """Of a model that knows only a few words: those that it can draw, and those that it has learned to ignore."""

    def __str__(self) -> str:
        return self.name + (f" at {self.revision[:12]}" if self.revision else "")

    @property
    def weight_files(self) -> list[Path]:
        """In the order in which they are loaded."""
        return [self.path / file for file in self.weights.values()]


def choose_model(settings: Settings) -> str:
    """Returns MODEL_ID; by default v1-4 on RunPod and on machines with a CUDA device, elsewhere ``demo``."""
    if settings.model_id:
        return settings.model_id
    return DEFAULT_MODEL_ID if on_runpod() or cuda_driver.shows_device() else DEMO_MODEL_ID


def find(settings: Settings) -> Repository:
    """Finds the model on this machine, or downloads it.

    Raises:
        StartError: if it cannot be found, or cannot be used.
    """
    if found := find_local(settings):
        return found
    model_id = choose_model(settings)
    with naming(settings):
        path, weights = _download(model_id, settings)
    return Repository(path, "downloaded", model_id, path.name, weights)


def find_local(settings: Settings) -> Repository | None:
    """Finds the model without a network.

    A directory is used as it is. A hub id is looked for among RunPod's cached models, then in the Hugging Face cache;
    without ``MODEL_REVISION``, the newest usable commit that RunPod cached is the last resort.

    Raises:
        StartError: if MODEL_ID is a directory that cannot be used, or no valid hub id; or if a cached copy cannot be
            used and downloads are off.
    """
    model_id = choose_model(settings)
    if model_id == DEMO_MODEL_ID:
        words = checks.read_json(DEMO_MODEL, "words.json")
        return Repository(DEMO_MODEL, "embedded", DEMO_MODEL_ID, None, _check(DEMO_MODEL, settings), words)
    with naming(settings):
        local = _local_path(model_id)
        if local.is_dir():
            weights = _check(local, settings)
            baked_from = checks.read_json(local, "model_index.json").get(ORIGIN) or {}
            name = baked_from.get("model", local.resolve().name)
            return Repository(local, f"directory {local}", name, baked_from.get("commit"), weights)
        if local.is_file():
            raise StartError(checks.SINGLE_FILE)
        if model_id.startswith(("/", ".", "~")):
            raise StartError("no such directory")
        return _find_cached(model_id, settings)


def _find_cached(model_id: str, settings: Settings) -> Repository | None:
    revision = _revision(model_id, settings)
    cached = _names_in_runpod_cache(model_id)
    places = [(name, RUNPOD_CACHE, "RunPod's cached models") for name in cached]
    unusable: StartError | None = None
    for name, cache, where in (*places, (model_id, None, "Hugging Face cache")):
        try:
            # looks up the index only, since a cache need not have all files; the check tells whether it has enough
            path = Path(
                snapshot_download(
                    name, revision=revision, cache_dir=cache, allow_patterns="model_index.json", local_files_only=True
                )
            )
            return Repository(path, where, model_id, path.name, _check(path, settings))
        except HFValidationError:
            raise StartError(f"neither a directory nor a hub id such as {DEFAULT_MODEL_ID}") from None
        except LocalEntryNotFoundError:
            continue
        except StartError as error:
            unusable = error
    if settings.model_revision is None:
        for path in _newest_first(cached):
            with suppress(StartError):
                pinned = f" (not the pinned commit, {revision[:12]})" if revision else ""
                where = f"RunPod's cached models{pinned}"
                return Repository(path, where, model_id, path.name, _check(path, settings))
    if unusable and constants.HF_HUB_OFFLINE:
        raise unusable
    return None


@contextmanager
def naming(settings: Settings) -> Iterator[None]:
    """Adds the operator's choice of a model to the front of a StartError."""
    try:
        yield
    except StartError as error:
        revision = f", MODEL_REVISION={settings.model_revision}" if settings.model_revision else ""
        line = f"MODEL_ID={choose_model(settings)}{revision}: {error}"
        raise StartError(line, may_recover=error.may_recover) from error


def _local_path(model_id: str) -> Path:
    try:
        path = Path(model_id).expanduser()
    except RuntimeError:
        raise StartError("no such home directory: write the whole path in place of ~") from None
    for folder in reversed(path.parents):
        if folder.is_dir() and not os.access(folder, os.X_OK):
            raise StartError(f"this user may not enter {folder}")
    return path


def _check(path: Path, settings: Settings) -> Mapping[str, str]:
    """Runs ``checks.check`` on a directory, and checks that this user may read it and that its weights are there."""
    for name in ("", *checks.REQUIRED, *checks.OPTIONAL):
        if (path / name).is_dir() and not os.access(path / name, os.R_OK | os.X_OK):
            raise StartError(f"{name or 'it'} may not be read by this user")
    # links into a cache may be broken
    files = {file.relative_to(path).as_posix() for file in (*path.glob("*"), *path.glob("*/*")) if file.is_file()}
    weights = checks.check(path, files, safety_checker=settings.safety_checker)
    for file in weights.values():
        if not os.access(path / file, os.R_OK):
            raise StartError(f"{file} may not be read by this user")
        checks.check_downloaded(path, file)
    return weights


def _names_in_runpod_cache(model_id: str) -> list[str]:
    """Finds a model's names in RunPod's cache: RunPod's documentation shows one in lower case, unlike the hub."""
    names = [folder.name.removeprefix("models--").replace("--", "/") for folder in RUNPOD_CACHE.glob("models--*")]
    return [name for name in names if name.lower() == model_id.lower()]


def _newest_first(names: list[str]) -> list[Path]:
    """Lists all commits in RunPod's cache; the newest was on the main branch when the endpoint was created."""
    folders = [RUNPOD_CACHE / f"models--{name.replace('/', '--')}" / "snapshots" for name in names]
    snapshots = [path for folder in folders for path in folder.glob("*")]
    return sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True)


def _revision(model_id: str, settings: Settings) -> str | None:
    return settings.model_revision or (DEFAULT_MODEL_REVISION if model_id == DEFAULT_MODEL_ID else None)


def _download(model_id: str, settings: Settings) -> tuple[Path, Mapping[str, str]]:
    """Downloads the small files, checks the model with them, then downloads its weights."""
    revision = _revision(model_id, settings)
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    download = partial(snapshot_download, model_id, revision=revision, token=token)
    with download_errors():
        # tried only once; without it, snapshot_download would try for half a minute to reach the hub
        listing = HfApi(token=token).model_info(model_id, revision=revision or constants.DEFAULT_REVISION)
        files = {sibling.rfilename for sibling in listing.siblings or ()}
        path = Path(download(allow_patterns=SMALL_FILES))
        weights = checks.check(path, files, safety_checker=settings.safety_checker)
        _check_tokenizer(path)
        download(allow_patterns=list(weights.values()))
        return path, weights


def _check_tokenizer(folder: Path) -> None:
    """Runs ``checks.check_tokenizer`` on a directory."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        text_encoder = CLIPTextConfig.from_pretrained(folder / "text_encoder", local_files_only=True)
    except Exception as error:
        raise StartError(f"the tokenizer cannot be read: {type(error).__name__}") from error
    checks.check_tokenizer(tokenizer, text_encoder)
