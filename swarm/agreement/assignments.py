"""Which micro-batch of a round is with which trainer, and which are counted where. Pure: the clock is passed in.

Micro-batch `index` of round r is always the same samples, whoever runs it: so it may be lent twice without harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from swarm.agreement.messages import Lent
from swarm.types import PeerId

LEAST_SECONDS = 5.0  # before a trainer that lives is thought too slow
MULTIPLE = 6.0  # of the usual time of a micro-batch
HALVINGS = 24  # of a loss scale, from the largest there is to 1
UNTOLD_SECONDS = 1.0  # between a trainer's end with a micro-batch and the last member's word that it is counted


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run fixes of its rounds.

    Attributes:
        run: the hash of all that must agree.
        stages: how many there are.
        samples: of a round.
        micro_batch: samples of a micro-batch; the last of a round may have fewer.
        tied: whether the first and the last stage share an embedding, whose gradient they add up.
        clip: the global norm of the mean gradient is at most this; 0 for no clipping.
        patience: skipped rounds in a row, after which the run stops; of those with a scaled loss, once its scale is 1.
        scaled: whether losses are scaled (fp16), so that gradients are not finite now and then and nobody is to blame.
        robust: how replicas' gradients become one: "none" (the exact mean), "clip" or "trimmed".
        dtype: of gradients on the wire: "float32", "float16" or "int8".
        overlap: whether the next round is collected while one averages, with the parameters from before its step.
        rounds: how many there are; 0 for no end.
    """

    run: bytes
    stages: int
    samples: int
    micro_batch: int
    tied: bool = False
    clip: float = 1.0
    patience: int = 3
    scaled: bool = False
    robust: str = "none"
    dtype: str = "float16"
    overlap: bool = False
    rounds: int = 0

    @property
    def longest_skipping(self) -> int:
        """Skipped rounds in a row, of which the last one stops the run."""
        return self.patience + (HALVINGS if self.scaled else 0)

    @property
    def count(self) -> int:
        """Micro-batches of a round."""
        return -(-self.samples // self.micro_batch)

    def is_ahead(self, round_: int, collected: int) -> bool:
        """Whether micro-batches of a round are taken already while `collected` has not ended."""
        return self.overlap and round_ == collected + 1 and (not self.rounds or round_ < self.rounds)

    def size(self, index: int) -> int:
        """Samples of a micro-batch."""
        return min(self.micro_batch, self.samples - index * self.micro_batch)

    def samples_of(self, indices: Iterable[int]) -> int:
        """Samples of these micro-batches together."""
        return sum(map(self.size, indices))


def to_bits(indices: Iterable[int]) -> bytes:
    """A set of indices as a little-endian bit field, as short as can be."""
    number = 0
    for index in indices:
        number |= 1 << index
    return number.to_bytes(-(-number.bit_length() // 8), "little")


def from_bits(bits: bytes) -> frozenset[int]:
    """The set of indices in a bit field."""
    number = int.from_bytes(bits, "little")
    return frozenset(index for index in range(number.bit_length()) if number >> index & 1)


@dataclass(slots=True)
class _Loan:
    trainer: PeerId
    lease: int
    since: float
    ended: float | None = None  # when the trainer was first heard to have done with it


class Assignments:
    """The micro-batches of one round.

    Args:
        lent: which of them were lent before; None where that is not known.
    """

    def __init__(self, plan: Plan, lent: Iterable[int] | None = ()) -> None:
        self._plan = plan
        self.lent = None if lent is None else set(lent)  # ever
        self._loans: dict[int, _Loan] = {}
        self._leases = 0
        self._usual = LEAST_SECONDS / MULTIPLE  # seconds from lending to the last count
        self.complete: frozenset[int] = frozenset()  # counted in every stage

    def hear(self, trainer: PeerId, seen: int, holding: Sequence[tuple[int, int]], now: float) -> None:
        """What a trainer says it has under way. What a coordinator before us lent it, counts as lent."""
        self._leases = max(self._leases, seen)
        for index, lease in holding:
            if index < self._plan.count and index not in self._loans and index not in self.complete:
                self._loans[index] = _Loan(trainer, lease, now)
        said = dict(holding)
        for index, loan in self._loans.items():
            if loan.trainer == trainer and loan.lease <= seen and said.get(index) != loan.lease:
                loan.ended = now if loan.ended is None else loan.ended

    def count(self, complete: frozenset[int], now: float) -> None:
        """These are counted in every stage. What was and is no longer (its holder is gone) is to be lent again."""
        for index in complete - self.complete:
            if (loan := self._loans.pop(index, None)) is not None:
                self._usual = 0.8 * self._usual + 0.2 * (now - loan.since)
        self.complete = complete

    def forget(self, trainer: PeerId) -> None:
        """A trainer is not heard of any more: what it was lent is free."""
        self._loans = {index: loan for index, loan in self._loans.items() if loan.trainer != trainer}

    def take(self, trainer: PeerId, want: int, holders: Mapping[int, list[str]], now: float) -> list[Lent]:
        """All that is lent to `trainer`, topped up to `want` micro-batches."""
        mine = [index for index, loan in self._loans.items() if loan.trainer == trainer and loan.ended is None]
        for index in range(self._plan.count):
            if len(mine) >= want:
                break
            if index not in mine and self._is_free(index, now):
                self._leases += 1
                self._loans[index] = _Loan(trainer, self._leases, now)
                mine.append(index)
                if self.lent is not None:
                    self.lent.add(index)
        return [Lent(index, self._loans[index].lease, holders.get(index, [])) for index in sorted(mine)]

    def unlent(self, indices: Iterable[int]) -> frozenset[int]:
        """Those of them that nobody can have run, because they were never lent or there are none such."""
        lent = range(self._plan.count) if self.lent is None else self.lent
        return frozenset(index for index in indices if index not in lent)

    def _is_free(self, index: int, now: float) -> bool:
        if index in self.complete:
            return False
        if (loan := self._loans.get(index)) is None:
            return True
        if loan.ended is not None:
            return now - loan.ended > UNTOLD_SECONDS
        return now - loan.since > max(LEAST_SECONDS, MULTIPLE * self._usual)

    def __repr__(self) -> str:
        return f"<Assignments lent={len(self._loans)} complete={len(self.complete)}/{self._plan.count}>"
