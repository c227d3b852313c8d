"""Whether hidden states are rounded on a link: never near, far only where bytes take their time, or where asked for.

Whoever sends chooses, when a session begins, and keeps to it until the session ends: what is sent again to whoever
takes over is then the same again.
"""

from __future__ import annotations

import ipaddress

from swarm import wire
from swarm.errors import RemoteError
from swarm.rpc import Link, Rpc
from swarm.wire import Rounding

SLOW = 4e6  # bytes per second below which hidden states travel in half of their bytes
VERY_SLOW = 5e5  # and in a quarter
_PAYLOAD = 32 * 1024  # bytes that are echoed to measure it
_SECONDS = 1.0  # for that, at most: who takes longer is very slow


def is_near(host: str) -> bool:
    """Whether an IP address is of this machine or its own network; "" is a connection within a process."""
    if not host:
        return True
    address = ipaddress.ip_address(host.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_private or address.is_link_local


def for_speed(bytes_per_second: float) -> Rounding:
    """What a far link of that speed gets where nobody has asked for anything."""
    if bytes_per_second < VERY_SLOW:
        return "int8"
    return "bfloat16" if bytes_per_second < SLOW else "float32"


async def choose(rpc: Rpc, link: Link, asked: Rounding, own: Rounding = "auto") -> Rounding:
    """How to round what is sent over `link`: as the client `asked`, else as we would (`own`), else as the link needs.

    Takes a second at most, the first time on a far link.
    """
    wanted = own if asked == "auto" else asked
    if wanted != "auto" or is_near(link.host):
        return "float32" if wanted == "auto" else wanted
    if link.speed is None:
        link.speed = await _speed(rpc, link)
    return for_speed(link.speed)


async def _speed(rpc: Rpc, link: Link) -> float:
    """Bytes per second, there and back together; 0 where that takes too long."""
    try:
        began = rpc.clock()
        await link.call(wire.Echo(), timeout=_SECONDS / 2)
        between = rpc.clock()
        await link.call(wire.Echo(), [bytes(_PAYLOAD)], timeout=_SECONDS / 2)
    except RemoteError:
        return 0.0
    return 2 * _PAYLOAD / max(rpc.clock() - between - (between - began), 1e-4)
