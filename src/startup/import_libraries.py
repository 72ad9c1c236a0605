"""Imports PyTorch, diffusers, transformers and RunPod's SDK, and defers those of their imports that no start needs.

Only this module knows the order of imports and which of them are deferred. A deferred module is imported in full when
something in it is first used (all but peft), so a newer library can only make a start slower. Written for torch 2.13,
diffusers 0.42, transformers 5.23 and runpod 1.12; it can go when they import less.
"""

import gc
import importlib
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType, SimpleNamespace
from typing import Any

from src.startup import prefetch
from src.startup.environment import quieten_libraries, set_environment


def import_libraries(imported: Callable[[str], None] = lambda library: None, *, eager: Collection[str] = ()) -> None:
    """Imports the libraries. Everything that they have created by then is exempt from garbage collection.

    Args:
        imported: called after each import with its name.
        eager: names from ``DEFERRED`` that are not deferred: peft for LoRAs, any to measure what deferring it saves.
    """
    set_environment()
    # imports create hundreds of thousands of objects and hardly any garbage
    gc.disable()
    import torch  # noqa: F401

    for name, defer in DEFERRED.items():
        if name not in eager:
            defer()
    if not any(isinstance(finder, _WholePackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WholePackages())
    kernels = prefetch.in_background(prefetch.load_kernels)
    imported("import torch")
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    imported("import diffusers, transformers")
    import runpod  # noqa: F401

    imported("import runpod")
    quieten_libraries()
    kernels.join()
    gc.freeze()
    gc.enable()


def _defer_distributed() -> None:
    import torch

    torch.distributed.is_available = lambda: False


def _defer_compiler() -> None:
    # diffusers and transformers mark functions for the compiler, and ask whether a model is compiled
    marks = dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), _mark_nothing)
    compiled = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))
    _defer("torch._dynamo", **marks, eval_frame=compiled)


def _defer_optimize() -> None:
    def linear_sum_assignment(*arguments: Any, **options: Any) -> Any:
        return _import("scipy.optimize").linear_sum_assignment(*arguments, **options)

    _defer("scipy.optimize", linear_sum_assignment=linear_sum_assignment)


def _hide_peft() -> None:
    # None is Python's mark for a module that cannot be imported; diffusers and transformers ask before they import it
    sys.modules.setdefault("peft", None)  # type: ignore[arg-type]


DEFERRED: dict[str, Callable[[], None]] = {
    # 0.5 s: tensors that several processes share; this worker is one process
    "torch.distributed": _defer_distributed,
    # 0.8 s: PyTorch's compiler, which nothing here uses
    "torch._dynamo": _defer_compiler,
    # 0.2 s: transformers' losses, for training
    "scipy.optimize": _defer_optimize,
    # 0.3 s: of the schedulers only KLMS integrates
    "scipy.integrate": lambda: _defer("scipy.integrate"),
    # 0.6 s: only beta distributions need it, which none of our schedulers uses
    "scipy.stats": lambda: _defer("scipy.stats"),
    # 0.1 s: merges LoRAs
    "peft": _hide_peft,
    # 1.1 s: the SDK's debugger asks for the processor's name in a subprocess
    "cpuinfo": lambda: _defer("cpuinfo", get_cpu_info=dict),
}
"""How each import is deferred, and what that saves of a start: ``python -m tests.bench.imports``, on two cores."""


def _mark_nothing(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments."""
    return function or _mark_nothing


class _Deferred(ModuleType):
    """Stands in for a module until an attribute that it lacks is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # code that inspects any module does not use this one
            raise AttributeError(name)
        return getattr(_import(self.__name__), name)


def _defer(name: str, **stand_ins: Any) -> None:
    """Puts a stand-in with nothing but ``stand_ins`` in the place of a package that is not imported yet."""
    if name not in sys.modules and (spec := find_spec(name)):
        module = _Deferred(name)
        vars(module).update(__spec__=spec, __path__=spec.submodule_search_locations, **stand_ins)
        sys.modules[name] = module


_removal = threading.Lock()


def _import(name: str) -> ModuleType:
    """Imports the module itself."""
    # two threads must not both find the stand-in, or the second would remove what the first imports
    with _removal:
        if isinstance(sys.modules.get(name), _Deferred):
            del sys.modules[name]
    return importlib.import_module(name)


class _WholePackages(MetaPathFinder, Loader):
    """Imports a deferred package before a module in it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package = name.rpartition(".")[0]
        # transformers imports this one, which needs nothing of its package
        alone = "torch._dynamo._trace_wrapped_higher_order_op"
        if name == alone or not isinstance(sys.modules.get(package), _Deferred):
            return None
        _import(package)
        # most packages import their modules
        return spec_from_loader(name, self) if name in sys.modules else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It has been executed."""
