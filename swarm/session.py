"""A route being used: open it, send steps along it, hear from its last hop.

A step goes to the first hop and its answer comes from the last; the hops pass it on among themselves. Whichever hop
cannot do its part tells us, and says who is at fault.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch

from swarm import tensors, wire
from swarm.errors import (
    BadTensor,
    Closed,
    DeadlineExceeded,
    Malformed,
    NoRoom,
    NoRoute,
    RemoteError,
    Unreachable,
    from_wire,
)
from swarm.rpc import Link, Rpc
from swarm.types import Hop, ModelId, PeerId, Route, SessionId

log = logging.getLogger(__name__)

OPEN_TIMEOUT = 10.0  # seconds
STEP_TIMEOUT = 30.0  # seconds for one position; a long step gets more
SECONDS_PER_POSITION = 0.5  # how much more, for each position of each row
MAX_OPEN_ATTEMPTS = 6  # routes that are tried before a session is given up

RouteFinder = Callable[[set[PeerId]], Awaitable[Route]]


@dataclass(slots=True)
class StepMeta:
    """What goes with the hidden states of a step. B rows, N positions."""

    position: int
    keep: int = 0  # trailing positions wanted, 0 for all
    rows: list[int] | None = None  # [B], which earlier rows the present ones continue
    position_ids: torch.Tensor | None = None  # [B, N] of int64
    mask: torch.Tensor | None = None  # [B, N], 1 for a token


@dataclass(slots=True)
class _Waiting:
    epoch: int
    number: int
    future: asyncio.Future[torch.Tensor]
    shape: tuple[int, int]  # rows, kept positions


class Sessions:
    """All sessions of one client: hands what comes in to the session it is for."""

    def __init__(self, rpc: Rpc) -> None:
        self.rpc = rpc
        self._sessions: dict[SessionId, Session] = {}
        rpc.listen(wire.Output, self._output)
        rpc.listen(wire.StepFailed, self._failed)

    def add(self, session: Session) -> None:
        """From now on it is told what comes for it."""
        self._sessions[session.key] = session

    def remove(self, session: Session) -> None:
        """It is over."""
        self._sessions.pop(session.key, None)

    def _output(self, link: Link, message: wire.Output, body: memoryview) -> None:
        if (session := self._sessions.get(SessionId(message.session))) is not None:
            session.heard(link, message, body)

    def _failed(self, link: Link, message: wire.StepFailed, body: memoryview) -> None:
        if (session := self._sessions.get(SessionId(message.session))) is not None:
            session.failed(message)

    async def close(self) -> None:
        """End all of them."""
        for session in list(self._sessions.values()):
            await session.close()


class Session:
    """One sequence batch being generated: a KV cache at every stage of its route. Used by one task at a time."""

    def __init__(self, owner: Sessions, model: ModelId, find_route: RouteFinder, batch: int, max_length: int) -> None:
        self.key = SessionId(os.urandom(16))
        self.route: Route | None = None
        self.batch = batch
        self.max_length = max_length
        self.length = 0  # positions that every stage holds
        self._owner = owner
        self._model = model
        self._find_route = find_route
        self._links: list[Link] = []
        self._numbers = itertools.count(1)
        self._epoch = 0
        self._waiting: _Waiting | None = None
        self._lease = 0.0
        self._alive: asyncio.Task[None] | None = None
        self._closed = False

    # --- opening ---------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Find a route and lease a cache at each of its hops.

        Raises:
            NoRoute: some block has no online peer.
            NoRoom: every route that was tried has a hop whose cache is full.
            RemoteError: what the last attempt met.
        """
        avoid: set[PeerId] = set()
        last: RemoteError | None = None
        self._owner.add(self)
        for _ in range(MAX_OPEN_ATTEMPTS):
            try:
                route = await self._find_route(avoid)
            except NoRoute:
                if last is None:
                    raise
                break  # what is to be avoided says more than that nothing else is left
            try:
                self._links = await self._open_hops(route)
            except RemoteError as error:
                log.info("cannot open route=%s error=%r", route, str(error))
                self._tell_hops(route)
                if not error.peer or error.peer in avoid:
                    raise
                avoid.add(PeerId(error.peer))
                last = error
                continue
            self.route = route
            break
        if self.route is None:
            assert last is not None
            raise last
        for link in self._links:
            link.on_lost.add(self._lost)
        self._alive = asyncio.get_running_loop().create_task(self._keep_alive())

    async def _open_hops(self, route: Route) -> list[Link]:
        following = [*route.hops[1:], None]
        tasks = [
            asyncio.ensure_future(self._open_hop(hop, after)) for hop, after in zip(route.hops, following, strict=True)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _open_hop(self, hop: Hop, after: Hop | None) -> Link:
        link = await self._owner.rpc.connect(hop.peer, hop.addresses)
        endpoint = wire.Endpoint(after.peer, [(a.host, a.port) for a in after.addresses]) if after else None
        message = wire.OpenSession(
            self.key, self._model, hop.span.start, hop.span.end, self.batch, self.max_length, endpoint
        )
        opened, _ = await link.call(message, timeout=OPEN_TIMEOUT)
        if not isinstance(opened, wire.SessionOpened) or not 0 < opened.lease < math.inf:
            raise Malformed("an answer to OpenSession that is none", link.peer)
        self._lease = min(opened.lease, self._lease or opened.lease)
        return link

    async def grow(self, max_length: int) -> None:
        """Lease more positions at every hop; what the session holds stays. Raises `NoRoom`."""
        before, self.max_length = self.max_length, max_length
        assert self.route is not None
        try:
            await self._open_hops(self.route)
        except NoRoom:
            self.max_length = before
            raise

    async def _keep_alive(self) -> None:
        """Say that we are still here, well before the lease ends. A hop that denies it fails the step under way."""
        while True:
            await asyncio.sleep(self._lease / 3)
            for link in self._links:
                try:
                    await link.call(wire.KeepAlive(self.key), timeout=self._lease / 3)
                except RemoteError as error:
                    self._fail(error)

    # --- steps -----------------------------------------------------------------------------------------------------

    async def step(self, hidden: torch.Tensor, meta: StepMeta) -> torch.Tensor:
        """Make `hidden` [B, N, H] the session's content from `meta.position` on, and run it through the chain.

        Returns:
            [B, kept, H]: the last block's hidden states for the last `meta.keep` positions, or for all N.

        Raises:
            RemoteError: a hop failed; `peer` says which.
            NoRoom: the session has to grow, and a hop has no room.
        """
        if self._closed:
            raise Closed("the session was closed")
        rows, count, _ = hidden.shape
        if meta.position + count > self.max_length:
            await self.grow(max(meta.position + count, 2 * self.max_length))
        number = next(self._numbers)
        future: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        kept = min(meta.keep, count) if meta.keep else count
        self._waiting = _Waiting(self._epoch, number, future, (rows, kept))
        try:
            async with asyncio.timeout(STEP_TIMEOUT + SECONDS_PER_POSITION * rows * count):
                await self._send(hidden, meta, number)
                output = await future
        except TimeoutError:
            raise DeadlineExceeded(f"no answer to step {number} at position {meta.position}") from None
        finally:
            self._waiting = None
        self.length = meta.position + count
        return output

    async def _send(self, hidden: torch.Tensor, meta: StepMeta, number: int) -> None:
        extras = [extra for extra in (meta.position_ids, meta.mask) if extra is not None]
        message = wire.Step(
            self.key,
            self._epoch,
            number,
            meta.position,
            meta.keep,
            tensors.spec_of(hidden),
            meta.rows,
            tensors.spec_of(meta.position_ids) if meta.position_ids is not None else None,
            tensors.spec_of(meta.mask) if meta.mask is not None else None,
        )
        body = tensors.encode([hidden, *extras])
        first = self._links[0]
        if first.error is not None:
            raise first.error
        if not first.try_notify(message, body):
            await first.notify(message, body)

    # --- what comes in ---------------------------------------------------------------------------------------------

    def heard(self, link: Link, message: wire.Output, body: memoryview) -> None:
        """An answer came: check it, and hand it to the step that waits for it."""
        waiting = self._waiting
        if waiting is None or (message.epoch, message.number) != (waiting.epoch, waiting.number):
            return  # an answer to a step that was given up
        if not self._links or link.peer != self._links[-1].peer:
            return
        try:
            output = _checked(tensors.decode(body, [message.hidden])[0], waiting.shape)
        except RemoteError as error:
            error.peer = link.peer
            self._fail(error)
            return
        if not waiting.future.done():
            waiting.future.set_result(output)

    def failed(self, message: wire.StepFailed) -> None:
        """A hop told us that it could not do its part."""
        waiting = self._waiting
        if waiting is not None and (message.epoch, message.number) == (waiting.epoch, waiting.number):
            self._fail(from_wire(message.code, message.message, message.peer))

    def _lost(self, link: Link) -> None:
        self._fail(Unreachable(f"the connection to {link.peer} was lost: {link.error}", link.peer))

    def _fail(self, error: RemoteError) -> None:
        if self._waiting is not None and not self._waiting.future.done():
            self._waiting.future.set_exception(error)

    # --- the end ---------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give the leases back. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._owner.remove(self)
        self._fail(Unreachable("the session was closed"))
        if self._alive is not None:
            self._alive.cancel()
        for link in self._links:
            link.on_lost.discard(self._lost)
        if self.route is not None:
            self._tell_hops(self.route)

    def _tell_hops(self, route: Route) -> None:
        for hop in route:
            self._owner.rpc.tell(hop.peer, wire.CloseSession(self.key))

    def __repr__(self) -> str:
        return f"<Session {self.key.hex()[:8]} at {self.length}/{self.max_length} route={self.route}>"


def _checked(output: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    if output.ndim != 3 or tuple(output.shape[:2]) != shape or not output.is_floating_point():
        raise BadTensor(f"an answer of shape {list(output.shape)}, where {list(shape)} and hidden states belong")
    if not torch.isfinite(output).all():
        raise BadTensor("an answer with values that are not finite numbers")
    return output
