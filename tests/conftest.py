import os

os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from src import pipeline
from src.engine import Engine
from src.pipeline import Model
from src.request import ModelLimits
from src.settings import Settings
from tests.v1_4 import make_repository

# small models gain nothing from more threads
torch.set_num_threads(1)

V1_4 = ModelLimits(native_size=512, max_size=1024, scheduler="PNDM")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small v1-4, with random weights. Tests that change it copy it first."""
    return make_repository(tmp_path_factory.mktemp("v1-4"))


@pytest.fixture(scope="session")
def loaded(repository: Path) -> dict[str, Model]:
    return {name: pipeline.load(Settings(model_id=name)) for name in (str(repository), "demo")}


@pytest.fixture
def v1_4_model(loaded: dict[str, Model], repository: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    return with_its_own_scheduler(loaded[str(repository)], monkeypatch)


@pytest.fixture
def demo_model(loaded: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> Model:
    return with_its_own_scheduler(loaded["demo"], monkeypatch)


def with_its_own_scheduler(model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    """``model``, whose scheduler is what it was, after the test: an engine gives it others."""
    monkeypatch.setattr(model.pipe, "scheduler", model.pipe.scheduler)
    return model


@pytest.fixture
def v1_4_engine(v1_4_model: Model) -> Engine:
    return Engine(v1_4_model, max_batch_images=4)


@pytest.fixture
def demo_engine(demo_model: Model) -> Engine:
    return Engine(demo_model, max_batch_images=4)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test sees the machine's own settings or Hugging Face cache."""
    for name in (*(name.upper() for name in Settings.model_fields), "RUNPOD_WEBHOOK_GET_JOB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    yield
