"""The all-reduce between members: each owns a part of the vector, adds up the others' sums of it, and sends the mean.

Reduce-scatter and all-gather in one: a chunk's mean goes out as soon as all have sent theirs of it, while others still
come in. Whoever receives a chunk digests its very bytes, the owner too, so that equal digests mean equal averages.
Nothing is decided here: an attempt ends in a `Report`, and what it left in `mean` is applied or overwritten.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping

import torch

from peer.training.codecs import Chunk, Coded, as_it_is
from peer.training.exchange import WINDOW, Exchange, Lost
from peer.training.feedback import Feedback
from swarm.agreement.assignments import Plan
from swarm.agreement.messages import Order, Piece, Report
from swarm.errors import BadTensor, RemoteError, StaleRound
from swarm.rpc import Link, Reply, Rpc
from swarm.types import Address, PeerId
from swarm.wire import Done, Endpoint

log = logging.getLogger(__name__)

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
        self.keeps = False  # whether the next attempt keeps the mean's bytes too
        self.bandwidth = 0.0  # bytes a second, of late
        self.stall = FIRST_STALL
        self._attempt: Attempt | None = None
        self._kept: dict[str, list[Chunk]] = {}
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
        self._kept = {}
        attempt = self._attempt = Attempt(self, order, sums, endpoints)
        async with self._begun:
            self._latest = attempt.key
            self._begun.notify_all()
        try:
            report = await attempt.run()
            self._kept = attempt.coded() if report.averages else {}
            return report
        finally:
            if self._attempt is attempt:
                self._attempt = None

    def coded(self) -> Coded:
        """The mean of the last attempt: the bytes that went over the wire if they were kept, else a copy."""
        return {group: self._kept.get(group) or as_it_is(mean) for group, mean in self.mean.items()}

    def commit(self) -> None:
        """What the last attempt averaged is being applied."""
        self._kept = {}
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


class Attempt:
    """One attempt, over all groups that a member is in."""

    def __init__(self, averager: Averager, order: Order, sums: Vectors, endpoints: Mapping[PeerId, Endpoint]) -> None:
        self.averager = averager
        self.order = order
        self.key = (order.round, order.term, order.attempt)
        self.keeps = averager.keeps and averager.plan.dtype != "float32"  # whose bytes are the mean itself
        self._endpoints = endpoints
        self._loop = asyncio.get_running_loop()
        averager.room_for(sums)
        me = averager.rpc.peer
        self.exchanges = {
            group: Exchange(
                self, averager.plan, order, group, vector, averager.mean[group], averager.feedback.get(group), me
            )
            for group, vector in sums.items()
        }
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

    def coded(self) -> dict[str, list[Chunk]]:
        """The means' bytes, by group, where they are kept."""
        return {group: exchange.coded() for group, exchange in self.exchanges.items()} if self.keeps else {}

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
