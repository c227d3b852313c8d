"""Who takes part in a round: who is heard, who is left out and why, who comes next. Pure: the clock is passed in.

A round goes on without a member that is silent, late or wrong. What it held is lent again, and it may come back; if it
was wrong, not for a while. The last one of a stage is left out for nothing but silence: without it nothing goes on, and
where nobody comes who holds the stage's state, this line of the run is lost.
"""

from __future__ import annotations

from collections import Counter

from msgspec import structs

from swarm.agreement.census import Census
from swarm.agreement.messages import MAX_MEMBERS, MAX_TRAINERS, Join, Roster, Seat
from swarm.agreement.roster import first, seats_of
from swarm.routes.avoidance import Avoidance
from swarm.types import PeerId

SILENCE = 2.0  # seconds after which a peer counts as lost
UNREADY = 10.0  # seconds that a member may take for the last round's step
GIVE_UP = 30.0  # seconds without a coordinator, a majority or a stage's state, after which all look for a new beginning
DOUBLES = 2  # sums of a member that have to be forgotten because of others' before it is out
SILENT = "is silent"


class Cohort:
    """The members and trainers of one round, and those who would be.

    Whom it leaves out is in the census's `out`, and whose sums are to be forgotten in its `void`.

    Args:
        me: who coordinates, and needs no word of its own to be heard.
        roster: who the round began with.
        census: what the members say.
        avoidance: who sent what cannot be right, in this round or an earlier one.

    Attributes:
        heard: when each was heard last, of those who are not lost.
        trainers: those of them who run micro-batches.
    """

    def __init__(self, me: PeerId, roster: Roster, census: Census, avoidance: Avoidance, now: float) -> None:
        self._me = me
        self._roster = roster
        self._census = census
        self._avoidance = avoidance
        self.trainers = {PeerId(peer) for peer in roster.trainers}
        self.heard = dict.fromkeys([*census.order, *self.trainers], now)
        self._joins: dict[PeerId, Join] = {}
        self._differing: set[PeerId] = set()  # whose parameters are not their replicas'
        self._doubles: Counter[PeerId] = Counter()  # how often each one's sum had to be forgotten
        self._begun = now
        self._whole = now  # when every stage had somebody who holds its state
        self._looked = now

    def join(self, peer: PeerId, join: Join) -> None:
        """Somebody would be in the next round: as a trainer at once, as a member if it holds what it must by then."""
        self._joins[peer] = join
        if join.stage is None:
            self.trainers.add(peer)

    # --- who is left out ---------------------------------------------------------------------------------------------

    def drop(self, peer: PeerId, why: str) -> bool:
        """Go on without a member, unless it is the last of its stage that can be heard; whether it is out now.

        Whoever is no member, as others may claim or it may think itself, is nobody to go on without.
        """
        if peer not in self._census.stages:
            return False
        if why != SILENT and self._census.living(self._census.stages[peer]) == [peer]:
            return False
        self._census.out.setdefault(peer, why)
        return True

    def expel(self, peer: PeerId, why: str, now: float) -> bool:
        """Drop a member that sent what cannot be right, and do without it for a while; whether it is out now."""
        dropped = self.drop(peer, why)
        if dropped:
            self._avoidance.failed(peer, now)
        return dropped

    def readmit(self, peer: PeerId, now: float) -> None:
        """A member counts for this round again: if it was left out, it is back, unless it was wrong."""
        if peer in self._census.out and peer not in self._avoidance.avoided(now) | self._differing:
            del self._census.out[peer]  # what it held is lent to others by now
            self._census.void[peer] = self._census.statuses[peer].sums

    def void(self, peer: PeerId, now: float) -> None:
        """Another has counted some of what a member has; who comes with it again and again has not."""
        self._census.void[peer] = self._census.statuses[peer].sums
        self._doubles[peer] += 1
        if self._doubles[peer] >= DOUBLES:
            self.expel(peer, "claims what its replicas have counted", now)

    def drop_silent(self, now: float) -> list[PeerId]:
        """Go on without those who were silent for too long; the trainers among them."""
        gap, self._looked = now - self._looked, now
        if gap > SILENCE / 2:  # it was us who slept: others are not to blame for it
            self.heard = {peer: heard + gap for peer, heard in self.heard.items()}
            self._whole += gap
        silent = [peer for peer, heard in self.heard.items() if peer != self._me and now - heard > SILENCE]
        for peer in silent:
            del self.heard[peer]
            self._joins.pop(peer, None)
            if peer in self._census.stages:
                self.drop(peer, SILENT)
        lost = [peer for peer in silent if peer in self.trainers and peer not in self._census.stages]
        self.trainers.difference_update(lost)
        return lost

    def drop_unready(self, now: float) -> None:
        """Go on without those who have not come to this round in all the time there was."""
        if now - self._begun > UNREADY:
            for peer in self._census.living():
                if not self._census.is_known(peer) and peer != self._me:
                    self.drop(peer, "did not come to this round")

    def drop_differing(self) -> None:
        """Go on without those who hold another state than their replicas."""
        for peer in self._census.differing():
            self.drop(peer, "holds other parameters than its replicas")
            self._differing.add(peer)

    # --- who is left -------------------------------------------------------------------------------------------------

    def is_lost(self, now: float) -> bool:
        """Whether a stage has been without anybody who holds its state for so long that nobody will come."""
        if self._census.is_whole():
            self._whole = now
        return now - self._whole > GIVE_UP

    def survivors(self) -> Roster:
        """Those who still hold the state, of a line that is lost."""
        holding = {peer for peer in self._census.living() if self._census.is_ready(peer)} or {self._me}
        return structs.replace(self._roster, coordinator=self._me, members=self._seats(holding))

    def next_roster(self, round_: int, now: float) -> Roster:
        """Who is in the next round: who is in this one, and newcomers who hold the state that `round_` began with."""
        living, avoided = set(self._census.living()), self._avoidance.avoided(now)
        seats = self._seats(living)
        for peer, join in self._joins.items():
            welcome = peer not in living and peer not in avoided and join.round == round_
            if welcome and len(seats) < MAX_MEMBERS and self._census.admits(join):
                seats += seats_of([join])
        next_ = self._me if self._me in living else first(seats)
        trainers = list[str](sorted(self.trainers, key=lambda peer: (peer not in self._roster.trainers, peer)))
        return structs.replace(self._roster, coordinator=next_, members=seats, trainers=trainers[:MAX_TRAINERS])

    def _seats(self, peers: set[PeerId]) -> list[Seat]:
        return [seat for seat in self._roster.members if seat.endpoint.peer in peers]

    def __repr__(self) -> str:
        return f"<Cohort members={len(self._census.living())} trainers={len(self.trainers)}>"
