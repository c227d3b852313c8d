"""One vector in an attempt to average: chunks of it out and in, added up where this member owns them, and checked.

A chunk's mean goes out as soon as all have sent theirs of it, while others still come in. Whoever receives a chunk
digests its very bytes, the owner too, so that equal digests mean equal averages.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from peer.training.codecs import CHUNK, CODECS, Chunk
from peer.training.feedback import Feedback
from peer.training.robust import ROBUST
from swarm.agreement.assignments import Plan
from swarm.agreement.messages import Averaged, Finding, Order, Piece, Share
from swarm.agreement.parts import parts, sharing
from swarm.errors import BadTensor
from swarm.types import PeerId

WINDOW = 2  # chunks on their way to one peer at once


@dataclass(frozen=True, slots=True)
class Lost:
    """Why an attempt cannot end: whom it was waiting for, or who sent what is no gradient."""

    suspects: list[str] = field(default_factory=list)
    unsound: list[tuple[str, str]] = field(default_factory=list)


class Way(Protocol):
    """What an exchange needs of the attempt that it is a part of."""

    keeps: bool  # whether the mean's bytes are wanted afterwards

    async def send(self, peer: PeerId, piece: Piece, body: memoryview) -> None:
        """A chunk to another member, until it is taken in there."""

    def fail(self, lost: Lost) -> None:
        """End the attempt."""


class Exchange:
    """One group's vector in an attempt."""

    def __init__(
        self,
        way: Way,
        plan: Plan,
        order: Order,
        group: str,
        sums: torch.Tensor,
        mean: torch.Tensor,
        feedback: Feedback | None,
        me: PeerId,
    ) -> None:
        """`sums`, of the members' `group`, are averaged into `mean`, which may hold anything before."""
        self._way = way
        self._plan = plan
        self._order = order
        self._group = group
        self._sums = sums
        self._mean = mean
        self._feedback = feedback
        self._codec = CODECS[plan.dtype]
        self._me = me
        self._shares: dict[PeerId, Share] = {
            PeerId(share.peer): share for share in sharing(order.shares, group, plan.stages)
        }
        self._parts = parts(list(self._shares.values()), len(sums))
        self._others = [peer for peer in self._shares if peer != me]
        self._came: dict[int, dict[PeerId, memoryview]] = defaultdict(dict)  # sums, by the chunk's start
        self._reduced: dict[int, asyncio.Event] = {start: asyncio.Event() for start in self._starts(me)}
        self._means: dict[PeerId, dict[int, bytes]] = {peer: {} for peer in self._shares}  # tags of the chunks
        self._outgoing: dict[PeerId, asyncio.Queue[tuple[Piece, memoryview] | None]] = {
            peer: asyncio.Queue() for peer in self._others
        }
        self._unsent = {peer: len(self._starts(peer)) for peer in self._others}  # chunks of sums, not yet taken in
        self._bodies: dict[int, memoryview] = {}  # of the mean, by the chunk's start, where they are kept
        self._squared: dict[PeerId, float] = dict.fromkeys(self._shares, 0.0)
        self._mean_squared = 0.0
        self._scratch = torch.empty(CHUNK)
        self._complete = asyncio.Event()
        seed = f"{order.round} {order.term} {order.attempt} {group}".encode()
        self._mac = AESGCM(hashlib.sha256(order.line + seed).digest()[:16])
        if self._feedback is not None:
            self._feedback.begin(self._parts)

    def _starts(self, owner: PeerId) -> range:
        part = self._parts[owner]
        return range(part.start, part.stop, CHUNK)

    def _count(self, owner: PeerId, start: int) -> int:
        return min(CHUNK, self._parts[owner].stop - start)

    async def run(self) -> None:
        """Send, and wait until all that is to come has come."""
        for start in self._starts(self._me):
            self._reduce_if_whole(start)
        self._end_outgoing_if_whole()
        self._look()
        async with asyncio.TaskGroup() as group:
            for peer in self._others:
                sums = self._sums_for(peer)
                for _ in range(WINDOW):
                    group.create_task(self._send_sums(peer, sums))
                    group.create_task(self._send_means(peer))
            group.create_task(self._complete.wait())

    def waits_for(self) -> set[PeerId]:
        """Who has not sent its sums or taken ours in; where all have, whose means are missing."""
        lacking = {
            peer for start, event in self._reduced.items() if not event.is_set() for peer in self._lacking(start)
        }
        lacking |= {peer for peer, left in self._unsent.items() if left}
        return lacking or {peer for peer in self._others if len(self._means[peer]) < len(self._starts(peer))}

    def _lacking(self, start: int) -> set[PeerId]:
        return set(self._others) - self._came[start].keys()

    # --- sums --------------------------------------------------------------------------------------------------------

    def _sums_for(self, owner: PeerId) -> Iterator[tuple[Piece, memoryview]]:
        for start in self._starts(owner):
            count = self._count(owner, start)
            values = self._sums[start : start + count]
            yield self._piece(start, count, mean=False), self._encode(start, values)

    def _encode(self, start: int, values: torch.Tensor) -> memoryview:
        if self._feedback is None:
            return self._codec.encode(values)
        wanted = self._feedback.added(start, values)
        body = self._codec.encode(wanted)
        read = self._codec.decode(body, torch.empty(len(values)))
        self._feedback.left_out(start, wanted - read)
        return body

    async def _send_sums(self, peer: PeerId, sums: Iterator[tuple[Piece, memoryview]]) -> None:
        for piece, body in sums:
            await self._way.send(peer, piece, body)
            self._unsent[peer] -= 1

    def _piece(self, start: int, count: int, mean: bool) -> Piece:
        order = self._order
        return Piece(order.line, order.round, order.term, order.attempt, self._group, start, count, mean)

    async def receive(self, peer: PeerId, message: Piece, body: memoryview) -> None:
        """A chunk from another member. Raises `BadTensor`."""
        owner = peer if message.mean else self._me
        if peer not in self._shares or message.start not in self._starts(owner):
            raise BadTensor(f"no chunk of {self._group} begins at {message.start}")
        if message.count != self._count(owner, message.start):
            raise BadTensor(f"a chunk of {message.count} values at {message.start}")
        if message.mean:
            self._take_mean(peer, message.start, body)
        elif peer not in self._came[message.start]:
            self._came[message.start][peer] = body
            self._reduce_if_whole(message.start)
            await self._reduced[message.start].wait()

    # --- adding up ---------------------------------------------------------------------------------------------------

    def _reduce_if_whole(self, start: int) -> None:
        if self._lacking(start) or self._reduced[start].is_set():
            return
        count = self._count(self._me, start)
        mean = self._mean[start : start + count]
        bodies = self._came.pop(start, {})
        if self._plan.robust == "none":
            self._add_up(start, mean, bodies)
        else:
            self._add_up_robustly(start, mean, bodies)
        self._mean_squared += _squared(mean)
        body = self._encode(start, mean)
        self._take_mean(self._me, start, body)
        self._reduced[start].set()
        for queue in self._outgoing.values():
            queue.put_nowait((self._piece(start, count, mean=True), body))
        self._end_outgoing_if_whole()

    def _end_outgoing_if_whole(self) -> None:
        if len(self._means[self._me]) == len(self._starts(self._me)):
            for queue in self._outgoing.values():
                for _ in range(WINDOW):  # as many as are sending
                    queue.put_nowait(None)

    def _add_up(self, start: int, mean: torch.Tensor, bodies: Mapping[PeerId, memoryview]) -> None:
        """The exact mean: this member's own values, then those of the others in their order, whoever was first."""
        total = self._values(self._me, start, len(mean), bodies)
        for peer in self._others:
            total = torch.add(total, self._values(peer, start, len(mean), bodies), out=mean)
        torch.mul(total, 1.0 / self._plan.samples, out=mean)

    def _add_up_robustly(self, start: int, mean: torch.Tensor, bodies: Mapping[PeerId, memoryview]) -> None:
        """The sum over stages (of a tied embedding: both) of the robust mean of their members' means."""
        by_stage: dict[int, list[torch.Tensor]] = defaultdict(list)
        for peer, share in self._shares.items():
            values = self._values(peer, start, len(mean), bodies)
            if share.samples:
                by_stage[share.stage].append(values / share.samples)
        mean.zero_()
        for rows in by_stage.values():
            mean.add_(ROBUST[self._plan.robust](torch.stack(rows)))

    def _values(self, peer: PeerId, start: int, count: int, bodies: Mapping[PeerId, memoryview]) -> torch.Tensor:
        """A member's sum of a chunk, in memory that the next call overwrites. Whoever sent what is none is told of."""
        values = self._sums[start : start + count]
        if peer != self._me:
            try:
                values = self._codec.decode(bodies[peer], self._scratch[:count])
            except BadTensor as error:
                self._way.fail(Lost(unsound=[(peer, f"sent {error}")]))
        squared = _squared(values)
        if not math.isfinite(squared):
            self._way.fail(Lost(unsound=[(peer, "sent a gradient that is not finite")]))
        self._squared[peer] += squared
        return values

    # --- means -------------------------------------------------------------------------------------------------------

    async def _send_means(self, peer: PeerId) -> None:
        while (each := await self._outgoing[peer].get()) is not None:
            piece, body = each
            await self._way.send(peer, piece, body)

    def _take_mean(self, owner: PeerId, start: int, body: memoryview) -> None:
        if start in self._means[owner]:
            return
        mean = self._mean[start : start + self._count(owner, start)]
        values = self._codec.decode(body, mean)
        if values.data_ptr() != mean.data_ptr():
            mean.copy_(values)
        if self._way.keeps:
            self._bodies[start] = body
        self._means[owner][start] = self._mac.encrypt(start.to_bytes(12, "little"), b"", body)
        self._look()

    def _look(self) -> None:
        if all(len(self._means[peer]) == len(self._starts(peer)) for peer in self._shares):
            self._complete.set()

    # --- what is reported --------------------------------------------------------------------------------------------

    def averaged(self) -> Averaged:
        """What is in `mean` now, and the squared norm of this member's part of it."""
        digests: list[tuple[str, bytes]] = []
        for peer, tags in self._means.items():
            joined = b"".join(tags[start] for start in sorted(tags))
            digests.append((peer, hashlib.sha256(joined).digest()[:16]))
        finite = math.isfinite(self._mean_squared)
        return Averaged(self._group, digests, self._mean_squared if finite else 0.0, finite)

    def coded(self) -> list[Chunk]:
        """The mean as it went over the wire, where that is kept."""
        counts = {start: self._count(owner, start) for owner in self._parts for start in self._starts(owner)}
        return [Chunk(self._plan.dtype, counts[start], body) for start, body in sorted(self._bodies.items())]

    def findings(self) -> list[Finding]:
        """How large the members' sums are, over this member's part."""
        return [Finding(self._group, peer, min(squared, 1e308)) for peer, squared in self._squared.items()]


def _squared(values: torch.Tensor) -> float:
    """The squared norm; infinite or not a number only where the values are."""
    squared = torch.dot(values, values).item()
    return squared if math.isfinite(squared) else torch.dot(values.double(), values.double()).item()
