"""Many sessions in one forward: their tokens side by side as one sequence, each attending to its own past only.

All that a family does per token (norms, products, experts, rotary tables) is done for all tokens at once by its own
forward. Attention alone is taken apart: a function of ours, registered with transformers' `AttentionInterface`, keeps
the new keys and values in a `Pool` and attends sequence by sequence, through the very function that the family would
have used. What may be seen (causal, windows, chunks) is the family's as well: a mask function of ours receives its
rule and applies it when it is known whose turn it is. Cf. Yu et al. 2022, "Orca": selective batching.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import cache_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swarm.batching import singles
from swarm.batching.padded import Padded, Wanted
from swarm.batching.pool import Pool, Run
from swarm.batching.tape import opaque
from swarm.errors import CannotCut

NAME = "shoal_ragged"
"""What transformers knows our attention and masks by."""

_SHORT = 16  # positions of a part that is padded with others, at most

_IMPLEMENTATION = "_attn_implementation_internal"
"""Where a config keeps the name of the attention to use."""

Rule = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""transformers' mask functions: (batch, head, query index, key index) to whether that key is seen."""


_CAUSAL: Rule = cast(Any, causal_mask_function)


@dataclass(slots=True)
class Part:
    """One row of one session in a batch: `count` new positions from `start` on.

    Attributes:
        runs: the slots of positions 0 to `start + count`, in order.
        real: [start + count] of bool, which of these are no padding; None if all are.
    """

    start: int
    count: int
    runs: Sequence[Run]
    real: torch.Tensor | None = None

    @property
    def end(self) -> int:
        """Positions after it was run."""
        return self.start + self.count


class Batch:
    """What runs in one forward.

    Args:
        parts: their new positions stand one after another in the hidden states.
        pool: where keys and values are.
        first: which layer of the pool is the first block's.
        padded: whether short parts attend together, padded to the longest (see `swarm.batching.padded`), instead of
            one by one; None for what suits the device.
    """

    def __init__(self, parts: Sequence[Part], pool: Pool, first: int = 0, padded: bool | None = None) -> None:
        self.parts = parts
        self.pool = pool
        self.first = first
        self.padded = pool.device.type != "cpu" if padded is None else padded
        self.bounds: list[Run] = []  # of each part's new positions, in the hidden states
        end = 0
        for part in parts:
            self.bounds.append((end, end + part.count))
            end += part.count
        self.tokens = end
        self.where = _slots([run for part in parts for run in between(part.runs, part.start, part.end)], pool.device)
        self.inner = ""  # the attention that the family would use

    def __repr__(self) -> str:
        return f"<Batch parts={len(self.parts)} tokens={self.tokens}>"


def between(runs: Sequence[Run], start: int, end: int) -> list[Run]:
    """The slots of positions `start` to `end`, where `runs` are those from position 0 on."""
    found, position = [], 0
    for first, last in runs:
        low, high = max(start - position, 0), min(end - position, last - first)
        if low < high:
            found.append((first + low, first + high))
        position += last - first
    return found


def _slots(runs: Sequence[Run], device: torch.device) -> slice | torch.Tensor:
    if len(runs) == 1:
        return slice(*runs[0])
    return torch.tensor([slot for run in runs for slot in range(*run)], device=device)


@dataclass(slots=True)
class _View:
    """What one part sees: of these slots, those that `mask` [count, N] leaves; all, or causally all, without one."""

    runs: Sequence[Run]
    mask: torch.Tensor | None
    causal: bool
    added: torch.Tensor | None = None

    def bias(self, groups: int, like: torch.Tensor) -> torch.Tensor | None:
        """The mask as what is added to the scores [groups * count, N]: made once, used by every block."""
        if self.mask is not None and (self.added is None or self.added.shape[0] != groups * len(self.mask)):
            added = torch.zeros(self.mask.shape, dtype=like.dtype)
            self.added = added.masked_fill_(~self.mask, -torch.inf).repeat(groups, 1).to(like.device)
        return self.added

    def whole(self) -> torch.Tensor | None:
        """The mask [count, N], of a causal view too."""
        if not self.causal:
            return self.mask
        count = sum(last - first for first, last in self.runs)
        return torch.ones(count, count, dtype=torch.bool).tril()


class Sight:
    """Stands for a mask in a ragged forward: the family's rule, applied to each part when it is first asked for."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._batch: Batch | None = None
        self._views: list[_View] = []
        self._padded: Padded | None = None
        self._alone: list[int] = []
        self._singles: list[Sequence[Run]] | None = None

    def views(self, batch: Batch) -> list[_View]:
        """One for each part of `batch`."""
        self._know(batch)
        return self._views

    def together(self, batch: Batch) -> Padded | None:
        """The short parts, where it is worth to have them attend together."""
        self._know(batch)
        return self._padded

    def alone(self, batch: Batch) -> list[int]:
        """Which parts attend one by one."""
        self._know(batch)
        return self._alone

    def singles(self, batch: Batch) -> list[Sequence[Run]] | None:
        """The slots that each part sees, where all are single tokens that see all of theirs; else None."""
        self._know(batch)
        return self._singles

    def _know(self, batch: Batch) -> None:
        if self._batch is batch:
            return
        self._batch, self._views = batch, [_view(self.rule, part) for part in batch.parts]
        short = [index for index, part in enumerate(batch.parts) if part.count <= _SHORT] if batch.padded else []
        short = short if len(short) > 1 else []
        wanted = [Wanted(batch.bounds[each], self._views[each].runs, self._views[each].whole()) for each in short]
        self._padded = Padded(wanted, batch.pool.device) if wanted else None
        self._alone = [index for index in range(len(batch.parts)) if index not in short]
        plain = batch.pool.device.type == "cpu" and not wanted and batch.tokens == len(batch.parts)
        plain = plain and all(view.mask is None for view in self._views)
        self._singles = [view.runs for view in self._views] if plain else None


def _view(rule: Rule, part: Part) -> _View:
    """What a part sees under a rule. Made on the host: the answers decide what is read."""
    if rule is _CAUSAL and part.real is None and (part.count == 1 or part.start == 0):
        return _View(part.runs, None, causal=part.count > 1)
    seen = rule(0, 0, torch.arange(part.start, part.end)[:, None], torch.arange(part.end)[None, :])
    seen = seen.expand(part.count, part.end)
    if part.real is not None:
        seen = seen & part.real
    any_sees = seen.any(0).nonzero()
    first = int(any_sees[0]) if len(any_sees) else 0  # windows and padding: what nobody sees is not even read
    mask = seen[:, first:]
    return _View(between(part.runs, first, part.end), None if bool(mask.all()) else mask, causal=False)


class RaggedCache(cache_utils.DynamicCache):
    """Stands for the cache of a ragged forward: the pool keeps what the attention function is given."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class _Active(threading.local):
    batch: Batch | None = None


_active = _Active()


@contextmanager
def running(batch: Batch, configs: Sequence[Any]) -> Iterator[None]:
    """Forwards of the models whose modules have these configs are ragged ones of `batch`, in this thread."""
    values = [vars(config) for config in configs]  # their own look-up costs more than all else here
    before = [each[_IMPLEMENTATION] for each in values]
    batch.inner = before[0]
    _active.batch = batch
    for each in values:
        each[_IMPLEMENTATION] = NAME
    try:
        yield
    finally:
        _active.batch = None
        for each, name in zip(values, before, strict=True):
            each[_IMPLEMENTATION] = name


@opaque
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of a ragged forward.

    Args:
        query: [1, heads, T, width], the tokens of all parts.
        key, value: [1, key heads, T, width], new ones only.
        attention_mask: a `Sight`.

    Returns:
        [1, T, heads, width], and no weights.

    Raises:
        CannotCut: the family does something beside this that cannot be taken apart.
    """
    batch = _active.batch
    if batch is None or not isinstance(attention_mask, Sight) or query.shape[0] != 1 or query.shape[2] != batch.tokens:
        raise CannotCut("this family's attention cannot be taken apart")
    layer = cast(int, module.layer_idx) + batch.first
    batch.pool.write(layer, batch.where, key, value)
    inner = _inner(module, batch.inner, extras)
    if inner is None and (seen := attention_mask.singles(batch)) is not None:
        return singles.attend(query, *batch.pool.stores(layer), seen, scaling), None
    if (padded := attention_mask.together(batch)) is not None:
        output = query.new_empty(1, batch.tokens, query.shape[1], value.shape[3])
        own = None if inner is None else partial(_own, inner, module, scaling, extras)
        output[0, padded.tokens] = padded.attend(query, batch.pool, layer, scaling, own)
        for index in attention_mask.alone(batch):
            start, end = batch.bounds[index]
            output[:, start:end] = _one(batch, index, layer, module, query, attention_mask, scaling, inner, extras)
        return output, None
    outputs = [
        _one(batch, index, layer, module, query, attention_mask, scaling, inner, extras)
        for index in range(len(batch.parts))
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), None


def _one(
    batch: Batch,
    index: int,
    layer: int,
    module: torch.nn.Module,
    query: torch.Tensor,
    sight: Sight,
    scaling: float | None,
    inner: Callable[..., Any] | None,
    extras: dict[str, Any],
) -> torch.Tensor:
    """What comes of one part, [1, count, heads, width]."""
    (start, end), view = batch.bounds[index], sight.views(batch)[index]
    keys, values = batch.pool.read(layer, view.runs, query.dtype)
    asked = query if end - start == batch.tokens else query[:, :, start:end]
    if inner is None:
        return _plain(asked, keys, values, view, scaling)
    mask = view.whole()
    added = None if mask is None else _added(mask, query)
    return _own(inner, module, scaling, extras, asked, keys, values, added)


def _own(
    inner: Callable[..., Any],
    module: torch.nn.Module,
    scaling: float | None,
    extras: dict[str, Any],
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    added: torch.Tensor | None,
) -> torch.Tensor:
    """The family's own function, with a mask that is added to the scores, [B, 1, N, L]."""
    output: torch.Tensor = inner(module, query, keys, values, added, scaling=scaling, dropout=0.0, **extras)[0]
    return output


def _plain(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, view: _View, scaling: float | None
) -> torch.Tensor:
    """What transformers' own function for torch's attention does, without its ado.

    Query heads that share a key head are put one below another, as if they were positions: nothing has to be copied.
    """
    _, heads, count, width = query.shape
    groups = heads // keys.shape[1]
    if view.causal:
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        output = scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
        return output.transpose(1, 2)
    mask = view.bias(groups, query)
    packed = query.reshape(1, keys.shape[1], groups * count, width)
    output = scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling)
    return output.reshape(1, heads, count, values.shape[3]).transpose(1, 2)


def _inner(module: torch.nn.Module, name: str, extras: dict[str, Any]) -> Callable[..., Any] | None:
    """The function that the family would use; None for torch's attention, with nothing beside it."""
    if extras.get("position_bias") is not None:
        raise CannotCut("its position biases are made for one sequence")
    if name == "sdpa" and extras.get("softcap") is None and extras.get("is_causal") is not False:
        return None
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", _missing)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, own)


def _missing(*_: Any, **__: Any) -> Any:
    raise CannotCut("its own attention function is not to be found")


def _added(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask [N, L] as transformers' own functions take it, [1, 1, N, L]."""
    added = torch.zeros(mask.shape, dtype=like.dtype)
    return added.masked_fill_(~mask, torch.finfo(like.dtype).min)[None, None].to(like.device)


def _sight(*, mask_function: Rule, attention_mask: Any = None, use_vmap: bool = False, **_: Any) -> Sight:
    """The mask function of a ragged forward."""
    if use_vmap or attention_mask is not None:
        raise CannotCut("this family's masks cannot be taken apart")
    return Sight(mask_function)


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _sight)
