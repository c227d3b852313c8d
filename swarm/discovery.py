"""Who hosts what, where, how fast: offers, published in the hivemind DHT and read from it, signed and checked.

An offer is told again well before it expires, until it is withdrawn, and again when the DHT node had to be replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from swarm import offers
from swarm.dht import Node, checked, now
from swarm.errors import DeadlineExceeded, ProtocolError, ShoalError
from swarm.identity import Identity
from swarm.membership import Membership
from swarm.offers import Kind, Record
from swarm.types import ModelId, Offer, PeerId, Span

RENEW_SECONDS = 20.0  # between two renewals of an offer, which lives for a minute
_PUBLISH_SECONDS = 10.0
_WITHDRAW_SECONDS = 1.0
_READ_SECONDS = 10.0
_MAX_MODELS = 256  # listed by `models`

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
        before = self._stamped(self._offer) if self._offer else None  # stamped first: the newest word is the offer
        stamped = self._stamped(offer)
        offers.pack(stamped, self._identity)  # a bad one must not be remembered
        self._offer = offer
        await self._put(stamped, Kind.OFFER, _places(offer))
        if before is not None:
            await self._leave(before)

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
                await self._leave(self._stamped(before))
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
        offer = self._offer
        if offer is None:
            return
        places = await self._to_renew(offer)
        if self._offer is offer:  # neither replaced nor withdrawn: nothing may be stamped later than a withdrawal
            await self._put(self._stamped(offer), Kind.OFFER, places)

    # --- records --------------------------------------------------------------------------------------------------

    def _stamped(self, offer: Offer) -> Offer:
        # The DHT prefers what expires last, so every record of ours must expire later than the one before.
        self._issued = max(now(), self._issued + 0.001)
        return replace(offer, issued=self._issued, expires=self._issued + offers.LIFETIME)

    async def _put(self, stamped: Offer, kind: Kind, places: Sequence[_Place]) -> None:
        value = offers.pack(stamped, self._identity, kind)
        keys, subkeys = zip(*places, strict=True)
        store = Node.store if kind is Kind.OFFER else Node.store_at_once
        taken = await self._membership.ask(
            lambda node: store(node, keys, subkeys, value, stamped.expires), _PUBLISH_SECONDS
        )
        # Another peer of the model may have told the index something newer: as good as our own.
        if not taken.issuperset(key for key in keys if key != offers.INDEX_KEY):
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
        tables = await self._membership.ask(lambda node: node.get(wanted), _READ_SECONDS) if wanted else {}
        found = []
        for key, table in tables.items():
            for subkey, (value, expires) in table.items():
                with contextlib.suppress(ProtocolError):
                    found.append(checked(offers.hashed(key), subkey, value, expires))
        return found

    def __repr__(self) -> str:
        return f"<Discovery {self.peer[-6:]} offer={self._offer and str(self._offer.span)} {self._membership!r}>"


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
