"""What the members of a round say they have counted, and how much of it is believed. Pure.

A member's weight is never its own to say: it is the samples of those micro-batches that it claims and that were lent.
"""

from __future__ import annotations

import statistics
from collections import defaultdict

from swarm.agreement.assignments import Assignments, Plan, from_bits
from swarm.agreement.judgement import differing
from swarm.agreement.messages import Join, Report, Roster, Share, Status
from swarm.agreement.roster import members, stages
from swarm.types import PeerId


class Census:
    """The members of one round.

    Attributes:
        order: all of them, in the roster's order.
        stages: which stage each holds.
        statuses: the last that each has told.
        out: who is not in the round any more, and why.
        void: the number of the last sum that each is to forget.
    """

    def __init__(self, plan: Plan, roster: Roster, collected: Assignments, ahead: Assignments) -> None:
        self._plan = plan
        self._collected = collected
        self._ahead = ahead
        self.order = members(roster)
        self.stages = stages(roster)
        self.statuses: dict[PeerId, Status] = {}
        self.out: dict[PeerId, str] = {}
        self.void: dict[PeerId, int] = {}

    def living(self, stage: int | None = None) -> list[PeerId]:
        """Who is in the round, of one stage or of all."""
        return [peer for peer in self.order if peer not in self.out and stage in (None, self.stages[peer])]

    def is_ready(self, peer: PeerId) -> bool:
        """Whether it counts for this round."""
        status = self.statuses.get(peer)
        return status is not None and status.ready

    def is_known(self, peer: PeerId) -> bool:
        """Whether it is ready, and has said which state it holds."""
        return self.is_ready(peer) and self.statuses[peer].digest != b""

    def steps(self) -> int:
        """How many steps the state has had that the round began with; most know it where some do not tell the truth."""
        told = [self.statuses[peer].steps for peer in self.living() if self.is_ready(peer)]
        return statistics.median_low(told) if told else 0

    def is_whole(self) -> bool:
        """Whether every stage has somebody who holds what the round began with, or is about to."""
        told = [(self.stages[peer], self.statuses[peer]) for peer in self.living() if peer in self.statuses]
        held = {stage for stage, status in told if status.ready or status.stepping}
        return len(held) == self._plan.stages

    def differing(self) -> list[PeerId]:
        """Who holds another state than its replicas; of a part of them, the wrong ones may be most."""
        found: list[PeerId] = []
        for stage in range(self._plan.stages):
            if all(self.is_known(peer) for peer in self.living(stage)):
                digests = {peer: self.statuses[peer].digest for peer in self.living(stage)}
                found += differing(digests, self.order)
        return found

    def admits(self, join: Join) -> bool:
        """Whether a newcomer holds what the replicas of its stage hold."""
        if join.stage is None or join.endpoint is None or join.stage >= self._plan.stages:
            return False
        held = {self.statuses[peer].digest for peer in self.living(join.stage) if self.is_ready(peer)} - {b""}
        return not held or join.digest in held

    def false_claims(self, status: Status) -> frozenset[int]:
        """What it claims to have counted and cannot have."""
        collected = self._collected.unlent(from_bits(status.counted))
        return collected | self._ahead.unlent(from_bits(status.ahead))

    def counted(self, peer: PeerId, ahead: bool = False) -> frozenset[int]:
        """The micro-batches in a member's sum, of this round or of the next."""
        status = self.statuses.get(peer)
        if status is None or peer in self.out or (not ahead and status.sums <= self.void.get(peer, -1)):
            return frozenset()
        book, claimed = (self._ahead, status.ahead) if ahead else (self._collected, status.counted)
        return from_bits(claimed) - book.unlent(from_bits(claimed))

    def complete(self, ahead: bool = False) -> frozenset[int]:
        """Micro-batches that are in a sum of every stage."""
        complete = frozenset(range(self._plan.count))
        for stage in range(self._plan.stages):
            complete &= frozenset[int]().union(*(self.counted(peer, ahead) for peer in self.living(stage)))
        return complete

    def holders(self, ahead: bool = False) -> dict[int, list[str]]:
        """Who has counted each micro-batch."""
        holders: dict[int, list[str]] = defaultdict(list)
        for peer in self.living():
            for index in self.counted(peer, ahead):
                holders[index].append(peer)
        return holders

    def share(self, peer: PeerId) -> Share:
        """Its part in an attempt."""
        samples = self._plan.samples_of(self.counted(peer))
        return Share(peer, self.stages[peer], samples, self.statuses[peer].bandwidth)

    def reports(self, shares: list[Share], term: int, attempt: int) -> dict[PeerId, Report]:
        """What those who share have reported of an attempt."""
        found = {PeerId(share.peer): self.statuses[PeerId(share.peer)].report for share in shares}
        mine = (term, attempt)
        return {peer: report for peer, report in found.items() if report and (report.term, report.attempt) == mine}
