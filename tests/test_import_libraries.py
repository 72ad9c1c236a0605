"""A start does not import what is deferred, and it is all there when it is used."""

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
DEFERS = f"{REAL}\nfrom src.startup.import_libraries import import_libraries\nimport_libraries()\nimport torch\n"


def test_a_start_imports_nothing_deferred_and_only_klms_does_later(v1_4_repository):
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


@pytest.mark.parametrize(
    "used",
    [
        "import scipy.stats; assert scipy.stats.beta.ppf(0.5, 1, 1) == 0.5",
        "from scipy import stats; assert stats.beta.ppf(0.5, 1, 1) == 0.5",
        "from scipy.stats import beta; assert beta.ppf(0.5, 1, 1) == 0.5",
        "import scipy.stats._stats_py as part, scipy.stats; assert scipy.stats._stats_py is part; scipy.stats.beta",
        "from scipy.integrate import quad; assert quad(lambda x: x, 0, 2)[0] == 2",
        "from transformers.loss.loss_for_object_detection import linear_sum_assignment as f\n"
        "assert f([[1, 0], [0, 1]])[1].tolist() == [1, 0]",
        "import cpuinfo; assert cpuinfo.get_cpu_info() == {}; assert cpuinfo.CPUINFO_VERSION",
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2",
        "from torch._dynamo.utils import counters\nassert torch._dynamo.utils.counters is counters",
        "from diffusers.utils.torch_utils import is_compiled_module\n"
        "plain = torch.nn.Linear(1, 1)\n"
        "assert not is_compiled_module(plain) and not real()\n"
        "assert is_compiled_module(torch.compile(plain, backend='eager')) and not is_compiled_module(plain)",
    ],
)
def test_whoever_uses_it_gets_all_of_it(used: str):
    assert python(f"{DEFERS}\n{used}\nprint(len(real()) > 0)").splitlines()[-1] == "True"


def test_what_is_imported_already_is_left_alone():
    python(f"import scipy.stats\nbefore = scipy.stats\n{DEFERS}\nimport scipy.stats\nassert scipy.stats is before")
