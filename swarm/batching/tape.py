"""What a function asks of torch, written down while it runs once and asked again without the function.

Between a model's products lies a good deal of Python: modules that call modules, options that are looked at, shapes
that are unpacked. For one token that costs as much as small products do, and comes to the same each time. So the
calls that reach torch are recorded (its `TorchFunctionMode` sees them all), and become a straight function of their
own. What the recorded function decides by looking into a tensor cannot be recorded, and is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import GetSetDescriptorType
from typing import Any, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode, wrap_torch_function

F = TypeVar("F", bound=Callable[..., Any])

Tape = Callable[..., Any]
"""Takes what the recorded function was given, gives what it gave."""

_DESCRIPTIONS = {"size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size", "nelement"}
"""What does not depend on the values in a tensor, beside its properties."""

_SHAPED_BY_VALUES = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"}

_MADE = {"T", "mT", "H", "mH", "real", "imag", "data", "grad"}
"""Properties that are tensors."""


class Unrecorded(Exception):
    """What was seen cannot be done again from a record of it."""


def opaque(function: F) -> F:
    """Have `function` stand in a tape as it is: for what depends on more than the tensors it is given."""
    wrapped = wrap_torch_function(_tensors_in)(function)
    wrapped.bare = function  # type: ignore[attr-defined] # what a tape asks: nobody records it again
    return cast(F, wrapped)


def _tensors_in(*args: Any, **kwargs: Any) -> list[Any]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]


class Recorder(TorchFunctionMode):
    """Records what reaches torch while it is entered.

    Args:
        inputs: what the tape is to be given each time: tensors, or whatever else; told by identity.
        constants: tensors that are the same each time.
    """

    def __init__(self, inputs: Sequence[Any], constants: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._names = {id(value): f"i{index}" for index, value in enumerate(inputs)}
        self._inputs = list(inputs)
        self._constants = {id(value) for value in constants}
        self._bound: list[Any] = []  # what the tape's lines need and is not computed by one
        self._bound_names: dict[int, str] = {}
        self._lines: list[str] = []
        self._seen: list[Any] = []  # alive, so that no identity is used twice
        self._refused = ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._refused:
            try:
                self._write(func, args, kwargs or {}, output)
            except Unrecorded as error:
                self._refused = str(error)
        return output

    def tape(self, output: Any) -> Tape:
        """The function that gives `output` again. Raises `Unrecorded`."""
        if self._refused:
            raise Unrecorded(self._refused)
        lines = [*self._lines, f"return {self._expression(output)}"]
        arguments = ", ".join(f"i{index}" for index in range(len(self._inputs)))
        bound = "".join(f", b{index}" for index in range(len(self._bound)))
        source = f"def tape({bound[2:]}):\n def run({arguments}):\n  " + "\n  ".join(lines) + "\n return run"
        made: Tape = _compiled(source)(*self._bound)
        return made

    def _write(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        if _is_description(func):
            return
        if _looks(func, args, output):
            raise Unrecorded(f"{_name(func)} looks into a tensor")
        given = [*map(self._expression, args)]
        given += [f"{name}={self._expression(value)}" for name, value in kwargs.items()]
        call = f"{self._bind(getattr(func, 'bare', func))}({', '.join(given)})"
        if output is None or id(output) in self._names:
            if output is None or _changes(func):
                self._lines.append(call)
            return
        name = f"v{len(self._lines)}"
        self._lines.append(f"{name} = {call}")
        self._know(output, name)

    def _know(self, output: Any, name: str) -> None:
        self._seen.append(output)
        self._names.setdefault(id(output), name)
        if isinstance(output, tuple | list):
            for index, each in enumerate(output):
                if isinstance(each, torch.Tensor | tuple | list):
                    self._know(each, f"{name}[{index}]")

    def _expression(self, value: Any) -> str:
        """How a line of the tape comes by `value`."""
        if (name := self._names.get(id(value))) is not None and not isinstance(value, bool | int | float | str):
            return name
        if isinstance(value, torch.Tensor):
            if id(value) not in self._constants:
                raise Unrecorded("a tensor comes from elsewhere")
            return self._bind(value)
        if type(value) in (tuple, list) and not all(isinstance(each, bool | int | float | str) for each in value):
            inner = "".join(f"{self._expression(each)}, " for each in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if isinstance(value, slice):
            return f"slice({', '.join(self._expression(each) for each in (value.start, value.stop, value.step))})"
        if value is None or type(value) in (bool, int):
            return repr(value)
        return self._bind(value)

    def _bind(self, value: Any) -> str:
        if (name := self._bound_names.get(id(value))) is None:
            name = self._bound_names[id(value)] = f"b{len(self._bound)}"
            self._bound.append(value)
        return name


@functools.lru_cache(maxsize=512)
def _compiled(source: str) -> Callable[..., Tape]:
    """Blocks of one kind have the same lines: only what is bound to them differs."""
    made: dict[str, Any] = {}
    exec(compile(source, "<tape>", "exec"), made)
    found: Callable[..., Tape] = made["tape"]
    return found


def _is_description(func: Callable[..., Any]) -> bool:
    """Shapes, dtypes and their like: the same each time."""
    owner = getattr(func, "__self__", None)
    if isinstance(owner, GetSetDescriptorType):
        return owner.__name__ not in _MADE
    return _name(func) in _DESCRIPTIONS


def _looks(func: Callable[..., Any], args: Sequence[Any], output: Any) -> bool:
    """Whether what comes out is no tensor, or one whose very shape depends on values."""
    if _name(func) == "__getitem__" and any(_is_choice(each) for each in args[1:]):
        return True
    return _name(func) in _SHAPED_BY_VALUES or not (output is None or _has_tensors(output))


def _is_choice(index: Any) -> bool:
    if isinstance(index, tuple | list):
        return any(map(_is_choice, index))
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, tuple | list) and any(map(_has_tensors, value)))


def _changes(func: Callable[..., Any]) -> bool:
    """Whether it changes what it is given, rather than make something."""
    name = _name(func)
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", type(func).__name__)
