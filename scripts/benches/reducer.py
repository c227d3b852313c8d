"""One process of `allreduce`: averages vectors by our all-reduce or by torch's gloo.

Run as `python reducer.py WAY RANK SIZE DTYPE`: says where it is as a line of JSON, is told in the same way where all
are, and then answers every line by averaging once: the seconds that took, and how far the mean is from the right one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import torch
import uvloop

HOST = "127.0.0.1"
PATIENCE = 60.0  # seconds
SAMPLED = 97  # of so many values, one is compared

Reduce = Callable[[int], Awaitable[torch.Tensor]]  # the number of the time: the mean


def vector(rank: int, length: int) -> torch.Tensor:
    """What one process has to average."""
    return torch.randn(length, generator=torch.Generator().manual_seed(rank))


def say(**what: Any) -> None:
    """A line of JSON to the bench."""
    print(json.dumps(what), flush=True)


async def hear() -> Any:
    """A line of JSON from the bench; None where there are no more."""
    line = await asyncio.to_thread(sys.stdin.readline)
    return json.loads(line) if line else None


async def ours(rank: int, length: int, dtype: str) -> tuple[Reduce, int]:
    """`peer.averaging` over the data plane, TLS and all."""
    from peer.averaging import Averager
    from swarm.agreement.assignments import Plan
    from swarm.agreement.messages import Decision, Order, Roster, Seat, Share
    from swarm.agreement.parts import group_of_stage
    from swarm.identity import Identity
    from swarm.rpc import Rpc
    from swarm.transport import TcpTransport
    from swarm.types import Address, PeerId
    from swarm.wire import Endpoint

    transport = TcpTransport(Identity.generate())
    rpc = Rpc(transport)
    address = await transport.listen(Address(HOST, 0), rpc.accept)
    say(peer=rpc.peer, port=address.port)
    everyone = await hear()
    endpoints = {PeerId(one["peer"]): Endpoint(one["peer"], [(HOST, one["port"])]) for one in everyone}
    averager = Averager(rpc, Plan(b"r" * 16, 1, len(everyone), 1, dtype=dtype))
    seats = [Seat(0, endpoint) for endpoint in endpoints.values()]
    begin = Decision(-1, 0, 0, "begin", 1.0, 0.0, [], Roster(b"r" * 16, b"l" * 16, everyone[0]["peer"], seats, []))
    mine = {group_of_stage(0): vector(rank, length)}

    async def reduce(number: int) -> torch.Tensor:
        shares = [Share(peer, 0, 1, 0.0) for peer in endpoints]
        order = Order(b"l" * 16, number, 0, 2, 1, shares, [], begin)
        report = await averager.run(order, mine, endpoints)
        assert report.averages, report
        return averager.mean[group_of_stage(0)]

    return reduce, len(everyone)


async def gloo(rank: int, length: int, dtype: str) -> tuple[Reduce, int]:
    """torch.distributed, as it comes: fp32, no encryption, nothing checked."""
    import torch.distributed as distributed

    store = distributed.TCPStore(HOST, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    say(port=store.port if store is not None else 0)
    everyone = await hear()
    if store is None:
        store = distributed.TCPStore(HOST, everyone[0]["port"], is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=len(everyone))
    mine, buffer = vector(rank, length), torch.empty(length)

    async def reduce(number: int) -> torch.Tensor:
        buffer.copy_(mine)
        distributed.all_reduce(buffer)
        return buffer.div_(len(everyone))

    return reduce, len(everyone)


async def main(way: str, rank: int, length: int, dtype: str) -> None:
    """Average whenever told to, until stdin ends."""
    torch.set_num_threads(1)
    reduce, count = await {"ours": ours, "gloo": gloo}[way](rank, length, dtype)
    expected = sum(vector(each, length)[::SAMPLED].clone() for each in range(count)) / count
    say(ready=True)
    number = 0
    while await hear() is not None:
        number += 1
        started = time.perf_counter()
        mean = await reduce(number)
        seconds = time.perf_counter() - started
        say(seconds=seconds, error=float((mean[::SAMPLED] - expected).norm() / expected.norm()))
    sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
