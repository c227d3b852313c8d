"""Who gets room in a full pool: idle sessions make it, others wait in turn, and nobody is left waiting for ever."""

from __future__ import annotations

import asyncio

import pytest

from peer.cache import Leases
from peer.kv.admission import IDLE_SECONDS, LOST_SECONDS, MAX_QUEUE, Admission
from swarm.errors import NoRoom
from swarm.types import SessionId

A, B, C, D = (SessionId(bytes([letter]) * 16) for letter in b"abcd")


class Host:
    """Sessions that are idle unless they are said to be busy; remembers what was done with them."""

    def __init__(self, capacity: int, host: int | None = None) -> None:
        self.now = 0.0
        self.busy: set[SessionId] = set()
        self.out: list[SessionId] = []
        self.ended: list[SessionId] = []
        self.leases = Leases(capacity, host=host)
        self.admission = Admission(self.leases, self, lambda: self.now)

    def is_busy(self, session: SessionId) -> bool:
        return session in self.busy

    def put_out(self, session: SessionId) -> None:
        self.out.append(session)

    def lose(self, session: SessionId) -> None:
        self.ended.append(session)
        self.leases.release(session, self.now)


async def test_idle_sessions_are_put_out_for_who_comes_the_longest_idle_first() -> None:
    host = Host(100)
    for now, session in enumerate((A, B, C)):
        host.now = now
        await host.admission.lease(session, 30)
    host.leases.stepped(A, 2.5)
    host.now = 2.5 + IDLE_SECONDS
    await host.admission.lease(D, 40)
    assert (host.out, host.leases.used, host.leases.out) == ([B], 100, 30)
    host.leases.stepped(A, host.now)
    await host.admission.lease(B, 30, first=True)  # it comes back, and another goes
    assert (host.out, host.leases.is_out(B), host.leases.is_out(C)) == ([B, C], False, True)


async def test_who_was_active_lately_or_has_steps_waiting_stays() -> None:
    host = Host(60)
    await host.admission.lease(A, 30)
    await host.admission.lease(B, 30)
    host.busy.add(A)
    host.now = 2 * IDLE_SECONDS
    host.leases.stepped(B, host.now - IDLE_SECONDS / 2)
    with pytest.raises(NoRoom):
        await host.admission.lease(C, 10)
    assert host.out == []


async def test_a_lease_is_lost_only_where_host_memory_is_full_too() -> None:
    host = Host(60, host=30)
    for session in (A, B):
        await host.admission.lease(session, 30)
    host.now = IDLE_SECONDS
    await host.admission.lease(C, 30)
    assert (host.out, host.ended) == ([A], [])
    host.now = 2 * IDLE_SECONDS
    with pytest.raises(NoRoom):
        await host.admission.lease(D, 30)
    assert host.ended == []
    host.now = LOST_SECONDS
    await host.admission.lease(D, 30)
    assert (host.out, host.ended) == ([A, B], [A])


async def test_a_full_pool_says_when_room_is_expected() -> None:
    host = Host(100)
    host.leases.grant(A, 10, 0.0)
    host.leases.release(A, 20.0)  # a session lasts for 20 seconds here
    host.now = 20.0
    for session, now in ((B, 20.0), (C, 25.0)):
        host.leases.grant(session, 50, now)
    host.now = 26.0
    host.busy |= {B, C}
    with pytest.raises(NoRoom, match=r"0 of 100 are free; room is expected in 14 s"):
        await host.admission.lease(D, 30)
    assert host.leases.expected_wait(80, 26.0) == 19.0
    with pytest.raises(NoRoom, match=r"0 of 100 are free$"):
        await host.admission.lease(D, 101, wait=5.0)  # never: it does not wait at all


async def test_who_waits_is_served_in_turn_and_not_overtaken() -> None:
    host = Host(100)
    host.busy |= {A, B, C, D}
    await host.admission.lease(A, 100)
    first = asyncio.create_task(host.admission.lease(B, 80, wait=60.0))
    second = asyncio.create_task(host.admission.lease(C, 30, wait=60.0))
    await asyncio.sleep(0)
    host.leases.grant(A, 90, 0.0)
    host.admission.serve()
    with pytest.raises(NoRoom, match="2 sessions wait for room"):
        await host.admission.lease(D, 10)
    host.leases.release(A)
    host.admission.serve()
    await first
    assert not second.done()
    host.leases.release(B)
    host.admission.serve()
    await second
    assert len(host.admission) == 0


async def test_a_session_that_comes_back_does_not_wait_behind_new_ones() -> None:
    host = Host(100)
    host.busy |= {A, B, C, D}
    host.leases.grant(B, 50, 0.0)
    host.leases.put_out(B)
    await host.admission.lease(A, 100)
    new = asyncio.create_task(host.admission.lease(C, 60, wait=60.0))
    await asyncio.sleep(0)
    back = asyncio.create_task(host.admission.lease(B, 50, wait=60.0, first=True))
    await asyncio.sleep(0)
    host.leases.release(A)
    host.admission.serve()
    await back
    assert not new.done()
    new.cancel()
    await asyncio.wait([new])


async def test_the_queue_is_bounded_in_time_and_length() -> None:
    host = Host(10)
    host.busy.add(A)
    await host.admission.lease(A, 10)
    with pytest.raises(NoRoom, match=r"after 0.0 s in the queue"):
        await host.admission.lease(B, 5, wait=0.01)
    waiting = [
        asyncio.create_task(host.admission.lease(SessionId(bytes([n]) * 16), 5, wait=60.0)) for n in range(MAX_QUEUE)
    ]
    await asyncio.sleep(0)
    with pytest.raises(NoRoom):
        await host.admission.lease(B, 5, wait=60.0)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert (len(host.admission), host.leases.used) == (0, 10)


async def test_who_gives_up_as_it_is_served_leaves_no_lease_behind() -> None:
    host = Host(10)
    host.busy |= {A, B}
    await host.admission.lease(A, 10)
    waiting = asyncio.create_task(host.admission.lease(B, 5, wait=60.0))
    await asyncio.sleep(0)
    host.leases.release(A)
    host.admission.serve()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert host.leases.used == 0
