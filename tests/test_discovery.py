"""The hivemind DHT in hand: real daemons on loopback, killed, stopped and lied to."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
import uvloop

from swarm import discovery
from swarm.directory import membership, offers, sampling
from swarm.directory.daemon import Daemon
from swarm.directory.dht import Node
from swarm.directory.offers import INDEX_KEY, Kind, bucket_keys, pack
from swarm.discovery import Discovery, Listing
from swarm.errors import CannotJoin, Closed, PortInUse, UsageError
from swarm.identity import Identity
from swarm.types import Address, Coordinate, ModelId, Offer, Span, State

MODEL, OTHER_MODEL = ModelId("ab" * 32), ModelId("cd" * 32)
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through pidfd")


def offer_of(peer: Any, start: int = 0, end: int = 8, model: ModelId = MODEL, **values: Any) -> Offer:
    offer = Offer(
        peer=peer.peer,
        model=model,
        name="Llama",
        num_blocks=32,
        span=Span(start, end),
        addresses=(Address("127.0.0.1", 31338),),
        state=State.ONLINE,
        dtype="bfloat16",
        tokens_per_second=12.5,
        cache_tokens=4096,
        cache_free=4096,
        sessions=0,
        version="0.1.0",
        issued=0.0,
        expires=0.0,
    )
    return dataclasses.replace(offer, **values)


def fresh(peer: Any, **values: Any) -> Offer:
    return offer_of(peer, issued=time.time(), expires=time.time() + 50, **values)


async def spans(reader: Discovery, model: ModelId = MODEL) -> list[str]:
    return [str(offer.span) for offer in await reader.offers(model, 32)]


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = 8.0) -> None:
    """Wait for what other processes do in their own time, and tell nobody."""
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def ended(pid: int, seconds: float) -> None:
    """Wait for the end of any process, ours or not."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            over = asyncio.Event()
            asyncio.get_running_loop().add_reader(descriptor, over.set)
            await asyncio.wait_for(over.wait(), seconds)
        finally:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)


@contextlib.asynccontextmanager
async def script(text: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another Python process, killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", text, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


PEER = """
import asyncio, sys
from swarm.discovery import Discovery
from swarm.identity import Identity
async def main():
    async with await Discovery.start(Identity.generate(), sys.argv[1:]) as here:
        print(here.daemon_pid, *here.addresses, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


async def line_of(process: asyncio.subprocess.Process) -> list[str]:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().split()


def sockets_of_hivemind() -> set[Path]:
    return set(Path("/tmp").glob("hivemind-*"))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = sockets_of_hivemind()
    yield
    assert [child for child in psutil.Process().children(recursive=True) if child.name() == "p2pd"] == []
    assert sockets_of_hivemind() <= before


async def vanish(peer: Discovery) -> None:
    """As if killed: it says nothing to anybody."""
    peer._offer = None
    await peer._membership.close()


Grow = Callable[..., Awaitable[Discovery]]


@pytest.fixture
async def grow() -> AsyncIterator[Grow]:
    """Start a Discovery that joins the first one's swarm; all are closed at the end."""
    async with contextlib.AsyncExitStack() as stack:
        seeds: list[str] = []

        async def one(*initial_peers: str, identity: Identity | None = None, **options: Any) -> Discovery:
            here = await Discovery.start(identity or Identity.generate(), initial_peers or seeds, **options)
            seeds.extend([] if seeds else here.addresses)
            return await stack.enter_async_context(here)

        yield one


# --- publishing and reading -------------------------------------------------------------------------------------------


async def test_offers_of_all_buckets_are_read_by_everybody(grow: Grow) -> None:
    first, second, client = await grow(), await grow(), await grow(client_mode=True)
    await first.publish(offer_of(first, 0, 20))
    await second.publish(offer_of(second, 20, 32))
    for reader in (first, second, client):
        assert await spans(reader) == ["0:20", "20:32"]
    assert client.addresses == []
    assert await client.peers_seen() >= 1
    assert await client.offers(MODEL, 31) == []  # not the model that was meant


async def test_the_newest_offer_counts_and_a_span_that_moved_is_gone_from_where_it_was(grow: Grow) -> None:
    first, second = await grow(), await grow()
    await first.publish(offer_of(first, 0, 8, state=State.JOINING))
    await first.publish(offer_of(first, 0, 8, state=State.DRAINING, sessions=7))
    assert [(o.state, o.sessions) for o in await second.offers(MODEL, 32)] == [(State.DRAINING, 7)]
    await first.publish(offer_of(first, 16, 24))
    assert await spans(second) == ["16:24"]
    assert await second.offers(MODEL, 16) == []


async def test_several_models_live_in_one_swarm(grow: Grow) -> None:
    first, second, third = await grow(), await grow(), await grow()
    await first.publish(offer_of(first, 0, 32))
    await second.publish(offer_of(second, 20, 32))
    await third.publish(offer_of(third, 0, 24, OTHER_MODEL, name="GPT-2", num_blocks=24))
    assert await first.models() == {MODEL: Listing("Llama", 32, 2), OTHER_MODEL: Listing("GPT-2", 24, 1)}
    await third.publish(offer_of(third, 0, 8))  # it changes to the other model
    await first.withdraw()
    assert await second.models() == {MODEL: Listing("Llama", 32, 2)}


async def test_a_withdrawn_offer_is_gone_at_once(grow: Grow) -> None:
    first, second = await grow(), await grow()
    await first.publish(offer_of(first))
    assert await spans(second) == ["0:8"]
    await first.withdraw()
    assert await spans(second) == await spans(first) == []
    await first.publish(offer_of(first))  # and may come back at once
    assert await spans(second) == ["0:8"]


@pytest.mark.slow
@linux
async def test_withdrawing_takes_a_second_when_a_neighbour_stalls(grow: Grow) -> None:
    first, second, stalled = await grow(), await grow(), await grow()
    await first.publish(offer_of(first))
    os.kill(stalled.daemon_pid, signal.SIGSTOP)
    started = time.monotonic()
    await first.withdraw()
    assert time.monotonic() - started < 1.5
    assert await spans(second) == []
    os.kill(stalled.daemon_pid, signal.SIGCONT)


@pytest.mark.slow
async def test_offers_are_renewed_while_their_peer_lives_and_expire_after(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers, "LIFETIME", 2.0)
    monkeypatch.setattr(discovery, "RENEW_SECONDS", 0.3)
    reader, living, dying = await grow(), await grow(), await grow()
    await living.publish(offer_of(living, 0, 8))
    await dying.publish(offer_of(dying, 8, 16))
    assert await spans(reader) == ["0:8", "8:16"]
    await vanish(dying)

    async def expired() -> bool:
        return await spans(reader) == ["0:8"]

    await until(expired)


async def test_bad_offers_are_refused_and_not_remembered(grow: Grow) -> None:
    here = await grow()
    with pytest.raises(UsageError):
        await here.publish(offer_of(here, sessions=-1))
    with pytest.raises(UsageError):
        await here.publish(offer_of(Identity.generate()))
    assert await here.models() == {}


def with_even_lots(count: int) -> list[Identity]:
    """Identities whose lots lie apart as those of a large crowd do on average."""
    found: dict[int, Identity] = {}
    while len(found) < count:
        identity = Identity.generate()
        found.setdefault(sampling.lot(identity.peer) * count >> sampling.LOT_BITS, identity)
    return list(found.values())


@pytest.mark.slow
async def test_a_crowd_is_read_in_slices_and_leaves_every_table_it_was_in(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ROOT", "SLICE", "FASTEST", "DRAWN"):
        monkeypatch.setattr(sampling, name, 1)
    near, far = Coordinate((0.01, 0.01, 0.01), 0.001, 0.1), Coordinate((0.2, 0.2, 0.2), 0.001, 0.1)
    peers = [await grow(identity=identity) for identity in with_even_lots(4)]
    for peer in peers * 2:  # the second time, each sees the others
        await peer.publish(offer_of(peer, coordinate=near))
    reader, names = await grow(client_mode=True), {peer.peer for peer in peers}

    async def read_by_many() -> set[str]:
        return {offer.peer for _ in range(12) for offer in await reader.offers(MODEL, 32, near)}

    assert {offer.peer for offer in await reader.everything(MODEL, 32)} == names
    assert await read_by_many() == names
    crowded, empty = await reader.survey(MODEL, 32)
    assert {offer.peer for offer in crowded.drawn} <= names
    assert (empty.certain, empty.drawn) == ((), ())

    await peers[0].withdraw()
    await peers[1].publish(offer_of(peers[1], coordinate=far))  # it was elsewhere after all
    for peer in peers[2:] * 2:  # as they renew their offers, they see how many they are now
        await peer.publish(offer_of(peer, coordinate=near))
    assert {offer.peer for offer in await reader.everything(MODEL, 32)} == names - {peers[0].peer}
    assert peers[0].peer not in await read_by_many()
    moved = [offer for offer in await reader.everything(MODEL, 32) if offer.peer == peers[1].peer]
    assert [offer.coordinate for offer in moved] == [far]


async def test_what_is_little_news_is_told_with_the_next_renewal(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "RENEW_SECONDS", 0.3)
    first, second = await grow(), await grow()
    first.amend(offer_of(first))  # before anything was published, there is nothing to amend
    assert await spans(second) == []
    await first.publish(offer_of(first))
    first.amend(offer_of(first, sessions=3))

    async def told() -> bool:
        return [offer.sessions for offer in await second.offers(MODEL, 32)] == [3]

    await until(told)


# --- lies -------------------------------------------------------------------------------------------------------------


def lies(liar: Identity, victim: Identity) -> dict[str, tuple[bytes, str | None, bytes, float]]:
    """Name to (key, subkey, value, expiry) of records that no honest peer stores."""
    good = fresh(liar)
    value, key = pack(good, liar), next(bucket_keys(MODEL, good.span))
    kind, _, body, signature = msgpack.unpackb(value)
    late = dataclasses.replace(good, issued=time.time() + 1000, expires=time.time() + 1050)
    early = dataclasses.replace(good, issued=time.time() - 70, expires=time.time() - 20)
    return {
        "unsigned": (key, liar.peer, msgpack.packb([kind, liar.peer, body, b""]), good.expires),
        "forged": (key, victim.peer, msgpack.packb([kind, victim.peer, body, signature]), good.expires),
        "another's subkey": (key, victim.peer, value, good.expires),
        "no subkey": (key, None, value, good.expires),
        "another key": (next(bucket_keys(MODEL, Span(16, 17))), liar.peer, value, good.expires),
        "another model": (next(bucket_keys(OTHER_MODEL, good.span)), liar.peer, value, good.expires),
        "another model in the index": (INDEX_KEY, OTHER_MODEL, value, good.expires),
        "kept for longer": (key, liar.peer, value, good.expires + 1e6),
        "too far ahead": (key, liar.peer, pack(late, liar), late.expires),
        "expired": (key, liar.peer, pack(early, liar), early.expires),
        "oversized": (key, liar.peer, value + bytes(2000), good.expires),
        "malformed": (key, liar.peer, b"\xc1" * 100, good.expires),
        "not an offer": (b"cat pictures", liar.peer, b"meow", good.expires),
        "withdrawal of another's": (key, victim.peer, pack(good, liar, Kind.WITHDRAWAL), good.expires),
    }


@contextlib.asynccontextmanager
async def lying_node(identity: Identity, *addresses: str) -> AsyncIterator[Any]:
    """A node that checks nothing."""
    node = await Node.start(identity)
    try:
        await node.join(addresses)
        yield node._dht
    finally:
        await node.stop()


def kept_by(here: Discovery) -> int:
    return len(here._membership._node._dht.protocol.storage)


async def test_lies_are_kept_by_nobody(grow: Grow) -> None:
    here, identity = await grow(), Identity.generate()
    async with lying_node(identity, *here.addresses) as liar:
        for name, (key, subkey, value, expires) in lies(identity, Identity.generate()).items():
            await liar.store(key, value, expires, subkey=subkey)
            assert kept_by(here) == 0, name
        good = fresh(identity)  # the same way works for the truth
        await liar.store(next(bucket_keys(MODEL, good.span)), pack(good, identity), good.expires, subkey=identity.peer)
        assert await here.offers(MODEL, 32) == [good]


@pytest.mark.parametrize("validator", [True, False])
async def test_lies_told_by_others_are_not_believed(
    grow: Grow, monkeypatch: pytest.MonkeyPatch, validator: bool
) -> None:
    if not validator:  # readers check for themselves
        monkeypatch.setattr(membership, "Validator", lambda: None)
    here, identity = await grow(), Identity.generate()
    await here.publish(offer_of(here))
    async with lying_node(identity, *here.addresses) as liar:
        records = lies(identity, here._identity)
        del records["no subkey"]  # a plain value instead of a dictionary: below
        for key, subkey, value, expires in records.values():
            liar.protocol.storage.store(liar_id(liar, key), msgpack.packb(value), expires, subkey=subkey)
        assert await spans(here) == ["0:8"]
        assert await here.models() == {MODEL: Listing("Llama", 32, 1)}


def liar_id(liar: Any, key: bytes) -> Any:
    return type(liar.node_id).generate(source=key)


async def test_a_plain_value_that_never_expires_hides_nothing(grow: Grow) -> None:
    here, reader = await grow(), await grow()
    await here.publish(offer_of(here))
    async with lying_node(Identity.generate(), *here.addresses) as liar:
        for key in (INDEX_KEY, *bucket_keys(MODEL, Span(0, 32))):
            liar.protocol.storage.store(liar_id(liar, key), msgpack.packb(b"nothing here"), float("inf"))
        assert await spans(reader) == ["0:8"]


# --- death ------------------------------------------------------------------------------------------------------------


@linux
async def test_the_daemon_dies_with_a_killed_parent() -> None:
    async with script(PEER) as process:
        pid = int((await line_of(process))[0])
        process.kill()
        await ended(pid, 5)


@linux
async def test_the_watchdog_does_the_same_where_the_kernel_cannot() -> None:
    text = """
import asyncio
from swarm.directory.daemon import Daemon
from swarm.identity import Identity
async def main():
    daemon = await Daemon.start(Identity.generate(), watchdog=True)
    print(daemon.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    async with script(text) as process:
        watchdog = int((await line_of(process))[0])
        (daemon,) = psutil.Process(watchdog).children()
        process.kill()
        await ended(daemon.pid, 5)
        await ended(watchdog, 5)


@pytest.mark.parametrize("watchdog", [False, True])
async def test_a_daemon_that_is_stopped_leaves_no_file_and_no_process(watchdog: bool) -> None:
    daemon = await Daemon.start(Identity.generate(), watchdog=watchdog)
    folder = Path(daemon.control.removeprefix("/unix")).parent
    assert folder.stat().st_mode & 0o077 == 0
    assert [file.name for file in folder.iterdir()] == ["control.sock"]  # the key is gone already
    processes = [psutil.Process(daemon.pid), *psutil.Process(daemon.pid).children()]
    await daemon.stop()
    await daemon.stop()
    assert not folder.exists()
    assert not any(process.is_running() for process in processes)


async def test_files_of_a_killed_process_are_removed_by_the_next(grow: Grow) -> None:
    async with script(PEER) as process:
        pid = int((await line_of(process))[0])
        (listen,) = [a for a in psutil.Process(pid).cmdline() if a.startswith("-listen=")]
        folder = Path(listen.removeprefix("-listen=/unix")).parent
        await grow()
        assert folder.exists()  # not of a living one
        process.kill()
        await ended(pid, 5)
    await grow()
    assert not folder.exists()


async def test_a_killed_daemon_is_replaced_and_the_offer_told_again(grow: Grow) -> None:
    first, second = await grow(), await grow()
    await second.publish(offer_of(second))
    (before,) = await first.offers(MODEL, 32)
    pid, addresses = second.daemon_pid, second.addresses
    os.kill(pid, signal.SIGKILL)
    assert await spans(second) == ["0:8"]  # asked in the middle of it

    async def told_again() -> bool:
        return (await first.offers(MODEL, 32))[0].issued > before.issued

    await until(told_again)
    assert second.restarts == 1
    assert second.daemon_pid != pid
    assert second.addresses == addresses
    third = await grow(*addresses)  # the same address still works
    assert await spans(third) == ["0:8"]


async def test_a_lonely_bootstrap_keeps_its_records_when_its_daemon_dies(grow: Grow) -> None:
    here, leaving = await grow(), await grow()
    await leaving.publish(offer_of(leaving))
    await vanish(leaving)
    os.kill(here.daemon_pid, signal.SIGKILL)
    assert await spans(here) == ["0:8"]


async def test_the_others_go_on_without_the_bootstrap(grow: Grow) -> None:
    async with script(PEER) as bootstrap:
        _, address = await line_of(bootstrap)
        first, second = await grow(address), await grow(address)
        await first.publish(offer_of(first, 0, 16))
        bootstrap.kill()
        await bootstrap.wait()
    await second.publish(offer_of(second, 16, 32))
    newcomer = await grow(*first.addresses)
    for reader in (first, second, newcomer):
        assert await spans(reader) == ["0:16", "16:32"]


async def test_closing_leaves_nothing_and_later_questions_are_told(grow: Grow) -> None:
    here = await grow()
    waiting = asyncio.create_task(spans(here))
    process = psutil.Process(here.daemon_pid)
    await here.close()
    await here.close()
    assert not process.is_running()
    with contextlib.suppress(Closed):
        await waiting
    with pytest.raises(Closed):
        await here.offers(MODEL, 32)


# --- joining ----------------------------------------------------------------------------------------------------------


def silent_listener() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0)
    return listener


async def test_orders_that_are_given_up_leave_no_connection(nothing_left: None) -> None:
    node = await Node.start(Identity.generate())
    orders = [asyncio.create_task(node.known()), asyncio.create_task(node.addresses())]
    async with asyncio.timeout(8.0):
        while not node._connector._writers:  # noqa: ASYNC110
            await asyncio.sleep(0)
    for order in orders:
        order.cancel()
    await asyncio.wait(orders)
    await node.stop()


@pytest.mark.slow
async def test_an_initial_peer_that_says_nothing_is_named_within_ten_seconds() -> None:
    with silent_listener() as listener:
        address = f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}/p2p/{Identity.generate().peer}"
        started = time.monotonic()
        with pytest.raises(CannotJoin, match=address):
            await Discovery.start(Identity.generate(), [address])
        assert time.monotonic() - started < 10


async def test_one_initial_peer_that_answers_is_enough(grow: Grow, caplog: pytest.LogCaptureFixture) -> None:
    first = await grow()
    closed = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer}"
    second = await grow(closed, *first.addresses)
    assert closed in caplog.text
    await second.publish(offer_of(second))
    assert await spans(first) == ["0:8"]


async def test_somebody_elses_address_is_not_taken_for_the_peer(grow: Grow) -> None:
    first = await grow()
    wrong = first.addresses[0].replace(first.peer, Identity.generate().peer)
    with pytest.raises(CannotJoin, match="mismatch"):
        await grow(wrong)


@pytest.mark.parametrize(
    "address",
    ["nonsense", "127.0.0.1:31337", "/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/1/p2p/Qm", "/ip4/1/tcp/1/p2p/x", ""],
)
async def test_a_mistyped_address_is_answered_with_an_example(address: str) -> None:
    with pytest.raises(UsageError, match="/ip4/203"):
        await Discovery.start(Identity.generate(), [address])


@pytest.mark.parametrize("ahead", [3600, -3600])
async def test_a_wrong_clock_is_named(grow: Grow, ahead: int) -> None:
    first = await grow()
    text = f"import time; real = time.time; time.time = lambda: real() + {ahead}\n{PEER}"
    async with script(text, *first.addresses) as process:
        _, errors = await process.communicate()
    side = "ahead of" if ahead > 0 else "behind"
    told = re.search(rf"CannotJoin: this machine's clock is (\d+\.\d) s {side}", errors.decode())
    assert told is not None, errors.decode()
    assert float(told[1]) == pytest.approx(3600, abs=10)  # as exactly as a busy machine's answer can be timed


@pytest.mark.parametrize("by_daemon", [True, False])
async def test_a_port_in_use_is_named(grow: Grow, by_daemon: bool) -> None:
    with silent_listener() as listener:
        port = int((await grow()).addresses[0].split("/")[4]) if by_daemon else listener.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)):
            await Discovery.start(Identity.generate(), port=port)


@pytest.mark.parametrize(("host", "port"), [("203.0.113.7", 0), ("localhost", 0), ("127.0.0.1", 70000)])
async def test_an_address_that_is_not_ours_is_named(host: str, port: int) -> None:
    with pytest.raises(UsageError, match=host):
        await Discovery.start(Identity.generate(), host=host, port=port)


def test_it_works_under_uvloop() -> None:
    async def main() -> list[str]:
        async with await Discovery.start(Identity.generate()) as first:
            await first.publish(offer_of(first))
            async with await Discovery.start(Identity.generate(), first.addresses) as second:
                os.kill(first.daemon_pid, signal.SIGKILL)
                await second.publish(offer_of(second, 8, 16))
                return await spans(first)

    assert "0:8" in uvloop.run(main())


# --- hivemind, kept in its place --------------------------------------------------------------------------------------


def test_hivemind_leaves_the_host_programs_logging_alone() -> None:
    logger = logging.getLogger("hivemind")
    assert logger.handlers == []
    assert logger.propagate
    assert logging.getLevelName(logging.WARNING) == "WARNING"


@pytest.mark.slow
async def test_only_what_is_needed_of_hivemind_is_imported_and_the_rest_can_be() -> None:
    text = """
import sys
import swarm.discovery
assert not {"torch", "numpy", "hivemind.averaging", "hivemind.moe"} & set(sys.modules)
import hivemind, hivemind.dht
from hivemind.utils import MPFuture
print(hivemind.Optimizer.__name__, hivemind.dht.DHT.__name__, MPFuture.__name__)
"""
    async with script(text) as process:
        output, errors = await process.communicate()
    assert output.split() == [b"Optimizer", b"DHT", b"MPFuture"], errors.decode()
