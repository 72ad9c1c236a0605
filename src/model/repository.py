"""Finds a model's files: its own, or those of a single file, of the model that lends it all else, and of its LoRAs."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants

from src.errors import StartError
from src.model import checks, cuda_driver, loras, single_file
from src.model.hub import LICENCES, OFFLINE, download_errors
from src.model.loras import Lora
from src.model.places import SUFFIX, File, Reach, find_file, hub_repository, local_path
from src.settings import DEFAULT_MODEL_ID, DEMO_MODEL_ID, Settings, on_runpod

DEMO_MODEL = Path(__file__).parent / "demo"

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
class Repository:
    """The files of a model."""

    path: Path
    """Its directory; that of ``BASE_MODEL`` for a single file."""
    where: str
    """For the log."""
    name: str
    """The name that clients see, never a path."""
    revision: str | None
    """The commit, if it is known."""
    weights: Mapping[str, str]
    """The weight file in the directory to load for each component; a single file has those of the others."""
    single_file: File | None = None
    loras: Sequence[Lora] = ()
    words: Mapping[str, Collection[str]] | None = None
    """Of a model that knows only a few words: those that it can draw, and those that it has learned to ignore."""

    def __str__(self) -> str:
        return self.name + (f" at {self.revision[:12]}" if self.revision else "")

    @property
    def weight_files(self) -> list[Path]:
        """In the order in which they are loaded."""
        own = [self.single_file.path] if self.single_file else []
        return [*own, *(self.path / file for file in self.weights.values()), *(lora.path for lora in self.loras)]

    @property
    def licences(self) -> Path:
        """The folder with the model's licence and card, if it has them."""
        return self.single_file.folder if self.single_file else self.path


def choose_model(settings: Settings) -> str:
    """Returns MODEL_ID; by default v1-4 on RunPod and on machines with a CUDA device, elsewhere ``demo``."""
    if settings.model_id:
        return settings.model_id
    return DEFAULT_MODEL_ID if on_runpod() or cuda_driver.shows_device() else DEMO_MODEL_ID


def find(settings: Settings) -> Repository:
    """Finds the model on this machine, or downloads it once nothing small speaks against it.

    Raises:
        StartError: if it cannot be found, or cannot be used.
    """
    _find(settings, Reach.HEADERS)
    found = _find(settings, Reach.WEIGHTS)
    assert found
    return found


def find_local(settings: Settings) -> Repository | None:
    """Finds the model without a network, or returns None if some of it has to be downloaded.

    Directories and files are used as they are. On the hub's side, RunPod's cached models come before the Hugging Face
    cache.

    Raises:
        StartError: if what is there cannot be used, or the settings name nothing that could be.
    """
    return _find(settings, Reach.MACHINE)


def _find(settings: Settings, reach: Reach) -> Repository | None:
    with naming(settings):
        model = _find_model(settings, reach)
    if not model or not settings.lora:
        return model
    unet = checks.read_json(model.path, "unet/config.json")
    merged: list[Lora] = []
    for source, scale in settings.lora:
        with prefixed(f"LORA={source}"):
            if not (file := find_file(source, None, settings, reach)):
                return None
            loras.check(file.shapes, unet)
        merged.append(Lora(source, scale, file.path))
    return replace(model, name=" + ".join([model.name, *map(str, merged)]), loras=merged)


def _find_model(settings: Settings, reach: Reach) -> Repository | None:
    model_id = choose_model(settings)
    if model_id == DEMO_MODEL_ID:
        words = checks.read_json(DEMO_MODEL, "words.json")
        weights = checks.check_directory(DEMO_MODEL)
        return Repository(DEMO_MODEL, "embedded", DEMO_MODEL_ID, None, weights, words=words)
    local = local_path(model_id)
    if local.is_dir() or not (local.is_file() or model_id.endswith(SUFFIX)):
        return _find_directory(model_id, settings.model_revision, settings, reach)
    if not (file := find_file(model_id, settings.model_revision, settings, reach)):
        return None
    single_file.check_checkpoint(file.shapes)
    if not settings.base_model:
        single_file.check_version(file.shapes)
    base_model = settings.base_model or DEFAULT_MODEL_ID
    with prefixed(f"BASE_MODEL={base_model}"):
        base = _find_directory(base_model, None, settings, reach, parts=["safety_checker"])
    if not base:
        return None
    single_file.check_fits(file.shapes, checks.read_json(base.path, "unet/config.json"))
    where, name = f"{file.where}, all but its weights from {base}, {base.where}", file.path.name.removesuffix(SUFFIX)
    return replace(base, where=where, name=name, revision=file.revision, single_file=file)


def _find_directory(
    model_id: str,
    revision: str | None,
    settings: Settings,
    reach: Reach,
    parts: Collection[str] = checks.WEIGHTS.keys(),
) -> Repository | None:
    """Finds a model by its path or hub id, or returns None if it is not within ``reach``.

    Args:
        model_id: the path or the id.
        revision: the hub's, if the operator chose one.
        settings: for the token, and whether a safety checker is wanted.
        reach: where to look for it. With ``HEADERS``, weights that are on the hub only are not there afterwards.
        parts: the components whose weights are wanted.

    Raises:
        StartError: if it cannot be found, or cannot be used.
    """
    if not settings.safety_checker:
        parts = [part for part in parts if part != "safety_checker"]
    local = local_path(model_id)
    if local.is_dir():
        weights = checks.check_directory(local, parts)
        return Repository(local, f"directory {local}", *_origin(local), weights)
    if local.exists():
        raise StartError("a file: name a directory or hub id")
    hub = hub_repository(model_id, revision, settings)
    unusable: StartError | None = None
    for path, where in hub.snapshots("model_index.json"):
        try:
            return Repository(path, where, model_id, path.name, checks.check_directory(path, parts))
        except StartError as error:
            unusable = unusable or error
    if unusable and constants.HF_HUB_OFFLINE:
        raise StartError(f"{unusable}, in the cached copy, and {OFFLINE}")
    if reach is Reach.MACHINE:
        return None
    with download_errors():
        files = hub.list_files()
        path = hub.download(SMALL_FILES)
        weights = checks.check(path, files, parts)
        _check_tokenizer(path)
        if reach is Reach.WEIGHTS:
            hub.download(weights.values())
    return Repository(path, "downloaded", model_id, path.name, weights)


def _origin(folder: Path) -> tuple[str, str | None]:
    """The name and the commit of what is in a directory: as baked, as cached, or else its own name."""
    if baked_from := checks.read_json(folder, "model_index.json").get(ORIGIN):
        return baked_from["model"], baked_from["commit"]
    *_, cached, snapshots, name = ("", "", *folder.resolve().parts)
    if snapshots == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/"), name
    return name, None


def _check_tokenizer(folder: Path) -> None:
    """Runs ``checks.check_tokenizer`` on a directory."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        text_encoder = CLIPTextConfig.from_pretrained(folder / "text_encoder", local_files_only=True)
    except Exception as error:
        raise StartError(f"the tokenizer cannot be read: {type(error).__name__}") from error
    checks.check_tokenizer(tokenizer, text_encoder)


def naming(settings: Settings, *, merged: bool = False) -> AbstractContextManager[None]:
    """Adds the operator's choice of a model to the front of a StartError, and its LoRAs if they are ``merged``."""
    revision = f", MODEL_REVISION={settings.model_revision}" if settings.model_revision else ""
    added = f", LORA={', '.join(source for source, _ in settings.lora)}" if merged and settings.lora else ""
    return prefixed(f"MODEL_ID={choose_model(settings)}{revision}{added}")


@contextmanager
def prefixed(choice: str) -> Iterator[None]:
    """Adds a setting to the front of a StartError."""
    try:
        yield
    except StartError as error:
        raise StartError(f"{choice}: {error}", may_recover=error.may_recover) from error
