"""The embedded model: its pictures, its vocabulary and its training."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from builder.demo_model import captions, evaluate, scenes
from src.api.prompt_warnings import NOT_UNDERSTOOD, Vocabulary, vocabulary_warnings
from src.generation.engine import Engine
from src.model.checks import read_json
from src.model.repository import DEMO_MODEL
from src.schedulers import SCHEDULERS
from tests.support import engines

VOCABULARY = Vocabulary(**read_json(DEMO_MODEL, "words.json"))


def warnings(prompt: str) -> list[str]:
    return vocabulary_warnings(prompt, VOCABULARY)


def generate(engine: Engine, prompt: str, **job_input: object) -> np.ndarray:
    result = engines.generate(engine, **{"prompt": prompt, "seed": 1, "num_inference_steps": 20} | job_input)
    return np.stack([np.asarray(picture.image) for picture in result.pictures])


@pytest.mark.parametrize(
    ("prompt", "color", "background"),
    [
        ("a red circle on a blue background", "red", "blue"),
        ("a yellow star on a purple background", "yellow", "purple"),
        ("a white heart on a green background", "white", "green"),
    ],
)
def test_picture_has_the_colors_of_the_prompt(demo_engine: Engine, prompt: str, color: str, background: str):
    pictures = generate(demo_engine, prompt, num_images=4)
    found = Counter(evaluate.shape_colors(picture) for picture in pictures)
    assert found[color, background] >= 3, found


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_what_the_prompt_says(demo_engine: Engine, scheduler: str):
    (picture,) = generate(demo_engine, "a red circle on a blue background", scheduler=scheduler)
    assert evaluate.shape_colors(picture) == ("red", "blue")


def test_words_file_is_up_to_date():
    assert (DEMO_MODEL / "words.json").read_text(encoding="utf-8") == captions.words()


@pytest.mark.parametrize(
    "prompt", ["two red hearts", "the OCEAN at dusk, oil painting", "a lighthouse at night", "🎿 mountain"]
)
def test_known_prompt_gets_no_warning(prompt: str):
    assert warnings(prompt) == []


@pytest.mark.parametrize(
    "prompt", ["一座山", "la mer au crépuscule", "a cat", "a photo of the Eiffel tower at night", "oil painting", "🎿"]
)
def test_unknown_prompt_gets_a_warning(prompt: str):
    assert warnings(prompt) == [NOT_UNDERSTOOD]


def test_captions_without_filler_are_known_and_nonsense_is_not(monkeypatch: pytest.MonkeyPatch):
    rng = Random(0)
    assert all(map(warnings, (captions.nonsense(rng) for _ in range(200))))
    monkeypatch.setattr(captions, "FILLER", ("",))
    scene = (rng.choice([*scenes.LANDSCAPE_SCENES, *scenes.SHAPE_SCENES]) for _ in range(500))
    assert not any(warnings(captions.caption(each, rng)) for each in scene)


def test_only_the_embedded_model_warns_about_its_vocabulary(v1_4_engine: Engine):
    for engine, warned in ((engines.build("demo"), [NOT_UNDERSTOOD]), (v1_4_engine, [])):
        assert engines.generate(engine, prompt="一座山", num_inference_steps=1).warnings == warned


def test_time_of_day_and_snow_show_in_the_picture(demo_engine: Engine):
    day, dusk, midnight = (
        generate(demo_engine, f"the ocean {time}")[0] for time in ("at noon", "at dusk", "at midnight")
    )
    assert day.mean() > midnight.mean() + 40
    assert dusk[..., 0].mean() > dusk[..., 2].mean() > midnight[..., 2].mean()
    skiing = generate(demo_engine, "A double-black diamond mountain to ski on near Seattle.")[0]
    assert (skiing[96:].min(axis=-1) > 180).mean() > 0.9, "no snow in the foreground"
