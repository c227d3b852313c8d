"""Swarms in virtual time: real sessions, servers and stages over the transport in memory, and faults by name.

    swarm = swarm_of(5, spans=["0:2", "2:4", "4:6", "2:4", "0:6"])
    swarm.kill(1, at_step=7).stall(0, at_step=3, seconds=2).drop(0.05)
    [outcome] = swarm.run(Client(Decoding("beams", seed=3, prompt=9, tokens=14)))
    assert outcome.tokens == outcome.expected

Peers are named by their numbers; `CLIENT` is the first client. A fault happens when the first client begins its step
`at_step` (or `after` that many seconds later), or before the first step where no step is named.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from arithmetic import ARITHMETIC, ArithmeticModel
from decoding import Decoding, Ends, Undisturbed
from virtualexecutor import VirtualExecutor

from peer.cache import Leases
from peer.engine import Ran
from peer.server import Server
from peer.stage import Stage
from swarm.errors import ShoalError
from swarm.links.virtualtime import run_virtually
from swarm.loopback import LoopbackNetwork, LoopbackTransport
from swarm.network import Network, Waiting
from swarm.rpc import Rpc
from swarm.session import Session, StepMeta
from swarm.types import Address, ModelId, Offer, PeerId, Span, State

MODEL = ModelId("m" * 64)
OFFER_SECONDS = 30.0  # that a dead peer's offer is still read
STEP_SECONDS = 0.01  # of a step at a hop, whatever it is
POSITION_SECONDS = 0.001  # more, for each position of each row
LEASE_SECONDS = 20.0
CLIENT = -1

Load = Callable[[Span], Any]


def _timed(result: Any, seconds: float) -> Any:
    """A turn's result tells how long it took."""
    return replace(result, seconds=seconds, computing=1.0) if isinstance(result, Ran) else result


def _seconds(result: Any) -> float:
    """What a turn takes, going by what it put out; nothing where it is none."""
    if not isinstance(result, Ran):
        return 0.0
    return STEP_SECONDS + POSITION_SECONDS * sum(
        each.shape[0] * each.shape[1] for each in result.outcomes if isinstance(each, torch.Tensor)
    )


class Directory:
    """What the DHT would say: who is online, and for a while who was."""

    def __init__(self) -> None:
        self._offers: dict[PeerId, tuple[Offer, float]] = {}  # and when it expires

    def publish(self, offer: Offer, seconds: float) -> None:
        """It is read for so many seconds."""
        self._offers[offer.peer] = offer, asyncio.get_running_loop().time() + seconds

    async def offers(self, model: ModelId, num_blocks: int, place: object = None) -> list[Offer]:
        now = asyncio.get_running_loop().time()
        return [offer for offer, expires in self._offers.values() if expires > now]

    async def close(self) -> None: ...


class VirtualPeer:
    """One process of a peer that serves a span."""

    def __init__(self, swarm: VirtualSwarm, peer: PeerId, span: Span) -> None:
        self.peer, self.span = peer, span
        self._swarm = swarm
        self.transport: LoopbackTransport = swarm.network.transport(peer)
        self.rpc = Rpc(self.transport, asyncio.get_running_loop().time)
        self.executor = VirtualExecutor(swarm.network, peer, _seconds, _timed)
        loop = asyncio.get_running_loop()
        self.leases = Leases(swarm.cache_tokens, LEASE_SECONDS)
        stage = Stage(swarm.load(span))
        self.server = Server(self.rpc, stage, self.executor, self.leases, MODEL, loop.time)  # type: ignore[arg-type]
        self._offer: Offer | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen and say so."""
        address = await self.transport.listen(Address("memory", 0), self.rpc.accept)
        self._offer = Offer(
            peer=self.peer,
            model=MODEL,
            name="arithmetic",
            num_blocks=self._swarm.blocks,
            span=self.span,
            addresses=(address,),
            state=State.ONLINE,
            dtype="float32",
            tokens_per_second=50.0,
            cache_tokens=self.leases.capacity,
            cache_free=self.leases.free,
            sessions=0,
            version="test",
            issued=0.0,
            expires=0.0,
        )
        self._keeper = asyncio.get_running_loop().create_task(self._keep(self._offer))

    async def _keep(self, offer: Offer) -> None:
        while True:
            await self._swarm.network.running(self.peer)
            self.server.expire()
            state = State.DRAINING if self.server.draining else State.ONLINE
            self._swarm.directory.publish(replace(offer, state=state), OFFER_SECONDS)
            await asyncio.sleep(1.0)

    async def drain(self, seconds: float) -> bool:
        """Leave, as `peer serve` does at Ctrl-C."""
        assert self._offer is not None
        self._swarm.directory.publish(replace(self._offer, state=State.DRAINING), OFFER_SECONDS)
        drained = await self.server.drain(seconds)
        await self.end()
        self._swarm.network.kill(self.peer)
        return drained

    async def end(self) -> None:
        """The process is over."""
        if self._keeper is not None:
            self._keeper.cancel()
        self.executor.end()
        await self.rpc.close()


@dataclass(frozen=True)
class Client:
    """Somebody who generates."""

    decoding: Decoding
    standby: int = 0
    wait: float = 10.0  # seconds, for a new host in the middle of an answer
    first_wait: float = 0.0  # and before it


@dataclass
class Outcome:
    """What came of a client's run."""

    expected: list[list[int]]
    tokens: list[list[int]] | None = None
    error: ShoalError | None = None
    ended: float = 0.0  # virtual seconds
    failovers: int = 0
    steps: list[float] = field(default_factory=list)  # how long each took

    @property
    def pause(self) -> float:
        """The longest step, in virtual seconds."""
        return max(self.steps, default=0.0)


class _Watched:
    """A session whose steps are counted and timed."""

    def __init__(self, session: Session, ends: Ends, outcome: Outcome, before: Callable[[int], None]) -> None:
        self.session = session
        self.ends = ends
        self._outcome = outcome
        self._before = before
        self._count = 0

    async def step(self, hidden: torch.Tensor, meta: StepMeta) -> torch.Tensor:
        self._count += 1
        self._before(self._count)
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            return await self.session.step(hidden, meta)
        finally:
            self._outcome.steps.append(loop.time() - started)


@dataclass(frozen=True)
class Fault:
    """Something that happens to the swarm."""

    name: str
    what: Callable[[VirtualSwarm], None]
    at_step: int = 0
    after: float = 0.0  # seconds

    def __str__(self) -> str:
        return f"step {self.at_step} + {self.after:.3f} s: {self.name}"


class VirtualSwarm:
    """Peers, clients, and what happens to them. See the module for how to say it."""

    def __init__(
        self,
        spans: Sequence[Span],
        seed: int = 0,
        *,
        blocks: int = 0,
        latency: float = 0.005,
        cache_tokens: int = 20_000,
        load: Load = ArithmeticModel,
        ends: Ends = ARITHMETIC,
    ) -> None:
        self.spans = list(spans)
        self.blocks = blocks or max(span.end for span in spans)
        self.cache_tokens = cache_tokens
        self.load = load
        self.ends = ends
        self.peers: dict[int, VirtualPeer] = {}
        self.faults: list[Fault] = []
        self.drained: list[bool] = []
        self._seed = seed
        self._latency = latency
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timers: list[asyncio.TimerHandle] = []

    def __str__(self) -> str:
        return "\n".join([f"spans {' '.join(map(str, self.spans))}", *map(str, self.faults)])

    # --- the vocabulary --------------------------------------------------------------------------------------------

    def kill(self, peer: int, at_step: int = 0, *, after: float = 0.0) -> VirtualSwarm:
        """SIGKILL."""
        return self._add(f"kill {peer}", lambda swarm: swarm._kill(peer), at_step, after)

    def restart(self, peer: int, at_step: int = 0, *, after: float = 0.0) -> VirtualSwarm:
        """A new process under the same identity; the old one is killed if it still lives."""
        return self._add(f"restart {peer}", lambda swarm: swarm._spawn(swarm._start(peer)), at_step, after)

    def stall(self, peer: int, at_step: int = 0, *, seconds: float = 1e6, after: float = 0.0) -> VirtualSwarm:
        """SIGSTOP, and SIGCONT after so many seconds."""
        name = peer_name(peer)
        self._add(f"stall {peer}", lambda swarm: swarm.network.stall(name), at_step, after)
        return self._add(f"resume {peer}", lambda swarm: swarm.network.resume(name), at_step, after + seconds)

    def slow(self, peer: int, factor: float, at_step: int = 0, *, after: float = 0.0) -> VirtualSwarm:
        """From now on it takes `factor` times as long for its work."""

        def slow(swarm: VirtualSwarm) -> None:
            swarm.network.slow(peer_name(peer), factor, only_work=True)

        return self._add(f"slow {peer} x{factor:g}", slow, at_step, after)

    def partition(
        self,
        a: int,
        b: int,
        at_step: int = 0,
        *,
        one_way: bool = False,
        seconds: float = 1e6,
        after: float = 0.0,
    ) -> VirtualSwarm:
        """Nothing comes from `a` to `b`, nor back unless it is `one_way`, for so many seconds."""
        one, other = peer_name(a), peer_name(b)
        way = "->" if one_way else "<->"
        cut: Callable[[VirtualSwarm], None] = lambda swarm: swarm.network.partition(one, other, one_way=one_way)  # noqa: E731
        self._add(f"partition {a} {way} {b}", cut, at_step, after)
        return self._add(f"heal {a} {b}", lambda swarm: swarm.network.heal(one, other), at_step, after + seconds)

    def corrupt(self, peer: int, fraction: float = 1.0, at_step: int = 0, *, after: float = 0.0) -> VirtualSwarm:
        """So much of what it says is nonsense."""
        name = peer_name(peer)
        return self._add(
            f"corrupt {peer} {fraction:g}", lambda swarm: swarm.network.corrupt(name, fraction), at_step, after
        )

    def drop(self, fraction: float, at_step: int = 0) -> VirtualSwarm:
        """So many messages vanish."""
        return self._add(f"drop {fraction:g}", lambda swarm: swarm.network.drop(fraction), at_step)

    def duplicate(self, fraction: float, at_step: int = 0) -> VirtualSwarm:
        """So many messages come twice."""
        return self._add(f"duplicate {fraction:g}", lambda swarm: swarm.network.duplicate(fraction), at_step)

    def reorder(self, fraction: float, at_step: int = 0) -> VirtualSwarm:
        """So many messages come late."""
        return self._add(f"reorder {fraction:g}", lambda swarm: swarm.network.reorder(fraction), at_step)

    def drain(self, peer: int, at_step: int = 0, *, seconds: float = 60.0, after: float = 0.0) -> VirtualSwarm:
        """It leaves, as at Ctrl-C."""

        async def leave(swarm: VirtualSwarm) -> None:
            if (found := swarm.peers.pop(peer, None)) is not None:
                swarm.drained.append(await found.drain(seconds))

        return self._add(f"drain {peer}", lambda swarm: swarm._spawn(leave(swarm)), at_step, after)

    def disconnect(self, a: int, b: int = CLIENT, at_step: int = 0, *, after: float = 0.0) -> VirtualSwarm:
        """The connections between them break; both live."""

        def cut(swarm: VirtualSwarm) -> None:
            swarm.network.disconnect(peer_name(a), peer_name(b))

        return self._add(f"disconnect {a} {b}", cut, at_step, after)

    def do(self, what: Callable[[VirtualSwarm], None], at_step: int = 0, *, after: float = 0.0) -> VirtualSwarm:
        """Anything else."""
        return self._add(what.__name__, what, at_step, after)

    def _add(self, name: str, what: Callable[[VirtualSwarm], None], at_step: int, after: float = 0.0) -> VirtualSwarm:
        if after < 1e5:
            self.faults.append(Fault(name, what, at_step, after))
        return self

    # --- what is done ----------------------------------------------------------------------------------------------

    def _kill(self, peer: int) -> None:
        self.network.kill(peer_name(peer))
        if (found := self.peers.pop(peer, None)) is not None:
            self._spawn(found.end())

    async def _start(self, peer: int) -> None:
        self._kill(peer)
        self.peers[peer] = VirtualPeer(self, peer_name(peer), self.spans[peer])
        await self.peers[peer].start()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

    def _before(self, step: int) -> None:
        for fault in self.faults:
            if fault.at_step == step:
                self._timers.append(asyncio.get_running_loop().call_later(fault.after, fault.what, self))

    # --- a run -----------------------------------------------------------------------------------------------------

    def run(self, *clients: Client) -> list[Outcome]:
        """Let the clients generate at once, in virtual time, and see to it that nothing is left of them."""
        with no_errors_logged():
            return run_virtually(self._run(clients))

    async def _run(self, clients: Sequence[Client]) -> list[Outcome]:
        self.network = LoopbackNetwork(self._seed, self._latency)
        self.directory = Directory()
        for number in range(len(self.spans)):
            await self._start(number)
        await asyncio.sleep(0.1)
        self.clients = [
            Network(
                self.network.transport(client_name(n)),
                self.directory,
                random.Random(f"{self._seed} {n}"),
                asyncio.get_running_loop().time,
            )
            for n in range(len(clients))
        ]
        self._before(0)
        outcomes = await asyncio.gather(*(self._generate(n, client) for n, client in enumerate(clients)))
        self.trace = self.network.trace
        await self._nothing_is_left()
        return list(outcomes)

    async def _generate(self, number: int, client: Client) -> Outcome:
        decoding = client.decoding
        outcome = Outcome(await decoding.run(Undisturbed(self.blocks, decoding.batch, self.load, self.ends)))
        network = self.clients[number]
        session = network.session(
            MODEL,
            self.blocks,
            batch=decoding.batch,
            max_length=decoding.max_length,
            waiting=Waiting(client.first_wait, client.wait),
            standby=client.standby,
        )
        before = self._before if number == 0 else lambda step: None
        try:
            outcome.tokens = await decoding.run(_Watched(session, self.ends, outcome, before))
        except ShoalError as error:
            outcome.error = error
        outcome.ended = asyncio.get_running_loop().time()
        outcome.failovers = session.failovers
        await session.close()
        return outcome

    async def _nothing_is_left(self) -> None:
        """When the clients have gone and the faults are over, no peer holds anything of theirs."""
        for timer in self._timers:
            timer.cancel()
        for network in self.clients:
            await network.close()
        for name in [peer.peer for peer in self.peers.values()]:
            self.network.resume(name)
        await asyncio.sleep(3 * LEASE_SECONDS)
        for peer in self.peers.values():
            assert peer.server.sessions == 0, f"{peer.peer} holds sessions"
            assert peer.leases.used == 0, f"{peer.peer} holds leases"
        for peer in self.peers.values():
            await peer.end()


def peer_name(number: int) -> PeerId:
    """A peer's or, where it is negative, a client's."""
    return PeerId(f"peer{number}") if number >= 0 else client_name(-1 - number)


def client_name(number: int) -> PeerId:
    """What the others know a client by."""
    return PeerId(f"client{number}")


def swarm_of(count: int, blocks: int = 6, seed: int = 0, **options: Any) -> VirtualSwarm:
    """So many peers; their spans, if none are given, are those of a route of three hops, again and again."""
    spans = options.pop("spans", None)
    if spans is None:
        edges = [blocks * i // 3 for i in range(4)]
        spans = [f"{edges[i % 3]}:{edges[i % 3 + 1]}" for i in range(count)]
    assert len(spans) == count
    return VirtualSwarm([Span(*map(int, span.split(":"))) for span in spans], seed, blocks=blocks, **options)


@contextmanager
def no_errors_logged() -> Iterator[None]:
    """Fail where something logs an error: a handler that died, a mistake that was caught."""
    errors: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(self.format(record))

    handler = Collector(logging.ERROR)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
    assert not errors, "\n".join(errors)
