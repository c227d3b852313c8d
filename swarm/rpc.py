"""Typed calls and notifications between peers, over any transport.

A `Link` is a connection with calls on it: many at once in both directions, each with a deadline and a cancellation
that reach the other side. `Rpc` keeps one link per peer, dials when there is none, and knows who handles what.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from swarm import wire
from swarm.errors import (
    Busy,
    Closed,
    DeadlineExceeded,
    Malformed,
    ProtocolError,
    RemoteError,
    ShoalError,
    UnknownMessage,
    Unreachable,
    from_wire,
    to_wire,
)
from swarm.links.frames import Buffer
from swarm.links.interfaces import Connection, Transport
from swarm.types import Address, PeerId
from swarm.wire import Envelope, Kind, Message, pack_envelope

log = logging.getLogger(__name__)

DIAL_TIMEOUT = 10.0  # seconds
MAX_CALLS = 256  # requests that one link may have under way here
MAX_HELD = 2 * wire.MAX_BODY  # bytes of their bodies
MAX_UNTOLD = 256  # refusals and cancellations that wait for the other side to read
PROMPT = 0.5  # of a call's time, at most, may have gone into the answer if the call is to tell of the way
LIGHT = 2048  # bytes of body, at most, that do not slow a call down

Reply: TypeAlias = "Message | tuple[Message, Sequence[Buffer]]"
Answer: TypeAlias = "Callable[[Link, Any, memoryview], Awaitable[Reply]]"
Listener: TypeAlias = "Callable[[Link, Any, memoryview], None]"
Timed: TypeAlias = "Callable[[PeerId, float], None]"


@dataclass(slots=True)
class _Call:
    """One of ours, under way."""

    future: asyncio.Future[tuple[Any, memoryview]]
    began: float  # seconds on the clock
    light: bool  # sent with so little that only the way takes time


class Link:
    """One connection, and the calls on it in both directions."""

    def __init__(self, rpc: Rpc, connection: Connection) -> None:
        self._rpc = rpc
        self._connection = connection
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Call] = {}  # our calls there
        self._running: dict[int, asyncio.Task[None]] = {}  # their calls here
        self._held = 0  # bytes of the bodies of those
        self._untold = 0
        self._heard = 0  # messages
        self._given_up = False
        self._round_trip = 0.0  # seconds, of the quickest light call; 0 while there was none
        self.error: RemoteError | None = None  # why the link is gone, None while it lives
        self.speed: float | None = None  # bytes per second, where somebody has measured it
        self._watchers: list[Callable[[Link], None]] = []

    @property
    def peer(self) -> PeerId:
        """Who is at the other end, proven."""
        return self._connection.peer

    @property
    def host(self) -> str:
        """The IP address of the other end; "" where it is in this process."""
        return self._connection.host

    # --- our calls -------------------------------------------------------------------------------------------------

    async def call(self, message: Message, body: Sequence[Buffer] = (), *, timeout: float) -> tuple[Any, memoryview]:
        """Ask, and wait for the reply: its message and body.

        Raises what the other side raised, `DeadlineExceeded` after `timeout` seconds, `Unreachable` when the link
        breaks. Cancelling it cancels the handler there. Where nothing at all is heard for so long, the way may be
        dead without a word, as when a router has forgotten it: who wants the peer from then on dials anew.
        """
        if self.error is not None:
            raise self.error
        timeout = min(timeout, wire.MAX_TIMEOUT)
        if not timeout > 0:
            raise DeadlineExceeded(f"no time is left to ask {self.peer}", self.peer)
        call, heard = next(self._numbers), self._heard
        future: asyncio.Future[tuple[Any, memoryview]] = asyncio.get_running_loop().create_future()
        light = sum(len(piece) for piece in body) <= LIGHT
        self._pending[call] = _Call(future, self._rpc.clock(), light)
        try:
            async with asyncio.timeout(timeout):
                await self._connection.send(pack_envelope(Kind.REQUEST, call, timeout, message), body)
                return await future
        except TimeoutError:
            if self._heard == heard:
                self._give_up()
            name = type(message).__name__
            raise DeadlineExceeded(f"{self.peer} did not answer {name} within {timeout:.1f} s", self.peer) from None
        finally:
            del self._pending[call]
            if not future.done() or future.cancelled():
                self._tell(pack_envelope(Kind.CANCEL, call))
            else:
                future.exception()  # seen, even where something else ended the call at the same moment

    def try_notify(self, message: Message, body: Sequence[Buffer] = ()) -> bool:
        """Send a small message at once and expect no reply; False where it would have to wait."""
        return self._connection.try_send(pack_envelope(Kind.NOTIFY, body=message), body)

    async def notify(self, message: Message, body: Sequence[Buffer] = ()) -> None:
        """Send a message of any size and expect no reply. Raises `Unreachable`."""
        await self._connection.send(pack_envelope(Kind.NOTIFY, body=message), body)

    def tell(self, message: Message) -> None:
        """Notify without waiting; nobody hears of a failure. Who lets too much of it pile up is sent away."""
        self._tell(pack_envelope(Kind.NOTIFY, body=message))

    def _tell(self, header: bytes) -> None:
        """Send a few bytes if the link still lives; where it must wait, in the background."""
        if self.error is not None or self._connection.try_send(header, ()):
            return
        if self._untold >= MAX_UNTOLD:
            self.close(ProtocolError("it asks, and does not read what it is answered", self.peer))
            return
        self._untold += 1
        self._rpc.spawn(self._connection.send(header, ())).add_done_callback(self._told)

    def _told(self, _: asyncio.Task[None]) -> None:
        self._untold -= 1

    # --- what comes in ---------------------------------------------------------------------------------------------

    def received(self, header: bytes, body: memoryview) -> None:
        """A message from the other side (called by the connection)."""
        self._heard += 1
        if self._given_up:
            self._given_up = not self._rpc.keep(self)
        envelope = wire.unpack_envelope(header)
        if envelope.kind is Kind.NOTIFY:
            self._hear(envelope, body)
        elif envelope.kind is Kind.REQUEST:
            self._begin(envelope, body)
        elif envelope.kind is Kind.CANCEL:
            if (task := self._running.get(envelope.call)) is not None:
                task.cancel()
        else:
            self._settle(envelope, body)

    def _hear(self, envelope: Envelope, body: memoryview) -> None:
        message = wire.read_body(envelope)
        listener = self._rpc.listener_for(message)
        try:
            listener(self, message, body)
        except RemoteError:
            raise
        except Exception:  # a mistake of ours, which must not end what else goes on over the link
            log.exception("listener failed message=%s peer=%s", type(message).__name__, self.peer)

    def _settle(self, envelope: Envelope, body: memoryview) -> None:
        call = self._pending.get(envelope.call)
        if call is None or (future := call.future).done():  # given up in the meantime
            return
        if call.light and len(body) <= LIGHT and envelope.kind is Kind.REPLY:
            took = self._rpc.clock() - call.began
            self._round_trip = min(self._round_trip or took, took)
            self._time(self._rpc.clock() - call.began, envelope.timeout)
        try:
            message = wire.read_body(envelope)
        except ProtocolError as error:
            error.peer = self.peer
            future.set_exception(error)
            return
        if envelope.kind is Kind.ERROR:
            future.set_exception(from_wire(message.code, message.message, message.peer or self.peer))
        else:
            future.set_result((message, body))

    def _time(self, seconds: float, there: float) -> None:
        """Tell how long the way of a call took, of which the other side says that it answered after `there` seconds.

        That is believed as far as it matters little: whoever could take off as much as it likes could be anywhere.
        """
        if self._rpc.timed is not None and there <= PROMPT * seconds:
            self._rpc.timed(self.peer, seconds - there)

    def _begin(self, envelope: Envelope, body: memoryview) -> None:
        if envelope.call in self._running:
            raise Malformed(f"call {envelope.call} is made twice")
        if len(self._running) >= MAX_CALLS:
            self._refuse(envelope.call, Busy(f"more than {MAX_CALLS} calls at once"))
            return
        if self._held + len(body) > MAX_HELD:
            self._refuse(envelope.call, Busy(f"calls with more than {MAX_HELD} bytes at once"))
            return
        self._held += len(body)
        task = self._rpc.spawn(self._serve(envelope, body))
        self._running[envelope.call] = task
        task.add_done_callback(lambda _: self._served(envelope.call, len(body)))

    def _served(self, call: int, size: int) -> None:
        del self._running[call]
        self._held -= size

    async def _serve(self, envelope: Envelope, body: memoryview) -> None:
        deadline, began = asyncio.timeout(envelope.timeout or wire.MAX_TIMEOUT), self._rpc.clock()
        try:
            message = wire.read_body(envelope)
            async with deadline:
                reply = await self._rpc.answer_for(message)(self, message, body)
                header, pieces = reply if isinstance(reply, tuple) else (reply, ())
                took = self._rpc.clock() - began
                await self._connection.send(pack_envelope(Kind.REPLY, envelope.call, took, header), pieces)
        except ShoalError as error:
            self._refuse(envelope.call, error)
        except Exception as error:
            if deadline.expired():
                log.debug("call outlived its deadline peer=%s", self.peer)  # nobody waits for the answer any more
                return
            log.exception("handler failed peer=%s", self.peer)
            self._refuse(envelope.call, error)

    def _refuse(self, call: int, error: Exception) -> None:
        code, message = to_wire(error)
        about = error.peer if isinstance(error, RemoteError) else ""
        self._tell(pack_envelope(Kind.ERROR, call, body=wire.Failure(code, message[:2048], about)))

    # --- the end ---------------------------------------------------------------------------------------------------

    def lost(self, error: RemoteError) -> None:
        """The connection is gone (called by the connection)."""
        self.error = error
        for call in self._pending.values():
            if not call.future.done():
                call.future.set_exception(error)
        for task in self._running.values():
            task.cancel()
        self._rpc.forget(self)
        for lost in list(self._watchers):
            lost(self)

    def soon(self, seconds: float, trips: int = 2) -> float:
        """How long the other side may take for so many round trips: `seconds`, and more where it is far."""
        return seconds + trips * self._round_trip

    def watch(self, lost: Callable[[Link], None]) -> None:
        """Have `lost` told when the link is gone; once, however often this is asked."""
        if lost not in self._watchers:
            self._watchers.append(lost)

    def unwatch(self, lost: Callable[[Link], None]) -> None:
        """Have it told no more."""
        if lost in self._watchers:
            self._watchers.remove(lost)
        if self._given_up and not self._watchers:
            self.close()

    def _give_up(self) -> None:
        """Let nobody else have it, as long as it is silent; who has it already decides for himself."""
        self._given_up = True
        self._rpc.forget(self)

    def close(self, error: RemoteError | None = None) -> None:
        """End the link, telling the other side why."""
        self._connection.close(error)

    def __repr__(self) -> str:
        state = f"lost={self.error}" if self.error else f"calls={len(self._pending)}/{len(self._running)}"
        return f"<Link {self.peer[-6:]} {state}>"


class Rpc:
    """One link per peer, and who handles which message.

    Attributes:
        timed: told the round trip in seconds to a peer, without what it needs to answer, whenever a call shows it.
        clock: what round trips are timed by.
    """

    def __init__(self, transport: Transport, clock: Callable[[], float] = time.perf_counter) -> None:
        self.timed: Timed | None = None
        self.clock = clock
        self._transport = transport
        self.peer = transport.peer
        self._answers: dict[type[Message], Answer] = {wire.Echo: _echo}
        self._listeners: dict[type[Message], Listener] = {}
        self._links: dict[PeerId, Link] = {}
        self._dialling: dict[PeerId, asyncio.Task[Link]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def answer(self, kind: type[Message], handler: Answer) -> None:
        """`handler(link, message, body)` answers calls of this kind. What it raises, the caller is told."""
        self._answers[kind] = handler

    def listen(self, kind: type[Message], handler: Listener) -> None:
        """`handler(link, message, body)` is told notifications of this kind, in order; it must not block."""
        self._listeners[kind] = handler

    def answer_for(self, message: Message) -> Answer:
        """Raises `UnknownMessage` where nobody here answers it."""
        if (handler := self._answers.get(type(message))) is None:
            raise UnknownMessage(f"{type(message).__name__} is not answered here")
        return handler

    def listener_for(self, message: Message) -> Listener:
        """Raises `UnknownMessage` where nobody here listens to it."""
        if (handler := self._listeners.get(type(message))) is None:
            raise UnknownMessage(f"{type(message).__name__} is not listened to here")
        return handler

    def accept(self, connection: Connection) -> Link:
        """A connection that somebody else dialled."""
        link = Link(self, connection)
        self._links[connection.peer] = link
        return link

    async def connect(self, peer: PeerId, addresses: Sequence[Address]) -> Link:
        """The link to `peer`, dialled if there is none; callers at the same time share one attempt.

        Raises `Unreachable` or `WrongKey`.
        """
        if (link := self._links.get(peer)) is not None:
            return link
        if self._closed:
            raise Closed("the rpc is closed")
        if (task := self._dialling.get(peer)) is None:
            task = self.spawn(self._dial(peer, addresses))
            self._dialling[peer] = task
            task.add_done_callback(lambda _: self._dialling.pop(peer, None))
        return await asyncio.shield(task)

    async def _dial(self, peer: PeerId, addresses: Sequence[Address]) -> Link:
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                connection = await self._transport.dial(peer, addresses)
        except TimeoutError:
            raise Unreachable(f"{peer} did not answer within {DIAL_TIMEOUT:.0f} s", peer) from None
        link = self.accept(connection)
        connection.attach(link)
        return link

    def link_to(self, peer: PeerId) -> Link | None:
        """The link to `peer`, if there is one now."""
        return self._links.get(peer)

    def tell(self, peer: PeerId, message: Message) -> None:
        """Notify `peer` in the background if there is a link to it; nobody waits, and nobody hears of a failure."""
        if (link := self._links.get(peer)) is not None:
            link.tell(message)

    def forget(self, link: Link) -> None:
        """A link is gone, or silent; who wants the peer next dials anew."""
        if self._links.get(link.peer) is link:
            del self._links[link.peer]

    def keep(self, link: Link) -> bool:
        """A link is silent no more: it may be had again, unless there is another by now. Whether it is."""
        return self._links.setdefault(link.peer, link) is link

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Run `work` in the background until it ends or this is closed; a peer's failure in it is only logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.log(logging.DEBUG if isinstance(error, ShoalError) else logging.ERROR, "background error=%r", error)

    async def close(self) -> None:
        """End all links, what runs for them, and the transport. Returns when all of it has ended."""
        self._closed = True
        await self._transport.close()  # tells every link, which cancels its handlers
        while tasks := self._tasks - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def _echo(link: Link, message: wire.Echo, body: memoryview) -> Reply:
    return wire.Echo(), [body]
