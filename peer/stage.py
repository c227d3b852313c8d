"""A span of blocks on a device, and the sessions whose keys and values it holds: steps in, hidden states out.

What is ready of several sessions runs as one ragged forward (`swarm.batching.ragged`), with keys and values in pages of
one pool. Families that cannot be run so have a cache per session and run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peer.kv.pages import Pages, Tables
from peer.kv.prefixes import Prefixes, Trail
from swarm.batching.pool import Kept, Pool
from swarm.batching.ragged import Batch, Part
from swarm.cutting.caches import SessionCache
from swarm.errors import BadTensor, BeyondCache
from swarm.model import StageModel, reorder, rollback
from swarm.tensors import all_finite
from swarm.types import Span

PAGE = 16  # positions
DEFAULT_TOKENS = 16384  # of the pool, where nobody says otherwise


@dataclass(slots=True)
class StepInput:
    """What `Stage.run` needs of a step. Shapes: B rows, N positions, H hidden size."""

    number: int
    position: int
    hidden: torch.Tensor  # [B, N, H]
    rows: list[int] | None = None  # [B], which earlier rows the present ones continue
    position_ids: torch.Tensor | None = None  # [B, N]
    mask: torch.Tensor | None = None  # [B, N], 1 for a token and 0 for padding
    since: int | None = None  # the step that it builds on; None for the one before it

    def builds_on(self, number: int) -> bool:
        """Whether it goes on, or comes again, where step `number` was the last: what it takes for granted is there."""
        return number in (self.number, self._base)

    def moves_rows(self, number: int) -> bool:
        """Whether its rows are to be picked where step `number` was the last: once, however often it comes."""
        return self.rows is not None and self.position > 0 and number == self._base != self.number

    @property
    def _base(self) -> int:
        return self.number - 1 if self.since is None else self.since

    def joined(self, after: StepInput) -> StepInput | None:
        """Both in one; None unless `after` builds on this one, goes on where it ends, and is like it."""
        follows = after.since == self.number and after.position == self.position + self.hidden.shape[1]
        parts = [(self.hidden, after.hidden), (self.position_ids, after.position_ids), (self.mask, after.mask)]
        alike = all((a is None) == (b is None) for a, b in parts) and len(self.hidden) == len(after.hidden)
        if not follows or not alike or after.rows is not None:
            return None
        hidden, ids, mask = (None if a is None or b is None else torch.cat([a, b], 1) for a, b in parts)
        assert hidden is not None
        return StepInput(after.number, self.position, hidden, self.rows, ids, mask, self.since)

    def piece(self, start: int, end: int) -> StepInput:
        """Its positions `start` to `end`, counted from its own first."""
        if (start, end) == (0, self.hidden.shape[1]):
            return self
        ids, mask = self.position_ids, self.mask
        return StepInput(
            self.number,
            self.position + start,
            self.hidden[:, start:end],
            self.rows if start == 0 else None,
            None if ids is None else ids[:, start:end],
            None if mask is None else mask[:, start:end],
            self.since,
        )


@dataclass(slots=True, eq=False)
class SessionState:
    """One session as this stage holds it. Only the compute thread touches it."""

    model: StageModel  # the part of the stage that it uses
    batch: int  # rows, at most
    max_length: int  # positions, at most
    tables: Tables | None = None  # its pages of the pool
    cache: SessionCache | None = None  # or, for families that run one by one, a cache of its own
    number: int = 0  # of the last step that was run
    length: int = 0  # positions that it holds now
    rows: int = 0  # of the batch that it holds now
    mask: torch.Tensor | None = None  # [rows, length], None while there is no padding
    owner: str = ""  # whose pages it may use again, and who may use its
    trail: Trail | None = None  # what came in, as long as its pages can be used again
    out: list[list[Kept]] | None = None  # what its rows hold, block by block, while that is in host memory

    def forget(self) -> None:
        """Nothing was ever run in it."""
        if self.tables is not None:
            self.tables.truncate(0)
        else:
            self.cache = self.model.new_cache()
        self.mask, self.length, self.number, self.trail, self.out = None, 0, 0, None, None


Work = tuple[SessionState, StepInput]


class Stage:
    """Blocks on a device. Not for two threads at once: `peer.executor` sees to that.

    Args:
        model: the blocks.
        tokens: positions that the pool has room for, of all sessions together.
        dtype: of what the pool keeps; None for the blocks' own.
        padded: whether short steps attend together, as on a GPU; None for what suits the device.
    """

    def __init__(
        self,
        model: StageModel,
        tokens: int = DEFAULT_TOKENS,
        dtype: torch.dtype | None = None,
        padded: bool | None = None,
    ) -> None:
        self.model = model
        self._padded = padded
        self.span = model.span
        self.ran = 0  # tokens that went through the blocks
        self.reused = 0  # tokens that did not have to
        self._dtype = dtype
        self.reserve(tokens)

    @property
    def batches(self) -> bool:
        """Whether steps of several sessions run together."""
        return not self.model.unbatched

    def reserve(self, tokens: int) -> None:
        """Make room for so many positions. For a stage without sessions."""
        count = -(-tokens // PAGE)
        self.pages = Pages(count, PAGE)
        self.pool = Pool(count * PAGE, self.model.device, self._dtype)
        self._prefixes = Prefixes(self.pages)

    def open(self, span: Span, batch: int, max_length: int, owner: str = "") -> SessionState:
        """An empty session over `span`, which may be a part of this stage's.

        Sessions of the same `owner` that begin alike share what they have in common; without one it shares nothing.
        """
        model = self.model.part(span)
        state = SessionState(model, batch, max_length, owner=owner)
        if self.batches:
            state.tables = Tables(self.pages, id(state), batch, max_length)
        else:
            state.cache = model.new_cache()
        return state

    def close(self, state: SessionState) -> None:
        """Give back what the session holds."""
        if state.tables is not None:
            state.tables.close()

    def put_out(self, state: SessionState) -> None:
        """Move what the session holds to host memory, until its next step. A cache of its own stays where it is."""
        if (tables := state.tables) is not None and state.out is None and state.length:
            state.out = [self.pool.take_out(tables.runs(row, state.length)) for row in range(state.rows)]
            tables.truncate(0)

    def _bring_back(self, state: SessionState) -> None:
        if state.out is None or state.tables is None:
            return
        state.tables.set_rows(state.rows)
        state.tables.grow(0, state.length)
        for row, kept in enumerate(state.out):
            self.pool.put_back(kept, state.tables.runs(row, state.length))
        state.out = None

    def bytes_per_token(self, state: SessionState) -> int:
        """What a position of a session that has some takes in memory."""
        if state.cache is not None:
            return -(-state.cache.nbytes() // max(state.length, 1))
        return self.pool.bytes_per_slot()

    def run(self, state: SessionState, step: StepInput) -> torch.Tensor:
        """`run_all` of one step, raising what went wrong."""
        output = self.run_all([(state, step)])[0]
        if isinstance(output, Exception):
            raise output
        return output

    @torch.inference_mode()
    def run_all(self, works: Sequence[Work]) -> list[torch.Tensor | Exception]:
        """Make each step its session's content from its position on, and run it. One step a session.

        Safe to call twice with the same step: the second time rewrites the same positions.

        Returns:
            For each step [B, N, H], in the stage's dtype, or what is wrong with it:
            `BeyondCache` if it leaves a gap before it or does not fit into the lease; `BadTensor` for a wrong shape or
            dtype, or values that are not finite. The session is then as it was.
        """
        outcomes: list[torch.Tensor | Exception] = []
        for state, step in works:
            try:
                self._check(state, step)
                outcomes.append(step.hidden)
            except (BeyondCache, BadTensor) as error:
                outcomes.append(error)
        good = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, torch.Tensor)]
        for group in self._groups([(index, works[index]) for index in good]):
            chosen = [works[index] for index in group]
            for index, output in zip(group, self._attempt(chosen), strict=True):
                outcomes[index] = output
        return outcomes

    def _groups(self, works: Sequence[tuple[int, Work]]) -> list[list[int]]:
        """Which of them run in one forward: those over the same blocks."""
        if not self.batches:
            return [[index] for index, _ in works]
        groups: dict[Span, list[int]] = {}
        for index, (state, _) in works:
            groups.setdefault(state.model.span, []).append(index)
        return list(groups.values())

    def _attempt(self, works: Sequence[Work]) -> Sequence[torch.Tensor | Exception]:
        try:
            outputs = self._run_together(works) if self.batches else [self._run_alone(*works[0])]
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this batch's alone
            for state, _ in works:  # some layers hold the new positions, some do not: only a replay can help
                state.forget()
            return [error] * len(works)
        for state, step in works:
            state.length = step.position + step.hidden.shape[1]
            state.number = step.number
        return outputs

    def _run_together(self, works: Sequence[Work]) -> list[torch.Tensor]:
        """One ragged forward: the rows of all steps one after another."""
        model, device = works[0][0].model, self.model.device
        parts, positions, hidden = list[Part](), list[int](), list[torch.Tensor]()
        known = list[list[torch.Tensor]]()  # of each step's first positions, what comes of them
        for state, step in works:
            self._rewind(state, step)
            known.append(self._reuse(state, step))
            rest = step.piece(sum(each.shape[1] for each in known[-1]), step.hidden.shape[1])
            if rest.hidden.shape[1]:
                parts += self._parts(state, rest)
                positions += _positions(rest)
            hidden.append(rest.hidden.reshape(1, -1, model.hidden_size).to(device, model.dtype))
        together = hidden[0] if len(hidden) == 1 else torch.cat(hidden, 1)
        if parts:
            batch = Batch(parts, self.pool, model.span.start - self.span.start, self._padded)
            output = model.forward_batch(together, torch.tensor([positions], device=device), batch)
        else:
            output = together
        self.ran += output.shape[1]
        pieces = torch.split(output, [one.shape[1] for one in hidden], 1) if len(works) > 1 else [output]
        outputs = [
            torch.cat([*before, piece], 1) if before else piece for before, piece in zip(known, pieces, strict=True)
        ]
        for (state, step), before, piece in zip(works, known, pieces, strict=True):
            self._remember(state, step.hidden[:, sum(each.shape[1] for each in before) :], piece)
        return [output.reshape(step.hidden.shape) for output, (_, step) in zip(outputs, works, strict=True)]

    def _reuse(self, state: SessionState, step: StepInput) -> list[torch.Tensor]:
        """Take the pages that begin as the step does, and were run before; returns what came of them then."""
        tables, trail = state.tables, state.trail
        if trail is None or tables is None or trail.heads or step.hidden.shape[1] < PAGE:
            return []
        pages, outputs = self._prefixes.find(trail, step.hidden)
        tables.adopt(pages)
        self.reused += PAGE * len(pages)
        return outputs

    def _remember(self, state: SessionState, hidden: torch.Tensor, output: torch.Tensor) -> None:
        if state.trail is not None and state.tables is not None and hidden.shape[1]:
            self._prefixes.add(state.trail, state.tables.pages(0), hidden, output)

    def _parts(self, state: SessionState, step: StepInput) -> list[Part]:
        """A part of the batch for each row, with room for what it adds."""
        rows, count, _ = step.hidden.shape
        end = step.position + count
        tables, mask = state.tables, self._extended_mask(state, step)
        assert tables is not None
        self.pool.copy(tables.grow(step.position, end))
        state.mask = mask
        real = [None if mask is None or bool(mask[row].all()) else mask[row].bool() for row in range(rows)]
        return [Part(step.position, count, tables.runs(row, end), real[row]) for row in range(rows)]

    def _run_alone(self, state: SessionState, step: StepInput) -> torch.Tensor:
        self._rewind(state, step)
        mask = self._extended_mask(state, step)
        assert state.cache is not None
        output = state.model.forward(
            step.hidden.to(self.model.device, self.model.dtype),
            position=step.position,
            cache=state.cache,
            attention_mask=None if mask is None else mask.to(self.model.device),
            position_ids=step.position_ids,
        )
        state.mask = mask
        self.ran += step.hidden.shape[0] * step.hidden.shape[1]
        return output

    def _check(self, state: SessionState, step: StepInput) -> None:
        hidden = step.hidden
        if hidden.ndim != 3 or 0 in hidden.shape or hidden.shape[2] != self.model.hidden_size:
            raise BadTensor(f"hidden states of shape {list(hidden.shape)}; [B, N, {self.model.hidden_size}] are taken")
        if not hidden.is_floating_point() or not all_finite(hidden):
            raise BadTensor("hidden states that are not finite numbers")
        rows, count = hidden.shape[:2]
        missed = step.position > 0 and not step.builds_on(state.number)
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
        picks = step.moves_rows(state.number)
        if step.rows is not None and (len(step.rows) != rows or (picks and max(step.rows) >= held)):
            raise BadTensor(f"rows {step.rows} do not continue the session's {held}")
        if not picks and held != rows:
            raise BadTensor(f"{rows} rows, the session has {held}")
        for name, extra in (("position ids", step.position_ids), ("mask", step.mask)):
            if extra is not None and (extra.is_floating_point() or extra.shape != (rows, count)):
                raise BadTensor(f"{name} of shape {list(extra.shape)} and {extra.dtype}; integers [B, N] are taken")

    def _rewind(self, state: SessionState, step: StepInput) -> None:
        """Forget what lies after the step's position, and continue the rows it names: once, however often it comes."""
        self._bring_back(state)
        if step.position == 0:
            state.rows = step.hidden.shape[0]
            state.mask = None
        if state.tables is not None:
            state.tables.truncate(step.position)
            if step.position == 0:
                state.tables.set_rows(state.rows)
        elif state.cache is not None:
            if step.position == 0:
                state.cache = state.model.new_cache()
            elif step.position < state.length:
                rollback(state.cache, step.position)
        state.length = step.position
        state.mask = state.mask[:, : step.position] if state.mask is not None else None
        self._follow(state, step)
        if step.rows is not None and step.moves_rows(state.number):
            self._reorder(state, step.rows)
            state.number = step.number

    def _follow(self, state: SessionState, step: StepInput) -> None:
        """Keep the trail to what the session holds; only plain sessions of one row have one."""
        plain = step.hidden.shape[0] == 1 and step.rows is None and step.mask is None and step.position_ids is None
        if step.position == 0 and state.owner and state.tables is not None:
            state.trail = Trail.of(state.owner, state.model.span)
        if state.trail is not None and not (plain and state.trail.truncate(step.position, PAGE)):
            state.trail = None

    def _reorder(self, state: SessionState, rows: list[int]) -> None:
        if state.tables is not None:
            state.tables.reorder(rows)
        elif state.cache is not None:
            reorder(state.cache, torch.tensor(rows, device=self.model.device))
        state.mask = state.mask[torch.tensor(rows)] if state.mask is not None else None
        state.rows = len(rows)

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
        return torch.cat([before.to(torch.int64), now.to(torch.int64)], dim=1)

    def __repr__(self) -> str:
        how = self.pages if self.batches else "one by one"
        return f"<Stage {self.span} {self.model!r} {how!r}>"


def _positions(step: StepInput) -> list[int]:
    """For the rotary tables and their like, row after row."""
    rows, count, _ = step.hidden.shape
    if step.position_ids is not None:
        return [int(each) for each in step.position_ids.flatten().tolist()]
    return list(range(step.position, step.position + count)) * rows
