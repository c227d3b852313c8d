"""Who hosts what, where, how fast: offers, published in the hivemind DHT and read from it, signed and checked.

An offer is told again well before it expires, until it is withdrawn, and again when the DHT node had to be replaced.
Which tables it is put into, and which are read, `swarm.directory.reading` says: a bounded number, however many peers
there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from swarm.directory import offers, reading, sampling
from swarm.directory.dht import Node, checked, now
from swarm.directory.membership import Membership
from swarm.directory.offers import Kind, Record
from swarm.directory.reading import Part, Reading
from swarm.directory.sampling import Table
from swarm.errors import DeadlineExceeded, ProtocolError, ShoalError
from swarm.identity import Identity
from swarm.types import Coordinate, ModelId, Offer, PeerId, Span

RENEW_SECONDS = 20.0  # between two renewals of an offer, which lives for a minute
_PUBLISH_SECONDS = 10.0
_PUT_AGAIN_SECONDS = 0.2  # before a part of the DHT that did not take an offer is asked again
_WITHDRAW_SECONDS = 1.0
_READ_SECONDS = 10.0
_MAX_MODELS = 256  # listed by `models`
_SURVEY_SLICES = 16  # of each range of blocks, at most, that a peer reads which looks for its place

_Result = TypeVar("_Result")
_Place = tuple[bytes, str]  # a key of the DHT and the name in its dictionary
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
    """

    def __init__(self, identity: Identity, membership: Membership) -> None:
        self.peer = identity.peer
        self._identity, self._membership = identity, membership
        self._offer: Offer | None = None
        self._put_last: Offer | None = None
        self._lying: set[_Place] = set()  # where that was put, the index aside
        self._issued = 0.0
        self._keeper = asyncio.create_task(self._keep_known())

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
        membership = await Membership.start(
            identity, initial_peers, host=host, port=port, announce=announce, client_mode=client_mode
        )
        return cls(identity, membership)

    @property
    def addresses(self) -> list[str]:
        """Multiaddrs with PeerId, to give to the next machine as an initial peer; none in client mode."""
        return list(self._membership.addresses)

    @property
    def daemon_pid(self) -> int:
        """The process id of p2pd."""
        return self._membership.daemon_pid

    @property
    def restarts(self) -> int:
        """How often the daemon died and was replaced."""
        return self._membership.restarts

    async def publish(self, offer: Offer) -> None:
        """Tell the swarm `offer`, and keep telling it until `withdraw`; `issued` and `expires` are filled in here.

        Raises `UsageError` for an offer that cannot be published. Raises `DeadlineExceeded` where nobody took it in
        ten seconds; it is tried again at the next renewal all the same.
        """
        offers.pack(self._stamped(offer), self._identity)  # a bad one must not be remembered
        self._offer = offer
        await self._spread(offer)

    def amend(self, offer: Offer) -> None:
        """Tell `offer` at the next renewal, which is soon enough: what it says is little news. It hosts the same."""
        if self._offer is not None:
            self._offer = offer

    async def withdraw(self) -> None:
        """Take the offer back, so that readers stop seeing it at once. Never takes much more than a second.

        In a network too bad for that the offer, not renewed, expires by itself.
        """
        before, self._offer = self._offer, None
        if before is None:
            return
        try:
            async with asyncio.timeout(_WITHDRAW_SECONDS):
                await self._leave(self._lying)
        except (TimeoutError, DeadlineExceeded):
            logger.warning("the offer could not be withdrawn everywhere in time; it expires within a minute")

    async def _leave(self, places: Collection[_Place]) -> None:
        """Withdraw what was put last from `places`. The index stays: others may host the model."""
        if places and self._put_last is not None:
            await self._put(self._stamped(self._put_last), Kind.WITHDRAWAL, list(places))

    async def offers(self, model: ModelId, num_blocks: int, place: Coordinate | None = None) -> list[Offer]:
        """Offers for all of the `num_blocks` blocks of `model`, the newest of each peer, by span.

        All of them where they are few; else what somebody at `place` needs to know for a route, a little of it left to
        chance. Raises `DeadlineExceeded` where the DHT does not answer in ten seconds.
        """
        ticket = random.getrandbits(sampling.LOT_BITS)
        found = await self._answered(model, reading.for_route(num_blocks, place, ticket))
        return _newest(found, num_blocks)

    async def survey(self, model: ModelId, num_blocks: int, glance: bool = False) -> list[Part]:
        """What is known of the hosts of all blocks, a sample of them where they are many. Raises like `offers`.

        A `glance` costs little, and shows whether some block has nobody.
        """
        tickets = [random.getrandbits(sampling.LOT_BITS) for _ in range(0 if glance else _SURVEY_SLICES)]
        parts = await self._answered(model, reading.for_survey(num_blocks, tickets))
        return [_of_model(part, num_blocks) for part in parts]

    async def everything(self, model: ModelId, num_blocks: int) -> list[Offer]:
        """All offers for the blocks, however many they are. Raises like `offers`."""
        parts = await self._answered(model, reading.for_survey(num_blocks, None))
        return _newest((offer for part in parts for offer in (*part.certain, *part.drawn)), num_blocks)

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
        return len(await self._membership.ask(Node.known, _READ_SECONDS))

    async def close(self) -> None:
        """Withdraw the offer, stop everything, leave nothing behind. Takes a second or two at most; may be repeated."""
        if self._keeper.done():
            return
        await self.withdraw()
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
        await self._membership.close()

    async def __aenter__(self) -> Discovery:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _keep_known(self) -> None:
        """Renew the offer well before it expires, and at once when the node is a new one."""
        while True:
            pause = RENEW_SECONDS * random.uniform(0.8, 1.0)  # so that a swarm started at once does not stay in step
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._membership.restarted.wait(), pause)
            self._membership.restarted.clear()
            try:
                await self._renew()
            except (ShoalError, OSError) as error:
                logger.warning("renewing the offer failed, it is tried again soon: %s", error)

    async def _renew(self) -> None:
        await self._membership.look_around(_READ_SECONDS)
        if self._offer is not None:
            await self._spread(self._offer)

    async def _spread(self, offer: Offer) -> None:
        """Put `offer` where it belongs now, and withdraw what lies where it does not belong any more."""
        tables, listed = await asyncio.gather(
            self._answered(offer.model, reading.for_offer(offer)), self._is_listed(offer.model)
        )
        if self._offer is None:  # withdrawn meanwhile: nothing may be stamped later than that
            return
        if _belonging(self._offer) != _belonging(offer):
            await self._spread(self._offer)
            return
        places = {(offers.table_key(offer.model, table), str(offer.peer)) for table in tables}
        index = [] if listed else [(offers.INDEX_KEY, str(offer.model))]
        left, before = self._lying - places, self._put_last and self._stamped(self._put_last)
        stamped = self._stamped(self._offer)  # after the one before: the newest word is the offer
        self._lying, self._put_last = places, self._offer
        await self._put(stamped, Kind.OFFER, [*places, *index])
        if left and before is not None:
            await self._put(before, Kind.WITHDRAWAL, list(left))

    async def _is_listed(self, model: ModelId) -> bool:
        """Whether the index need not be told: another peer of the model has just renewed it there."""
        fresh = now() + offers.LIFETIME - RENEW_SECONDS
        index = await self._records([offers.INDEX_KEY])
        return any(seen.offer.model == model and seen.offer.expires > fresh for seen in index)

    # --- records --------------------------------------------------------------------------------------------------

    def _stamped(self, offer: Offer) -> Offer:
        # The DHT prefers what expires last, so every record of ours must expire later than the one before.
        self._issued = max(now(), self._issued + 0.001)
        return replace(offer, issued=self._issued, expires=self._issued + offers.LIFETIME)

    async def _put(self, stamped: Offer, kind: Kind, places: Sequence[_Place]) -> None:
        value = offers.pack(stamped, self._identity, kind)
        store = Node.store if kind is Kind.OFFER else Node.store_at_once
        # Another peer of the model may have told the index something newer: as good as our own.
        at, required = dict(places), {key for key, _ in places if key != offers.INDEX_KEY}

        async def put(node: Node) -> None:
            """Until it is taken, or we have said something newer: a node that has just died is found out by asking."""
            while True:
                required.difference_update(await store(node, list(at), list(at.values()), value, stamped.expires))
                if not required or self._issued > stamped.issued:
                    return
                await asyncio.sleep(_PUT_AGAIN_SECONDS)

        await self._membership.ask(put, _PUBLISH_SECONDS)

    async def _answered(self, model: ModelId, asking: Reading[_Result]) -> _Result:
        """What a reading finds out in the DHT."""
        try:
            wanted = next(asking)
            while True:
                wanted = asking.send(await self._tables(model, wanted))
        except StopIteration as end:
            result: _Result = end.value
            return result

    async def _tables(self, model: ModelId, tables: Iterable[Table]) -> dict[Table, list[Offer]]:
        """What stands in each of `tables`."""
        keys = {table: offers.table_key(model, table) for table in tables}
        found = await self._records_by_key(keys.values())
        return {table: _standing(found[key]) for table, key in keys.items()}

    async def _records(self, keys: Iterable[bytes]) -> list[Record]:
        """What lies under `keys` and passes every check; the rest is not there."""
        return [record for records in (await self._records_by_key(keys)).values() for record in records]

    async def _records_by_key(self, keys: Iterable[bytes]) -> dict[bytes, list[Record]]:
        wanted = list(keys)
        tables = await self._membership.ask(lambda node: node.get(wanted), _READ_SECONDS) if wanted else {}
        found: dict[bytes, list[Record]] = {key: [] for key in wanted}
        for key, table in tables.items():
            for subkey, (value, expires) in table.items():
                with contextlib.suppress(ProtocolError):
                    found[key].append(checked(offers.hashed(key), subkey, value, expires))
        return found

    def __repr__(self) -> str:
        return f"<Discovery {self.peer[-6:]} offer={self._offer and str(self._offer.span)} {self._membership!r}>"


def _belonging(offer: Offer) -> tuple[object, ...]:
    """What decides where an offer belongs."""
    return offer.model, offer.span, offer.state, sampling.cells_of(offer.coordinate)


def _standing(records: Iterable[Record]) -> list[Offer]:
    """The last word of every peer, if that is an offer and still good, by span."""
    newest: dict[PeerId, Record] = {}
    for record in sorted(records, key=lambda record: record.offer.issued):
        newest[record.offer.peer] = record
    good = (r.offer for r in newest.values() if r.kind is Kind.OFFER and r.offer.expires > now())
    return sorted(good, key=lambda offer: (offer.span, offer.peer))


def _newest(found: Iterable[Offer], num_blocks: int) -> list[Offer]:
    """The newest of each peer, by span; offers of another model under the same name are not meant."""
    newest: dict[PeerId, Offer] = {}
    for offer in sorted(found, key=lambda offer: offer.issued):
        newest[offer.peer] = offer
    meant = (offer for offer in newest.values() if offer.num_blocks == num_blocks)
    return sorted(meant, key=lambda offer: (offer.span, offer.peer))


def _of_model(part: Part, num_blocks: int) -> Part:
    certain, drawn = (tuple(_newest(found, num_blocks)) for found in (part.certain, part.drawn))
    return Part(part.blocks, certain, drawn, part.weight)


def _listing(hosts: Sequence[Offer]) -> Listing:
    (name, num_blocks), _ = Counter((offer.name, offer.num_blocks) for offer in hosts).most_common(1)[0]
    return Listing(name, num_blocks, len(hosts))
