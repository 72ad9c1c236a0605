"""The structure of src: which room may import which, the length of modules, which modules need no PyTorch."""

import ast
from pathlib import Path

import pytest

from tests.support.processes import ROOT, python

GROUND = {"errors", "schedulers", "setting_types", "threads"}
MAY_IMPORT = {
    "errors": set(),
    "setting_types": set(),
    "schedulers": set(),
    "threads": set(),
    "settings": GROUND,
    "api": {"settings", *GROUND},
    "model": {"settings", *GROUND},
    "serving": {"api", "settings", *GROUND},
    "startup": {"model", "settings", *GROUND},
    "generation": {"api", "model", "settings", *GROUND},
    "job_handler": {"generation", "api", "serving", "settings", *GROUND},
}
"""The other rooms that the modules of each room may import. Imports point downwards only."""

MODULES = sorted(path for path in (ROOT / "src").rglob("*.py") if path.name != "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(ROOT / "src").parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{each.name}" for each in node.names]
    return {name.split(".")[1] for name in names if name.startswith("src.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_is_short_and_imports_only_rooms_below(path: Path):
    assert imported_rooms(path) <= {room(path), *MAY_IMPORT[room(path)]}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 260


@pytest.mark.process
def test_api_settings_and_engine_need_no_pytorch():
    light = [
        path for path in MODULES if room(path) in {"api", "settings", *GROUND} or path.stem in {"engine", "cuda_errors"}
    ]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in light]
    assert len(names) >= 10
    loaded = python(f"import sys, {', '.join(names)}; print(*sys.modules)").split()
    assert not {"torch", "diffusers", "transformers", "numpy", "runpod"} & set(loaded)
