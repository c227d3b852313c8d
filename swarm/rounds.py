"""One round of a run, as its coordinator sees it, from collecting to commit. Pure: messages and time in, messages out.

A round is one optimizer step of all members together. Read `Coordinator.tick` first; it is the round's life:

    COLLECT   Trainers take micro-batches and send them through the stages; members add up gradients and say which
              micro-batches their sums hold. Who is silent for too long is out (`swarm.agreement.cohort`), and what it
              held is lent again.
    CLOSE     Every micro-batch is counted in every stage. Members are told to count no more and say once more what
              they hold. If a micro-batch is in two sums of a stage, one of these is forgotten, and back to COLLECT.
    AVERAGE   The members of each stage average their sums (`peer.averaging`) and report a digest of what they hold.
              Nobody steps. If somebody was lost, late or unsound, the attempt is void: sums are kept, COLLECT goes
              on without it.
    DECIDE    All hold the same. The decision (commit with this clipping factor; who is in the next round) is proposed
              to the voters. Once a majority has accepted it, it is told to all: they step, and the round is over.

With `Plan.overlap`, trainers are lent micro-batches of the next round as soon as this one has none left, so that nobody
waits while it averages. Their gradients are taken with the parameters from before this round's step, whenever they are
taken: all of round r + 1 with those that round r began with (a staleness of one). Members keep them apart and carry
them into the next round; what is missing there is lent there.

Deciding is single-decree Paxos (Lamport, "Paxos made simple", 2001), one instance a round: the voters are the roster's
that the decision before named, term 0 belongs to the coordinator that it named, and a higher term to whom a majority
has granted it (`swarm.agreement.participant`). So a decision is never changed, whoever dies, and two coordinators
cannot decide differently; a member that missed one notices, and fetches its state from those who have not. Where a
stage has nobody left who holds its state, that is decided too: all leave, and begin anew from what they have saved.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

from swarm.agreement.assignments import Assignments, Plan
from swarm.agreement.census import Census
from swarm.agreement.cohort import Cohort
from swarm.agreement.judgement import Verdict, accused, doubly_counted, judge
from swarm.agreement.messages import (
    Agree,
    Agreed,
    Chosen,
    Decision,
    Join,
    Order,
    Propose,
    Report,
    Roster,
    Share,
    Status,
    Take,
    Work,
)
from swarm.agreement.roster import is_quorum, members, voters
from swarm.routes.avoidance import Avoidance
from swarm.types import PeerId
from swarm.wire import Message

BEAT = 0.25  # seconds between two signs of life
LONGEST_ATTEMPT = 60.0  # seconds; members notice earlier that nothing moves, this is for those who do not tell
SECOND_OPINION = 0.3  # seconds between the first word that an attempt failed and the verdict who is to blame
STRIKES = 2  # failed attempts before somebody who is alive is out for it


class Phase(enum.IntEnum):
    """What a round is at."""

    COLLECT = 0
    CLOSE = 1
    AVERAGE = 2
    DECIDE = 3


class Coordinator:
    """Coordinates the round after `previous`, until `chosen` is set or it is `deposed`.

    Args:
        term: in which it may propose.
        attempt: the highest number of an attempt that it knows of.
        decision: what an earlier coordinator may have had accepted, and has to be proposed again.
        avoidance: who sent what cannot be right, in this round or an earlier one.
        lent: which micro-batches were lent before this round began; None where that is not known.
    """

    def __init__(
        self,
        plan: Plan,
        me: PeerId,
        previous: Decision,
        now: float,
        term: int = 0,
        attempt: int = 0,
        decision: Decision | None = None,
        avoidance: Avoidance | None = None,
        lent: Iterable[int] | None = (),
    ) -> None:
        self.plan = plan
        self.me = me
        self.previous = previous
        self.round = previous.round + 1
        self.term = term
        self.phase = Phase.COLLECT
        self.attempt = attempt
        self.assignments = Assignments(plan, lent)
        self.ahead = Assignments(plan, None if term else ())  # of the next round
        self.census = Census(plan, previous.roster, self.assignments, self.ahead)
        self.cohort = Cohort(me, previous.roster, self.census, avoidance or Avoidance(), now)
        self.chosen: Decision | None = None
        self.deposed = False
        self.outbox: list[tuple[PeerId, Message]] = []
        self._takes: dict[PeerId, Take] = {}
        self._shares: list[Share] = []
        self._strikes = 0
        self._failed_at: float | None = None  # when the first word of it came
        self._begun = now
        self._entered = now  # the phase
        self._told = now
        self._decision = decision
        self._votes: set[PeerId] = set()
        if decision is not None:
            self._propose(decision, now)
        self._order_all(now)

    # --- what comes in -----------------------------------------------------------------------------------------------

    def hear(self, sender: PeerId, message: Status | Take | Agree | Join, now: float) -> None:
        """Take in what a member, a trainer or a newcomer says."""
        if isinstance(message, Agree):
            self._votes.add(sender) if message.term == self.term else None
        elif isinstance(message, Join):
            self.cohort.join(sender, message)
        elif message.term > self.term:
            self.deposed = True
        elif isinstance(message, Status):
            self._hear_status(sender, message, now)
        else:
            self._hear_take(sender, message, now)
        self.cohort.heard[sender] = now
        self.tick(now)

    def _hear_status(self, sender: PeerId, status: Status, now: float) -> None:
        before = self.census.statuses.get(sender)
        if before is not None and status.number <= before.number:
            return
        self.census.statuses[sender] = status
        claims = self.census.false_claims(status)
        if claims and self.cohort.expel(sender, "claims micro-batches that nobody was lent", now):
            return
        if status.ready and self.phase is Phase.COLLECT:
            self.cohort.readmit(sender, now)

    def _hear_take(self, sender: PeerId, take: Take, now: float) -> None:
        before = self._takes.get(sender)
        if before is not None and take.number < before.number:
            return
        self._takes[sender] = take
        self.cohort.trainers.add(sender)
        self.assignments.hear(sender, take.seen, take.holding, now)
        self.ahead.hear(sender, take.ahead_seen, take.ahead, now)
        want = take.want if self._gathered(now) else 0
        wanted = want if self.phase is Phase.COLLECT else 0
        lent = self.assignments.take(sender, wanted, self.census.holders(), now)
        more = want - len(lent) if self.plan.is_ahead(self.round + 1, self.round) else 0
        ahead = self.ahead.take(sender, more, self.census.holders(ahead=True), now)
        self._send(sender, Work(self.previous.roster.line, self.round, lent, ahead))

    def _gathered(self, now: float) -> bool:
        """Whether it is known what is counted and lent: who does not coordinate from the beginning has to ask first."""
        if (self.term == 0 and not self.plan.overlap) or now - self._begun > 2 * BEAT:
            return True
        return (
            self.term == 0
            and {*self.census.living(), *self.cohort.trainers} <= self.census.statuses.keys() | self._takes.keys()
        )

    # --- the round's life --------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Go on as far as what was heard allows."""
        if self.deposed or self.chosen is not None:
            return
        for trainer in self.cohort.drop_silent(now):
            self.assignments.forget(trainer)
        if self.phase is Phase.COLLECT:
            self.cohort.drop_unready(now)
        self.ahead.count(self.census.complete(ahead=True), now)
        if self.phase is Phase.COLLECT:
            self._collect(now)
        if self.phase is Phase.CLOSE:
            self._close(now)
        if self.phase is Phase.AVERAGE:
            self._average(now)
        if self.phase is not Phase.DECIDE and self.cohort.is_lost(now):
            self._propose(self._ending("lost", self.cohort.survivors()), now)
        if self.phase is Phase.DECIDE:
            self._decide()
        if self.chosen is None and now - self._told >= BEAT:
            self._order_all(now)

    def _collect(self, now: float) -> None:
        self.cohort.drop_differing()
        complete = self.census.complete()
        self.assignments.count(complete, now)
        known = all(self.census.is_known(peer) for peer in self.census.living())
        if len(complete) == self.plan.count and known:
            self.attempt += 1
            self._enter(Phase.CLOSE, now)

    def _close(self, now: float) -> None:
        if any(
            not self.census.is_ready(peer) or self.census.statuses[peer].closed != self.attempt
            for peer in self.census.living()
        ):
            return
        for stage in range(self.plan.stages):
            counted = {peer: self.census.counted(peer) for peer in self.census.living(stage)}
            for peer in doubly_counted(counted, self.census.order):
                self.cohort.void(peer, now)
        if len(self.census.complete()) < self.plan.count:
            self._enter(Phase.COLLECT, now)
            return
        self._shares = [self.census.share(peer) for peer in self.census.living()]
        self._enter(Phase.AVERAGE, now)

    def _average(self, now: float) -> None:
        if any(share.peer in self.census.out for share in self._shares):
            self._discard(now)
            return
        reports = self.census.reports(self._shares, self.term, self.attempt)
        if unsound := {PeerId(peer): why for report in reports.values() for peer, why in report.unsound}:
            self._blame(unsound, now)
            return
        failed = any(report.suspects for report in reports.values())
        if failed and self._failed_at is None:
            self._failed_at = now
        if len(reports) == len(self._shares) and not failed:
            self._conclude(judge(self._shares, reports), now)
        elif self._failed_at is not None and now - self._failed_at > SECOND_OPINION:
            self._strike(reports, now)
        elif now - self._entered > LONGEST_ATTEMPT:
            for share in self._shares:
                if share.peer not in reports:
                    self.cohort.drop(PeerId(share.peer), "did not come to an end with averaging")
            self._discard(now)

    def proposing(self, now: float) -> float:
        """For how many seconds it has waited for a majority of the voters."""
        return now - self._entered if self.phase is Phase.DECIDE else 0.0

    def _decide(self) -> None:
        assert self._decision is not None
        if is_quorum(self.previous.roster, self._votes):
            self.chosen = self._decision
            told = {*self.cohort.heard, *members(self.chosen.roster)}
            for peer in sorted(told):
                self._send(peer, Chosen(self.chosen))

    # --- what an attempt came to -------------------------------------------------------------------------------------

    def _conclude(self, verdict: Verdict, now: float) -> None:
        if verdict.blamed:
            self._blame(dict(verdict.blamed), now)
        elif not verdict.finite:
            self._propose(self._skip(now), now)
        else:
            clip = self.plan.clip
            factor = min(1.0, clip / verdict.norm) if clip and verdict.norm else 1.0
            roster = self.cohort.next_roster(self.round, now)
            self._propose(self._ending("commit", roster, factor, verdict.norm, verdict.agreed), now)

    def _skip(self, now: float) -> Decision:
        skipped = self.previous.skipped + 1
        outcome = "stop" if skipped >= self.plan.longest_skipping else "skip"
        return self._ending(outcome, self.cohort.next_roster(self.round, now), skipped=skipped)

    def _ending(
        self,
        outcome: str,
        roster: Roster,
        factor: float = 0.0,
        norm: float = 0.0,
        agreed: Sequence[Agreed] = (),
        skipped: int = 0,
    ) -> Decision:
        steps = self.census.steps()
        return Decision(self.round, self.term, self.attempt, outcome, factor, norm, [*agreed], roster, skipped, steps)

    def _blame(self, blamed: dict[PeerId, str], now: float) -> None:
        """Go on without those who sent what cannot be right; if most did, it is the round that is wrong."""
        for stage in range(self.plan.stages):
            sharing = {PeerId(share.peer) for share in self._shares if share.stage == stage and share.samples}
            if (self.plan.scaled or 2 * len(sharing & blamed.keys()) > len(sharing)) and sharing & blamed.keys():
                self._propose(self._skip(now), now)
                return
        expelled = [peer for peer, why in blamed.items() if self.cohort.expel(peer, why, now)]
        if expelled:
            self._discard(now)
        else:
            self._propose(self._skip(now), now)

    def _strike(self, reports: dict[PeerId, Report], now: float) -> None:
        self._strikes += 1
        peer = accused(reports, self.census.order)
        if peer is not None and self._strikes >= STRIKES:
            self.cohort.drop(peer, "was late or lost in the middle of averaging")
            self._strikes = 0
        self._discard(now)

    def _discard(self, now: float) -> None:
        """The attempt is void, the sums are kept."""
        self._enter(Phase.COLLECT, now)
        self._collect(now)

    def _propose(self, decision: Decision, now: float) -> None:
        self._decision = decision
        self.attempt = max(self.attempt, decision.attempt)
        self._enter(Phase.DECIDE, now)

    def _enter(self, phase: Phase, now: float) -> None:
        self.phase = phase
        self._entered = now
        self._failed_at = None
        self._order_all(now)

    # --- what goes out -----------------------------------------------------------------------------------------------

    def order(self) -> Order:
        """What everyone is to know now."""
        return Order(
            line=self.previous.roster.line,
            round=self.round,
            term=self.term,
            phase=int(self.phase),
            attempt=self.attempt,
            shares=self._shares if self.phase is Phase.AVERAGE else [],
            void=sorted(self.census.void.items()),
            previous=self.previous,
            counted=self.plan.samples_of(self.assignments.complete),
            out=sorted(self.census.out),
        )

    def _order_all(self, now: float) -> None:
        self._told = now
        order = self.order()
        for peer in sorted({*self.cohort.heard, *self.census.order}):
            self._send(peer, order)
        if self.phase is Phase.DECIDE and self._decision is not None:
            proposal = Propose(order.line, self.round, self.term, self._decision)
            for peer in voters(self.previous.roster):
                if peer not in self._votes:
                    self._send(peer, proposal)

    def _send(self, peer: PeerId, message: Message) -> None:
        self.outbox.append((peer, message))

    def __repr__(self) -> str:
        phase = f"{self.phase.name} attempt={self.attempt}"
        return (
            f"<Coordinator round={self.round} term={self.term} {phase} {self.assignments!r} out={len(self.census.out)}>"
        )
