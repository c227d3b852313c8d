"""The all-reduce between members: each owns a part of the vector, adds up the others' sums of it, and sends the mean.

Reduce-scatter and all-gather in one: a chunk's mean goes out as soon as all have sent theirs of it, while others still
come in. Whoever receives a chunk digests its very bytes, the owner too, so that equal digests mean equal averages.
Nothing is decided here: an attempt ends in a `Report`, and what it left in `mean` is applied or overwritten.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from peer.training.codecs import CHUNK, CODECS
from peer.training.feedback import Feedback
from peer.training.robust import ROBUST
from swarm.agreement.assignments import Plan
from swarm.agreement.messages import Averaged, Finding, Order, Piece, Report, Share
from swarm.agreement.parts import parts, sharing
from swarm.errors import BadTensor, RemoteError, StaleRound
from swarm.rpc import Link, Reply, Rpc
from swarm.types import Address, PeerId
from swarm.wire import Done, Endpoint

log = logging.getLogger(__name__)

WINDOW = 2  # chunks on their way to one peer at once
FIRST_STALL = 15.0  # seconds without a sign of progress from a peer that is waited for, before any were measured
LEAST_STALL = 1.5
MULTIPLE = 20.0  # of the longest pause of late

Vectors = Mapping[str, torch.Tensor]  # by group: flat, fp32


class Averager:
    """Averages one member's sums with those of the others, an attempt at a time."""

    def __init__(self, rpc: Rpc, plan: Plan) -> None:
        self.rpc = rpc
        self.plan = plan
        self.mean: dict[str, torch.Tensor] = {}  # by group; whole once an attempt has ended well
        self.feedback: dict[str, Feedback] = {}
        self.bandwidth = 0.0  # bytes a second, of late
        self.stall = FIRST_STALL
        self._attempt: Attempt | None = None
        self._begun = asyncio.Condition()
        self._latest = (-1, -1, -1)  # (round, term, attempt) that was begun last
        rpc.answer(Piece, self._piece)

    async def run(self, order: Order, sums: Vectors, endpoints: Mapping[PeerId, Endpoint]) -> Report:
        """One attempt: what is in `sums`, averaged into `mean`. Cancelled where it is abandoned.

        Args:
            order: who takes part, and what this attempt is called.
            sums: over samples, by group (`swarm.agreement.parts`): flat, fp32, on the CPU.
            endpoints: where the others listen.
        """
        attempt = self._attempt = Attempt(self, order, sums, endpoints)
        async with self._begun:
            self._latest = attempt.key
            self._begun.notify_all()
        try:
            return await attempt.run()
        finally:
            if self._attempt is attempt:
                self._attempt = None

    def commit(self) -> None:
        """What the last attempt averaged is being applied."""
        for feedback in self.feedback.values():
            feedback.commit()

    async def _piece(self, link: Link, message: Piece, body: memoryview) -> Reply:
        key = (message.round, message.term, message.attempt)
        if key > self._latest:  # the other one was told first
            async with self._begun:
                await self._begun.wait_for(lambda: key <= self._latest)
        if self._attempt is None or self._attempt.key != key or self._attempt.order.line != message.line:
            raise StaleRound("another attempt is made here")
        await self._attempt.receive(link.peer, message, body)
        return Done()

    def room_for(self, sums: Vectors) -> None:
        """Have buffers of the right length: the one averaging buffer, and for 8 bits what the code leaves out."""
        for group, vector in sums.items():
            if group not in self.mean or len(self.mean[group]) != len(vector):
                self.mean[group] = torch.zeros(len(vector))
                if self.plan.dtype == "int8":
                    self.feedback[group] = Feedback(len(vector))


@dataclass(frozen=True, slots=True)
class Lost:
    """Why an attempt cannot end: whom it was waiting for, or who sent what is no gradient."""

    suspects: list[str] = field(default_factory=list)
    unsound: list[tuple[str, str]] = field(default_factory=list)


class Attempt:
    """One attempt, over all groups that a member is in."""

    def __init__(self, averager: Averager, order: Order, sums: Vectors, endpoints: Mapping[PeerId, Endpoint]) -> None:
        self.averager = averager
        self.order = order
        self.key = (order.round, order.term, order.attempt)
        self._endpoints = endpoints
        self._loop = asyncio.get_running_loop()
        averager.room_for(sums)
        me = averager.rpc.peer
        self.exchanges = {group: Exchange(self, group, vector, me) for group, vector in sums.items()}
        self._started = self._loop.time()
        self._moved: dict[PeerId, float] = {}  # when each peer last gave a sign of progress
        self._longest = 0.0
        self._rates: dict[PeerId, list[float]] = defaultdict(list)
        self.failed: asyncio.Future[Lost] = self._loop.create_future()

    async def run(self) -> Report:
        """Exchange everything; the report. What fails is in it, never raised."""
        report = Report(self.order.term, self.order.attempt, [], [], [], [])
        work, watch = asyncio.ensure_future(self._exchange()), asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait((work, self.failed), return_when=asyncio.FIRST_COMPLETED)
            lost = self.failed.result() if self.failed.done() else work.result()
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
            self.failed.cancel()
        if lost is not None:
            log.info("attempt failed round=%d suspects=%s unsound=%s", self.order.round, lost.suspects, lost.unsound)
            self.averager.stall = min(2.0 * self.averager.stall, FIRST_STALL)
            report.suspects, report.unsound = sorted(set(lost.suspects)), lost.unsound
            return report
        self._measure()
        report.averages = [exchange.averaged() for exchange in self.exchanges.values()]
        report.findings = [finding for exchange in self.exchanges.values() for finding in exchange.findings()]
        return report

    async def _exchange(self) -> Lost | None:
        async with asyncio.TaskGroup() as group:
            for exchange in self.exchanges.values():
                group.create_task(exchange.run())
        return None

    async def receive(self, peer: PeerId, message: Piece, body: memoryview) -> None:
        """A chunk has come. Returns once it is taken in. Raises `BadTensor`."""
        exchange = self.exchanges.get(message.group)
        if exchange is None:
            raise BadTensor(f"this member averages nothing called {message.group!r}")
        self.moved(peer)
        try:
            await exchange.receive(peer, message, body)
        except BadTensor as error:
            self.fail(Lost(unsound=[(peer, f"sent {error}")]))
            raise

    async def send(self, peer: PeerId, piece: Piece, body: memoryview) -> None:
        """A chunk to another member, until it is taken in there."""
        started = self._loop.time()
        addresses = [Address(*pair) for pair in self._endpoints[peer].addresses]
        try:
            link = await self.averager.rpc.connect(peer, addresses)
            await link.call(piece, [body], timeout=600.0)  # `_watch` knows better how long to wait
        except RemoteError as error:
            log.info("cannot send a chunk to=%s error=%r", peer[-6:], str(error))
            self.fail(Lost(suspects=[peer]))
            return
        self.moved(peer)
        if piece.mean:
            self._rates[peer].append(WINDOW * len(body) / max(self._loop.time() - started, 1e-6))

    def fail(self, lost: Lost) -> None:
        """End the attempt."""
        if not self.failed.done():
            self.failed.set_result(lost)

    # --- deadlines ---------------------------------------------------------------------------------------------------

    def moved(self, peer: PeerId) -> None:
        """A peer gave a sign of progress."""
        now = self._loop.time()
        self._longest = max(self._longest, now - self._moved.get(peer, self._started))
        self._moved[peer] = now

    async def _watch(self) -> None:
        """End the attempt when somebody who is waited for gives no sign of progress for much longer than is usual."""
        stall = self.averager.stall
        while True:
            await asyncio.sleep(stall / 8)
            now = self._loop.time()
            waiting = set[PeerId]().union(*(exchange.waits_for() for exchange in self.exchanges.values()))
            late = [peer for peer in waiting if now - self._moved.get(peer, self._started) > stall]
            if late:
                self.fail(Lost(suspects=list[str](late)))

    def _measure(self) -> None:
        usual = min(max(LEAST_STALL, MULTIPLE * self._longest), FIRST_STALL)
        self.averager.stall = max(usual, 0.5 * self.averager.stall)
        rates = [sorted(each)[len(each) // 2] for each in self._rates.values() if each]
        if rates:
            self.averager.bandwidth = 0.5 * (self.averager.bandwidth or max(rates)) + 0.5 * max(rates)


class Exchange:
    """One group's vector in an attempt."""

    def __init__(self, attempt: Attempt, group: str, sums: torch.Tensor, me: PeerId) -> None:
        averager, order = attempt.averager, attempt.order
        plan = averager.plan
        self._attempt = attempt
        self._plan = plan
        self._group = group
        self._sums = sums
        self._mean = averager.mean[group]
        self._feedback = averager.feedback.get(group)
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
            await self._attempt.send(peer, piece, body)
            self._unsent[peer] -= 1

    def _piece(self, start: int, count: int, mean: bool) -> Piece:
        order = self._attempt.order
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
                self._attempt.fail(Lost(unsound=[(peer, f"sent {error}")]))
        squared = _squared(values)
        if not math.isfinite(squared):
            self._attempt.fail(Lost(unsound=[(peer, "sent a gradient that is not finite")]))
        self._squared[peer] += squared
        return values

    # --- means -------------------------------------------------------------------------------------------------------

    async def _send_means(self, peer: PeerId) -> None:
        while (each := await self._outgoing[peer].get()) is not None:
            piece, body = each
            await self._attempt.send(peer, piece, body)

    def _take_mean(self, owner: PeerId, start: int, body: memoryview) -> None:
        if start in self._means[owner]:
            return
        mean = self._mean[start : start + self._count(owner, start)]
        values = self._codec.decode(body, mean)
        if values.data_ptr() != mean.data_ptr():
            mean.copy_(values)
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

    def findings(self) -> list[Finding]:
        """How large the members' sums are, over this member's part."""
        return [Finding(self._group, peer, min(squared, 1e308)) for peer, squared in self._squared.items()]


def _squared(values: torch.Tensor) -> float:
    """The squared norm; infinite or not a number only where the values are."""
    squared = torch.dot(values, values).item()
    return squared if math.isfinite(squared) else torch.dot(values.double(), values.double()).item()
