"""A trainer's part in the rounds: take micro-batches, say what is under way, vote. Pure: see `swarm.rounds`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from swarm.agreement.assignments import Plan
from swarm.agreement.cohort import SILENCE
from swarm.agreement.messages import Join, Lent, Take, Work
from swarm.agreement.participant import Participant
from swarm.rounds import BEAT
from swarm.types import PeerId


@dataclass(slots=True)
class _Loans:
    """What was lent of one round."""

    holding: dict[int, int] = field(default_factory=dict)  # index: lease, of what is not done with
    seen: int = 0  # the highest lease

    def take(self, lent: list[Lent]) -> list[Lent]:
        """What of it is new."""
        fresh = [each for each in lent if each.lease > self.seen]
        self.holding |= {each.index: each.lease for each in fresh}
        self.seen = max([self.seen, *(each.lease for each in lent)])
        return fresh


class Borrower(Participant):
    """One trainer.

    Args:
        want: how many micro-batches it would have under way at once.
    """

    def __init__(self, plan: Plan, me: PeerId, want: int, now: float) -> None:
        super().__init__(plan, me, now)
        self.want = want
        self.todo: deque[tuple[int, Lent]] = deque()  # (round, what is lent of it), not yet begun
        self._loans: dict[int, _Loans] = {}  # of the round that is collected, and of the next
        self._line = b""
        self._handlers[Work] = self._lent
        self._asked = now

    def done(self, round_: int, lent: Lent, now: float) -> None:
        """It was run, or could not be: members say which are counted, and what is not is lent again."""
        if round_ in self._loans and self._loans[round_].holding.get(lent.index) == lent.lease:
            del self._loans[round_].holding[lent.index]
            self._ask_for_work(now)

    def tick(self, now: float) -> None:
        super().tick(now)
        if sum(len(loans.holding) for loans in self._loans.values()) < self.want and now - self._asked >= BEAT:
            self._ask_for_work(now)

    def _lent(self, sender: PeerId, work: Work, now: float) -> None:
        for round_, lent in ((self.round, work.lent), (self.round + 1, work.ahead)):
            self.todo.extend((round_, fresh) for fresh in self._of(round_).take(lent))

    def _of(self, round_: int) -> _Loans:
        return self._loans.setdefault(round_, _Loans())

    def _ask_for_work(self, now: float) -> None:
        if self.previous is not None and self.coordinating is not None:
            self._answer(self.coordinating, now)

    def _answer(self, sender: PeerId, now: float) -> None:
        assert self.previous is not None
        self._asked = now
        line, number = self.previous.roster.line, self._next_number()
        now_, next_ = self._of(self.round), self._of(self.round + 1)
        holding, ahead = sorted(now_.holding.items()), sorted(next_.holding.items())
        take = Take(line, self.round, self._promised, number, self.want, now_.seen, holding, next_.seen, ahead)
        self._send(sender, take)

    def _entered(self, now: float) -> None:
        assert self.previous is not None
        if self.previous.roster.line != self._line:
            self._line = self.previous.roster.line
            self._loans.clear()
        self._loans = {round_: loans for round_, loans in self._loans.items() if round_ >= self.round}
        self.todo = deque((round_, lent) for round_, lent in self.todo if round_ in self._loans)
        if self.seated:
            self._ask_for_work(now)

    def _is_outside(self, now: float) -> bool:
        # It never stands for election, and a coordinator that has lost it calls it no more: so it asks who there is.
        return super()._is_outside(now) or now - self._heard >= SILENCE

    def _call(self, now: float) -> None:
        for peer in self._whom_to_call(now):
            self._send(peer, Join(self.plan.run, None, None, [], -1, b""))
