"""A repository on the Hugging Face hub, and its copies on this machine."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from httpx2 import Client, Request, TransportError
from huggingface_hub import HfApi, constants, set_client_factory, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    SafetensorsParsingError,
)
from huggingface_hub.utils._http import default_client_factory

from src.errors import StartError, condensed, one_line
from src.model.single_file import Shapes
from src.settings import DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION

RUNPOD_CACHE = Path("/runpod-volume/huggingface-cache/hub")
"""Where a worker finds RunPod's cached models, in the layout of the Hugging Face cache."""

MEANINGS = {
    "GatedRepo": "gated: accept its licence on the hub and set HF_TOKEN",
    "RepoNotFound": "the hub has no such model, or it is private and HF_TOKEN may not read it",
    "RevisionNotFound": "the hub has no such revision",
}
"""By the hub's ``X-Error-Code``."""

PASSING = (408, 425, 429)
"""Too slow, too early, too many: the only client errors that another try may not meet."""

MAX_SILENCE = 30.0
"""In seconds: how long the hub may take for each step of an answer. huggingface_hub would wait for ever."""

OFFLINE = (
    "HF_HUB_OFFLINE=1 forbids a download: choose it as the endpoint's Model, or set HF_HUB_OFFLINE=0 to download it"
)

LICENCES = ["LICENSE*", "README.md"]
"""A copy of a model must keep them."""


@dataclass(frozen=True)
class HubRepository:
    """A repository on the hub."""

    id: str
    """Such as ``CompVis/stable-diffusion-v1-4``."""
    revision: str | None
    """If the operator chose one. By default a pinned commit for the default model, ``main`` for others."""
    token: str | None

    def snapshots(self, file: str) -> Iterator[tuple[Path, str]]:
        """Yields its copies on this machine and where each was found, in words for the log; the best comes first.

        First come those in RunPod's cached models and in the Hugging Face cache at the revision, then, if the operator
        chose none, the others that RunPod cached: the newest of them was on the main branch when the endpoint was
        created. A copy need not have all files, but at least ``file`` if the hub had it.

        Raises:
            StartError: if ``id`` cannot be one of the hub's.
        """
        cached = list(self._names_in_runpod_cache())
        places = [(name, RUNPOD_CACHE, "RunPod's cached models") for name in cached]
        for name, cache, where in (*places, (self.id, None, "Hugging Face cache")):
            with suppress(LocalEntryNotFoundError):
                try:
                    folder = snapshot_download(
                        name, revision=self._commit, cache_dir=cache, allow_patterns=file, local_files_only=True
                    )
                except HFValidationError:
                    said = f"neither a directory, a file, nor a hub id such as {DEFAULT_MODEL_ID}"
                    raise StartError(f"{said}, or owner/name/file.safetensors") from None
                yield Path(folder), where
        if self.revision is None:
            pinned = f" (not the pinned commit, {self._commit[:12]})" if self._commit else ""
            folders = [RUNPOD_CACHE / f"models--{name.replace('/', '--')}" / "snapshots" for name in cached]
            snapshots = [path for folder in folders for path in folder.glob("*")]
            for path in sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True):
                yield path, f"RunPod's cached models{pinned}"

    def list_files(self) -> set[str]:
        """Asks the hub for the names of its files."""
        # tried only once; without it, snapshot_download would try for half a minute to reach the hub
        listing = HfApi(token=self.token).model_info(self.id, revision=self._commit or constants.DEFAULT_REVISION)
        return {sibling.rfilename for sibling in listing.siblings or ()}

    def read_shapes(self, file: str) -> Shapes:
        """Asks the hub for the header of a safetensors file, which is a thousandth of it or less."""
        api = HfApi(token=self.token)
        try:
            header = api.parse_safetensors_file_metadata(self.id, file, revision=self._commit)
        except SafetensorsParsingError as error:
            raise StartError(f"{file} is no safetensors file, whatever its name says") from error
        return {name: tensor.shape for name, tensor in header.tensors.items()}

    def download(self, patterns: Iterable[str]) -> Path:
        """Downloads the files with these names, and returns the folder."""
        return Path(snapshot_download(self.id, revision=self._commit, token=self.token, allow_patterns=list(patterns)))

    @property
    def _commit(self) -> str | None:
        return self.revision or (DEFAULT_MODEL_REVISION if self.id == DEFAULT_MODEL_ID else None)

    def _names_in_runpod_cache(self) -> Iterator[str]:
        """Its names there: RunPod's documentation shows one in lower case, unlike the hub."""
        for folder in RUNPOD_CACHE.glob("models--*"):
            name = folder.name.removeprefix("models--").replace("--", "/")
            if name.lower() == self.id.lower():
                yield name


def _new_client() -> Client:
    """huggingface_hub's own client, but with time-outs for the requests to which it gives none."""

    def bound(request: Request) -> None:
        timeouts = request.extensions["timeout"]
        request.extensions["timeout"] = {step: seconds or MAX_SILENCE for step, seconds in timeouts.items()}

    client = default_client_factory()
    client.event_hooks["request"].append(bound)
    return client


# it makes a new one after each error of a connection
set_client_factory(_new_client)


@contextmanager
def download_errors() -> Iterator[None]:
    """Turns the errors of huggingface_hub into a StartError, which tells whether another try may succeed."""
    try:
        yield
    except StartError:
        raise
    except Exception as error:
        # huggingface_hub looks into its cache when the hub refuses, and then reports that nothing was there
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(cause) from error
        if not isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | TransportError):
            raise StartError(f"cannot be downloaded: {one_line(error)}", may_recover=True) from error
        if constants.HF_HUB_OFFLINE:
            raise StartError(f"in no local cache, and {OFFLINE}") from error
        raise StartError("in no local cache, and the hub cannot be reached", may_recover=True) from error


def _refusal(error: HfHubHTTPError) -> StartError:
    status = error.response.status_code
    meaning = MEANINGS.get(error.response.headers.get("X-Error-Code", ""), f"the hub answered {status}")
    # the header's sentence, or else the body's
    sentence = (error.server_message or "").partition("\n")[0]
    quoted = f': "{condensed(sentence)}"' if sentence else ""
    return StartError(meaning + quoted, may_recover=status >= 500 or status in PASSING)
