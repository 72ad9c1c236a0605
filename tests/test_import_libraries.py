"""What is deferred is not imported by a start, and complete when it is used."""

import json

import pytest

from src.schedulers import SCHEDULERS
from src.startup.import_libraries import DEFERRED
from tests.support.processes import python

pytestmark = pytest.mark.process

REAL = f"""
import sys
def real():
    names = {[name for name in DEFERRED if name != "torch.distributed"]}
    return [name for name in names if type(sys.modules.get(name)).__name__ == "module"]
"""


def test_start_imports_nothing_deferred_and_only_klms_does_later(v1_4_repository):
    for model in ("demo", str(v1_4_repository)):
        code = (
            f"{REAL}\n"
            "import handler\n"
            "from src.settings import Settings\n"
            f"worker = handler.build_worker(Settings(model_id={model!r}))\n"
            "from src.schedulers import SCHEDULERS\n"
            "from src.api.request import ImageRequest\n"
            "runner = worker._engine._runner\n"
            "print('start', *real(), 'torch.distributed.tensor' in sys.modules)\n"
            "for name in sorted(SCHEDULERS, key='KLMS'.__eq__):\n"
            "    job_input = {'prompt': 'sea', 'scheduler': name, 'num_inference_steps': 3}\n"
            "    runner.run([ImageRequest.parse(job_input, runner.limits)], [0], lambda share: None)\n"
            "    print(name, *real())\n"
        )
        start, *others, klms = python(code).splitlines()[-1 - len(SCHEDULERS) :]
        assert [start, *others] == ["start False", *(name for name in SCHEDULERS if name != "KLMS")]
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


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What becomes of each of ``USES``, each in a fork of one process that has imported the libraries."""
    code = (
        f"{REAL}\n"
        "import json, os, traceback\n"
        "from src.startup.import_libraries import import_libraries\n"
        "import_libraries()\n"
        "import torch\n"
        f"for name, use in {USES!r}.items():\n"
        "    if not os.fork():\n"
        "        try:\n"
        "            exec(use, globals())\n"
        "            outcome = 'imported' if real() else 'not imported'\n"
        "        except BaseException:\n"
        "            outcome = traceback.format_exc()\n"
        "        print(json.dumps([name, outcome]), flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
    )
    return dict(json.loads(line) for line in python(code).splitlines())


@pytest.mark.parametrize("use", USES)
def test_deferred_import_is_complete_when_used(outcomes: dict[str, str], use: str):
    assert outcomes[use] == "imported"


def test_earlier_import_is_left_alone():
    code = (
        "import scipy.stats\n"
        "before = scipy.stats\n"
        "from src.startup.import_libraries import import_libraries\n"
        "import_libraries()\n"
        "import scipy.stats\n"
        "assert scipy.stats is before\n"
    )
    python(code)
