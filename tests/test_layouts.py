"""Models in the layouts of real repositories give the same pictures as with diffusers alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from src.model import repository
from src.settings import Settings
from tests.support import engines
from tests.support.layouts import LAYOUTS

pytestmark = [
    # schedulers of the pinned diffusers call NumPy in a deprecated way
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_model_gives_the_same_bytes_as_diffusers(layout: Callable[[Path], None], tmp_path: Path):
    folder = tmp_path / "model"
    layout(folder)
    asked: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 5, "guidance_scale": 7.5} | LAYOUTS[layout]
    engine = engines.build(folder)
    ours = engines.generate(engine, seed=3, negative_prompt="a dog", **asked).pictures[0].image
    # the variant is taken by components, and need not be there for all
    half = any(".fp16." in file.name for file in repository.find(Settings(model_id=str(folder))).weight_files)
    pipe = StableDiffusionPipeline.from_pretrained(folder, variant="fp16" if half else None, use_safetensors=True)
    theirs = pipe(negative_prompt="a dog", generator=torch.Generator().manual_seed(3), **asked).images[0]
    assert ours.tobytes() == theirs.tobytes()
    assert engine.model_name == "model"
