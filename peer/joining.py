"""How a peer comes into the swarm: under which key, at which addresses, through whom."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path

from peer.config import PeerSettings, parse_address
from swarm.discovery import Discovery
from swarm.errors import InUse
from swarm.identity import Identity
from swarm.types import Address

log = logging.getLogger(__name__)


def identity_of(settings: PeerSettings) -> Identity:
    """The identity in the file that the settings name, or in the first default one that no other peer here uses.

    Raises `UsageError`, or `InUse` where the settings name one that another peer uses.
    """
    if settings.identity is not None:
        return Identity.claim(settings.identity)
    default = default_identity_file()
    for number in itertools.count(1):
        file = default if number == 1 else default.with_stem(f"{default.stem}-{number}")
        try:
            return Identity.claim(file)
        except InUse:
            log.info("identity in use, trying the next file=%s", file)
    raise AssertionError("there is always another number")


def default_identity_file() -> Path:
    """Where a peer keeps its key if it is not told otherwise."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "shoal" / "identity.key"


async def start_discovery(settings: PeerSettings, identity: Identity, port: int) -> Discovery:
    """Join the swarm, or begin one. The DHT listens at the same host as the data plane, at `port`."""
    listen = parse_address(settings.listen)
    announce = [_multiaddr(parse_address(settings.announce).host, port)] if settings.announce and port else []
    return await Discovery.start(identity, settings.initial_peers, host=listen.host, port=port, announce=announce)


def addresses_of(settings: PeerSettings, discovery: Discovery, listening: Address) -> tuple[Address, ...]:
    """Where others reach the data plane: as announced, or at every address of this machine if it listens at all."""
    if settings.announce:
        announced = parse_address(settings.announce)
        return (Address(announced.host, announced.port or listening.port),)
    if listening.host not in ("0.0.0.0", "::"):
        return (listening,)
    hosts = dict.fromkeys(address.split("/")[2] for address in discovery.addresses)
    near_last = sorted(hosts, key=lambda host: host.startswith("127.") or host == "::1")
    return tuple(Address(host, listening.port) for host in near_last[:8])


def _multiaddr(host: str, port: int) -> str:
    kind = "ip6" if ":" in host else "ip4" if host.replace(".", "").isdecimal() else "dns"
    return f"/{kind}/{host}/tcp/{port}"
