"""Torch and transformers imported without what nothing here uses: a third of the time, and tens of megabytes.

Transformers asks for torch's compiler and for the sharding of tensors between the processes of one job as soon as it
is imported, for decorators and type checks of ways to run a model that are not taken here. So a process that is ours
alone says that it has no `torch.distributed`, and has stand-ins in the place of some modules, which know the few names
that are asked for at once. Whoever wants anything else of them gets the real ones, then.

Threads that torch computes with are told to sleep while they wait for each other, where whoever runs the process has
not chosen. As a rule they spin, which is a little faster on cores that have nothing else to do, and many times slower
on others: a thread that waits keeps from its core the one that it waits for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


class StandIn(ModuleType):
    """In `sys.modules` in a module's place, until more than its `known` names is wanted of it."""

    def __init__(self, name: str, known: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # what is in it as in a package, `_Within` finds
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever goes through all modules wants nothing of this one
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


class _Within(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module in a package that has a stand-in: the real one, in the real package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not isinstance(sys.modules.get(fullname.rpartition(".")[0]), StandIn):
            return None
        _real(fullname)
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It was, when it was found."""


def _real(name: str) -> ModuleType:
    """The module itself; all stand-ins have had their time then."""
    for other, module in list(sys.modules.items()):
        if isinstance(module, StandIn):
            sys.modules.pop(other, None)
    return importlib.import_module(name)


def _unchanged(function: Any = None, *_: object, **__: object) -> Any:
    """A decorator that tells the compiler something about a function: nothing, where nothing is compiled."""
    return _unchanged if function is None else function


def _later(module: str, name: str) -> Callable[..., Any]:
    """Calls what the module has by that name."""
    return lambda *arguments, **options: getattr(_real(module), name)(*arguments, **options)


_INDEXING = "torch._dynamo._trace_wrapped_higher_order_op", "TransformGetItemToIndex"
_ASSIGNMENT = "scipy.optimize", "linear_sum_assignment"
_KNOWN: Mapping[str, Mapping[str, Any]] = {
    "torch._dynamo": {
        **dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), _unchanged),
        "graph_break": lambda: None,  # every step of an optimizer calls it
    },
    **{module: {name: _later(module, name)} for module, name in (_INDEXING, _ASSIGNMENT)},
}


def import_lightly(*names: str) -> None:
    """Import modules that need torch and transformers, in a process that is ours alone."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by OpenMP when torch is loaded
    for name, known in _KNOWN.items():
        sys.modules.setdefault(name, StandIn(name, known))
    if not any(isinstance(finder, _Within) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Within())
    import torch

    torch.distributed.is_available = lambda: False
    for name in names:
        importlib.import_module(name)
