"""Defers what the libraries import and a start does not need, which would take as long as the rest of their imports."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType, SimpleNamespace
from typing import Any


def defer() -> None:
    """Makes diffusers, transformers and the SDK, imported after this call, put off imports that they may never need.

    A deferred module is imported in full when something in it is first used.
    """
    import torch

    # diffusers and transformers prepare for tensors that several processes share: this worker is one
    torch.distributed.is_available = lambda: False
    # they mark what PyTorch's compiler shall leave alone, and ask whether a model is compiled: none is
    marks = dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), _mark_nothing)
    compiled = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))
    _defer("torch._dynamo", **marks, eval_frame=compiled)
    # transformers' losses, for training
    _defer("scipy.optimize", linear_sum_assignment=_called_later("scipy.optimize", "linear_sum_assignment"))
    # diffusers' schedulers: KLMS integrates, and none that is used here asks for a beta distribution
    _defer("scipy.integrate")
    _defer("scipy.stats")
    # the SDK's debugger asks, in a subprocess that takes a second, what the processor is called
    _defer("cpuinfo", get_cpu_info=dict)
    # its command line reaches other machines by SSH
    _defer("paramiko")
    sys.meta_path.insert(0, _WholePackages())


def _mark_nothing(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments."""
    return function or _mark_nothing


class _Deferred(ModuleType):
    """Stands in for a module until an attribute that it lacks is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # who asks what any module may have does not use it
            raise AttributeError(name)
        return getattr(_import(self.__name__), name)


def _defer(name: str, **stand_ins: Any) -> None:
    """Puts a stand-in with nothing but ``stand_ins`` in the place of a package that is not imported yet."""
    if name not in sys.modules and (spec := find_spec(name)):
        module = _Deferred(name)
        vars(module).update(__spec__=spec, __path__=spec.submodule_search_locations, **stand_ins)
        sys.modules[name] = module


def _import(name: str) -> ModuleType:
    """The module itself."""
    if isinstance(sys.modules.get(name), _Deferred):
        del sys.modules[name]
    return importlib.import_module(name)


def _called_later(module: str, name: str) -> Any:
    """A function, whose module is imported when it is called."""
    return lambda *args, **kwargs: getattr(_import(module), name)(*args, **kwargs)


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
