"""Timesteps stay on the CPU; no step waits for the device because of them."""

import copy
import functools
import gc
import weakref
from typing import Any, Literal
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import StableDiffusionPipeline

from src.generation import acceleration
from src.generation.engine import Engine
from src.generation.timesteps import keep_on_cpu, on_device
from src.schedulers import SCHEDULERS
from src.settings import Settings
from tests.support.engines import generate, new_scheduler


@pytest.mark.parametrize("name", SCHEDULERS)
def test_timesteps_of_every_scheduler_stay_on_the_cpu(name: str, v1_4_engine: Engine):
    scheduler, same = keep_on_cpu(new_scheduler(v1_4_engine, name)), new_scheduler(v1_4_engine, name)
    scheduler.set_timesteps(4, device="meta")
    same.set_timesteps(4, device="cpu")
    assert scheduler.timesteps.device.type == "cpu"
    assert torch.equal(scheduler.timesteps, same.timesteps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_is_added_as_by_diffusers_without_moving_a_table(name: str, dtype: torch.dtype, v1_4_engine: Engine):
    ours, theirs = keep_on_cpu(new_scheduler(v1_4_engine, name)), new_scheduler(v1_4_engine, name)
    latents, noise = torch.randn(2, 3, 4, 8, 8, dtype=dtype)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8, device="cpu")
    for timestep in ours.timesteps:
        expected = theirs.add_noise(latents, noise, timestep.repeat(3))
        assert torch.equal(ours.add_noise(latents, noise, timestep.repeat(3)), expected)
        on_another_device = (each.to("meta") for each in (latents, noise))
        assert ours.add_noise(*on_another_device, timestep.repeat(3)).is_meta
    tables = [value for value in vars(ours).values() if isinstance(value, torch.Tensor)]
    assert tables
    assert not any(table.is_meta for table in tables)


def test_pipeline_gets_such_a_scheduler_and_nothing_keeps_it(v1_4_engine: Engine, monkeypatch: pytest.MonkeyPatch):
    schedulers = []
    real = StableDiffusionPipeline.__call__

    @functools.wraps(real)
    def call(pipe: StableDiffusionPipeline, **arguments: Any) -> Any:
        pipe.scheduler.set_timesteps(4, device="meta")
        schedulers.append((weakref.ref(pipe.scheduler), pipe.scheduler.timesteps.device.type))
        return real(pipe, **arguments)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    gc.disable()
    try:
        generate(v1_4_engine)
        ((scheduler, device),) = schedulers
        assert (scheduler(), device) == (None, "cpu")
    finally:
        gc.enable()


@pytest.mark.parametrize("timestep", [torch.tensor(7), torch.tensor(7.5), torch.tensor(7, device="meta")])
def test_timestep_is_filled_in_on_the_device_unless_it_is_there(timestep: torch.Tensor):
    sample = MagicMock(device=torch.device("meta"))
    moved = on_device(timestep, sample)
    if timestep.is_meta:
        assert moved is timestep
    else:
        sample.new_full.assert_called_once_with((), timestep.item(), dtype=timestep.dtype)
        assert moved is sample.new_full()


@pytest.mark.parametrize("graphs", ["off", "graphs"])
def test_unet_of_a_worker_gets_timesteps_on_its_device(
    graphs: Literal["off", "graphs"], v1_4_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    pipe, seen, captured = copy.deepcopy(v1_4_pipe), [], []
    monkeypatch.setattr(StableDiffusionPipeline, "device", torch.device("cuda"))
    monkeypatch.setattr(acceleration, "Capture", lambda: lambda step, inputs: captured.extend(inputs) or step)
    monkeypatch.setattr(type(pipe.unet), "forward", lambda unet, *inputs, **_: seen.append((unet, *inputs)) or inputs)
    acceleration.accelerate(pipe, Settings(acceleration=graphs, attention_slicing="off"))
    sample = torch.zeros(2, 4, 8, 8, device="meta")
    copied = copy.deepcopy(pipe.unet) if graphs == "off" else pipe.unet
    copied(sample, torch.tensor(7), encoder_hidden_states=sample, return_dict=False)
    ((unet, *inputs),) = seen
    assert unet is copied
    assert {each.device for each in (*inputs, *captured)} == {sample.device}
    assert len(captured) == (3 if graphs == "graphs" else 0)
