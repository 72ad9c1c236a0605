"""The benches run. What they measure here has no meaning, but for what attention slicing costs, which is counted."""

from pathlib import Path

import pytest

from tests.bench import cold_start, memory
from tests.support import forks


@pytest.mark.process
def test_cold_start_bench_measures_a_start(v1_4_repository: Path):
    assert "weights" in cold_start.measure_start("worker", v1_4_repository)


@pytest.mark.process
def test_gpu_bench_runs_on_a_cpu():
    ran = forks.run_module("tests.bench.gpu", "--small", "--runs", "1", "--steps", "2")
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(("way", "max_kernels"), [("`off`", 700), ("`auto`", 780), ("`max`", 980)])
def test_fused_slices_cost_no_memory_and_few_kernels(way: str, max_kernels: int):
    gib, kernels = memory.count_step(memory.SLICINGS[way], images=1, size=512)
    assert gib < 0.2 and kernels < max_kernels
