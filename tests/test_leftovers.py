"""However many sessions are opened, stepped, cancelled and killed: nothing of them stays with the peers."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import torch
from arithmetic import ArithmeticModel
from inprocess import save_llama
from virtualswarm import LEASE_SECONDS, MODEL, Directory, Load, VirtualPeer, VirtualSwarm, client_name

from peer.stage import PAGE
from swarm.errors import NoRoom, NoRoute
from swarm.links.virtualtime import run_virtually
from swarm.loopback import LoopbackNetwork
from swarm.model import load_stage
from swarm.network import Network, Waiting
from swarm.session import StepMeta
from swarm.types import Span

OURS = ("swarm", "peer", "virtualswarm")
COUNTED = (torch.Tensor, memoryview, asyncio.Future, asyncio.Event, asyncio.Lock)  # and all that is ours
CACHES = ("_prefixes", "_budget", "model")  # what is kept on purpose, within bounds of its own
SPANS = [Span(0, 1), Span(1, 2), Span(0, 1), Span(1, 2)]
CACHE_TOKENS = 320  # of a peer
CLIENTS = 20  # in a wave
SESSIONS = 3  # of a client


def census() -> Counter[str]:
    """What there is, by type."""
    gc.collect()
    found = Counter[str]()
    for one in gc.get_objects():
        module = str(type(one).__module__)
        if issubclass(type(one), COUNTED) or module.partition(".")[0] in OURS:
            found[f"{module}.{type(one).__qualname__}"] += 1
    return found


def sizes(root: object, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, int]]:
    """The name and length of every table in `root`, and in what of ours it has."""
    seen = set() if seen is None else seen
    for attribute in _attributes(root):
        value, path = getattr(root, attribute, None), f"{name}.{attribute}"
        if attribute in CACHES or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Collection) and not isinstance(value, str | bytes | bytearray | torch.Tensor):
            yield path, len(value)
        if str(type(value).__module__).partition(".")[0] in OURS:
            yield from sizes(value, path, seen)


def _attributes(one: object) -> list[str]:
    slots = [slot for kind in type(one).__mro__ for slot in getattr(kind, "__slots__", ())]
    return [*getattr(one, "__dict__", {}), *slots]


class Crowd:
    """Clients that come in waves; of each wave some end as they should, and some in every other way."""

    def __init__(self, swarm: VirtualSwarm, seed: int, width: int) -> None:
        self.swarm = swarm
        self._width = width  # of the hidden states
        self.ends = Counter[str]()
        self._chance = random.Random(seed)
        self._numbers = iter(range(1_000_000))

    async def wave(self) -> None:
        """They come and go; a peer dies and comes back; the last lease ends."""
        victim = self._chance.randrange(len(self.swarm.spans))
        self.swarm._kill(victim)
        lives = [asyncio.ensure_future(self._live(next(self._numbers))) for _ in range(CLIENTS)]
        await asyncio.sleep(0.5)
        await self.swarm._start(victim)
        await asyncio.gather(*lives, *self.swarm._tasks)
        self.swarm._tasks.clear()
        await asyncio.sleep(3 * LEASE_SECONDS)

    async def _live(self, number: int) -> None:
        chance, network = self._chance, self.swarm.network
        await asyncio.sleep(chance.uniform(0.0, 2.0))
        client = Network(
            network.transport(client_name(number)),
            self.swarm.directory,
            random.Random(number),
            _now,  # type: ignore[arg-type]
        )
        for _ in range(SESSIONS):
            await self._ask(client, chance.choice(("closed", "cancelled", "left")))
        if chance.random() < 0.5:
            network.kill(client_name(number))
            self.ends["killed"] += 1
        await client.close()

    async def _ask(self, client: Network, end: str) -> None:
        rows, waiting = self._chance.choice((1, 1, 2)), Waiting(5.0, 5.0)
        session = client.session(
            MODEL, self.swarm.blocks, batch=rows, max_length=32, waiting=waiting, standby=self._chance.choice((0, 0, 1))
        )

        async def steps() -> None:
            await session.step(torch.ones(rows, 20, self._width), StepMeta(0, keep=1))
            await session.step(torch.ones(rows, 1, self._width), StepMeta(20, keep=1))

        stepping = asyncio.ensure_future(steps())
        if end == "cancelled":
            await asyncio.sleep(self._chance.uniform(0.0, 0.15))
            stepping.cancel()
        await asyncio.wait({stepping})
        if not stepping.cancelled() and (error := stepping.exception()) is not None:
            assert isinstance(error, NoRoom | NoRoute)
            end = "refused"
        self.ends[end] += 1
        if end != "left":
            await session.close()


def _now() -> float:
    return asyncio.get_running_loop().time()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Load:
    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp("llama")
    save_llama(folder, num_hidden_layers=2)
    models = {span: load_stage(folder, span, dtype=torch.float32) for span in set(SPANS)}
    return lambda span: models[span]


def test_what_is_kept_does_not_grow_with_those_who_came_and_went(llama: Load) -> None:
    leave_nothing(llama, waves=3)


@pytest.mark.slow
def test_nor_with_thousands_of_sessions() -> None:
    leave_nothing(ArithmeticModel, waves=34)


def leave_nothing(load: Load, waves: int) -> None:
    """What there is after so many waves is what there was after the first."""
    swarm = VirtualSwarm(SPANS, seed=1, cache_tokens=CACHE_TOKENS, load=load)

    def holds() -> dict[str, int]:
        peers: list[VirtualPeer] = [swarm.peers[number] for number in range(len(SPANS))]
        assert all(peer.server.sessions == 0 and peer.leases.used == peer.leases.out == 0 for peer in peers)
        return dict(entry for peer in peers for entry in sizes(peer.server, str(peer.peer)))

    async def run() -> None:
        swarm.network, swarm.directory = LoopbackNetwork(1, 0.005), Directory()
        for number in range(len(SPANS)):
            await swarm._start(number)
        crowd = Crowd(swarm, seed=1, width=load(SPANS[0]).hidden_size)
        await crowd.wave()
        before, held = census(), holds()
        for _ in range(waves - 1):
            await crowd.wave()
        more = census() - before
        more["torch.Tensor"] -= CACHE_TOKENS // PAGE * len(SPANS)  # what came out of pages that can be used again
        assert {kind: count for kind, count in more.items() if count > 8} == {}
        assert holds() == held
        assert min(crowd.ends[end] for end in ("closed", "cancelled", "left", "killed")) >= 5 * waves
        assert sum(crowd.ends.values()) >= SESSIONS * CLIENTS * waves
        for number in range(len(SPANS)):
            await swarm.peers[number].end()

    run_virtually(run())
