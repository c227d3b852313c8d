"""Calls that are made for nothing but their round trip, which the `Rpc` tells whoever keeps the bearings."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from swarm import wire
from swarm.errors import RemoteError
from swarm.rpc import Rpc
from swarm.types import Offer

TIMES = 2  # calls to each peer
PAYLOAD = 256 * 1024  # bytes that are echoed to measure bandwidth
PING_SECONDS = 3.0  # for the answer to one


async def ping(rpc: Rpc, offers: Iterable[Offer], seconds: float) -> None:
    """Call the peers of `offers`, all at once, and wait at most `seconds`; who answers later is heard all the same."""
    if calls := {rpc.spawn(_ping(rpc, offer)) for offer in offers if offer.peer != rpc.peer}:
        await asyncio.wait(calls, timeout=seconds)


async def _ping(rpc: Rpc, offer: Offer) -> None:
    with contextlib.suppress(RemoteError):  # it is not there, which matters to nobody yet
        link = await rpc.connect(offer.peer, offer.addresses)
        for _ in range(TIMES):
            await link.call(wire.Echo(), timeout=PING_SECONDS)


async def bandwidth(rpc: Rpc, offer: Offer, round_trip: float) -> float | None:
    """Bytes per second to the peer of `offer` and back, whose way takes `round_trip` seconds; None where it fails."""
    try:
        link = await rpc.connect(offer.peer, offer.addresses)
        began = rpc.clock()
        await link.call(wire.Echo(), [bytes(PAYLOAD)], timeout=PING_SECONDS)
    except RemoteError:
        return None
    return 2 * PAYLOAD / max(rpc.clock() - began - round_trip, 1e-4)
