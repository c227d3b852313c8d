"""The swarm of one model as it truly is, and how it fares: who serves which blocks, since when, how well covered."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulation.directory import Directory
from simulation.machines import Machine, Model
from swarm.coordinates import NOWHERE
from swarm.types import Coordinate, Offer, PeerId, Span, State


@dataclass(slots=True)
class Peer:
    """One machine that is there."""

    machine: Machine
    offer: Offer
    since: float  # when it came to its span, in seconds
    coordinate: Coordinate = NOWHERE
    leaving: bool = False  # for good


@dataclass(slots=True)
class Sample:
    """How the swarm is at a moment, for the plot."""

    hours: float
    online: int
    weakest: float  # block, in tokens per second
    average: float


class Hosting:
    """The peers of one model."""

    def __init__(self, model: Model, keepers: int) -> None:
        self.model = model
        self.peers: dict[PeerId, Peer] = {}
        self.directory = Directory(model.num_blocks, keepers)
        self.samples: list[Sample] = []
        self.moves = 0
        self.covered_seconds = 0.0
        self.peer_seconds = 0.0
        self.seconds = 0.0
        self._hosts = [0] * model.num_blocks
        self._missing = model.num_blocks
        self._last = 0.0

    @property
    def online(self) -> list[Peer]:
        """Those that serve."""
        return [peer for peer in self.peers.values() if peer.offer.state is State.ONLINE]

    def pass_time(self, now: float, measuring: bool) -> None:
        """Count the time since the last change; call it before each."""
        elapsed, self._last = now - self._last, now
        if measuring:
            self.seconds += elapsed
            self.covered_seconds += elapsed if not self._missing else 0.0
            self.peer_seconds += elapsed * len(self.peers)

    def become(self, peer: Peer, state: State, span: Span) -> None:
        """Let a peer change, and publish what it says then."""
        self._count(peer, -1)
        machine = peer.machine
        peer.offer = replace(
            peer.offer,
            span=span,
            state=state,
            tokens_per_second=1.0 / (machine.seconds_per_block * len(span)),
            coordinate=peer.coordinate,
        )
        self._count(peer, +1)
        self.directory.offers[machine.peer] = peer.offer

    def vanish(self, peer: Peer) -> None:
        """A peer is no more. Its last offer stays where it is."""
        self._count(peer, -1)
        del self.peers[peer.machine.peer]

    def _count(self, peer: Peer, change: int) -> None:
        if peer.offer.state is not State.ONLINE:
            return
        for block in peer.offer.span:
            before = self._hosts[block]
            self._hosts[block] += change
            self._missing += (self._hosts[block] == 0) - (before == 0)

    def take_sample(self, now: float) -> None:
        """Remember how it is."""
        strength = [0.0] * self.model.num_blocks
        online = self.online
        for peer in online:
            for block in peer.offer.span:
                strength[block] += peer.offer.tokens_per_second
        self.samples.append(Sample(now / 3600, len(online), min(strength), sum(strength) / len(strength)))


def first_offer(machine: Machine, model: Model, span: Span) -> Offer:
    """What a machine says when it comes."""
    return Offer(
        peer=machine.peer,
        model=model.id,
        name=model.name,
        num_blocks=model.num_blocks,
        span=span,
        addresses=(),
        state=State.JOINING,
        dtype="bfloat16",
        tokens_per_second=1.0 / (machine.seconds_per_block * len(span)),
        cache_tokens=65536,
        cache_free=65536,
        sessions=0,
        version="",
        issued=0.0,
        expires=0.0,
        seconds_per_block=machine.seconds_per_block,
    )
