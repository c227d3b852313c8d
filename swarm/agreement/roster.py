"""Who is in a round, in which order, and how many of them decide. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from swarm.agreement.messages import Join, Roster, Seat
from swarm.types import PeerId


def members(roster: Roster) -> list[PeerId]:
    """The members in the roster's order, by stage and PeerId: the first that lives is to coordinate."""
    ordered = sorted(roster.members, key=lambda seat: (seat.stage, seat.endpoint.peer))
    return [PeerId(seat.endpoint.peer) for seat in ordered]


def first(seats: Iterable[Seat]) -> PeerId:
    """Whose turn it is to coordinate."""
    return PeerId(min(seats, key=lambda seat: (seat.stage, seat.endpoint.peer)).endpoint.peer)


def stages(roster: Roster) -> dict[PeerId, int]:
    """Which stage each member holds."""
    return {PeerId(seat.endpoint.peer): seat.stage for seat in roster.members}


def voters(roster: Roster) -> list[PeerId]:
    """Who decides: all members, and fewer trainers than members.

    Trainers are witnesses: with one, the survivor of two replicas is still a majority. They come and go as they
    like, so that the members alone must be one too.
    """
    return members(roster) + [PeerId(peer) for peer in sorted(roster.trainers)][: len(roster.members) - 1]


def is_quorum(roster: Roster, agreeing: Collection[PeerId]) -> bool:
    """Whether these are a majority of the voters; of two equal halves, the one with the first member is it.

    Any two quorums share a voter.
    """
    everyone = voters(roster)
    count = sum(peer in agreeing for peer in everyone)
    return 2 * count > len(everyone) or (2 * count == len(everyone) and everyone[0] in agreeing)


def everyone(roster: Roster) -> list[PeerId]:
    """Members, then trainers."""
    return members(roster) + [PeerId(peer) for peer in roster.trainers]


def seats_of(joins: Iterable[Join]) -> list[Seat]:
    """The places of those who would be members; trainers have none."""
    return [Seat(join.stage, join.endpoint) for join in joins if join.stage is not None and join.endpoint is not None]


def outranks(roster: Roster, round_: int, other: Roster, other_round: int) -> bool:
    """Of two lines of one run that were begun apart, whether the first is the one to keep: the longer one."""
    return (round_, other.line) > (other_round, roster.line)


def replicas(roster: Roster, count: int) -> list[int]:
    """How many members each of `count` stages has."""
    counts = Counter(seat.stage for seat in roster.members)
    return [counts[stage] for stage in range(count)]
