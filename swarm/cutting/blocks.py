"""The blocks of a span, ready to run: hidden states in, hidden states out, with a cache per session."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, cast

import torch

from swarm.cutting.splice import Splice
from swarm.errors import CannotCut, UsageError
from swarm.types import Span

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

    from swarm.batching.lean import Lean
    from swarm.batching.ragged import Batch
    from swarm.cutting.caches import SessionCache
    from swarm.cutting.skeleton import Skeleton

CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""What forwards call their cache."""


class StageModel:
    """A contiguous span of a model's blocks, on a device. Not for two threads at a time.

    Attributes:
        span: which blocks.
        dtype: of the hidden states that go in and come out.
        device: where the weights are.
        hidden_size: H, the last dimension of the hidden states.
        num_blocks: how many blocks the span has.
        supports_rollback: whether `rollback` can forget positions. Blocks with a recurrent state cannot.
        unbatched: why many sessions cannot run in one forward of this family; empty where they can.
        model: the Hugging Face model around the blocks, without embeddings, final norm and head.
        config: its config, cut to the span.
    """

    def __init__(self, skeleton: Skeleton, span: Span, device: str | torch.device, unbatched: str = "") -> None:
        self.span = span
        self.unbatched = unbatched
        self.num_blocks = len(span)
        self.dtype = skeleton.dtype
        self.device = torch.device(device)
        self.model = skeleton.owner
        self.config: PreTrainedConfig = skeleton.owner.config
        self.hidden_size: int = self.config.hidden_size
        self._skeleton = skeleton
        self._parts: dict[Span, StageModel] = {}
        self._lean: Lean | None = None
        self.supports_rollback = not self.new_cache().is_stateful
        self._arguments = _accepted(type(self.model))
        configs = [self.config, *(vars(module).get("config") for module in self.model.modules())]
        self._configs = list({id(config): config for config in configs if config is not None}.values())
        self._splice = Splice()
        self._splice.enter_at(skeleton.blocks[0])
        self._splice.leave_at(skeleton.blocks[-1])

    def __repr__(self) -> str:
        return f"<StageModel {self.span} {self.config.model_type} {str(self.dtype).removeprefix('torch.')}>"

    @property
    def lean(self) -> bool:
        """Whether batches go the lean way through the blocks, as far as that was tried (`swarm.batching.lean`)."""
        return self._lean is not None and self._lean.known

    def new_cache(self) -> SessionCache:
        """An empty cache for one session."""
        from swarm.cutting.caches import SessionCache

        return SessionCache(self._skeleton.config, self.span)

    def part(self, span: Span) -> StageModel:
        """The stage of `span`, some of this one's blocks: modules of its own, the same weights.

        Raises:
            UsageError: this stage does not have those blocks.
        """
        if span == self.span:
            return self
        if span not in self.span:
            raise UsageError(f"blocks {span} are not in {self.span}")
        if span not in self._parts:
            weights = [*self._skeleton.top.parameters(), *self._skeleton.top.buffers()]
            skeleton = copy.deepcopy(self._skeleton, {id(weight): weight for weight in weights})
            for block in skeleton.blocks:
                block.__dict__.pop("forward", None)  # what its splice put there is this stage's
            skeleton.compact(Span(span.start - self.span.start, span.end - self.span.start))
            self._parts[span] = StageModel(skeleton, span, self.device, self.unbatched)
        return self._parts[span]

    @torch.inference_mode()
    def forward(
        self,
        hidden: torch.Tensor,
        *,
        position: int,
        cache: SessionCache,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the blocks over N positions of B sequences whose keys and values up to `position` are in `cache`.

        Args:
            hidden: [B, N, H], what the block before the span put out, or the embeddings.
            position: where the first of the N is, counted from the start of the session.
            cache: from `new_cache`; grows by N positions.
            attention_mask: [B, position + N], 1 where a position is real; None if all are.
            position_ids: [B, N], for the rotary tables and their like; None for `position` and what follows.

        Returns:
            [B, N, H]
        """
        place = {"attention_mask": attention_mask, "position_ids": position_ids}
        return self.run(hidden, position=position, cache=cache, **place)

    def run(
        self,
        hidden: torch.Tensor,
        *,
        position: int = 0,
        cache: SessionCache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`forward`, in whatever gradient mode the caller is; without a cache if there is none (training)."""
        if position_ids is None:
            end = position + hidden.shape[1]
            position_ids = torch.arange(position, end, device=hidden.device).unsqueeze(0)
        offered = {
            "inputs_embeds": hidden,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": cache is not None,
            **dict.fromkeys(CACHE_ARGUMENTS, cache),
        }
        if cache is not None:
            cache.length = position
        with self._splice.given(hidden):
            self.model(**{name: offered[name] for name in self._arguments})
            if cache is not None:
                cache.length = position + hidden.shape[1]
            return self._splice.output

    @torch.inference_mode()
    def forward_batch(self, hidden: torch.Tensor, position_ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Run the blocks over T tokens of many sessions at once; only where `unbatched` is empty.

        Args:
            hidden: [1, T, H], the new positions of all parts of `batch`, one part after another.
            position_ids: [1, T], for the rotary tables and their like.
            batch: whose they are, and where their keys and values are; takes the new ones in.

        Returns:
            [1, T, H]
        """
        from swarm.batching.lean import Lean
        from swarm.batching.ragged import RaggedCache, running

        def full(cache: RaggedCache) -> torch.Tensor:
            offered = {
                "inputs_embeds": hidden,
                "attention_mask": None,
                "position_ids": position_ids,
                "use_cache": True,
                **dict.fromkeys(CACHE_ARGUMENTS, cache),
            }
            self.model(**{name: offered[name] for name in self._arguments})
            return self._splice.output

        self._lean = self._lean or Lean(self.model, list(self._skeleton.blocks))
        with self._splice.given(hidden), running(batch, self._configs):
            return self._lean.run(full, hidden, position_ids)


def _accepted(model: type) -> tuple[str, ...]:
    """Which of what a stage can offer the model's forward takes."""
    named = inspect.signature(inspect.unwrap(model.forward)).parameters  # type: ignore[attr-defined]
    if "inputs_embeds" not in named or not any(name in named for name in CACHE_ARGUMENTS):
        raise CannotCut(f"{model.__name__} takes no inputs_embeds or no cache")
    wanted = ("inputs_embeds", "attention_mask", "position_ids", "use_cache", *CACHE_ARGUMENTS)
    return tuple(name for name in wanted if name in named)


def rollback(cache: SessionCache, length: int) -> None:
    """Forget what lies after `length` positions.

    Raises:
        CannotCut: there are not so many; or the blocks fold the past into a state, which cannot be undone.
    """
    if length == cache.length:
        return
    if length > cache.length:
        raise CannotCut(f"a cache of {cache.length} positions cannot go on to {length}")
    if cache.is_stateful:
        raise CannotCut(f"blocks with a recurrent state cannot go back from position {cache.length} to {length}")
    cache.crop(length - cache.length)
    cache.length = length


def reorder(cache: SessionCache, rows: torch.Tensor) -> None:
    """Let row i of the batch be what row `rows[i]` was (beam search). `rows`: [B'] of int64."""
    cache.reorder_cache(cast(torch.LongTensor, rows))
