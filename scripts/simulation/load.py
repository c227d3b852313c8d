"""A swarm under as much load as it could bear at best: how much of that it bears.

The bound is a maximum flow. A peer that needs s seconds for a block can run 1/s blocks of tokens in a second, shared
as it likes among the blocks it hosts; every block has to be run for every token. The most tokens per second for
which source -> peers -> blocks -> sink still fills every block is what the placement allows. No placement of the
same peers allows more than the sum of their 1/s, divided by the number of blocks.

(A real peer runs many sessions' tokens together and does more of them; that scales both sides alike.)
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import maximum_flow

from simulation.clients import Client, living_route, settle, true_seconds
from simulation.hosting import Hosting, Peer
from swarm.directory.sampling import LOT_BITS
from swarm.errors import NoRoute
from swarm.routing import Vector
from swarm.types import Route

CROWD = 5.0  # how many times more sessions than would fill the swarm if none had to wait for another
CLIENTS = 200  # places that they come from
ROUNDS = 40  # renewals of the offers in the time that a session lasts: every 10 s of 400 s, say
LIFETIMES = 2  # of sessions, until what is seen counts
MOST = 6000  # sessions that are routed one by one; where there are more, each stands for several
_UNITS = 1_000_000  # of flow that the strongest block has, at least: flows are whole numbers
_PRECISION = 1e-3
_FULL = 0.95  # use of a peer's time, above which what waits is counted by Little's law alone


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens per second at the limit."""

    achieved: float
    placed: float  # the maximum flow through the peers where they are
    possible: float  # no placement of these peers allows more


@dataclass(frozen=True, slots=True)
class _Session:
    route: Route
    alone: float  # seconds that a token takes while nobody else is there


def saturate(hosting: Hosting, chance: random.Random) -> Load:
    """Crowd the swarm with sessions that each generate as fast as they can, and see how fast that is.

    Sessions come in rounds, choose routes by what offers say of the queues before that round, and end; what counts is
    the last state. The peers' time is shared fairly (max-min) among the sessions.
    """
    peers = hosting.online
    placed, possible = max_flow(peers, hosting.model.num_blocks), _possible(peers, hosting.model.num_blocks)
    clients = [settle(hosting, chance) for _ in range(CLIENTS)]
    published = dict(hosting.directory.offers)
    sessions = _routes(hosting, clients, 100, chance)
    alone = sum(session.alone for session in sessions) / max(1, len(sessions))
    crowd = CROWD * placed * alone
    weight = max(1.0, crowd / MOST)
    count = max(1, round(crowd / weight / ROUNDS))  # in a round
    sessions = []
    for turn in range(ROUNDS * LIFETIMES):
        if turn >= ROUNDS:
            sessions = chance.sample(sessions, max(0, len(sessions) - count))
        sessions += _routes(hosting, clients, count, chance)
        _publish_queues(hosting, _Shares(hosting, sessions, weight))
    achieved = weight * float(_Shares(hosting, sessions, weight).rates.sum())
    hosting.directory.offers = published
    hosting.directory.forget()
    return Load(achieved, placed, possible)


def _routes(hosting: Hosting, clients: list[Client], count: int, chance: random.Random) -> list[_Session]:
    sessions = []
    for _ in range(count):
        client = chance.choice(clients)
        records = hosting.directory.read(client.coordinate, chance.getrandbits(LOT_BITS))
        with contextlib.suppress(NoRoute):
            route, _ = living_route(hosting, client, records, chance)
            sessions.append(_Session(route, true_seconds(hosting, client, route)))
    return sessions


class _Shares:
    """The max-min fair rates of sessions that share peers: all rise together until a peer of theirs is full.

    Attributes:
        rates: tokens per second of each session, no more than it could do alone.
        queues: steps that wait at each peer on average, as it would measure them. A session that is slower than it
            would be alone has a step waiting for the rest of the time (Little's law), at the peer that holds it up.
            Besides, steps come at random: as many wait as in a queue with equal service times (M/D/1).
    """

    def __init__(self, hosting: Hosting, sessions: list[_Session], weight: float = 1.0) -> None:
        self._peers = {name: index for index, name in enumerate(hosting.peers)}
        hops = [(number, hop) for number, session in enumerate(sessions) for hop in session.route]
        self._session = np.array([number for number, _ in hops])
        self._peer = np.array([self._peers[hop.peer] for _, hop in hops])
        pace = {name: peer.machine.seconds_per_block for name, peer in hosting.peers.items()}
        # What a token takes there, of all the sessions that one stands for, [hops].
        self._seconds = weight * np.array([pace[hop.peer] * len(hop.span) for _, hop in hops])
        self._alone = np.array([session.alone for session in sessions])
        self.rates = np.zeros(len(sessions))
        self._holds_up = np.full(len(sessions), -1)  # the peer that does, -1 for none
        self._free = np.ones(len(self._peers))  # of each peer's time
        self._fill()
        waiting = weight * np.maximum(0.0, 1.0 - self.rates * self._alone)
        held = self._holds_up >= 0
        counts = np.bincount(self._holds_up[held], waiting[held], minlength=len(self._peers))
        use = np.minimum(1.0 - self._free, _FULL)
        queues = counts + use**2 / (2 * (1 - use))
        self.queues = dict(zip(self._peers, map(float, queues), strict=True))

    def _fill(self) -> None:
        """Progressive filling; peers that fill up at almost the same level are taken together."""
        free, rising = self._free, np.ones(len(self.rates), dtype=bool)
        while rising.any():
            on_hops = rising[self._session]
            wanted = np.bincount(self._peer[on_hops], self._seconds[on_hops], minlength=len(free))
            levels = np.divide(free, wanted, out=np.full(len(free), np.inf), where=wanted > 0)
            limit = levels.min() * 1.02
            content = rising & (1.0 / self._alone <= limit)
            self._settle(content, 1.0 / self._alone[content], free, rising)
            if content.any():
                continue
            full = (levels <= limit)[self._peer] & on_hops
            self._holds_up[self._session[full]] = self._peer[full]
            held = np.zeros_like(rising)
            held[self._session[full]] = True
            self._settle(held, levels[self._holds_up[held]], free, rising)

    def _settle(self, which: npt.NDArray[np.bool_], rates: Vector, free: Vector, rising: npt.NDArray[np.bool_]) -> None:
        """Give sessions their final rates."""
        self.rates[which] = rates
        rising[which] = False
        hops = which[self._session]
        used = self._seconds[hops] * self.rates[self._session[hops]]
        free -= np.bincount(self._peer[hops], used, minlength=len(free))
        np.maximum(free, 0.0, out=free)


def _publish_queues(hosting: Hosting, shares: _Shares) -> None:
    for name, peer in hosting.peers.items():
        if name in hosting.directory.offers:
            hosting.directory.offers[name] = replace(peer.offer, queue=shares.queues[name])
    hosting.directory.forget()


def _possible(peers: list[Peer], num_blocks: int) -> float:
    return sum(1.0 / peer.machine.seconds_per_block for peer in peers) / num_blocks


def max_flow(peers: list[Peer], num_blocks: int) -> float:
    """The most tokens per second that the peers could run where they are, by bisection."""
    highest = _possible(peers, num_blocks)
    unit = highest / _UNITS
    low, high = 0.0, highest
    while high - low > _PRECISION * highest:
        middle = (low + high) / 2
        wanted = int(middle / unit)
        graph = _graph(peers, num_blocks, unit, wanted)
        full = maximum_flow(graph, 0, graph.shape[0] - 1).flow_value == wanted * num_blocks
        low, high = (middle, high) if full else (low, middle)
    return low


def _graph(peers: list[Peer], num_blocks: int, unit: float, wanted: int) -> csr_array:
    """Source 0, then the peers, the blocks, and the sink; capacities in units."""
    first_block, sink = 1 + len(peers), 1 + len(peers) + num_blocks
    edges = [(first_block + block, sink, wanted) for block in range(num_blocks)]
    for index, peer in enumerate(peers, start=1):
        power = int(1.0 / peer.machine.seconds_per_block / unit)
        edges.append((0, index, power))
        edges += [(index, first_block + block, power) for block in peer.offer.span]
    rows, columns, capacities = np.array(edges, dtype=np.int32).T
    return csr_array(coo_array((capacities, (rows, columns)), shape=(sink + 1, sink + 1)))
