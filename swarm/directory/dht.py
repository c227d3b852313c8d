"""One life of our node in the hivemind DHT: from the start of its daemon to the daemon's death.

hivemind does the work; what is here keeps it in hand: joined with errors that say what is wrong, and asked in a way
that a hostile node cannot cut short.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import weakref
from collections.abc import Collection, Iterable, Sequence

from swarm.directory import offers
from swarm.directory.daemon import Daemon
from swarm.directory.hive import (
    DHTID,
    P2P,
    ControlClient,
    DaemonConnector,
    DHTNode,
    DHTRecord,
    Multiaddr,
    P2PDaemonError,
    P2PHandlerError,
    PeerID,
    RecordValidatorBase,
    dht_pb2,
    get_dht_time,
)
from swarm.errors import CannotJoin, Malformed, ProtocolError, Unreachable, UsageError
from swarm.identity import Identity, public_key_of
from swarm.types import PeerId

_GREET_SECONDS = 7.0  # to dial an initial peer and hear from it
_CALL_SECONDS = 2.0  # until a node that says nothing is left out
_LOOK_AROUND_SECONDS = 3.0  # to find more nodes through those
_MAX_SKEW = 3.0  # seconds; hivemind's own limit
_EXAMPLE = "/ip4/203.0.113.7/tcp/31337/p2p/12D3KooW... (every peer prints its own when it starts)"

logger = logging.getLogger(__name__)


_FAILURES = (P2PDaemonError, P2PHandlerError, OSError, EOFError, TimeoutError)  # of a call through the daemon


# Most records were seen before, and a signature takes 0.1 ms to check.
_read = functools.lru_cache(maxsize=4096)(offers.read)


def checked(key_id: bytes, subkey: object, value: object, expires: float) -> offers.Record:
    """The record that lies in the DHT as `value`. Raises `ProtocolError` unless it is sound and may lie there now."""
    if not isinstance(value, bytes):
        raise Malformed("a value that is no signed record")
    record = _read(value)
    offers.check(record, key_id, subkey, expires, now())
    return record


class Validator(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    """Asked by hivemind about every record that somebody wants us to keep or that answers a question of ours."""

    def validate(self, record: DHTRecord) -> bool:
        """Whether `record` is a signed one of ours, lies where it belongs and expires when it should."""
        try:
            value = offers.plain(record.value, offers.MAX_RECORD + 8)  # bytes in MessagePack have a head
            checked(record.key, offers.plain(record.subkey), value, record.expiration_time)
        except ProtocolError as error:
            logger.debug("dropped a record: %s", error)
            return False
        return True


def now() -> float:
    """DHT time: seconds since the epoch."""
    return float(get_dht_time())


def parse_address(text: str) -> Multiaddr:
    """`text` as the address of a DHT node. Raises `UsageError` with an example."""
    try:
        address = Multiaddr(text)
        public_key_of(address["p2p"])
        names = {protocol.name for protocol in address.protocols()}
    except (ProtocolError, LookupError, ValueError) as error:
        raise UsageError(f"not the address of a peer: {text!r} ({error}); one looks like {_EXAMPLE}") from None
    if "tcp" not in names or names.isdisjoint({"ip4", "ip6", "dns4", "dns6"}):
        raise UsageError(f"not the address of a peer: {text!r} (no host and port); one looks like {_EXAMPLE}")
    return address


class _Connector(DaemonConnector):  # type: ignore[misc]  # hivemind has no types
    """Connections to the daemon, closed with the node: hivemind leaves open those of orders that are given up."""

    def __init__(self, control: str) -> None:
        super().__init__(Multiaddr(control))
        self._writers: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()

    async def open_connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await super().open_connection()
        self._writers.add(writer)
        return reader, writer

    async def close(self) -> None:
        """End what is left of them."""
        left = list(self._writers)
        for writer in left:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in left), return_exceptions=True)


class Node:
    """A DHT node that runs.

    Attributes:
        peer: its PeerId.
        gone: done when it is of no more use: the daemon died or hung up.
    """

    gone: asyncio.Task[object]

    def __init__(self, daemon: Daemon, p2p: P2P, dht: DHTNode, client_mode: bool) -> None:
        self.peer = PeerId(p2p.peer_id.to_base58())
        self._daemon, self._p2p, self._dht, self._client_mode = daemon, p2p, dht, client_mode
        self._connector = _Connector(daemon.control)
        p2p._client.control.daemon_connector = self._connector
        # hivemind's reader of the daemon's answers: when it ends, every later call would wait for nothing.
        self._tasks = (p2p._client.control._read_task, p2p._client.control._write_task)
        self.gone = asyncio.create_task(asyncio.wait({daemon.gone, *self._tasks}, return_when=asyncio.FIRST_COMPLETED))

    @classmethod
    async def start(
        cls,
        identity: Identity,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        announce: Sequence[str] = (),
        client_mode: bool = False,
        validator: RecordValidatorBase | None = None,
    ) -> Node:
        """Start a node that knows nobody yet. Raises as `Daemon.start` does."""
        daemon = await Daemon.start(identity, host=host, port=port, announce=announce, client_mode=client_mode)
        p2p = None
        try:
            p2p = await P2P.replicate(Multiaddr(daemon.control))
            dht = await DHTNode.create(
                p2p,
                # Where a node lies in the key space follows from its key: a restarted one is the same to the others.
                node_id=DHTID.generate(source=identity.peer.encode()),
                client_mode=client_mode,
                record_validator=validator,
                wait_timeout=_CALL_SECONDS,
                # No caches: a cached dictionary hides newer offers, and one that a liar said never expires stays.
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                cache_size=1024,
                reuse_get_requests=False,
            )
        except BaseException:
            if p2p is not None:
                await p2p.shutdown()
            await daemon.stop()
            raise
        return cls(daemon, p2p, dht, client_mode)

    @property
    def daemon_pid(self) -> int:
        """The process id of its p2pd."""
        return self._daemon.pid

    async def addresses(self) -> list[str]:
        """Multiaddrs that others can dial; none in client mode."""
        _, addresses = await self._control().identify()
        return [f"{address}/p2p/{self.peer}" for address in addresses]

    async def known(self) -> dict[PeerId, str]:
        """The peers that the daemon is connected to, with an address of each."""
        peers = await self._p2p.list_peers()
        return {PeerId(str(peer.peer_id)): f"{peer.addrs[0]}/p2p/{peer.peer_id}" for peer in peers if peer.addrs}

    @property
    def port(self) -> int:
        """The TCP port that it listens at; 0 in client mode."""
        return self._daemon.port

    @property
    def neighbours(self) -> int:
        """How many DHT nodes are in the routing table."""
        return len(self._dht.protocol.routing_table.uid_to_peer_id)

    def inherit(self, other: Node) -> None:
        """Go on keeping the records that `other`, an earlier life of this node, kept for the swarm."""
        self._dht.protocol.storage = other._dht.protocol.storage

    async def join(self, peers: Iterable[str]) -> None:
        """Join the swarm that `peers` (multiaddrs) are in. One that answers is enough; the rest are warned about.

        Raises `UsageError` for a mistyped address, `CannotJoin` where nobody answers or our clock is not theirs.
        """
        parsed = [address for address in map(parse_address, peers) if address["p2p"] != self.peer]
        answers = await asyncio.gather(*map(self._greet, parsed), return_exceptions=True)
        problems = [problem for problem in map(_problem, parsed, answers) if problem is not None]
        if parsed and len(problems) == len(parsed):
            raise CannotJoin("; ".join(problems))
        for problem in problems:
            logger.warning("%s", problem)
        around = asyncio.create_task(self._dht.find_nearest_nodes([self._dht.node_id]))
        await asyncio.wait({around}, timeout=_LOOK_AROUND_SECONDS)
        around.cancel()

    async def _greet(self, address: Multiaddr) -> float:
        """Exchange node ids with the peer at `address`; how many seconds our clock is ahead of its, at least."""
        peer, protocol = PeerID.from_base58(address["p2p"]), self._dht.protocol
        try:
            async with asyncio.timeout(_GREET_SECONDS):
                await self._control().connect(peer, [address.decapsulate(f"/p2p/{address['p2p']}")])
                asked = now()
                question = dht_pb2.PingRequest(peer=protocol.node_info, validate=True)
                answer = await protocol.get_stub(peer).rpc_ping(question)
        except _FAILURES as error:
            said = " ".join(str(error).split())  # by the daemon: what it tried, and behind brackets why that failed
            reason = said.rpartition("] ")[2][:300] or f"waited {_GREET_SECONDS:.0f} s"
            raise Unreachable(f"{address} does not answer: {reason}") from None
        if not answer.peer.node_id:
            raise Unreachable(f"{address} is a client, not a node of the DHT")
        if not self._client_mode and not answer.available:
            logger.warning("%s cannot call us back: is this machine behind a firewall?", address)
        await protocol.update_routing_table(DHTID.from_bytes(answer.peer.node_id), peer, responded=True)
        theirs = float(answer.dht_time)
        return min(max(asked, theirs), now()) - theirs

    def _control(self) -> ControlClient:
        """The daemon's orders, each over a connection of its own."""
        return ControlClient(self._connector, _initialized_with_create=True)

    async def store(self, keys: Sequence[bytes], subkeys: Sequence[str], value: bytes, expires: float) -> set[bytes]:
        """Keep `value` under every key at the nodes nearest to it; the keys where it was taken."""
        kept = await self._dht.store_many(
            list(keys), [value] * len(keys), float(expires), subkeys=list(subkeys), exclude_self=self._client_mode
        )
        return {key for (key, _), taken in kept.items() if taken}

    async def store_at_once(
        self, keys: Sequence[bytes], subkeys: Sequence[str], value: bytes, expires: float
    ) -> set[bytes]:
        """Like `store`, but here and at every node known now, without a search: nobody who stalls holds up the rest."""
        protocol, near = self._dht.protocol, set[PeerID]()
        ids, packed = [DHTID.generate(source=key) for key in keys], protocol.serializer.dumps(value)
        for key_id, subkey in zip(ids, subkeys, strict=True):
            table = protocol.routing_table.get_nearest_neighbors(key_id, self._dht.protocol.bucket_size)
            near |= {peer for _, peer in table}
            if not self._client_mode:
                protocol.storage.store(key_id, packed, expires, subkey=subkey)
        many = len(ids)
        calls = (protocol.call_store(peer, ids, [packed] * many, [expires] * many, list(subkeys)) for peer in near)
        await asyncio.gather(*calls)
        return set(keys)

    async def get(self, keys: Collection[bytes]) -> dict[bytes, dict[object, tuple[object, float]]]:
        """The dictionaries under `keys`, merged from all nodes near them: subkey to (value, expiry), unchecked.

        NaN as the expiry that would suffice: hivemind stops at the first answer that claims enough, and a liar could
        claim infinity; nothing is enough for NaN.
        """
        found = await self._dht.get_many(list(keys), sufficient_expiration_time=math.nan)
        tables = {key: item.value for key, item in found.items() if item is not None}
        return {
            key: {subkey: (item.value, item.expiration_time) for subkey, item in table.items()}
            for key, table in tables.items()
            if isinstance(table, dict)
        }

    async def stop(self) -> None:
        """End it and everything it started. Nobody is told: what was stored elsewhere stays until it expires."""
        self._dht.is_alive = False
        self.gone.cancel()
        await self._p2p.shutdown()
        await asyncio.gather(*self._tasks, self.gone, return_exceptions=True)
        await self._connector.close()
        await self._daemon.stop()

    def __repr__(self) -> str:
        state = "gone" if self.gone.done() else "up"
        return f"<Node {self.peer[-6:]} {state} neighbours={self.neighbours} {self._daemon!r}>"


def _problem(address: Multiaddr, answer: float | BaseException) -> str | None:
    if isinstance(answer, Unreachable):
        return str(answer)
    if isinstance(answer, BaseException):
        raise answer
    if abs(answer) > _MAX_SKEW:
        side = "ahead of" if answer > 0 else "behind"
        return f"this machine's clock is {abs(answer):.1f} s {side} that of {address}; set it (NTP) and try again"
    return None
