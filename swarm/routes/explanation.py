"""Why a route is what it is: each hop's expected time, and what the next best in its place would cost more. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from swarm.errors import NoRoute
from swarm.routing import SPREAD, Estimates, View, find_route, work_of
from swarm.types import Hop, Offer, PeerId, Route


@dataclass(frozen=True, slots=True)
class Cost:
    """What a token is expected to take, in seconds."""

    way: float = 0.0  # from the peer before, or the client
    turn: float = 0.0  # waiting for others there, and what every hop costs
    blocks: float = 0.0  # running them

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.way + self.turn + self.blocks

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.way + other.way, self.turn + other.turn, self.blocks + other.blocks)


@dataclass(frozen=True, slots=True)
class Choice:
    """One hop of a route, and why it is this one."""

    hop: Hop
    cost: Cost
    instead: tuple[Hop, ...]  # the next best for the same blocks; empty where there is none
    extra: float  # seconds that it would take more, infinite where there is none
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """A route's expected time per token, hop by hop."""

    choices: tuple[Choice, ...]
    back: float  # seconds from the last hop to the client

    @property
    def seconds(self) -> float:
        """Per token."""
        return sum(choice.cost.seconds for choice in self.choices) + self.back


def explain(
    route: Route,
    offers: Sequence[Offer],
    *,
    avoid: Collection[PeerId] = (),
    view: View | None = None,
    tokens_needed: int = 1,
) -> Explanation:
    """Why `find_route` with the same arguments answers `route`. All of its peers must be among `offers`."""
    view = view or View()
    known = {offer.peer: offer for offer in offers}
    neighbours = [view.before, *(known[hop.peer] for hop in route), view.after]
    costs, back = _costs(route.hops, known, view, tokens_needed)
    shunned = {*avoid, *(hop.peer for hop in route)}
    choices = []
    for index, (hop, cost) in enumerate(zip(route, costs, strict=True)):
        around = replace(view, before=neighbours[index], after=neighbours[index + 2])
        here, onward = _costs([hop], known, around, tokens_needed)
        try:
            instead = find_route(offers, hop.span, avoid=shunned, view=around, tokens_needed=tokens_needed).hops
        except NoRoute:
            choices.append(Choice(hop, cost, (), float("inf"), f"nobody else hosts all of {hop.span}"))
            continue
        there, from_there = _costs(instead, known, around, tokens_needed)
        now, then = here[0] + Cost(way=onward), sum(there, Cost(way=from_there))
        reason = _reason(now, then, len(instead))
        choices.append(Choice(hop, cost, instead, then.seconds - now.seconds, reason))
    return Explanation(tuple(choices), back)


def _costs(hops: Sequence[Hop], known: dict[PeerId, Offer], view: View, tokens_needed: int) -> tuple[list[Cost], float]:
    """What each hop takes, and the way on from the last."""
    offers = list(known.values())
    number = {offer.peer: index for index, offer in enumerate(offers)}
    indices = np.array([number[hop.peer] for hop in hops])
    latencies, work = Estimates(offers, view), work_of(offers, tokens_needed)
    between = latencies.between(indices[:-1], indices[1:]).diagonal()
    ways = [float(latencies.first()[indices[0]]), *map(float, between)]
    costs = [
        Cost(way, float(work.turn[index]), float(work.block[index]) * len(hop.span))
        for hop, index, way in zip(hops, indices, ways, strict=True)
    ]
    return costs, float(latencies.last()[indices[-1]])


def _reason(now: Cost, then: Cost, hops: int) -> str:
    """What most speaks against the next best."""
    extra = then.seconds - now.seconds
    if extra <= SPREAD * now.seconds:
        return "the next best is about as good"
    against = {
        "farther away": then.way - now.way,
        "busier, or without room for the session" if hops == 1 else "more hops": then.turn - now.turn,
        "slower": then.blocks - now.blocks,
    }
    name = max(against, key=lambda what: against[what])
    return f"the next best is {name} ({1000 * against[name]:+.1f} ms)"
