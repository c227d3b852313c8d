"""A ragged forward without the model's ado around its blocks, learned by watching and proven before it is trusted.

Before its blocks run, a model's forward makes masks, looks at options and prepares to record outputs; for a single
token that takes longer than a small block. What the blocks are given in the end is little: the hidden states, the
positions, the cache, masks, and what a few helpers (the rotary embedding) make of these. So one forward is watched:
where every argument of every block can be told to be one of those, the blocks can be called straight away. That way
is then taken beside the model's own until it has given the very same bits several times; if it ever does not, or
something cannot be told, the model's own forward is used. For a few tokens the blocks are not even called: what each
asks of torch is recorded (`swarm.batching.tape`), and proven in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from swarm.batching.ragged import RaggedCache, Sight
from swarm.batching.tape import Recorder, Tape, Unrecorded

PROOFS = 3  # forwards of each number of tokens that has tapes, and of any larger one
TAPED = 16  # tokens, at most: with more, the products are all that counts
_PLAIN = (type(None), bool, int, float, str)


@dataclass(slots=True)
class _Given:
    """What one forward is given, and what helpers have made of it."""

    hidden: torch.Tensor
    position_ids: torch.Tensor
    cache: RaggedCache
    sights: list[Sight]
    made: list[Any] = field(default_factory=list)


_Source = Callable[[_Given], Any]


@dataclass(slots=True)
class _Call:
    """A call that was seen, later one to be made."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(slots=True)
class _Step:
    """A call to be made: every argument told where it comes from.

    Attributes:
        leaves: the same for all tensors in the arguments, and whatever else differs from time to time.
        constants: the module's own tensors.
        tapes: what the call comes to, for numbers of tokens; None where it has to be made.
    """

    forward: Callable[..., Any]
    args: list[_Source]
    kwargs: dict[str, _Source]
    leaves: list[_Source]
    constants: list[torch.Tensor]
    tapes: dict[int, Tape | None] = field(default_factory=dict)

    def run(self, given: _Given) -> Any:
        if (tape := self.tapes.get(given.hidden.shape[1])) is not None:
            return tape(*[leaf(given) for leaf in self.leaves])
        return self.forward(
            *[source(given) for source in self.args], **{name: source(given) for name, source in self.kwargs.items()}
        )

    def record(self, given: _Given) -> Any:
        """`run`, from which a tape is made where there can be one."""
        recorder = Recorder([leaf(given) for leaf in self.leaves], self.constants)
        tokens = given.hidden.shape[1]
        with recorder:
            output = self.run(given)
        try:
            self.tapes[tokens] = recorder.tape(output)
        except Unrecorded:
            self.tapes[tokens] = None
        return output


class _Untold(Exception):
    """Where an argument comes from cannot be told."""


class Lean:
    """The lean way through one model's blocks, once it is known and proven.

    Args:
        owner: the model around the blocks.
        blocks: in their order.
    """

    def __init__(self, owner: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._owner = owner
        self._blocks = list(blocks)
        self._plan: _Plan | None = None
        self._open: dict[int, int] = {}  # proofs that are still to come, by the number of tokens; 0 for many
        self._refuted = ""

    @property
    def known(self) -> bool:
        """Whether there is one, and nothing speaks against it so far."""
        return self._plan is not None and not self._refuted

    @property
    def refuted(self) -> str:
        """Why the model's own forward is used; empty where it need not be, as far as is known."""
        return self._refuted

    def run(
        self, full: Callable[[RaggedCache], torch.Tensor], hidden: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """The output of the blocks, [1, T, H]: by the lean way, or by `full`, the model's own forward."""
        tokens, cache = hidden.shape[1] if hidden.shape[1] <= TAPED else 0, RaggedCache()
        if self._refuted:
            return full(cache)
        if self._plan is None:
            return self._watch(full, hidden, position_ids, cache)
        if self._open.setdefault(tokens, PROOFS) == 0:
            return self._plan.run(hidden, position_ids, cache)
        output = full(cache)
        self._prove(self._plan, tokens, output, hidden, position_ids)
        return output

    def _watch(
        self,
        full: Callable[[RaggedCache], torch.Tensor],
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        cache: RaggedCache,
    ) -> torch.Tensor:
        helpers = [child for child in self._owner.children() if not any(b in child.modules() for b in self._blocks)]
        with _watched(self._blocks) as block_calls, _watched(helpers) as helper_calls:
            output = full(cache)
        try:
            self._plan = _Plan(self._blocks, block_calls, helper_calls, hidden, position_ids, cache)
        except _Untold as error:
            self._refuted = str(error)
        return output

    def _prove(
        self, plan: _Plan, tokens: int, expected: torch.Tensor, hidden: torch.Tensor, position_ids: torch.Tensor
    ) -> None:
        record = tokens > 0 and not plan.was_recorded(tokens)
        try:
            same = torch.equal(plan.run(hidden, position_ids, RaggedCache(), record), expected)
        except Exception as error:  # noqa: BLE001 - whatever it is, the model's own forward does without
            same, why = False, f"{type(error).__name__}: {error}"
        else:
            why = "it computes something else"
        if same:
            self._open[tokens] -= 1
        elif plan.forget_tapes(tokens):
            self._open[tokens] = PROOFS
        else:
            self._refuted = why


class _Plan:
    """The calls to make, helpers first."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        block_calls: Sequence[_Call],
        helper_calls: Sequence[_Call],
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        cache: RaggedCache,
    ) -> None:
        if [call.module for call in block_calls] != list(blocks):
            raise _Untold("its blocks are not called once each, in their order")
        self._rules: list[Sight] = []
        self._seen: dict[int, _Source] = {
            id(position_ids): lambda given: given.position_ids,
            id(cache): lambda given: given.cache,
            id(hidden): lambda given: given.hidden,
        }
        self._like = hidden.shape, hidden.dtype
        self._helpers: list[_Step] = []
        needed = {id(value) for call in block_calls for value in _flat((call.args, call.kwargs))}
        for call in helper_calls:
            if needed & {id(value) for value in (call.output, *_flat(call.output))}:
                self._add_helper(call)
        self._steps = [self._step(call, index, block_calls) for index, call in enumerate(block_calls)]

    def run(
        self, hidden: torch.Tensor, position_ids: torch.Tensor, cache: RaggedCache, record: bool = False
    ) -> torch.Tensor:
        """[1, T, H]; with `record`, tapes are made for T tokens."""
        given = _Given(hidden, position_ids, cache, [Sight(sight.rule) for sight in self._rules])
        for helper in self._helpers:
            given.made.append(helper.record(given) if record else helper.run(given))
        for step in self._steps:
            output = step.record(given) if record else step.run(given)
            given.hidden = output if isinstance(output, torch.Tensor) else output[0]
        return given.hidden

    def was_recorded(self, tokens: int) -> bool:
        """Whether it is known what the calls for so many tokens come to, or that it cannot be."""
        return all(tokens in step.tapes for step in self._steps)

    def forget_tapes(self, tokens: int) -> bool:
        """Make the calls themselves from now on; whether any for so many tokens were not made."""
        taped = [step for step in (*self._helpers, *self._steps) if step.tapes.get(tokens) is not None]
        for step in taped:
            step.tapes[tokens] = None
        return bool(taped)

    def _add_helper(self, call: _Call) -> None:
        index = len(self._helpers)
        args = [self._source(value, lenient=True) for value in call.args]
        kwargs = {name: self._source(value, lenient=True) for name, value in call.kwargs.items()}
        leaves = [self._source(value, lenient=True) for value in _leaves((call.args, call.kwargs))]
        self._helpers.append(_Step(call.module.forward, args, kwargs, leaves, _tensors_of(call.module)))
        self._seen[id(call.output)] = lambda given: given.made[index]
        for place, value in enumerate(call.output if isinstance(call.output, tuple) else ()):
            self._seen[id(value)] = lambda given, place=place: given.made[index][place]  # type: ignore[misc]

    def _step(self, call: _Call, index: int, calls: Sequence[_Call]) -> _Step:
        """The first block's hidden states are put in its place; the others' are what the block before put out."""
        args, kwargs = list(call.args), dict(call.kwargs)
        entered = args.pop(0) if args else kwargs.pop("hidden_states")
        if index:
            before = calls[index - 1].output
            if entered is not (before if isinstance(before, torch.Tensor) else before[0]):
                raise _Untold("something happens between its blocks")
        sources = [self._source(value) for value in args]
        named = {name: self._source(value) for name, value in kwargs.items()}
        leaves = [lambda given: given.hidden, *(self._source(value) for value in _leaves((args, kwargs)))]
        if call.args:
            sources.insert(0, lambda given: given.hidden)
        else:
            named["hidden_states"] = lambda given: given.hidden
        forward = type(call.module).forward.__get__(call.module)  # what a stage put on the instance is not for us
        return _Step(forward, sources, named, leaves, _tensors_of(call.module))

    def _source(self, value: Any, lenient: bool = False) -> _Source:
        """Where a value comes from. A helper may be given the hidden states for what was made of them.

        That it makes no difference is for the proof to show: they look at no more than its type and device.
        """
        if isinstance(value, _PLAIN):
            return lambda given: value
        if isinstance(value, Sight):
            return self._sight(value)
        if id(value) in self._seen:
            return self._seen[id(value)]
        if isinstance(value, tuple):
            sources = [self._source(each) for each in value]
            return lambda given: tuple(source(given) for source in sources)
        if lenient and isinstance(value, torch.Tensor) and (value.shape, value.dtype) == self._like:
            return lambda given: given.hidden
        raise _Untold(f"a block is given a {type(value).__name__} that is made on the way")

    def _sight(self, sight: Sight) -> _Source:
        if not any(sight is known for known in self._rules):
            self._rules.append(sight)
        index = next(index for index, known in enumerate(self._rules) if known is sight)
        return lambda given: given.sights[index]


@contextmanager
def _watched(modules: Sequence[nn.Module]) -> Iterator[list[_Call]]:
    """The calls of these modules meanwhile."""
    calls: list[_Call] = []
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_watching(module, calls))
        yield calls


@contextmanager
def _watching(module: nn.Module, calls: list[_Call]) -> Iterator[None]:
    forward, own = module.forward, "forward" in vars(module)

    def watch(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        calls.append(_Call(module, args, kwargs, output))
        return output

    module.forward = watch
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


def _flat(value: Any) -> Iterator[Any]:
    """The values in nested tuples and dictionaries, and these themselves."""
    if isinstance(value, tuple | list):
        for each in value:
            yield each
            yield from _flat(each)
    elif isinstance(value, Mapping):
        yield from _flat(tuple(value.values()))


def _leaves(value: Any) -> Iterator[Any]:
    """What differs from time to time in nested arguments."""
    return (each for each in _flat(value) if not isinstance(each, (*_PLAIN, tuple, list, Mapping)))


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
