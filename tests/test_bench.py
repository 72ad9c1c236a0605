"""The benches run. What they measure here has no meaning."""

import gc
import re
import sys
from pathlib import Path

import pytest

from src.model import loading
from tests.bench import cold_start, gpu, memory
from tests.bench.gpu import GRAPHS, Measurement
from tests.support import forks


@pytest.mark.process
@pytest.mark.parametrize("way", ["baseline", "worker"])
def test_cold_start_bench_measures_a_start(way: str, v1_4_repository: Path):
    taken = cold_start.measure_start(way, v1_4_repository)
    assert {"interpreter", "weights"} <= set(taken)


@pytest.mark.process
def test_gpu_tests_that_a_cpu_can_run_pass():
    ran = forks.run_module("pytest", "-m", "gpu", "--small", "tests/test_gpu.py")
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"^30 passed, 5 skipped", ran.stdout, re.M)


@pytest.mark.process
def test_gpu_bench_measures_every_way_to_generate():
    ran = forks.run_module("tests.bench.gpu", "--small", "--runs", "1", "--steps", "2", "--price", "1")
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout
    rows = re.findall(r"^(.{42}) {6}([14])(?: +\d+\.\d+){4} +(\d+\.\d|nan) +(\d+\.\d|nan) +\d+\.\d+$", printed, re.M)
    assert len(set(rows)) == 2 * (3 + len(gpu.SETTINGS) + len(gpu.CHANGES))
    assert {name.split(",")[0] for name, _, *times in rows if "nan" in times} == {"baseline handler"}
    assert printed.count("device idle between two queued calls, ") == len(gpu.SETTINGS)
    assert re.search(r"^floor: \S+ TFLOP of the UNet a picture / \S+ TFLOP/s = \d+\.\d+ s$", printed, re.M)
    assert re.search(r"^set .+\nwhy: .+\nwhy: .+\n", printed, re.M)


def test_full_size_model_is_not_measured_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "on a CPU only --small makes sense" in capsys.readouterr().err


def test_measured_worker_is_freed_from_memory(tmp_path: Path, v1_4_repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "StableDiffusionPipeline", gpu.TimedPipeline)
    (tmp_path / "baked").symlink_to(v1_4_repository)
    gpu.measure_worker(tmp_path, 1, 1, gpu.CHANGES["PNDM, timesteps on the CPU"])
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, gpu.TimedPipeline)]


def rows(**seconds: float) -> dict[str, list[Measurement]]:
    """Returns 1 s for one picture and 3 s for four, multiplied by the factor given for a way to generate."""
    taken = dict.fromkeys([*gpu.SETTINGS, *gpu.CHANGES], 1.0) | seconds
    return {name: [Measurement(one, 2**30, 20, 12), Measurement(3 * one, 2**31, 20, 40)] for name, one in taken.items()}


def test_fastest_settings_are_recommended_with_reasons():
    advice = list(gpu.advice(rows(**{GRAPHS: 0.5, "ATTENTION_SLICING=off": 0.9, "cudnn.benchmark": 0.4, "DDIM": 0.1})))
    assert advice[:4] == [
        "set ACCELERATION=graphs: 2.00 times as fast for 1, 2.00 times as fast for 4, +0.00 GiB",
        "why: a step of 1 takes the host 20.0 ms, the device 12.0 ms: the host is the limit, which graphs relieve",
        "why: a step of 4 takes the host 20.0 ms, the device 40.0 ms: the device is the limit",
        "channels_last UNet: not worth a setting, 0.50 times as fast for 1, 0.50 times as fast for 4, +0.00 GiB",
    ]
    assert "cudnn.benchmark: worth a setting, 1.25 times as fast for 1, 1.25 times as fast for 4, +0.00 GiB" in advice
    assert len(advice) == 3 + len(gpu.CHANGES) - 1


def test_no_setting_is_recommended_for_a_difference_within_noise():
    assert next(gpu.advice(rows(**{GRAPHS: 0.98}))) == "set nothing: no setting makes this worker 3% faster"


@pytest.mark.parametrize(
    ("way", "most_gib", "most_kernels"),
    [("`off`", 0.2, 750), ("`auto`", 0.2, 780), ("`max`", 0.2, 980), ("diffusers' `auto`", 0.4, 1400)],
)
def test_fused_slices_cost_no_memory(way: str, most_gib: float, most_kernels: int):
    gib, kernels = memory.count_step(memory.SLICINGS[way], images=1, size=512)
    assert most_gib / 2 < gib <= most_gib
    assert most_kernels * 0.95 < kernels <= most_kernels
