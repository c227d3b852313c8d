"""The transport in memory: whole swarms in one process, with faults on demand and in virtual time.

What goes wrong follows what TCP does. A killed peer's connections are reset. A stopped process still has its kernel
take what comes, so nothing is lost and nothing is answered. Between peers that are parted, messages wait as long as
retransmission lasts, and then the connection is lost. Beyond that, messages can be made to vanish, come twice, overtake
each other or arrive as nonsense, which no TCP would do, because what is built on it must not depend on that.

On `swarm.links.virtualtime.VirtualLoop`, the same seed gives the same course, event by event.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import zlib
from collections.abc import Callable, Sequence

from swarm.errors import Closed, RemoteError, Unreachable, WrongKey, from_wire, to_wire
from swarm.links import frames
from swarm.links.frames import Buffer
from swarm.links.interfaces import Connection, Receiver
from swarm.links.lane import Lane, Message
from swarm.links.ways import Latency, Ways
from swarm.types import Address, PeerId

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0  # a dial may take
RETRANSMISSION_SECONDS = 20.0  # before a connection is given up over which nothing comes through
HEAD = 40  # bytes of a message beside its own
_LATE = 10.0  # latencies that a message which is overtaken may come late

Accept = Callable[[Connection], Receiver]


class LoopbackNetwork(Ways):
    """The peers too, their processes and where they listen. Arguments are those of `Ways`."""

    def __init__(self, seed: int = 0, latency: float | Latency = 0.002, bandwidth: float = 1e8) -> None:
        super().__init__(seed, latency, bandwidth)
        self._listeners: dict[Address, LoopbackTransport] = {}
        self._ports = itertools.count(1)
        self._transports: list[LoopbackTransport] = []

    def transport(self, peer: PeerId) -> LoopbackTransport:
        """A new process of `peer`: what it had before, under the same name, is no more."""
        self.kill(peer)
        transport = LoopbackTransport(self, peer)
        self._transports.append(transport)
        return transport

    def kill(self, peer: PeerId) -> None:
        """End the process of `peer`: its connections are reset, and it can not be dialled."""
        self.note("kill", peer)
        for transport in [transport for transport in self._transports if transport.peer == peer]:
            transport.end()
        self.resume(peer)

    def disconnect(self, one: PeerId, other: PeerId) -> None:
        """Break the connections between two that both live; what is under way is lost."""
        self.note("disconnect", one, other)
        for transport in self._transports:
            for connection in list(transport.connections):
                if {transport.peer, connection.peer} == {one, other}:
                    connection.abort()

    def listen(self, transport: LoopbackTransport, address: Address) -> Address:
        """Let `transport` be found at `address`; port 0 for any."""
        chosen = address if address.port else Address(address.host, next(self._ports))
        self._listeners[chosen] = transport
        return chosen

    def at(self, address: Address) -> LoopbackTransport | None:
        """Who listens there."""
        return self._listeners.get(address)

    def forget(self, transport: LoopbackTransport) -> None:
        """It listens no more."""
        self._listeners = {a: listener for a, listener in self._listeners.items() if listener is not transport}
        if transport in self._transports:
            self._transports.remove(transport)


class LoopbackTransport:
    """One process of one peer, as far as others notice."""

    def __init__(self, network: LoopbackNetwork, peer: PeerId) -> None:
        self.network = network
        self.peer = peer
        self.closed = False
        self.connections: list[LoopbackConnection] = []
        self._accept: Accept | None = None

    async def listen(self, address: Address, accept: Accept) -> Address:
        """Take connections at `address` and give each to `accept`. Returns where it listens."""
        self._accept = accept
        return self.network.listen(self, address)

    async def dial(self, peer: PeerId, addresses: Sequence[Address]) -> LoopbackConnection:
        """Connect to `peer` at the first address that answers. Raises `Unreachable` or `WrongKey`."""
        error: RemoteError = Unreachable(f"{peer} has no address", peer)
        for address in addresses:
            if self.closed:
                raise Closed("the transport is closed")
            try:
                async with asyncio.timeout(HANDSHAKE_SECONDS):
                    return await self._dial(peer, address)
            except TimeoutError:
                error = Unreachable(f"{address} does not answer", peer)
            except RemoteError as failure:
                error = failure
        raise error

    async def _dial(self, peer: PeerId, address: Address) -> LoopbackConnection:
        for _ in range(2):  # TCP's handshake and TLS's; ours is the third
            await self._ask(peer, address)
        listener = await self._ask(peer, address)
        if self.closed:
            raise Closed("the transport is closed")
        if listener.peer != peer:
            raise WrongKey(f"{peer} was dialled, {listener.peer} answers", peer)
        here, there = LoopbackConnection(self, peer), LoopbackConnection(listener, self.peer)
        here.other, there.other = there, here
        listener.accepted(there)
        return here

    async def _ask(self, peer: PeerId, address: Address) -> LoopbackTransport:
        """Who answers there, after one round trip. Raises `Unreachable`."""
        await self.network.passage(self.peer, peer)
        await self.network.passage(peer, self.peer)
        if (listener := self.network.at(address)) is None:
            raise Unreachable(f"nobody listens at {address}", peer)
        return listener

    def accepted(self, connection: LoopbackConnection) -> None:
        """Somebody has dialled us."""
        assert self._accept is not None  # or nobody would have found us
        connection.attach(self._accept(connection))

    def end(self) -> None:
        """End everything at once; the others find out."""
        self.closed = True
        self.network.forget(self)
        for connection in list(self.connections):
            connection.close()

    async def close(self) -> None:
        self.end()


class LoopbackConnection:
    """One end of a connection in memory."""

    def __init__(self, transport: LoopbackTransport, peer: PeerId) -> None:
        self.peer = peer
        self.network = transport.network
        self.other: LoopbackConnection | None = None  # known before anything is sent
        self._transport = transport
        self._receiver: Receiver | None = None
        self._early: list[Message] = []
        self._error: RemoteError | None = None
        self._small, self._large = (Lane(transport.network.bandwidth, self._deliver) for _ in range(2))
        self._turn = asyncio.Lock()  # of large messages
        self._giving_up: asyncio.TimerHandle | None = None
        transport.connections.append(self)

    @property
    def host(self) -> str:
        """Part of `swarm.links.interfaces.Connection`."""
        return ""

    @property
    def closed(self) -> bool:
        """Whether it is over."""
        return self._error is not None

    # --- sending ---------------------------------------------------------------------------------------------------

    def try_send(self, header: bytes, body: Sequence[Buffer]) -> bool:
        """Send a small message at once; False where it is large or the way is not free."""
        if self._error is not None:
            raise self._error
        if not frames.is_small(header, body) or self._small.is_full:
            return False
        whole = b"".join(body)
        self._post(self._small, Message(header, whole), self._small.reserve(HEAD + len(header) + len(whole)))
        return True

    async def send(self, header: bytes, body: Sequence[Buffer]) -> None:
        """Send a message of any size. Raises `Unreachable`."""
        if frames.is_small(header, body):
            while not self.try_send(header, body):
                await self._small.drained()
            return
        whole = b"".join(body)
        async with self._turn:
            while self._large.is_full and not self.closed:
                await self._large.drained()
            size = HEAD + len(header) + len(whole)
            await self.network.leave(self._transport.peer, size)
            await asyncio.sleep(self._large.reserve(size))
        if self._error is not None:
            raise self._error
        self._post(self._large, Message(header, whole), 0.0)

    def _post(self, lane: Lane, message: Message, seconds: float) -> None:
        network, nuisance, chance = self.network, self.network.nuisance, self.network.chance
        latency = network.latency(self._transport.peer, self.peer)
        message = network.mangled(self._transport.peer, message)
        if nuisance.dropped and chance.random() < nuisance.dropped:
            log.info("dropped from=%s to=%s bytes=%d", self._transport.peer, self.peer, len(message.header))
            return
        late = nuisance.reordered and chance.random() < nuisance.reordered
        lane.put(message, seconds + latency, chance.uniform(0.0, _LATE * latency) if late else 0.0)
        if nuisance.duplicated and chance.random() < nuisance.duplicated:
            lane.put(message, seconds + latency, chance.uniform(0.0, _LATE * latency))

    # --- on the way ------------------------------------------------------------------------------------------------

    def _deliver(self, lane: Lane, message: Message) -> bool:
        """Let a message arrive at the other end, unless the way there is closed."""
        if self._is_held():
            self.network.hold(lane)
            return False
        self._arrive(message)
        return True

    def _is_held(self) -> bool:
        """Whether the way is closed now; for how long, is watched where it is cut and not the peer that is stopped."""
        ours, theirs = self._transport.peer, self.peer
        parted = self.network.is_parted(ours, theirs)
        if parted and self._giving_up is None and not self.closed:
            loop = asyncio.get_running_loop()
            self._giving_up = loop.call_later(RETRANSMISSION_SECONDS, self._give_up)
        if not parted and self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
        return not self.network.is_open(ours, theirs)

    def _give_up(self) -> None:
        self._fail(Unreachable("nothing came through for too long", self.peer))

    def _arrive(self, message: Message) -> None:
        assert self.other is not None
        size = f"{len(message.header)}+{len(message.body)} {zlib.crc32(message.body)}"
        self.network.note(self._transport.peer, self.peer, "end" if message.end else size)
        if message.end is not None:
            self.other._fail(message.end)
        elif self.other._receiver is None:
            self.other._early.append(message)
        else:
            self.other._take(message)

    def _take(self, message: Message) -> None:
        if self._error is not None or self._receiver is None:
            return
        try:
            self._receiver.received(message.header, memoryview(bytearray(message.body)))
        except RemoteError as error:
            self.close(error)

    def attach(self, receiver: Receiver) -> None:
        """Tell `receiver` what comes in, from the first message on."""
        self._receiver = receiver
        early, self._early = self._early, []
        for message in early:
            self._take(message)
        if self._error is not None and not early:
            receiver.lost(self._error)

    # --- the end ---------------------------------------------------------------------------------------------------

    def close(self, error: RemoteError | None = None) -> None:
        """End it, telling the other side why, behind what was said before."""
        if self._error is not None:
            return
        there: RemoteError = Unreachable("the other side closed the connection", self._transport.peer)
        if error is not None:
            code, text = to_wire(error)
            there = from_wire(code, f"the other side closed: {text}", self._transport.peer)
        latency = self.network.latency(self._transport.peer, self.peer)
        self._small.put(Message(b"", b"", there), latency)
        self._fail(error or Unreachable("the connection was closed", self.peer))

    def abort(self) -> None:
        """Let both ends break."""
        self._small.clear()
        self._large.clear()
        self._fail(Unreachable("the connection was reset", self.peer))

    def _fail(self, error: RemoteError) -> None:
        if self._error is not None:
            return
        self._error = error
        error.peer = error.peer or self.peer
        self._transport.connections.remove(self)
        if self._giving_up is not None:
            self._giving_up.cancel()
        self._small.wake()
        self._large.wake()
        if self._receiver is not None:
            self._receiver.lost(error)

    def __repr__(self) -> str:
        return f"<LoopbackConnection {self._transport.peer}>{self.peer} {self._error or 'open'}>"
