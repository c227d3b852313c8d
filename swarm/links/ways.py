"""The ways between peers in memory, and what can be wrong with them: stopped, slow, parted, lossy, corrupt."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from swarm.links.frames import CHUNK
from swarm.links.lane import Lane, Message
from swarm.types import PeerId

Latency = Callable[[PeerId, PeerId], float]


@dataclass(slots=True)
class Nuisance:
    """How likely it is that a message meets with something."""

    dropped: float = 0.0
    duplicated: float = 0.0
    reordered: float = 0.0


class Uplink:
    """What all connections of a peer share on their way out: each gets as much as any other that has something to send.

    Args:
        bandwidth: bytes per second of all together.
    """

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._turn = asyncio.Lock()  # fair: as TCP's congestion control is meant to be

    async def carry(self, size: int) -> None:
        """Take turns for so many bytes with whoever else sends."""
        for start in range(0, size, CHUNK):
            async with self._turn:
                await asyncio.sleep(min(CHUNK, size - start) / self._bandwidth)


class Ways:
    """The ways between peers, and what can happen to messages on them.

    Args:
        seed: of all chance there is in it.
        latency: one-way seconds from one peer to another.
        bandwidth: bytes per second of each way.
    """

    def __init__(self, seed: int = 0, latency: float | Latency = 0.002, bandwidth: float = 1e8) -> None:
        self.chance = random.Random(seed)
        self.bandwidth = bandwidth
        self.nuisance = Nuisance()
        self._latency: Latency = latency if callable(latency) else lambda sender, receiver: latency
        self._slowness: dict[PeerId, float] = {}
        self._distance: dict[PeerId, float] = {}
        self._stalled: dict[PeerId, asyncio.Event] = {}
        self._parted: set[tuple[PeerId, PeerId]] = set()
        self._corrupt: dict[PeerId, float] = {}
        self._uplinks: dict[PeerId, Uplink] = {}
        self._held: list[Lane] = []  # which found their way closed
        self._changed = asyncio.Event()  # some way was opened
        self._trace = hashlib.blake2b(digest_size=16)

    # --- what peers share ------------------------------------------------------------------------------------------

    def share_uplink(self, peer: PeerId, bandwidth: float) -> None:
        """From now on, the large messages of `peer` to all others share so many bytes per second."""
        self._uplinks[peer] = Uplink(bandwidth)

    async def leave(self, sender: PeerId, size: int) -> None:
        """Take what a large message needs of its sender's uplink, if that is limited."""
        if (uplink := self._uplinks.get(sender)) is not None:
            await uplink.carry(size)

    # --- faults ----------------------------------------------------------------------------------------------------

    def stall(self, peer: PeerId) -> None:
        """Stop the process of `peer`, as SIGSTOP does: the world waits for it, and does not notice."""
        self.note("stall", peer)
        self._stalled.setdefault(peer, asyncio.Event())

    def resume(self, peer: PeerId) -> None:
        """Let it go on, as SIGCONT does: it finds everything that came meanwhile."""
        if (running := self._stalled.pop(peer, None)) is not None:
            self.note("resume", peer)
            running.set()
            self._stir()

    def slow(self, peer: PeerId, factor: float, *, only_work: bool = False) -> None:
        """From now on, `peer` takes `factor` times as long for everything, or only for its own work; 1 heals it."""
        self.note("slow", peer, f"{factor:g}")
        self._slowness[peer] = factor
        self._distance[peer] = 1.0 if only_work else factor

    def partition(self, sender: PeerId, receiver: PeerId, *, one_way: bool = False) -> None:
        """Nothing comes through from one to the other, and nobody is told."""
        self.note("partition", sender, receiver, f"{one_way}")
        self._parted |= {(sender, receiver)} if one_way else {(sender, receiver), (receiver, sender)}

    def heal(self, one: PeerId, other: PeerId) -> None:
        """Let everything through again, both ways; what waited first."""
        self.note("heal", one, other)
        self._parted -= {(one, other), (other, one)}
        self._stir()

    def drop(self, fraction: float) -> None:
        """Let so many of all messages vanish."""
        self.nuisance.dropped = fraction

    def duplicate(self, fraction: float) -> None:
        """Let so many of all messages arrive twice."""
        self.nuisance.duplicated = fraction

    def reorder(self, fraction: float) -> None:
        """Let so many of all messages arrive late, after what was sent behind them."""
        self.nuisance.reordered = fraction

    def corrupt(self, peer: PeerId, fraction: float = 1.0) -> None:
        """Let so much of what `peer` says arrive as nonsense; 0 heals it."""
        self.note("corrupt", peer, f"{fraction:g}")
        self._corrupt[peer] = fraction

    async def passage(self, sender: PeerId, receiver: PeerId) -> None:
        """What it takes to say a word: the latency, and however long the way is closed."""
        await asyncio.sleep(self.latency(sender, receiver))
        while not self.is_open(sender, receiver):
            await self._changed.wait()

    def hold(self, lane: Lane) -> None:
        """The way of `lane` is closed: it is told when that may have changed."""
        self._held.append(lane)

    def _stir(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        held, self._held = self._held, []
        for lane in held:
            lane.look()

    # --- how things are --------------------------------------------------------------------------------------------

    def slowness(self, peer: PeerId) -> float:
        """How many times as long as usual `peer` takes for its work."""
        return self._slowness.get(peer, 1.0)

    async def running(self, peer: PeerId) -> None:
        """Wait until `peer` is not stopped."""
        while (event := self._stalled.get(peer)) is not None:
            await event.wait()

    def is_open(self, sender: PeerId, receiver: PeerId) -> bool:
        """Whether what one says reaches the other now."""
        stopped = sender in self._stalled or receiver in self._stalled
        return not stopped and not self.is_parted(sender, receiver)

    def is_parted(self, sender: PeerId, receiver: PeerId) -> bool:
        """Whether it is the way between them where things are held."""
        return (sender, receiver) in self._parted

    def latency(self, sender: PeerId, receiver: PeerId) -> float:
        """One-way seconds at this moment."""
        return self._latency(sender, receiver) * max(self._distance.get(peer, 1.0) for peer in (sender, receiver))

    def mangled(self, sender: PeerId, message: Message) -> Message:
        """What becomes of a message on its way: itself, unless its sender is corrupt."""
        if not (fraction := self._corrupt.get(sender, 0.0)) or self.chance.random() >= fraction:
            return message
        kind = self.chance.choice(("numbers", "length", "header") if message.body else ("header",))
        self.note("mangled", sender, kind)
        if kind == "numbers":
            return replace(message, body=b"\xff" * len(message.body))  # in every floating-point format, not a number
        if kind == "length":
            return replace(message, body=message.body[: len(message.body) // 2])
        return replace(message, header=self.chance.randbytes(len(message.header)))

    def note(self, *event: str) -> None:
        """Take something into the trace."""
        self._trace.update(f"{asyncio.get_running_loop().time():.9f} {' '.join(event)}\n".encode())

    @property
    def trace(self) -> str:
        """A digest of everything that has happened, and when."""
        return self._trace.copy().hexdigest()
