"""Everyone's part in a run's rounds: hear orders, vote, and be the coordinator when it is one's turn. Pure.

`receive` and `tick` take in messages and the time; what is to be sent is in `outbox`, and (of a `Member`) what is to
be done in `effects`. Whoever drives it (`peer.training.member`, a test) empties both.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from swarm.agreement.assignments import Plan
from swarm.agreement.cohort import SILENCE
from swarm.agreement.messages import (
    Accepted,
    Agree,
    Chosen,
    Decision,
    Elect,
    Granted,
    Join,
    Order,
    Propose,
    Status,
    Take,
)
from swarm.agreement.roster import everyone, is_quorum, members, outranks, voters
from swarm.rounds import BEAT, Coordinator, Phase
from swarm.routes.avoidance import Avoidance
from swarm.types import PeerId
from swarm.wire import Message

PATIENCE = 1.5  # seconds without a coordinator's word before the next in the roster stands for election
STAGGER = 0.4  # seconds between one candidate's turn and the next one's
ABANDONED = 10.0  # seconds without a coordinator, after which another line of the run will do
ELSEWHERE = 2.0  # seconds between two looks whether the run was begun a second time


class Participant:
    """What members and trainers have in common.

    Args:
        plan: of the run.
        me: who this is.
        now: seconds of any steady clock.
    """

    def __init__(self, plan: Plan, me: PeerId, now: float) -> None:
        self.plan = plan
        self.me = me
        self.round = -1  # that is being collected, -1 as long as it is not known
        self.previous: Decision | None = None  # how it came to be
        self.order: Order | None = None  # the last that was heard of it
        self.coordinator: Coordinator | None = None  # if that is who this is
        self.coordinating: PeerId | None = None  # whom orders come from
        self.stopped = False
        self.decided: deque[Decision] = deque(maxlen=64)  # what was heard of late, for whoever shows it
        self.outbox: list[tuple[PeerId, Message]] = []
        self._avoidance = Avoidance()
        self._promised = 0  # the term below which nobody is obeyed
        self._accepted: Accepted | None = None
        self._candidacy: Elect | None = None  # while this would be the coordinator
        self._granted: dict[PeerId, Granted] = {}  # by whom
        self._votes_from = 0  # the first round that it votes in
        self._lines: set[bytes] = set()  # of the run, that it has been in
        self._numbers = 0
        self._heard = now  # from the coordinator
        self._stood = now  # for election
        self._called = now  # for whoever is not in the roster
        self._looked = now
        self._elsewhere: list[PeerId] = []
        self._handlers: dict[type[Message], Callable[[PeerId, Any, float], None]] = {
            Order: self._obey,
            Elect: self._grant,
            Granted: self._count_grant,
            Propose: self._vote,
            Chosen: lambda _, message, now: self._learn(message.decision, now),
            Agree: self._pass_up,
            Status: self._pass_up,
            Take: self._pass_up,
            Join: self._pass_up,
        }

    # --- in ----------------------------------------------------------------------------------------------------------

    def receive(self, sender: PeerId, message: Message, now: float) -> None:
        """Take in a message; those from another time or another line of the run change nothing."""
        line = getattr(message, "line", None)
        if line is not None and not isinstance(message, Order):
            if self.previous is None or line != self.previous.roster.line:
                return
            if (of := message.round) < self.round:  # type: ignore[attr-defined]
                self._help(sender, of)
                return
            if of > self.round:
                self._answer(sender, now)  # it hears that we are behind, and helps
                return
        if (handler := self._handlers.get(type(message))) is not None:
            handler(sender, message, now)
        self._deliver(now)

    def tick(self, now: float) -> None:
        """Do what is to be done as time passes; call it every few hundredths of a second."""
        if self.stopped:
            return
        if self.coordinator is not None:
            self.coordinator.tick(now)
            self._look_elsewhere(now)
        elif self.seated and not self._coordinator_lives(now):
            self._stand(now)
        self._beat(now)
        self._deliver(now)

    def meet(self, peers: Collection[PeerId]) -> None:
        """These say elsewhere (in the DHT) that they are members of the run."""
        known, self._elsewhere = self._elsewhere, [peer for peer in peers if peer != self.me]
        if not known and self._elsewhere:
            self._called = -math.inf  # the first that are known of are called at once

    @property
    def seated(self) -> bool:
        """Whether the roster has a place for this one."""
        return self.previous is not None and self.me in everyone(self.previous.roster)

    @property
    def _may_vote(self) -> bool:
        return self.seated and self.round >= self._votes_from

    # --- orders ------------------------------------------------------------------------------------------------------

    def _obey(self, sender: PeerId, order: Order, now: float) -> None:
        self._learn(order.previous, now)
        if self.previous is None or order.line != self.previous.roster.line:
            return
        if order.round < self.round:
            self._help(sender, order.round)
        elif order.round == self.round and order.term >= self._promised:
            if order.term > 0 or sender == self.previous.roster.coordinator:
                self.coordinating = sender
                if self.order is None or _progress(order) >= _progress(self.order):
                    self._follow(order, now)
                self._answer(sender, now)
        elif order.round == self.round:
            self._answer(sender, now)  # it hears of the higher term

    def _follow(self, order: Order, now: float) -> None:
        self._promised = order.term
        self._candidacy = None
        self._heard = now
        self.order = order
        if self.coordinator is not None and order.term > self.coordinator.term:
            self.coordinator = None

    def _answer(self, sender: PeerId, now: float) -> None:
        """Tell a coordinator, or who is a round ahead, how far this is."""
        raise NotImplementedError

    def _help(self, sender: PeerId, round_: int) -> None:
        """Somebody is behind."""
        if self.previous is not None and round_ < self.round:
            self._send(sender, Chosen(self.previous))

    # --- decisions ---------------------------------------------------------------------------------------------------

    def _learn(self, decision: Decision, now: float) -> None:
        """A decision was chosen: its round is over."""
        if decision.roster.run != self.plan.run or not self._is_news(decision, now):
            return
        self.decided.append(decision)
        if decision.outcome == "lost":
            self._leave(now)
            return
        before, self.previous = self.previous, decision
        self.round = decision.round + 1
        line = decision.roster.line
        if before is None or before.roster.line != line:
            # It may have voted already, and forgotten it when it left this line, or when it was restarted.
            fresh = decision.outcome == "begin" and line not in self._lines
            self._votes_from = self.round + (0 if fresh else 1)
            self._lines.add(line)
        coordinated = self.coordinator
        self.order = self._accepted = self._candidacy = self.coordinator = None
        self._promised = 0
        self._heard = now
        self.coordinating = PeerId(decision.roster.coordinator)
        self.stopped = decision.outcome == "stop"
        self._entered(now)
        if decision.roster.coordinator == self.me and not self.stopped and self._can_coordinate():
            lent = self._lent_before(coordinated, decision)
            self.coordinator = Coordinator(self.plan, self.me, decision, now, avoidance=self._avoidance, lent=lent)

    def _lent_before(self, coordinated: Coordinator | None, decision: Decision) -> Collection[int] | None:
        """What was lent of a round before it began, as far as who coordinates it has lent it itself."""
        if not self.plan.overlap or decision.outcome == "begin":
            return ()
        return coordinated.ahead.lent if coordinated is not None and coordinated.round == decision.round else None

    def _leave(self, now: float) -> None:
        """This line of the run comes to no end any more: look for another."""
        self.previous = self.order = self.coordinator = self.coordinating = None
        self.round = -1
        self._heard = now

    def _is_news(self, decision: Decision, now: float) -> bool:
        if self.previous is None or decision.roster.line == self.previous.roster.line:
            return decision.round >= self.round and (decision.outcome != "lost" or self.previous is not None)
        if decision.outcome == "lost":
            return False
        ours, theirs = self.previous, decision
        return outranks(theirs.roster, theirs.round, ours.roster, ours.round) or now - self._heard > ABANDONED

    def _entered(self, now: float) -> None:
        """A new round has begun, by the decision that is now `previous`."""
        raise NotImplementedError

    def _can_coordinate(self) -> bool:
        return False

    def _vote(self, sender: PeerId, message: Propose, now: float) -> None:
        if message.term >= self._promised and self._may_vote and message.decision.round == self.round:
            self._promised = message.term
            self._accepted = Accepted(message.term, message.decision)
            self._send(sender, Agree(message.line, self.round, message.term))

    # --- elections ---------------------------------------------------------------------------------------------------

    def _coordinator_lives(self, now: float) -> bool:
        return now - self._heard < PATIENCE

    def _stand(self, now: float) -> None:
        """Stand for election, when it is our turn and nobody has won one."""
        assert self.previous is not None
        order = members(self.previous.roster)
        if not self._can_coordinate() or self.me not in order:
            return
        turn = STAGGER * order.index(self.me)
        if now - self._heard < PATIENCE + turn or now - self._stood < PATIENCE + turn:
            return
        self._stood = now
        self._ask(self._promised + 1, sounding=True)

    def _ask(self, term: int, sounding: bool) -> None:
        assert self.previous is not None
        self._granted = {}
        self._candidacy = Elect(self.previous.roster.line, self.round, term, sounding)
        for peer in voters(self.previous.roster):
            self._send(peer, self._candidacy)

    def _grant(self, sender: PeerId, message: Elect, now: float) -> None:
        if not self._may_vote or message.term <= self._promised:
            return
        if sender != self.me and (self.coordinator is not None or now - self._heard < PATIENCE / 2):
            return  # we hear the one that there is
        if not message.sounding:
            self._promised = message.term
            self._heard = now  # give it time
        self._send(sender, Granted(message.line, self.round, message.term, message.sounding, self._accepted))

    def _count_grant(self, sender: PeerId, message: Granted, now: float) -> None:
        mine = self._candidacy
        if mine is None or self.previous is None or (message.term, message.sounding) != (mine.term, mine.sounding):
            return
        self._granted[sender] = message
        if not is_quorum(self.previous.roster, self._granted):
            return
        self._candidacy = None
        if mine.sounding:
            self._ask(mine.term, sounding=False)
            return
        accepted = [each.accepted for each in self._granted.values() if each.accepted is not None]
        latest = max(accepted, key=lambda one: one.term, default=None)
        attempt = self.order.attempt if self.order else 0
        decision = latest.decision if latest else None
        self.coordinator = Coordinator(
            self.plan, self.me, self.previous, now, mine.term, attempt, decision, self._avoidance, lent=None
        )

    # --- being the coordinator ---------------------------------------------------------------------------------------

    def _pass_up(self, sender: PeerId, message: Status | Take | Agree | Join, now: float) -> None:
        if isinstance(message, Join) and message.run != self.plan.run:
            return
        if self.coordinator is not None:
            self.coordinator.hear(sender, message, now)
        elif isinstance(message, Join):
            self._redirect(sender, message, now)

    def _redirect(self, sender: PeerId, join: Join, now: float) -> None:
        """Somebody would join and does not know whom to ask, nor whether the run was stopped."""
        if self.previous is not None and (self.stopped or self._coordinator_lives(now)):
            self._send(sender, Chosen(self.previous))

    def _look_elsewhere(self, now: float) -> None:
        """Peers that are not in the roster may be in one of their own: begun apart, one of the two is to end."""
        if self.coordinator is None or now - self._looked < ELSEWHERE or self.previous is None:
            return
        self._looked = now
        for peer in set(self._elsewhere) - set(everyone(self.previous.roster)):
            self._send(peer, self.coordinator.order())

    def _beat(self, now: float) -> None:
        """Call again, where nobody calls us."""
        if self._is_outside(now) and now - self._called >= BEAT:
            self._called = now
            self._call(now)

    def _is_outside(self, now: float) -> bool:
        """Whether it has to ask for a place in the roster."""
        return not self.seated

    def _call(self, now: float) -> None:
        """Ask for a place in the roster."""
        raise NotImplementedError

    def _whom_to_call(self, now: float) -> list[PeerId]:
        """The coordinator, or everyone who may know it."""
        if self.coordinating is not None and now - self._heard < SILENCE:
            return [self.coordinating]
        known = members(self.previous.roster) if self.previous is not None else []
        return sorted({*known, *self._elsewhere} - {self.me})

    # --- out ---------------------------------------------------------------------------------------------------------

    def _send(self, peer: PeerId, message: Message) -> None:
        self.outbox.append((peer, message))

    def _deliver(self, now: float) -> None:
        """What one says to oneself, one hears at once."""
        while True:
            self._collect_outbox()
            mine = [message for peer, message in self.outbox if peer == self.me]
            if not mine:
                return
            self.outbox = [pair for pair in self.outbox if pair[0] != self.me]
            for message in mine:
                if (handler := self._handlers.get(type(message))) is not None and self._is_current(message):
                    handler(self.me, message, now)

    def _is_current(self, message: Message) -> bool:
        return getattr(message, "round", self.round) == self.round

    def _collect_outbox(self) -> None:
        if self.coordinator is not None:
            self.outbox += self.coordinator.outbox
            self.coordinator.outbox.clear()
            if self.coordinator.deposed:
                self.coordinator = None

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers


def _progress(order: Order) -> tuple[int, int, int]:
    """Grows with every order of a round, so that one that was overtaken is known: an attempt that failed is collecting
    again under its own number."""
    return order.term, order.attempt, order.phase or len(Phase)
