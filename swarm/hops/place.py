"""One hop of a session's route: the way to its peer, what is asked of it, and who could take its place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from swarm import tensors, wire
from swarm.errors import DeadlineExceeded, Malformed, RemoteError, Unreachable
from swarm.hops.history import Mark, Piece
from swarm.rpc import Link, Rpc
from swarm.types import Hop, PeerId, SessionId
from swarm.wire import Rounding


@dataclass(slots=True, eq=False)
class Place:
    """One hop and how far it is."""

    hop: Hop
    link: Link | None = None
    after: Hop | None = None  # who comes next, as it knows
    open: bool = False  # on the terms of the moment: who comes next, how long it may get
    failed: bool = False  # another peer has to take its place
    mark: Mark = field(default_factory=Mark)  # how far it is, as it said when the session was opened there
    told: Mark = field(default_factory=Mark)  # how far we told it, where it follows as a spare of the first hop
    rounding: Rounding = "float32"  # of what it passes on
    spares: list[list[Place]] = field(default_factory=list)  # who follows, ready to take over: one or several together

    @property
    def lives(self) -> bool:
        """Whether there is a connection to its peer."""
        return self.link is not None and self.link.error is None

    @property
    def sound(self) -> bool:
        """Whether it can take the next step."""
        return self.lives and self.open and not self.failed

    @property
    def peer(self) -> PeerId:
        """Whose place it is."""
        return self.hop.peer

    def followers(self) -> Iterator[Place]:
        """All the places of its spares."""
        return (each for spare in self.spares for each in spare)

    async def open_session(
        self, rpc: Rpc, terms: wire.OpenSession, after: Hop | None, lost: Callable[[Link], None], timeout: float
    ) -> float:
        """Open the session, or tell the new terms. Returns how long the lease lasts, in seconds.

        Raises what the peer says; `teller` is who says it.
        """
        try:
            async with asyncio.timeout(timeout):
                link = await rpc.connect(self.peer, self.hop.addresses)
                opened, _ = await link.call(terms, timeout=timeout)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.hop} did not answer within {timeout:.1f} s", self.peer) from None
        except RemoteError as error:
            error.peer, error.teller = error.peer or self.peer, self.peer
            raise
        if not isinstance(opened, wire.SessionOpened):
            raise Malformed("an answer to OpenSession that is none", self.peer)
        if self.link is not None and self.link is not link:
            self.link.unwatch(lost)
        self.link, self.after, self.open = link, after, True
        self.mark, self.rounding = Mark(opened.number, opened.length), opened.rounding
        link.watch(lost)
        return opened.lease

    async def call(self, message: wire.Message, timeout: float) -> object:
        """Ask its peer. Raises what it says, or `Unreachable`."""
        if self.link is None:
            raise Unreachable("not connected", self.peer)
        try:
            answer, _ = await self.link.call(message, timeout=timeout)
        except RemoteError as error:
            error.teller = self.peer
            raise
        return answer

    def soon(self, seconds: float) -> float:
        """How long its peer may take to say a word: `seconds`, and more where it is far."""
        return seconds if self.link is None else self.link.soon(seconds)

    async def ask(self, key: SessionId, timeout: float) -> wire.Alive:
        """How far its peer is. Raises what it says, or `DeadlineExceeded` where it says nothing."""
        answer = await self.call(wire.KeepAlive(key), timeout)
        if not isinstance(answer, wire.Alive):
            raise Malformed("an answer to KeepAlive that is none", self.peer)
        return answer

    async def send(self, step: wire.Step, piece: Piece, patience: float) -> None:
        """Send a step. Raises `Unreachable` or `DeadlineExceeded`."""
        if self.link is None or self.link.error is not None:
            raise Unreachable("the connection was lost")
        parts = [each for each in (piece.hidden, piece.position_ids, piece.mask) if each is not None]
        body = tensors.encode(parts, step.specs())
        if self.link.try_notify(step, body):
            return
        try:
            async with asyncio.timeout(patience):
                await self.link.notify(step, body)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.hop} takes nothing", self.peer) from None

    def __str__(self) -> str:
        return f"{self.hop}{'!' if self.failed else ''}"


def step_header(
    key: SessionId,
    epoch: int,
    number: int,
    block: int,
    piece: Piece,
    rounding: Rounding,
    keep: int = 0,
    replay: int = 0,
) -> wire.Step:
    """What is said of a step beside its tensors, of which the hidden states are sent rounded so."""
    ids, mask = piece.position_ids, piece.mask
    return wire.Step(
        key,
        epoch,
        number,
        piece.position,
        keep,
        tensors.spec_of(piece.hidden, rounding),
        piece.rows,
        None if ids is None else tensors.spec_of(ids),
        None if mask is None else tensors.spec_of(mask),
        replay,
        since=piece.since,
        block=block,
    )
