"""Clients: what they read, the route they take, and the one that somebody would take who knows everything."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np

from simulation.geography import Place, TrueLatencies, draw_place, measured, round_trip
from simulation.hosting import Hosting
from swarm.coordinates import NOWHERE, distance, update
from swarm.directory.sampling import LOT_BITS
from swarm.errors import NoRoute
from swarm.routes.costs import HOP_SECONDS
from swarm.routing import View, Work, cheapest, find_route
from swarm.types import Coordinate, Offer, PeerId, Route, Span

FIRST_PINGS = 16  # peers anywhere that a client measures to find its own place, twice each
NEAR_PINGS = 8  # peers near it that host the first block


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client found."""

    seconds: float  # per token, on its route, truly
    oracle: float  # on the best route by true latencies over all peers
    read: int  # records
    hops: int
    dead: int  # peers that it chose first and that were not there any more


@dataclass(frozen=True, slots=True)
class Client:
    """A client that has found its place."""

    place: Place
    coordinate: Coordinate
    measured: dict[PeerId, float]  # round trips in seconds
    ticket: int  # which slices it reads


def settle(hosting: Hosting, chance: random.Random) -> Client:
    """A new client, somewhere: it measures a few peers to know where it is, and the nearest to begin with."""
    place, coordinate = draw_place(chance), NOWHERE
    pinged: dict[PeerId, float] = {}
    ticket = chance.getrandbits(LOT_BITS)
    anywhere = hosting.directory.read(None, ticket)
    chosen = chance.sample(anywhere, min(FIRST_PINGS, len(anywhere)))
    for offer in chosen * 2:
        coordinate = _ping(hosting, place, coordinate, offer, pinged, chance)
    first = [offer for offer in hosting.directory.read(coordinate, ticket) if 0 in offer.span and offer.coordinate]
    first.sort(key=lambda offer: distance(coordinate, offer.coordinate or NOWHERE))
    for offer in first[:NEAR_PINGS]:
        coordinate = _ping(hosting, place, coordinate, offer, pinged, chance)
    return Client(place, coordinate, pinged, ticket)


def _ping(
    hosting: Hosting, place: Place, mine: Coordinate, offer: Offer, pinged: dict[PeerId, float], chance: random.Random
) -> Coordinate:
    peer = hosting.peers.get(offer.peer)
    if peer is None or offer.coordinate is None:
        return mine
    rtt = measured(place, peer.machine.place, chance)
    pinged[offer.peer] = min(rtt, pinged.get(offer.peer, rtt))
    return update(mine, offer.coordinate, rtt, chance)


def ask(hosting: Hosting, chance: random.Random) -> Answer | None:
    """Let a client come and find a route. None where there was none, or none is possible."""
    client = settle(hosting, chance)
    records = hosting.directory.read(client.coordinate, client.ticket)
    best = oracle(hosting, client)
    if best is None:
        return None
    try:
        route, dead = living_route(hosting, client, records, chance)
    except NoRoute:
        return None
    seconds, known = true_seconds(hosting, client, route), true_seconds(hosting, client, best)
    return Answer(seconds, known, len(records), len(route), dead)


def living_route(hosting: Hosting, client: Client, records: list[Offer], chance: random.Random) -> tuple[Route, int]:
    """What the client chooses from the records that it read, and how many peers it found dead before.

    Raises `NoRoute`.
    """
    offers = list({offer.peer: offer for offer in records}.values())
    view, dead = View(client.coordinate, client.measured), set[PeerId]()
    while True:
        route = find_route(offers, hosting.model.num_blocks, avoid=dead, chance=chance, view=view)
        if not (gone := {hop.peer for hop in route} - hosting.peers.keys()):
            return route, len(dead)
        dead |= gone


def oracle(hosting: Hosting, client: Client) -> Route | None:
    """The best route over all that truly serve, by true latencies. None where some block has nobody."""
    peers = hosting.online
    span = Span(0, hosting.model.num_blocks)
    if {block for peer in peers for block in peer.offer.span} != set(span):
        return None
    latencies = TrueLatencies([peer.machine.place for peer in peers], client.place)
    work = Work(
        np.full(len(peers), HOP_SECONDS),
        np.array([peer.machine.seconds_per_block for peer in peers]),
        np.ones(len(peers)),
    )
    return cheapest([peer.offer for peer in peers], span, latencies, work)


def true_seconds(hosting: Hosting, client: Client, route: Route) -> float:
    """What a token takes on `route` while nobody else is there."""
    machines = [hosting.peers[hop.peer].machine for hop in route]
    places = [client.place, *(machine.place for machine in machines), client.place]
    way = sum(round_trip(a, b) / 2 for a, b in itertools.pairwise(places))
    work = sum(machine.seconds_per_block * len(hop.span) for machine, hop in zip(machines, route, strict=True))
    return way + work + HOP_SECONDS * len(route)
