"""Finds a model's files: its own, or those of a single file, of the model that lends it all else, and of its LoRAs."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from src.errors import StartError
from src.model import checks, cuda_driver, loras, single_file
from src.model.directory import Directory, check_directory, find_directory
from src.model.loras import Lora
from src.model.places import SUFFIX, find_file, local_path
from src.settings import DEFAULT_MODEL_ID, DEMO_MODEL_ID, Settings, on_runpod

DEMO_MODEL = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class Repository(Directory):
    """Everything that is loaded. What a single file lacks is in the directory, which is that of ``BASE_MODEL`` then."""

    licences: Path
    """The folder with the model's licence and card, if it has them."""
    single_file: Path | None = None
    loras: Sequence[Lora] = ()
    words: Mapping[str, Collection[str]] | None = None
    """Of a model that knows only a few words: those that it can draw, and those that it has learned to ignore."""

    @property
    def weight_files(self) -> list[Path]:
        """In the order in which they are loaded."""
        own = [self.single_file] if self.single_file else []
        return [*own, *(self.path / file for file in self.weights.values()), *(lora.path for lora in self.loras)]


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
    found = _find(settings, download=True)
    assert found
    return found


def find_local(settings: Settings) -> Repository | None:
    """Finds the model without a network, or returns None if some of it has to be downloaded.

    Directories and files are used as they are. On the hub's side, RunPod's cached models come before the Hugging Face
    cache.

    Raises:
        StartError: if what is there cannot be used, or the settings name nothing that could be.
    """
    return _find(settings, download=False)


def _find(settings: Settings, *, download: bool) -> Repository | None:
    with naming(settings):
        model = _find_model(settings, download)
    if not model or not settings.lora:
        return model
    unet = checks.read_json(model.path, "unet/config.json")
    merged: list[Lora] = []
    for source, scale in settings.lora:
        with prefixed(f"LORA={source}"):
            file = find_file(source, None, settings, download, partial(loras.check, unet=unet))
        if not file:
            return None
        merged.append(Lora(source, scale, file.path))
    return replace(model, name=" + ".join([model.name, *map(str, merged)]), loras=merged)


def _find_model(settings: Settings, download: bool) -> Repository | None:
    model_id = choose_model(settings)
    if model_id == DEMO_MODEL_ID:
        words = checks.read_json(DEMO_MODEL, "words.json")
        weights = check_directory(DEMO_MODEL)
        return Repository(DEMO_MODEL, "embedded", DEMO_MODEL_ID, None, weights, DEMO_MODEL, words=words)
    local = local_path(model_id)
    if local.is_dir() or not (local.is_file() or model_id.endswith(SUFFIX)):
        directory = find_directory(model_id, settings.model_revision, settings, download)
        return Repository(**vars(directory), licences=directory.path) if directory else None
    file = find_file(model_id, settings.model_revision, settings, download, single_file.check_checkpoint)
    if not file:
        return None
    base_model = settings.base_model or DEFAULT_MODEL_ID
    with prefixed(f"BASE_MODEL={base_model}"):
        base = find_directory(base_model, None, settings, download, parts=["safety_checker"])
    if not base:
        return None
    single_file.check_fits(single_file.read_shapes(file.path), checks.read_json(base.path, "unet/config.json"))
    where, name = f"{file.where}, all but its weights from {base}, {base.where}", file.path.name.removesuffix(SUFFIX)
    return Repository(base.path, where, name, file.revision, base.weights, file.folder, file.path)


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
