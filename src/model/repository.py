"""Where a model's files are found, and whether they are what the worker runs."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from httpx2 import TransportError
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from src.errors import StartError, one_line
from src.model import cuda_driver
from src.settings import DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION, DEMO_MODEL_ID, Settings, on_runpod

DEMO_MODEL = Path(__file__).parent / "demo"
RUNPOD_CACHE = Path("/runpod-volume/huggingface-cache/hub")
"""Where RunPod's cached models lie on a worker, in the layout of the Hugging Face cache."""

PIPELINE = "StableDiffusionPipeline"
NEEDED_FILES = [
    "model_index.json",
    "*/*.json",
    "*/*.txt",
    "*/model.safetensors",
    "*/diffusion_pytorch_model.safetensors",
]
"""What a download takes of a repository: no pickled twin, no single-file checkpoint, no other precision."""

WEIGHT_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "safety_checker": "model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
"""By component, the largest of v1-4's first."""


@dataclass(frozen=True)
class Repository:
    """A model's directory."""

    path: Path
    where: str
    """Where it was found, for the log."""
    name: str
    """The name that clients see, never a path."""
    revision: str | None
    """The commit, where it is known."""

    def __str__(self) -> str:
        return self.name + (f" at {self.revision[:12]}" if self.revision else "")


def choose_model(settings: Settings) -> str:
    """The model to run: MODEL_ID, by default v1-4 on RunPod and where there is a CUDA device, otherwise ``demo``."""
    if settings.model_id:
        return settings.model_id
    return DEFAULT_MODEL_ID if on_runpod() or cuda_driver.shows_device() else DEMO_MODEL_ID


def find(settings: Settings) -> Repository:
    """Finds the model on this machine, or downloads it.

    Raises:
        StartError: if it is nowhere, or what is there cannot be used.
    """
    if found := find_local(settings):
        return found
    model_id = choose_model(settings)
    path = _download(_snapshot_arguments(model_id, settings), settings)
    check(path, settings)
    return Repository(path, "downloaded", model_id, path.name)


def find_local(settings: Settings) -> Repository | None:
    """Finds the model without a network.

    A directory is taken as it is. A hub id is looked for among RunPod's cached models, then in the Hugging Face cache;
    without ``MODEL_REVISION``, the newest usable commit that RunPod cached is the last resort.

    Raises:
        StartError: if MODEL_ID is a directory that cannot be used, or cannot be a hub id; or if what a cache holds of
            it cannot be used, and nothing may be downloaded.
    """
    model_id = choose_model(settings)
    if model_id == DEMO_MODEL_ID:
        return Repository(DEMO_MODEL, "embedded", DEMO_MODEL_ID, None)
    local = Path(model_id).expanduser()
    if local.is_dir():
        index = check(local, settings)
        # a baked directory knows the hub id that it was made from
        origin = str(index.get("_name_or_path") or "/")
        name = local.resolve().name if origin.startswith(("/", ".", "~")) else origin
        commit = index.get("_commit_hash")
        return Repository(local, f"directory {local}", name, str(commit) if commit else None)
    if model_id.startswith(("/", ".", "~")):
        raise StartError(f"MODEL_ID={model_id}: no such directory")
    wanted = _snapshot_arguments(model_id, settings)
    cached = _names_in_runpod_cache(model_id)
    places = [(name, RUNPOD_CACHE, "RunPod's cached models") for name in cached]
    unusable: StartError | None = None
    for name, cache, where in (*places, (model_id, None, "Hugging Face cache")):
        try:
            path = Path(snapshot_download(**wanted | {"repo_id": name}, cache_dir=cache, local_files_only=True))
            check(path, settings)
            return Repository(path, where, model_id, path.name)
        except HFValidationError:
            hint = f"neither a directory nor a hub id such as {DEFAULT_MODEL_ID}"
            raise StartError(f"MODEL_ID={model_id}: {hint}") from None
        except LocalEntryNotFoundError:
            continue
        except StartError as error:
            unusable = error
    if settings.model_revision is None and (newest := _newest_snapshot(cached, settings)):
        pinned = f" (not the pinned commit, {wanted['revision'][:12]})" if wanted["revision"] else ""
        return Repository(newest, f"RunPod's cached models{pinned}", model_id, newest.name)
    if unusable and constants.HF_HUB_OFFLINE:
        raise unusable
    return None


def _names_in_runpod_cache(model_id: str) -> list[str]:
    """The names that RunPod's cache has for a model: RunPod's documentation shows one in lower case, unlike the hub."""
    names = [folder.name.removeprefix("models--").replace("--", "/") for folder in RUNPOD_CACHE.glob("models--*")]
    return [name for name in names if name.lower() == model_id.lower()]


def _newest_snapshot(names: list[str], settings: Settings) -> Path | None:
    """The newest usable commit in RunPod's cache: it holds what was the main branch when the endpoint was made."""
    folders = [RUNPOD_CACHE / f"models--{name.replace('/', '--')}" / "snapshots" for name in names]
    snapshots = [path for folder in folders for path in folder.glob("*")]
    for path in sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(StartError):
            check(path, settings)
            return path
    return None


def _snapshot_arguments(model_id: str, settings: Settings) -> dict[str, Any]:
    pinned = DEFAULT_MODEL_REVISION if model_id == DEFAULT_MODEL_ID else None
    return {
        "repo_id": model_id,
        "revision": settings.model_revision or pinned,
        "allow_patterns": NEEDED_FILES,
        "ignore_patterns": None if settings.safety_checker else ["safety_checker/*", "feature_extractor/*"],
    }


def _download(wanted: dict[str, Any], settings: Settings) -> Path:
    name = wanted["repo_id"] + (f" at revision {wanted['revision']}" if wanted["revision"] else "")
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    try:
        # asks once; snapshot_download would try for half a minute when the hub cannot be reached
        HfApi(token=token).model_info(wanted["repo_id"], revision=wanted["revision"] or constants.DEFAULT_REVISION)
        return Path(snapshot_download(**wanted, token=token))
    except GatedRepoError as error:
        raise StartError(f"{name} is gated: accept its licence on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise StartError(f"{name}: the hub has no such revision") from error
    except RepositoryNotFoundError as error:
        raise StartError(f"{name}: the hub has no such model, or it is private and HF_TOKEN may not read it") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, TransportError) as error:
        if constants.HF_HUB_OFFLINE:
            hint = "choose it as the endpoint's Model, or set HF_HUB_OFFLINE=0 to download it"
            raise StartError(f"{name} is in no local cache, and HF_HUB_OFFLINE=1 forbids a download: {hint}") from error
        raise StartError(f"{name} is in no local cache, and the hub cannot be reached", may_recover=True) from error
    except Exception as error:
        raise StartError(f"cannot download {name}: {one_line(error)}", may_recover=True) from error


def weight_files(path: Path, settings: Settings) -> list[Path]:
    """The weight files that the worker loads from a model's directory."""
    skipped = () if settings.safety_checker else ("safety_checker",)
    return [path / component / file for component, file in WEIGHT_FILES.items() if component not in skipped]


def check(path: Path, settings: Settings) -> dict[str, Any]:
    """Checks that a directory holds a Stable Diffusion pipeline in safetensors, without reading the weights.

    Returns:
        What its model_index.json holds.

    Raises:
        StartError: naming what is missing or of the wrong kind.
    """
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StartError(f"{path} is not a diffusers pipeline: it has no model_index.json") from None
    except (OSError, ValueError) as error:
        raise StartError(f"cannot read {path / 'model_index.json'}: {one_line(error)}") from error
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind != PIPELINE:
        raise StartError(f"{path} is a {kind}, this worker runs a {PIPELINE}")
    for file in weight_files(path, settings):
        component = file.parent.name
        if component == "safety_checker" and index.get(component, [None])[0] is None:
            continue
        if os.access(file, os.R_OK):
            continue
        missing = "it is missing (pickled weights, .bin, can run code when loaded: they are not read)"
        raise StartError(f"cannot use {file}: {'it may not be read by this user' if file.exists() else missing}")
    return dict(index)
