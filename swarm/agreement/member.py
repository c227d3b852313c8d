"""A member's part in the rounds: count, close, average, and step when it was decided. Pure: see `swarm.rounds`.

What it wants done is in `effects`, in order; whoever does it says so by `averaged`, `holds` and `voided`. Micro-batches
are announced by `begin` and ended by `counted` or `gave_up`, so that a member that has closed has none under way.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection

from swarm.agreement.assignments import Plan, to_bits
from swarm.agreement.cohort import GIVE_UP, SILENCE
from swarm.agreement.effects import Abandon, Apply, Average, Effect, Fetch, Restore, Settled, Void
from swarm.agreement.judgement import digest_of
from swarm.agreement.messages import (
    MAX_MEMBERS,
    MAX_SAVED,
    Agreed,
    Chosen,
    Decision,
    Join,
    Order,
    Report,
    Roster,
    Seat,
    Status,
)
from swarm.agreement.participant import Participant
from swarm.agreement.roster import first, members, seats_of, stages
from swarm.errors import NotReady, StaleRound
from swarm.rounds import Phase
from swarm.types import PeerId
from swarm.wire import Endpoint

SETTLE = 2.0  # seconds that a peer looks for a run that goes on before it begins one


class _Tally:
    """Of one round, the micro-batches that are in the sum, and those that are about to be."""

    def __init__(self) -> None:
        self.counted: set[int] = set()
        self.under_way: set[int] = set()


class Member(Participant):
    """One peer that holds a stage of the run.

    Args:
        stage: which.
        endpoint: where it listens.
        line: 16 random bytes, the name of the line if it is this peer that begins the run; of the next, their hash.
        saved: tells the rounds at whose beginning it can start (0 for fresh parameters from the run's seed).
    """

    def __init__(
        self,
        plan: Plan,
        stage: int,
        endpoint: Endpoint,
        line: bytes,
        now: float,
        saved: Callable[[], Collection[int]] = lambda: (0,),
    ) -> None:
        super().__init__(plan, PeerId(endpoint.peer), now)
        self.stage = stage
        self.endpoint = endpoint
        self.effects: list[Effect] = []
        self.bandwidth = 0.0  # bytes a second, as measured in the last attempts
        self.steps = 0  # of the optimizer, that the state has had which is held
        self._line = line
        self._saved = saved
        self._held = -1  # the round at whose beginning the state is that is held; -1 for none
        self._digest = b""
        self._fetching = False
        self._stepping = False  # while it applies a decision or restores
        self._tally = _Tally()
        self._ahead = _Tally()  # of the next round
        self._of_line = b""  # what both are of
        self._sums = 1
        self._voiding = False
        self._attempt: tuple[int, int] | None = None  # (term, number) of what is being averaged, or was
        self._report: Report | None = None
        self._seekers: dict[PeerId, tuple[Join, float]] = {}  # who looks for the run as this does
        self._alone_since = now

    # --- micro-batches -----------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether it holds the state of the round that is collected, and has a place in it."""
        return self.seated and self._held == self.round and not self._fetching

    @property
    def crowded_out(self) -> bool:
        """Whether the run has as many members as can be, and this is none of them: it waits for one to leave."""
        return self.previous is not None and not self.seated and len(self.previous.roster.members) >= MAX_MEMBERS

    @property
    def held(self) -> int:
        """The round at whose beginning the state is that is held; -1 for none."""
        return self._held

    @property
    def counted_indices(self) -> frozenset[int]:
        """The micro-batches in the sum."""
        return frozenset(self._tally.counted)

    def begin(self, round_: int, index: int) -> bool:
        """A micro-batch of this round is about to be run backward; whether it is to be added to the sum.

        False where it is counted already: then only its gradient for the stage before is wanted.
        Raises `StaleRound`, or `NotReady` where this member is not as far yet.
        """
        self.check(round_)
        if not 0 <= index < self.plan.count:
            raise StaleRound(f"there is no micro-batch {index} in a round")
        tally = self._tally if round_ == self.round else self._ahead
        if index in tally.counted or index in tally.under_way:
            return False
        if tally is self._tally and (self._closed >= 0 or self._voiding):
            raise StaleRound(f"round {round_} is closed")
        tally.under_way.add(index)
        return True

    def check(self, round_: int) -> None:
        """Whether micro-batches of this round are taken here and now. Raises `StaleRound` or `NotReady`."""
        if not self.ready or not self.reaches(round_):
            raise NotReady(f"round {round_} has not begun here")
        if round_ < self.round:
            raise StaleRound(f"round {round_} is over, {self.round} is collected")

    def reaches(self, round_: int) -> bool:
        """Whether that round is over, collected, or the next one that is begun already."""
        return round_ <= self.round or self.plan.is_ahead(round_, self.round)

    def counted(self, round_: int, index: int, now: float) -> None:
        """It is in the sum."""
        if (tally := self._tally_with(round_, index)) is not None:
            tally.under_way.discard(index)
            tally.counted.add(index)
            self._tell(now)

    def gave_up(self, round_: int, index: int, now: float) -> None:
        """It is not in the sum: something failed."""
        if (tally := self._tally_with(round_, index)) is not None:
            tally.under_way.discard(index)
            self._tell(now)

    def _tally_with(self, round_: int, index: int) -> _Tally | None:
        """The tally in which a micro-batch is under way."""
        tally = {self.round: self._tally, self.round + 1: self._ahead}.get(round_)
        return tally if tally is not None and index in tally.under_way else None

    @property
    def _closed(self) -> int:
        """The attempt for which it counts no more, -1 where it still counts."""
        order = self.order
        return order.attempt if order is not None and order.phase > Phase.COLLECT else -1

    # --- what was done -----------------------------------------------------------------------------------------------

    def holds(self, round_: int, digest: bytes, now: float) -> None:
        """The state is now that of the beginning of `round_`; `digest` of it, empty until it is computed."""
        self._held = round_
        self._digest = digest
        self._stepping = False
        self._settle()
        self._tell(now)

    def averaged(self, report: Report, now: float) -> None:
        """How an attempt went."""
        if (report.term, report.attempt) == self._attempt:
            self._report = report
            self._tell(now)

    def voided(self, round_: int, now: float) -> None:
        """The sums of a round are forgotten."""
        if round_ == self.round:
            self._voiding = False
            self._tally.counted.clear()
            self._sums += 1
        elif round_ == self.round + 1:
            self._ahead.counted.clear()
        self._tell(now)

    def failed_to_fetch(self, now: float) -> None:
        """None of the sources gave its state: ask others."""
        self._fetching = False
        self._alone_since = now

    # --- orders ------------------------------------------------------------------------------------------------------

    def _follow(self, order: Order, now: float) -> None:
        super()._follow(order, now)
        if not self.ready:
            self._catch_up()
            return
        if dict(order.void).get(self.me, 0) >= self._sums and not self._voiding:
            self._voiding = True
            self._drop_attempt()
            self.effects.append(Void(self.round))
        if order.phase in (Phase.COLLECT, Phase.CLOSE):
            self._drop_attempt()
        elif order.phase == Phase.AVERAGE and self._attempt != (order.term, order.attempt):
            self._drop_attempt()
            if any(share.peer == self.me for share in order.shares) and self._adds_up(order):
                self._attempt = order.term, order.attempt
                self.effects.append(Average(order))

    def _adds_up(self, order: Order) -> bool:
        """Whether the weights are those of a round: nobody's can be more than it could have counted."""
        samples = Counter[int]()
        for share in order.shares:
            samples[share.stage] += share.samples
        return [samples[stage] for stage in range(self.plan.stages)] == [self.plan.samples] * self.plan.stages

    def _drop_attempt(self) -> None:
        if self._attempt is not None:
            self.effects.append(Abandon())
        self._attempt = self._report = None

    def _answer(self, sender: PeerId, now: float) -> None:
        if self.seated:
            self._send(sender, self.status())

    def _tell(self, now: float) -> None:
        """Something changed: whoever coordinates is to know at once."""
        if not self.seated:
            self._call(now)
        elif self.coordinating is not None:
            self._send(self.coordinating, self.status())
        self._deliver(now)

    def status(self) -> Status:
        """All that a coordinator has to know."""
        assert self.previous is not None
        closed = self._closed if not self._tally.under_way and not self._voiding else -1
        return Status(
            line=self.previous.roster.line,
            round=self.round,
            term=self._promised,
            number=self._next_number(),
            ready=self.ready,
            closed=closed,
            counted=to_bits(self._tally.counted),
            sums=self._sums,
            report=self._report,
            digest=self._digest if self._held == self.round else b"",
            bandwidth=self.bandwidth,
            ahead=to_bits(self._ahead.counted),
            stepping=self._stepping,
            steps=self.steps,
        )

    # --- decisions ---------------------------------------------------------------------------------------------------

    def _entered(self, now: float) -> None:
        decision = self.previous
        assert decision is not None
        self._tally, self._ahead = self._ahead, _Tally()  # a step carries over what was summed ahead of it
        self._voiding = False
        self._sums = 1
        if self._may_apply(decision):
            self._step(Apply(decision))
        else:
            self._drop_attempt()
            self._count_anew()
        self._attempt = self._report = None
        self._of_line = decision.roster.line
        self._settle()
        self._catch_up()

    def _count_anew(self) -> None:
        """Nothing is counted where a state is fetched; nor where another line begins at what is held here."""
        self._tally = _Tally()
        assert self.previous is not None
        if self._held == self.round and self._of_line != self.previous.roster.line:
            self._voiding = True
            self.effects += [Void(self.round), Void(self.round + 1)]

    def _step(self, effect: Apply | Restore) -> None:
        self._stepping = True
        self.effects.append(effect)

    def _may_apply(self, decision: Decision) -> bool:
        """Whether this member can make the step that was decided, and is to."""
        if self._held != decision.round or self._fetching or self._stepping or not self.seated:
            return False
        if decision.outcome != "commit":
            return decision.outcome != "begin" or self._held < 0
        report = self._report
        if report is None or (report.term, report.attempt) != (decision.term, decision.attempt):
            return False
        mine = [Agreed(average.group, digest_of(average)) for average in report.averages]
        return all(each in decision.agreed for each in mine)

    def _can_coordinate(self) -> bool:
        return self.seated

    def _settle(self) -> None:
        if self._fetching and self.seated and self._held == self.round:
            self._fetching = False
            self.effects.append(Settled())

    def _catch_up(self) -> None:
        """Get the state that the others hold, where it is not held and nothing is being done about it."""
        if self.previous is None or self._held == self.round or self._fetching or self._stepping:
            return
        if self.previous.outcome == "begin" and self.round in self._saved():
            self._step(Restore(self.round))
            return
        where = stages(self.previous.roster)
        sources = [peer for peer in members(self.previous.roster) if where[peer] == self.stage and peer != self.me]
        if sources:
            self._fetching = True
            self.effects.append(Fetch(tuple(sources), self.previous.roster))

    # --- without a place in the roster -------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        super().tick(now)
        if self.previous is not None and self._is_left(now):
            self._leave(now)
        if self.previous is None and now - self._alone_since > SETTLE:
            self._begin_run(now)

    def _is_left(self, now: float) -> bool:
        """Whether nobody coordinates any more, or it is this one and too few are there to decide with."""
        if self.coordinator is None:
            return now - self._heard > GIVE_UP
        return self.coordinator.proposing(now) > GIVE_UP

    def _leave(self, now: float) -> None:
        """Look for others to begin anew with, from what is held or saved."""
        super()._leave(now)
        self._drop_attempt()
        if self._fetching:
            self.effects.append(Settled())
        self._fetching = False
        self._of_line = b""  # where it is this line again, sums of before are no part of it either
        self._alone_since = now

    def _call(self, now: float) -> None:
        for peer in self._whom_to_call(now):
            self._send(peer, self._join())
        self._catch_up()

    def _join(self) -> Join:
        saved = sorted({*self._saved(), *([self._held] if self._held >= 0 else [])})[-MAX_SAVED:]
        return Join(self.plan.run, self.stage, self.endpoint, saved, self._held, self._digest)

    def _redirect(self, sender: PeerId, join: Join, now: float) -> None:
        super()._redirect(sender, join, now)
        if self.previous is None and join.stage is not None and join.endpoint is not None:
            self._seekers[sender] = join, now

    def _begin_run(self, now: float) -> None:
        """Begin the run with those who look for it too, at the latest round that all stages can begin at."""
        seekers = {peer: join for peer, (join, heard) in self._seekers.items() if now - heard < SILENCE}
        seekers[self.me] = self._join()
        if self.me != min(seekers, key=lambda peer: (seekers[peer].stage, peer)):
            return
        for round_ in sorted({one for join in seekers.values() for one in join.saved}, reverse=True):
            seats = seats_of(join for join in seekers.values() if round_ in join.saved)
            if {seat.stage for seat in seats} >= set(range(self.plan.stages)):
                self._announce(round_, seats, now)
                return

    def _announce(self, round_: int, seats: list[Seat], now: float) -> None:
        roster = Roster(self.plan.run, self._line, first(seats), seats, [])
        self._line = hashlib.sha256(self._line).digest()[:16]  # whoever begins twice begins two lines
        decision = Decision(round_ - 1, 0, 0, "begin", 1.0, 0.0, [], roster)
        for seat in seats:
            self._send(PeerId(seat.endpoint.peer), Chosen(decision))
        self._deliver(now)
