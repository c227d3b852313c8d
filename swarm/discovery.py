"""Who hosts what, where, how fast: offers, published in the hivemind DHT and read from it, signed and checked.

A `Discovery` outlives its DHT node. When the node's daemon dies, a new one is started under the same key at the same
port, joins through everybody known so far, and publishes the offer again; what was being asked is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from swarm import offers
from swarm.dht import Node, Validator, checked, now, parse_address
from swarm.errors import CannotJoin, Closed, DeadlineExceeded, LocalError, ProtocolError, ShoalError
from swarm.identity import Identity
from swarm.offers import Kind, Record
from swarm.types import ModelId, Offer, PeerId, Span

RENEW_SECONDS = 20.0  # between two renewals of an offer, which lives for a minute
_PUBLISH_SECONDS = 10.0
_WITHDRAW_SECONDS = 1.0
_READ_SECONDS = 10.0
_MAX_BACK_OFF = 10.0  # seconds between two attempts to start the daemon again
_MAX_MODELS = 256  # listed by `models`

_Place = tuple[bytes, str]  # a key of the DHT and the name in its dictionary
_Result = TypeVar("_Result")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listing:
    """A model that is in the swarm: what most of its peers call it, and how many they are."""

    name: str
    num_blocks: int
    peers: int


class Discovery:
    """This machine's place in the swarm. `async with` closes it.

    Attributes:
        peer: our PeerId.
        restarts: how often the daemon died and was replaced.
    """

    _node: Node

    def __init__(
        self, identity: Identity, initial_peers: Sequence[str], start: Callable[[int], Awaitable[Node]]
    ) -> None:
        self.peer = identity.peer
        self.restarts = 0
        self._identity, self._initial_peers, self._start = identity, tuple(initial_peers), start
        self._addresses: list[str] = []
        self._known: dict[PeerId, str] = {}
        self._offer: Offer | None = None
        self._issued = 0.0
        self._up, self._restarted = asyncio.Event(), asyncio.Event()
        self._keepers: list[asyncio.Task[None]] = []
        self._closed = False

    @classmethod
    async def start(
        cls,
        identity: Identity,
        initial_peers: Sequence[str] = (),
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        announce: Sequence[str] = (),
        client_mode: bool = False,
    ) -> Discovery:
        """Start a DHT node and join the swarm of `initial_peers`; with none, be the first of a new one.

        Args:
            initial_peers: multiaddrs with PeerId; one that answers is enough.
            host: IP address to listen at. port: TCP port, 0 for any; kept when the daemon has to be restarted.
            announce: multiaddrs (without PeerId) to tell others instead of those listened at.
            client_mode: only ask; neither listen nor keep records for others.

        Raises `UsageError` (mistyped address), `PortInUse`, or `CannotJoin` within ten seconds.
        """
        for address in (*initial_peers, *(f"{visible}/p2p/{identity.peer}" for visible in announce)):
            parse_address(address)

        async def node(port: int) -> Node:
            return await Node.start(
                identity, host=host, port=port, announce=announce, client_mode=client_mode, validator=Validator()
            )

        self = cls(identity, initial_peers, node)
        self._node = await self._start(port)
        try:
            await self._node.join(initial_peers)
            self._addresses = await self._node.addresses()
        except BaseException:
            await self._node.stop()
            raise
        self._up.set()
        self._keepers = [asyncio.create_task(self._keep_up()), asyncio.create_task(self._keep_known())]
        return self

    @property
    def addresses(self) -> list[str]:
        """Multiaddrs with PeerId, to give to the next machine as an initial peer; none in client mode."""
        return list(self._addresses)

    @property
    def daemon_pid(self) -> int:
        """The process id of p2pd."""
        return self._node.daemon_pid

    async def publish(self, offer: Offer) -> None:
        """Tell the swarm `offer`, and keep telling it until `withdraw`; `issued` and `expires` are filled in here.

        Raises `UsageError` for an offer that cannot be published. Raises `DeadlineExceeded` where nobody took it in
        ten seconds; it is tried again at the next renewal all the same.
        """
        offers.pack(self._stamped(offer), self._identity)  # a bad one must not be remembered
        before, self._offer = self._offer, offer
        await self._put(offer, Kind.OFFER, _places(offer))
        if before is not None:
            await self._leave(before)

    async def withdraw(self) -> None:
        """Take the offer back, so that readers stop seeing it at once. Never takes much more than a second.

        In a network too bad for that the offer, not renewed, expires by itself.
        """
        before, self._offer = self._offer, None
        if before is None:
            return
        try:
            async with asyncio.timeout(_WITHDRAW_SECONDS):
                await self._leave(before)
        except (TimeoutError, DeadlineExceeded):
            logger.warning("the offer could not be withdrawn everywhere in time; it expires within a minute")

    async def _leave(self, before: Offer) -> None:
        """Withdraw `before` from where the present offer is not. The index stays: others may host the model."""
        stay = set(_places(self._offer)) if self._offer else set()
        if left := [place for place in _places(before) if place not in stay and place[0] != offers.INDEX_KEY]:
            await self._put(before, Kind.WITHDRAWAL, left)

    async def offers(self, model: ModelId, num_blocks: int) -> list[Offer]:
        """The offers for any of the `num_blocks` blocks of `model`, the newest of each peer, by span.

        Raises `DeadlineExceeded` where the DHT does not answer in ten seconds.
        """
        records = await self._records(offers.bucket_keys(model, Span(0, num_blocks)))
        return [offer for offer in _standing(records) if offer.num_blocks == num_blocks]

    async def models(self) -> dict[ModelId, Listing]:
        """The models that somebody hosts now. Raises like `offers`."""
        index = await self._records([offers.INDEX_KEY])
        newest = sorted((record.offer for record in index), key=lambda offer: offer.issued)[-_MAX_MODELS:]
        keys = {key for seen in newest for key in offers.bucket_keys(seen.model, Span(0, seen.num_blocks))}
        hosts: dict[ModelId, list[Offer]] = {}
        for offer in _standing(await self._records(keys)):
            hosts.setdefault(offer.model, []).append(offer)
        return {model: _listing(of_model) for model, of_model in hosts.items()}

    async def peers_seen(self) -> int:
        """How many other peers the daemon is connected to, for a status line."""
        return len(await self._ask(Node.known, _READ_SECONDS))

    async def close(self) -> None:
        """Withdraw the offer, stop everything, leave nothing behind. Takes a second or two at most; may be repeated."""
        if self._closed:
            return
        await self.withdraw()
        self._closed = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.wait(self._keepers)
        self._up.set()  # who waits for a node shall see that there will be none
        await self._node.stop()

    async def __aenter__(self) -> Discovery:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- the node, one after another ------------------------------------------------------------------------------

    async def _ask(self, question: Callable[[Node], Coroutine[Any, Any, _Result]], seconds: float) -> _Result:
        """The answer of the node, or of its successor if it dies over the question."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    node = await self._living()
                    with contextlib.suppress(_NodeDied):
                        return await _answer(node, question)
                    if self._node is node:
                        self._up.clear()
        except TimeoutError:
            raise DeadlineExceeded(f"the DHT did not answer in {seconds:.0f} s") from None

    async def _living(self) -> Node:
        await self._up.wait()
        if self._closed:
            raise Closed("this Discovery was closed")
        return self._node

    async def _keep_up(self) -> None:
        """Replace the node whenever it dies."""
        while True:
            await asyncio.wait({self._node.gone})
            logger.warning("the DHT daemon died; starting another")
            self._up.clear()
            self.restarts += 1
            before = self._node
            await before.stop()
            self._node = await self._start_again()
            self._node.inherit(before)
            await self._join_again()
            self._up.set()
            self._restarted.set()

    async def _start_again(self) -> Node:
        back_off = 0.1
        while True:
            try:
                return await self._start(self._node.port)
            except (LocalError, OSError) as error:
                logger.warning("the DHT daemon cannot be started (%s); again in %.1f s", error, back_off)
            await asyncio.sleep(back_off)
            back_off = min(2 * back_off, _MAX_BACK_OFF)

    async def _join_again(self) -> None:
        """Back into the swarm by whoever is still there; alone, if nobody is."""
        try:
            await self._node.join({*self._initial_peers, *self._known.values()})
        except CannotJoin as error:
            logger.warning("nobody of the swarm answers: %s", error)

    async def _keep_known(self) -> None:
        """Renew the offer well before it expires, and at once when the node is a new one."""
        while True:
            pause = RENEW_SECONDS * random.uniform(0.8, 1.0)  # so that a swarm started at once does not stay in step
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._restarted.wait(), pause)
            self._restarted.clear()
            try:
                await self._renew()
            except (ShoalError, OSError) as error:
                logger.warning("renewing the offer failed, it is tried again soon: %s", error)

    async def _renew(self) -> None:
        self._known = await self._ask(Node.known, _READ_SECONDS) or self._known
        if self._node.neighbours == 0:
            await self._join_again()
        offer = self._offer
        if offer is None:
            return
        places = await self._to_renew(offer)
        if self._offer is offer:  # neither replaced nor withdrawn: nothing may be stamped later than a withdrawal
            await self._put(offer, Kind.OFFER, places)

    # --- records --------------------------------------------------------------------------------------------------

    def _stamped(self, offer: Offer) -> Offer:
        # The DHT prefers what expires last, so every record of ours must expire later than the one before.
        self._issued = max(now(), self._issued + 0.001)
        return replace(offer, issued=self._issued, expires=self._issued + offers.LIFETIME)

    async def _put(self, offer: Offer, kind: Kind, places: Sequence[_Place]) -> None:
        stamped = self._stamped(offer)
        value = offers.pack(stamped, self._identity, kind)
        keys, subkeys = zip(*places, strict=True)
        store = Node.store if kind is Kind.OFFER else Node.store_at_once
        if not await self._ask(lambda node: store(node, keys, subkeys, value, stamped.expires), _PUBLISH_SECONDS):
            raise DeadlineExceeded("not every part of the DHT took the offer")

    async def _to_renew(self, offer: Offer) -> list[_Place]:
        """Where to put `offer` again: not into the index if another peer of the model has just renewed it there."""
        fresh = now() + offers.LIFETIME - RENEW_SECONDS
        index = await self._records([offers.INDEX_KEY])
        listed = any(seen.offer.model == offer.model and seen.offer.expires > fresh for seen in index)
        return [(key, subkey) for key, subkey in _places(offer) if not (listed and key == offers.INDEX_KEY)]

    async def _records(self, keys: Iterable[bytes]) -> list[Record]:
        """What lies under `keys` and passes every check; the rest is not there."""
        wanted = list(keys)
        tables = await self._ask(lambda node: node.get(wanted), _READ_SECONDS) if wanted else {}
        found = []
        for key, table in tables.items():
            for subkey, (value, expires) in table.items():
                with contextlib.suppress(ProtocolError):
                    found.append(checked(offers.hashed(key), subkey, value, expires))
        return found

    def __repr__(self) -> str:
        state = "closed" if self._closed else "up" if self._up.is_set() else "restarting"
        return f"<Discovery {self.peer[-6:]} {state} offer={self._offer and self._offer.span} {self._node!r}>"


class _NodeDied(Exception):
    """The question has to be asked again, of the next node."""


async def _answer(node: Node, question: Callable[[Node], Coroutine[Any, Any, _Result]]) -> _Result:
    asking = asyncio.create_task(question(node))
    try:
        await asyncio.wait({asking, node.gone}, return_when=asyncio.FIRST_COMPLETED)
        if not node.gone.done():
            return asking.result()
    except (OSError, EOFError):  # the daemon hung up: its end is being noticed
        await asyncio.wait({node.gone})
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    raise _NodeDied


def _places(offer: Offer) -> list[_Place]:
    """Where an offer belongs: with the other offers for its blocks, and in the list of all models."""
    keys = offers.bucket_keys(offer.model, offer.span)
    return [*((key, str(offer.peer)) for key in keys), (offers.INDEX_KEY, str(offer.model))]


def _standing(records: Iterable[Record]) -> list[Offer]:
    """The last word of every peer, if that is an offer and still good, by span."""
    newest: dict[PeerId, Record] = {}
    for record in sorted(records, key=lambda record: record.offer.issued):
        newest[record.offer.peer] = record
    good = (r.offer for r in newest.values() if r.kind is Kind.OFFER and r.offer.expires > now())
    return sorted(good, key=lambda offer: (offer.span, offer.peer))


def _listing(hosts: Sequence[Offer]) -> Listing:
    (name, num_blocks), _ = Counter((offer.name, offer.num_blocks) for offer in hosts).most_common(1)[0]
    return Listing(name, num_blocks, len(hosts))
