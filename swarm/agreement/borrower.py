"""A trainer's part in the rounds: take micro-batches, say what is under way, vote. Pure: see `swarm.rounds`."""

from __future__ import annotations

from collections import deque

from swarm.agreement.assignments import Plan
from swarm.agreement.messages import Join, Lent, Take, Work
from swarm.agreement.participant import Participant
from swarm.rounds import BEAT
from swarm.types import PeerId


class Borrower(Participant):
    """One trainer.

    Args:
        want: how many micro-batches it would have under way at once.
    """

    def __init__(self, plan: Plan, me: PeerId, want: int, now: float) -> None:
        super().__init__(plan, me, now)
        self.want = want
        self.todo: deque[Lent] = deque()  # lent, and not yet begun
        self._holding: dict[int, int] = {}  # index: lease, of what is not done with
        self._seen = 0  # the highest lease of this round
        self._handlers[Work] = self._lent
        self._asked = now

    def done(self, round_: int, lent: Lent, now: float) -> None:
        """It was run, or could not be: members say which are counted, and what is not is lent again."""
        if round_ == self.round and self._holding.get(lent.index) == lent.lease:
            del self._holding[lent.index]
            self._ask_for_work(now)

    def tick(self, now: float) -> None:
        super().tick(now)
        if len(self._holding) < self.want and now - self._asked >= BEAT:
            self._ask_for_work(now)

    def _lent(self, sender: PeerId, work: Work, now: float) -> None:
        for lent in work.lent:
            if lent.lease > self._seen:
                self._holding[lent.index] = lent.lease
                self.todo.append(lent)
        self._seen = max([self._seen, *(lent.lease for lent in work.lent)])

    def _answer(self, coordinator: PeerId, now: float) -> None:
        self._ask_for_work(now)

    def _ask_for_work(self, now: float) -> None:
        self._asked = now
        if self.previous is None or self.coordinating is None:
            return
        holding = sorted(self._holding.items())
        line, number = self.previous.roster.line, self._next_number()
        take = Take(line, self.round, self._promised, number, self.want, self._seen, holding)
        self._send(self.coordinating, take)

    def _entered(self, now: float) -> None:
        self.todo.clear()
        self._holding.clear()
        self._seen = 0
        if self.seated:
            self._ask_for_work(now)

    def _call(self, now: float) -> None:
        for peer in self._whom_to_call(now):
            self._send(peer, Join(self.plan.run, None, None, [], -1, b""))
