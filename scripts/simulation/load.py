"""A swarm under as much load as it could bear at best: how much of that it bears.

The bound is a maximum flow. A peer that needs s seconds for a block can run 1/s blocks of tokens in a second, shared
as it likes among the blocks it hosts; every block has to be run for every token. The most tokens per second for
which source -> peers -> blocks -> sink still fills every block is what the placement allows. No placement of the
same peers allows more than the sum of their 1/s, divided by the number of blocks.

(A real peer runs many sessions' tokens together and does more of them; that scales both sides alike.)
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import maximum_flow

from simulation.clients import Client, route_of, settle
from simulation.hosting import Hosting, Peer
from swarm.errors import NoRoute
from swarm.types import PeerId, Route

SESSIONS_PER_PEER = 2  # in each of the places of 64 blocks, see `saturate`
CLIENTS = 200
ROUNDS = 20  # in which sessions come while the offers stay as they are
RENEWALS = 2  # how often all sessions have ended and others come, after the swarm is full
_UNITS = 1_000_000  # of flow that the strongest block has, at least: flows are whole numbers
_PRECISION = 1e-3


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens per second at the limit."""

    achieved: float
    placed: float  # the maximum flow through the peers where they are
    possible: float  # no placement of these peers allows more


def saturate(hosting: Hosting, chance: random.Random) -> Load:
    """Offer the swarm the whole of what its placement allows, in many sessions, and see what it does.

    Sessions come in rounds, choose routes by what offers say of the queues before that round, and end; what counts is
    the last state. A session gets what the busiest peer of its route has left for it.
    """
    peers = hosting.online
    placed, possible = max_flow(peers, hosting.model.num_blocks), _possible(peers, hosting.model.num_blocks)
    clients = [settle(hosting, chance) for _ in range(CLIENTS)]
    count = max(500, SESSIONS_PER_PEER * len(peers)) // ROUNDS * ROUNDS
    rate = placed / count
    published = dict(hosting.directory.offers)
    sessions: list[Route] = []
    for turn in range(ROUNDS * (1 + RENEWALS)):
        if turn >= ROUNDS:
            del sessions[: count // ROUNDS]
        sessions += _routes(hosting, clients, count // ROUNDS, chance)
        _publish_queues(hosting, _use(hosting, sessions, rate))
    use = _use(hosting, sessions, rate)
    achieved = sum(rate / max(1.0, *(use[hop.peer] for hop in route)) for route in sessions)
    hosting.directory.offers = published
    hosting.directory.forget()
    return Load(achieved, placed, possible)


def _routes(hosting: Hosting, clients: list[Client], count: int, chance: random.Random) -> list[Route]:
    routes = []
    for _ in range(count):
        client = chance.choice(clients)
        try:
            route = route_of(hosting, client, hosting.directory.read(client.coordinate), chance)
        except NoRoute:
            continue
        if all(hop.peer in hosting.peers for hop in route):
            routes.append(route)
    return routes


def _use(hosting: Hosting, sessions: list[Route], rate: float) -> dict[PeerId, float]:
    """How much of each peer's time the sessions want: more than 1 where it cannot be had."""
    use: dict[PeerId, float] = defaultdict(float)
    for route in sessions:
        for hop in route:
            use[hop.peer] += rate * len(hop.span) * hosting.peers[hop.peer].machine.seconds_per_block
    return use


def _publish_queues(hosting: Hosting, use: dict[PeerId, float]) -> None:
    for name, peer in hosting.peers.items():
        if name in hosting.directory.offers:
            hosting.directory.offers[name] = replace(peer.offer, queue=_queue(use.get(name, 0.0)))
    hosting.directory.forget()


def _queue(use: float) -> float:
    """Steps that wait: of a queue with random arrivals and equal service times (M/D/1); growing while it is too full."""
    bounded = min(use, 0.97)
    return bounded**2 / (2 * (1 - bounded)) + 50.0 * max(0.0, use - bounded)


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
