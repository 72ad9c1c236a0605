"""The benches run; what they measure here means nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import cold_start, memory

ROOT = Path(__file__).parents[1]


@pytest.mark.process
@pytest.mark.parametrize("way", ["baseline", "worker"])
def test_a_start_is_measured(way: str, v1_4_repository: Path):
    taken = cold_start.start(way, v1_4_repository)
    assert {"interpreter", "weights"} <= set(taken)


@pytest.mark.process
def test_every_way_to_generate_is_measured():
    command = [sys.executable, "-m", "tests.bench.gpu", "--small", "--runs", "1", "--steps", "2", "--price", "1"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ways = re.findall(r"^(.{36}) {6}([14])(?: +\d+\.\d+){5}$", printed, re.M)
    assert len(ways) == len(set(ways)) == 2 * 7
    assert printed.count("device idle between two queued calls, this worker") == 4
    assert re.search(r"^floor: \S+ TFLOP of the UNet a picture / \S+ TFLOP/s = \d+\.\d+ s$", printed, re.M)


@pytest.mark.parametrize(
    ("way", "most_gib", "most_kernels"),
    [("`off`", 0.2, 750), ("`auto`", 0.2, 780), ("`max`", 0.2, 980), ("diffusers' `auto`", 0.4, 1400)],
)
def test_slices_by_fused_attention_cost_no_memory(way: str, most_gib: float, most_kernels: int):
    gib, kernels = memory.step(memory.WAYS[way], images=1, size=512)
    assert most_gib / 2 < gib <= most_gib
    assert most_kernels * 0.95 < kernels <= most_kernels
