"""The swarm as the one block of a client's model: hidden states in, along a session's route, and hidden states out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

import torch

from swarm.background import BackgroundLoop
from swarm.cutting.caches import SessionCache
from swarm.errors import UsageError
from swarm.model import num_blocks
from swarm.network import Network, Quantized, Waiting, warn_quantized
from swarm.routes.precision import Precision
from swarm.session import StepMeta
from swarm.speculation.tuning import Speculate
from swarm.swarm_cache import SwarmCache
from swarm.types import ModelId, Span
from swarm.wire import Priority, Rounding

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel


class Call(threading.local):
    """What the forward under way in this thread was given beside the hidden states."""

    cache: SwarmCache | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    keep: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """What a client wants of the peers that run its sessions.

    Attributes:
        precision: which of them will do, by how exact their weights are.
        rounding: what may be done to hidden states on their way.
        priority: how urgent its steps are.
    """

    precision: Precision = Precision.STEADY
    rounding: Rounding = "auto"
    priority: Priority = "normal"

    @classmethod
    def parse(cls, exact: bool = False, mix: bool = False, wire_dtype: str = "auto", priority: str = "normal") -> Terms:
        """What a user has said. Raises `UsageError`."""
        if exact and mix:
            raise UsageError("exact peers alone, or a mix of any: not both")
        if wire_dtype not in get_args(Rounding):
            raise UsageError(f"--wire-dtype {wire_dtype}: there are {', '.join(get_args(Rounding))}")
        if priority not in get_args(Priority):
            raise UsageError(f"--priority {priority}: there are {', '.join(get_args(Priority))}")
        precision = Precision.EXACT if exact else Precision.ANY if mix else Precision.STEADY
        rounding = "float32" if exact and wire_dtype == "auto" else wire_dtype
        return cls(precision, cast("Rounding", rounding), cast("Priority", priority))


class Chain:
    """The swarm as the one block of a model: hidden states in, hidden states out."""

    def __init__(
        self,
        background: BackgroundLoop,
        network: Network,
        model: ModelId,
        config: PreTrainedConfig,
        waiting: Waiting,
        standby: int,
        speculate: Speculate,
        terms: Terms = Terms(),
    ) -> None:
        self.background = background
        self.network = network
        self.model = model
        self.num_blocks = num_blocks(config)
        self.context = context_of(config)
        self.waiting = waiting
        self.standby = standby
        self.terms = terms
        self.on_quantized: Quantized = warn_quantized
        self._told: dict[str, list[Span]] = {}  # which blocks are quantized, as the user knows
        self.speculate = speculate
        self.draft_model: PreTrainedModel | None = None
        self.rewindable = not SessionCache(config, Span(0, self.num_blocks)).is_stateful
        self.call = Call()
        self.refresh: Callable[[], bool] | None = None  # where weights change, fetches the ends if they are old

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run [B, N, H] through the swarm as the call under way wants it; returns [B, N, H].

        Where the call keeps only its last positions, the others come back as zeros: nobody looks at them.
        """
        call, cache = self.call, self.call.cache
        assert cache is not None  # `SwarmMixin._bind` has put one there
        rows, count, _ = hidden.shape
        self._check_length(cache.length, count)
        meta = StepMeta(
            position=cache.length,
            keep=call.keep if call.keep < count else 0,
            rows=cache.rows if cache.length else None,
            position_ids=_unusual_positions(call.position_ids, cache.length, rows, count),
            mask=_unusual_mask(call.attention_mask, cache, count),
        )
        output = self.background.run(self._step(cache, hidden.detach(), meta))
        cache.length += count
        cache.rows = None
        cache.padded = cache.padded or meta.mask is not None
        output = output.to(hidden.device, hidden.dtype)
        if output.shape[1] < count:
            output = torch.cat([hidden.new_zeros(rows, count - output.shape[1], output.shape[2]), output], dim=1)
        return output

    def _check_length(self, before: int, count: int) -> None:
        if not count:
            raise UsageError("the input is empty: there is no token to go on from")
        if self.context is not None and before + count > self.context:
            raise UsageError(f"{before + count} tokens are more than the model's context of {self.context}")

    def _quantized(self, blocks: dict[str, list[Span]]) -> None:
        """Tell the user what is new to them: sessions come and go."""
        if blocks != self._told:
            self._told = blocks
            self.on_quantized(blocks)

    async def _step(self, cache: SwarmCache, hidden: torch.Tensor, meta: StepMeta) -> torch.Tensor:
        if cache.session is None:
            length = max(cache.max_length, meta.position + hidden.shape[1])
            session = self.network.session(
                self.model,
                self.num_blocks,
                batch=hidden.shape[0],
                max_length=length,
                waiting=self.waiting,
                standby=self.standby,
                precision=self.terms.precision,
                on_quantized=self._quantized,
                rounding=self.terms.rounding,
                priority=self.terms.priority,
            )
            cache.bind(session, self.background)
        assert cache.session is not None
        return await cache.session.step(hidden, meta)


def context_of(config: PreTrainedConfig) -> int | None:
    """How many tokens the model can look back on, None where its config does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _unusual_positions(ids: torch.Tensor | None, start: int, rows: int, count: int) -> torch.Tensor | None:
    """[B, N], or None where they are just `start`, `start + 1`, ..., as for every text without padding."""
    if ids is None or ids.ndim != 2:
        return None
    ids = ids[:, -count:]
    if ids.shape == (1, 1) and int(ids) == start:  # as for nearly every token: told without making a tensor
        return None
    if torch.equal(ids, torch.arange(start, start + count, device=ids.device).expand_as(ids)):
        return None
    return ids.expand(rows, count).to("cpu", torch.int64).contiguous()


def _unusual_mask(mask: torch.Tensor | None, cache: SwarmCache, count: int) -> torch.Tensor | None:
    """The part of a 2-D mask for the new positions [B, N], or None where there never was any padding."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise UsageError(f"an attention mask of {mask.ndim} dimensions; the swarm takes [batch, positions]")
    mask = mask[:, -count:]
    if not cache.padded and bool(mask.all()):
        return None
    return mask.to("cpu", torch.uint8).contiguous()
