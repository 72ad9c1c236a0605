"""Every field of a request reaches the pipeline, the batches, the output and the picture's parameters."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_type_hints
from unittest import mock

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.api.output import OneImage
from src.api.picture import parameters
from src.api.request import ImageRequest
from src.generation.batch_runner import PIPELINES, BatchRunner
from tests.support.fields import FIELDS, LIMITS, PER_IMAGE, job_inputs, two_requests

NOT_IN_A_PICTURE = {"num_images", "output_format", "output_quality", "image", "mask"}
"""The fields that are not needed to make the same picture again, or that belong to the client alone."""


def test_every_field_has_a_strategy():
    assert list(FIELDS) == list(ImageRequest.model_fields)


@given(st.one_of(map(job_inputs, FIELDS)))
def test_values_of_the_strategies_are_accepted_unchanged(job_input: dict[str, Any]):
    request = ImageRequest.parse(job_input, LIMITS)
    for name in job_input.keys() - {"image", "mask"}:
        value = job_input[name]
        assert getattr(request, name) == (value.strip() if isinstance(value, str) else value)


def recording(pipeline: type, calls: list[dict[str, Any]]) -> Callable[..., Any]:
    """Returns a stand-in for a class of pipelines that records its arguments and produces NaN."""

    class Recording:
        def __init__(self, **components: Any) -> None:
            self.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
            config = SimpleNamespace(sample_size=8, in_channels=4)
            self.unet = SimpleNamespace(config=config, register_to_config=lambda **changes: None)
            self.vae_scale_factor, self.components = 8, {"unet": self.unet}

        def set_progress_bar_config(self, disable: bool) -> None: ...

        @functools.wraps(pipeline.__call__)
        def __call__(self, *, generator: list[torch.Generator], callback_on_step_end: object, **asked: Any) -> Any:
            seeds = [each.initial_seed() for each in generator]
            calls.append(asked | {"seeds": seeds, "scheduler": (type(self.scheduler), dict(self.scheduler.config))})
            return SimpleNamespace(images=torch.full((len(seeds), 3, 8, 8), torch.nan), nsfw_content_detected=None)

    return Recording


@pytest.mark.parametrize("field", FIELDS)
@settings(max_examples=10)
@given(st.data())
def test_field_reaches_the_pipeline(field: str, data: st.DataObject):
    calls: list[dict[str, Any]] = []
    stand_ins = {task: recording(pipeline, calls) for task, pipeline in PIPELINES.items()}
    with mock.patch.dict(PIPELINES, stand_ins):
        runner = BatchRunner(stand_ins["text"](), "none")
        for request in data.draw(two_requests(field)):
            runner.run([request] * request.num_images, request.seeds, lambda share: None)
    first, second = calls
    assert (first == second) == (field in {"output_format", "output_quality"})


@pytest.mark.parametrize("field", FIELDS)
@settings(max_examples=10)
@given(st.data())
def test_requests_share_a_batch_if_they_differ_only_per_image(field: str, data: st.DataObject):
    one, other = data.draw(two_requests(field))
    assert (one.batch_key == other.batch_key) == (field in PER_IMAGE)


@pytest.mark.parametrize("field", FIELDS)
@settings(max_examples=10)
@given(st.data())
def test_picture_parameters_say_how_it_was_made(field: str, data: st.DataObject):
    one, other = (parameters(request, request.seed, "none") for request in data.draw(two_requests(field)))
    assert (one == other) == (field in NOT_IN_A_PICTURE)


def test_output_tells_every_value_the_client_may_not_know():
    asked_and_known = {"prompt", "negative_prompt", "num_images", "output_quality", "mask"}
    assert set(FIELDS) - set(get_type_hints(OneImage)) == asked_and_known
