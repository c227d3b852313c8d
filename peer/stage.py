"""A span of blocks on a device, and the sessions whose keys and values it holds: a step in, hidden states out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from swarm.caches import SessionCache
from swarm.errors import BadTensor, BeyondCache
from swarm.model import StageModel, reorder, rollback
from swarm.types import Span


@dataclass(slots=True)
class StepInput:
    """What `Stage.run` needs of a step. Shapes: B rows, N positions, H hidden size."""

    number: int
    position: int
    hidden: torch.Tensor  # [B, N, H]
    rows: list[int] | None = None  # [B], which earlier rows the present ones continue
    position_ids: torch.Tensor | None = None  # [B, N]
    mask: torch.Tensor | None = None  # [B, N], 1 for a token and 0 for padding
    replayed: bool = False  # it brings the session to where other stages are, over steps that were never seen here


@dataclass(slots=True)
class SessionState:
    """One session as this stage holds it. Only the compute thread touches it."""

    model: StageModel  # the part of the stage that it uses
    batch: int  # rows, at most
    max_length: int  # positions, at most
    cache: SessionCache
    number: int = 0  # of the last step that was run
    length: int = 0  # positions that it holds now
    rows: int = 0  # of the batch that it holds now
    mask: torch.Tensor | None = None  # [rows, length], None while there is no padding


class Stage:
    """Blocks on a device. Not for two threads at once: `peer.executor` sees to that."""

    def __init__(self, model: StageModel) -> None:
        self.model = model
        self.span = model.span
        self._decode_seconds = math.inf  # of one position of one row, of late

    def open(self, span: Span, batch: int, max_length: int) -> SessionState:
        """An empty session over `span`, which may be a part of this stage's."""
        model = self.model.part(span)
        return SessionState(model, batch, max_length, model.new_cache())

    @torch.inference_mode()
    def run(self, state: SessionState, step: StepInput) -> torch.Tensor:
        """Make `step` the session's content from its position on, and run it.

        Safe to call twice with the same step: the second time rewrites the same positions.

        Returns:
            [B, N, H], in the stage's dtype.

        Raises:
            BeyondCache: it leaves a gap before it, or does not fit into the lease.
            BadTensor: a wrong shape or dtype, or values that are not finite. The session is as it was.
        """
        started = time.perf_counter()
        self._check(state, step)
        self._rewind(state, step)
        mask = self._extended_mask(state, step)
        try:
            output = state.model.forward(
                step.hidden.to(self.model.device, self.model.dtype),
                position=step.position,
                cache=state.cache,
                attention_mask=mask,
                position_ids=step.position_ids,
            )
        except BaseException:  # some layers hold the new positions, some do not: only a replay can help
            state.cache, state.mask, state.length, state.number = state.model.new_cache(), None, 0, 0
            raise
        state.mask = mask
        state.length = step.position + step.hidden.shape[1]
        state.number = step.number
        if step.hidden.shape[:2] == (1, 1):
            seconds = time.perf_counter() - started
            known = self._decode_seconds < math.inf
            self._decode_seconds = 0.9 * self._decode_seconds + 0.1 * seconds if known else seconds
        return output

    def expected_seconds(self, step: StepInput) -> float:
        """How long `run` will take, going by what it took of late; infinite for what is not a single token."""
        return self._decode_seconds if step.hidden.shape[:2] == (1, 1) else math.inf

    def _check(self, state: SessionState, step: StepInput) -> None:
        hidden = step.hidden
        if hidden.ndim != 3 or 0 in hidden.shape or hidden.shape[2] != self.model.hidden_size:
            raise BadTensor(f"hidden states of shape {list(hidden.shape)}; [B, N, {self.model.hidden_size}] are taken")
        if not hidden.is_floating_point() or not torch.isfinite(hidden).all():
            raise BadTensor("hidden states that are not finite numbers")
        rows, count = hidden.shape[:2]
        missed = step.number > state.number + 1 and step.position > 0 and not step.replayed
        if missed or step.position > state.length:
            raise BeyondCache(
                f"step {step.number} at position {step.position} leaves a gap: "
                f"the session is at step {state.number}, position {state.length}"
            )
        if rows > state.batch or step.position + count > state.max_length:
            raise BeyondCache(
                f"{rows} rows to position {step.position + count}; {state.batch} to {state.max_length} are leased"
            )
        self._check_rows(state, step, rows, count)

    def _check_rows(self, state: SessionState, step: StepInput, rows: int, count: int) -> None:
        held = state.rows if step.position else rows
        picks = step.rows is not None and step.position > 0 and step.number == state.number + 1  # else it has, before
        if step.rows is not None and (len(step.rows) != rows or (picks and max(step.rows) >= held)):
            raise BadTensor(f"rows {step.rows} do not continue the session's {held}")
        if not picks and held != rows:
            raise BadTensor(f"{rows} rows, the session has {held}")
        for name, extra in (("position ids", step.position_ids), ("mask", step.mask)):
            if extra is not None and (extra.is_floating_point() or extra.shape != (rows, count)):
                raise BadTensor(f"{name} of shape {list(extra.shape)} and {extra.dtype}; integers [B, N] are taken")

    def _rewind(self, state: SessionState, step: StepInput) -> None:
        """Forget what lies after the step's position, and continue the rows it names: once, however often it comes."""
        if step.position == 0:
            state.cache, state.mask, state.rows = state.model.new_cache(), None, step.hidden.shape[0]
        elif step.position < state.length:
            rollback(state.cache, step.position)
        state.length = step.position
        state.mask = state.mask[:, : step.position] if state.mask is not None else None
        if step.rows is not None and step.number == state.number + 1 and step.position:
            index = torch.tensor(step.rows)
            reorder(state.cache, index.to(self.model.device))
            state.mask = state.mask[index] if state.mask is not None else None
            state.number, state.rows = step.number, len(step.rows)

    def _extended_mask(self, state: SessionState, step: StepInput) -> torch.Tensor | None:
        """[B, position + N], or None while there is no padding at all."""
        if state.mask is None and step.mask is None:
            return None
        rows, count = step.hidden.shape[:2]
        before, now = state.mask, step.mask
        if before is None:
            before = torch.ones(rows, step.position, dtype=torch.int64)
        if now is None:
            now = torch.ones(rows, count, dtype=torch.int64)
        return torch.cat([before.to(torch.int64), now.to(torch.int64)], dim=1).to(self.model.device)

    def __repr__(self) -> str:
        return f"<Stage {self.span} {self.model!r}>"
