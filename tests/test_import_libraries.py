"""Deferred imports: a start does without them, and they are complete when used."""

import os
from pathlib import Path

import pytest

from src.schedulers import SCHEDULERS
from src.startup import environment
from src.startup.import_libraries import DEFERRED
from tests.support import forks
from tests.support.processes import python

pytestmark = pytest.mark.process

REAL = f"""
import sys
def real():
    names = {[name for name in DEFERRED if name not in ("torch.distributed", "peft")]}
    return [name for name in names if type(sys.modules.get(name)).__name__ == "module"]
"""
"""``real()`` names the deferred modules that have been imported."""


def test_start_imports_nothing_deferred_and_only_klms_does_later(v1_4_repository: Path):
    code = (
        f"{REAL}\n"
        "import handler\n"
        "from src.settings import Settings\n"
        f"job_handler = handler.build_job_handler(Settings(model_id={str(v1_4_repository)!r}))\n"
        "from src.schedulers import SCHEDULERS\n"
        "from src.api.request import ImageRequest\n"
        "from tests.support.internals import runner_of\n"
        "runner = runner_of(job_handler)\n"
        "print('start', *real(), 'torch.distributed.tensor' in sys.modules, sys.modules['peft'])\n"
        "for name in sorted(SCHEDULERS, key='KLMS'.__eq__):\n"
        "    job_input = {'prompt': 'sea', 'scheduler': name, 'num_inference_steps': 3}\n"
        "    runner.run([ImageRequest.parse(job_input, runner.limits)], [0], lambda share: None)\n"
        "    print(name, *real())\n"
    )
    start, *others, klms = python(code).splitlines()[-1 - len(SCHEDULERS) :]
    assert [start, *others] == ["start False None", *(name for name in SCHEDULERS if name != "KLMS")]
    assert klms == "KLMS scipy.optimize scipy.integrate"


USES = {
    "module": "import scipy.stats; assert scipy.stats.beta.ppf(0.5, 1, 1) == 0.5",
    "module of its package": "from scipy import stats; assert stats.beta.ppf(0.5, 1, 1) == 0.5",
    "attribute": "from scipy.stats import beta; assert beta.ppf(0.5, 1, 1) == 0.5",
    "module within": "import scipy.stats._stats_py as part, scipy.stats\n"
    "assert scipy.stats._stats_py is part; scipy.stats.beta",
    "integration": "from scipy.integrate import quad; assert quad(lambda x: x, 0, 2)[0] == 2",
    "loss": "from transformers.loss.loss_for_object_detection import linear_sum_assignment as f\n"
    "assert f([[1, 0], [0, 1]])[1].tolist() == [1, 0]",
    "processor": "import cpuinfo; assert cpuinfo.get_cpu_info() == {}; assert cpuinfo.CPUINFO_VERSION",
    "compiler": "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2",
    "compiler's module": "from torch._dynamo.utils import counters\nassert torch._dynamo.utils.counters is counters",
    "compiled model": "from diffusers.utils.torch_utils import is_compiled_module\n"
    "plain = torch.nn.Linear(1, 1)\n"
    "assert not is_compiled_module(plain) and not real()\n"
    "assert is_compiled_module(torch.compile(plain, backend='eager')) and not is_compiled_module(plain)",
    "two threads": "import threading\n"
    "import scipy.stats as stats\n"
    "found = []\n"
    "threads = [threading.Thread(target=lambda: found.append(stats.beta)) for _ in range(8)]\n"
    "for each in threads: each.start()\n"
    "for each in threads: each.join()\n"
    "assert len(found) == 8 and len(set(map(id, found))) == 1",
}


@pytest.mark.parametrize("use", USES)
def test_deferred_import_is_complete_when_used(use: str):
    code = f"{REAL}\nimport torch\n{USES[use]}\nprint('imported' if real() else 'not imported')"
    assert forks.python(code) == "imported\n"


def test_earlier_import_is_left_alone():
    code = (
        "import sys\n"
        "del sys.modules['scipy.stats']\n"
        "import scipy.stats\n"
        "before = scipy.stats\n"
        "from src.startup.import_libraries import import_libraries\n"
        "import_libraries()\n"
        "import scipy.stats\n"
        "assert sys.modules['scipy.stats'] is before\n"
    )
    forks.python(code)


@pytest.mark.parametrize(
    ("quota", "threads"), [("150000 100000", "2"), ("50000 100000", "1"), ("max 100000", None), (None, None)]
)
def test_pytorch_computes_with_as_many_threads_as_the_container_has_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str | None, threads: str | None
):
    monkeypatch.setattr(environment, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    environment.set_environment()
    assert os.environ.get("OMP_NUM_THREADS") == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment.set_environment()
    assert os.environ["OMP_NUM_THREADS"] == "7"
