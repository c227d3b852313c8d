"""Members and trainers of a run in virtual time, with a network that loses, doubles, delays and corrupts at will.

Gradients are whole numbers that depend on round, micro-batch, stage and parameters, so that sums are exact in any
order and a single micro-batch counted twice, left out or computed with stale parameters shows in every digest after.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from swarm.agreement.assignments import Plan
from swarm.agreement.borrower import Borrower
from swarm.agreement.effects import Abandon, Apply, Average, Fetch, Restore, Settled, Void
from swarm.agreement.member import Member
from swarm.agreement.messages import Averaged, Finding, Lent, Order, Report
from swarm.agreement.participant import Participant
from swarm.agreement.roster import stages
from swarm.errors import NotReady, StaleRound
from swarm.rounds import Phase
from swarm.types import PeerId
from swarm.wire import Endpoint, Message

TICK = 0.05  # seconds
COMPUTE = 0.02  # seconds of a micro-batch at one stage
STEP = 0.01  # seconds of an optimizer step
ALLREDUCE_STALL = 1.0  # seconds after which a member gives up on who has not sent
SAVING = 2  # rounds between two checkpoints
PATIENCE = 0.6  # seconds that a trainer waits for a stage

Gradient = tuple[float, ...]
ZERO: Gradient = (0.0, 0.0, 0.0)


def gradient(round_: int, index: int, stage: int, parameters: Gradient) -> Gradient:
    """Of one micro-batch, summed over its samples."""
    seed = hashlib.sha256(f"{round_} {index} {stage} {[int(p) % 97 for p in parameters]}".encode()).digest()
    return tuple(float(byte) for byte in seed[:3])


class Reference:
    """The parameters of a stage at the beginning of every round, as one process computes them."""

    def __init__(self, plan: Plan, stage: int, outcomes: dict[int, str]) -> None:
        self._plan = plan
        self._stage = stage
        self._outcomes = outcomes  # of rounds: those that are skipped change nothing
        self._curve: list[Gradient] = [ZERO]

    def at(self, round_: int) -> Gradient:
        while len(self._curve) <= round_:
            self._curve.append(self._after(len(self._curve) - 1))
        return self._curve[round_]

    def _after(self, round_: int) -> Gradient:
        parameters = self._curve[round_]
        if self._outcomes.get(round_, "commit") != "commit":
            return parameters
        earlier = self._curve[max(round_ - 1, 0)] if self._plan.overlap else parameters
        parts = [gradient(round_, index, self._stage, earlier) for index in range(self._plan.count)]
        return tuple(p + sum(part[i] for part in parts) for i, p in enumerate(parameters))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    round: int
    lent: Lent


@dataclass(frozen=True, slots=True)
class Ran:
    round: int
    lent: Lent
    well: bool


@dataclass(frozen=True, slots=True)
class Part:
    term: int
    attempt: int
    sums: Gradient


@dataclass(frozen=True, slots=True)
class AskState:
    stop: bool = False


@dataclass(frozen=True, slots=True)
class State:
    round: int
    parameters: Gradient
    earlier: Gradient


@dataclass
class Network:
    """Virtual time, and what is on its way."""

    seed: int
    now: float = 0.0
    queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    peers: dict[PeerId, Peer] = field(default_factory=dict)
    cut: set[frozenset[PeerId]] = field(default_factory=set)
    loss: float = 0.0
    doubling: float = 0.0
    slow: dict[PeerId, float] = field(default_factory=dict)
    corrupt: dict[PeerId, Callable[[Part], Part]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    outcomes: dict[int, str] = field(default_factory=dict)  # of rounds
    disks: dict[int, dict[int, State]] = field(default_factory=dict)  # by stage, what its replicas have saved

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._order = itertools.count()

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + delay, next(self._order), action))

    def send(self, sender: PeerId, receiver: PeerId, payload: Any) -> None:
        if frozenset((sender, receiver)) in self.cut or self.random.random() < self.loss:
            return
        copies = 2 if self.random.random() < self.doubling else 1
        if isinstance(payload, Part) and sender in self.corrupt:
            payload = self.corrupt[sender](payload)
        for _ in range(copies):
            delay = self.random.uniform(0.001, 0.008) + self.slow.get(sender, 0.0) + self.slow.get(receiver, 0.0)
            self.at(delay, lambda: self._arrive(sender, receiver, payload))

    def _arrive(self, sender: PeerId, receiver: PeerId, payload: Any) -> None:
        peer = self.peers.get(receiver)
        if peer is None or frozenset((sender, receiver)) in self.cut:
            return
        peer.do(lambda: peer.take(sender, payload))

    def run(self, until: Callable[[], bool], limit: float) -> bool:
        """Let time pass until it is so; False where it is not by `limit` seconds."""
        while self.queue and self.now < limit:
            self.now, _, action = heapq.heappop(self.queue)
            action()
            if until():
                return True
        return until()


class Peer:
    """What members and trainers have in common: a clock that ticks, and stops where the peer is stopped."""

    machine: Participant

    def __init__(self, network: Network, name: str) -> None:
        self.network = network
        self.name = PeerId(name)
        self.stalled = False
        self._missed: list[Callable[[], None]] = []
        network.peers[self.name] = self
        network.at(network.random.uniform(0, TICK), self._tick)

    @property
    def alive(self) -> bool:
        return self.network.peers.get(self.name) is self

    def do(self, action: Callable[[], None]) -> None:
        if not self.alive:
            return
        if self.stalled:
            self._missed.append(action)
            return
        action()
        self.flush()

    def later(self, delay: float, action: Callable[[], None]) -> None:
        self.network.at(delay, lambda: self.do(action))

    def _tick(self) -> None:
        if not self.alive:
            return
        if not self.stalled:
            members = [peer.name for peer in self.network.peers.values() if isinstance(peer, SimulatedMember)]
            self.machine.meet(members)
            self.machine.tick(self.network.now)
            self.flush()
        self.network.at(TICK, self._tick)

    def resume(self) -> None:
        self.stalled = False
        missed, self._missed = self._missed, []
        for action in missed:
            self.do(action)

    def flush(self) -> None:
        for receiver, message in self.machine.outbox:
            self.network.send(self.name, receiver, message)
        self.machine.outbox.clear()

    def take(self, sender: PeerId, payload: Any) -> None:
        if isinstance(payload, Message):
            self.machine.receive(sender, payload, self.network.now)


class SimulatedMember(Peer):
    """A member whose model is three whole numbers."""

    machine: Member

    def __init__(self, network: Network, plan: Plan, stage: int, name: str) -> None:
        super().__init__(network, name)
        self.plan = plan
        self.stage = stage
        line = hashlib.sha256(f"{network.seed} {name} {network.now}".encode()).digest()[:16]
        endpoint = Endpoint(name, [("127.0.0.1", 1)])
        self._disk = network.disks.setdefault(stage, {0: State(0, ZERO, ZERO)})
        self.machine = Member(plan, stage, endpoint, line, network.now, lambda: self._disk)
        self.round = -1
        self.parameters: Gradient = ZERO
        self.earlier: Gradient = ZERO  # of the beginning of the round before
        self.sums: Gradient = ZERO
        self.samples: list[int] = []
        self.ahead: Gradient = ZERO  # the next round's sum
        self.samples_ahead: list[int] = []
        self.mean: Gradient | None = None
        self._attempt: Order | None = None
        self._parts: dict[tuple[int, int], dict[PeerId, Part]] = {}
        self._followers: set[PeerId] = set()
        self._pending: dict[int, Gradient] = {}
        self._fetching = False
        self.applied: list[tuple[int, int, tuple[int, ...]]] = []  # (round, samples in the sum, indices)

    def flush(self) -> None:
        while self.machine.effects:
            effect = self.machine.effects.pop(0)
            getattr(self, f"_do_{type(effect).__name__.lower()}")(effect)
        super().flush()

    def take(self, sender: PeerId, payload: Any) -> None:
        match payload:
            case MicroBatch():
                self._run(sender, payload)
            case Part():
                self._parts.setdefault((payload.term, payload.attempt), {})[sender] = payload
                self._reduce()
            case AskState():
                (self._followers.discard if payload.stop else self._followers.add)(sender)
                if not payload.stop and self.round >= 0:
                    self.network.send(self.name, sender, self._state())
            case State():
                self._came(payload)
            case _:
                super().take(sender, payload)

    def digest(self) -> bytes:
        return hashlib.sha256(repr(self._state()).encode()).digest()

    # --- micro-batches

    def _run(self, trainer: PeerId, batch: MicroBatch) -> None:
        round_, index = batch.round, batch.lent.index
        try:
            fresh = self.machine.begin(round_, index)
        except (StaleRound, NotReady):
            self.network.send(self.name, trainer, Ran(round_, batch.lent, False))
            return

        def ended() -> None:
            ahead = round_ - self.round
            taken = ahead in (0, int(self.plan.overlap))
            if fresh and taken:
                self._add(round_, index, ahead > 0)
                self.machine.counted(round_, index, self.network.now)
            self.network.send(self.name, trainer, Ran(round_, batch.lent, taken))

        self.later(COMPUTE, ended)

    def _add(self, round_: int, index: int, ahead: bool) -> None:
        if ahead:
            self.ahead = _plus(self.ahead, gradient(round_, index, self.stage, self.parameters))
            self.samples_ahead.append(index)
        else:
            parameters = self.earlier if self.plan.overlap else self.parameters
            self.sums = _plus(self.sums, gradient(round_, index, self.stage, parameters))
            self.samples.append(index)

    def _turn(self) -> None:
        self.round += 1
        self.sums, self.samples, self.ahead, self.samples_ahead = self.ahead, self.samples_ahead, ZERO, []

    # --- effects

    def _do_restore(self, effect: Restore) -> None:
        self._load(self._disk[effect.round])

    def _load(self, state: State) -> None:
        self.round, self.parameters, self.earlier = state.round, state.parameters, state.earlier
        self.sums, self.samples, self.ahead, self.samples_ahead = ZERO, [], ZERO, []
        self.machine.holds(self.round, self.digest(), self.network.now)

    def _state(self) -> State:
        return State(self.round, self.parameters, self.earlier)

    def _do_void(self, effect: Void) -> None:
        if effect.round == self.round:
            self.sums, self.samples = ZERO, []
        elif effect.round == self.round + 1:
            self.ahead, self.samples_ahead = ZERO, []
        self.machine.voided(effect.round, self.network.now)

    def _do_fetch(self, effect: Fetch) -> None:
        self._fetching = True
        for source in effect.sources[:1] if self.network.random.random() < 0.5 else effect.sources[-1:]:
            self.network.send(self.name, source, AskState())
        self.later(1.5, self._gave_up_fetching)

    def _gave_up_fetching(self) -> None:
        if self._fetching:
            self._fetching = False
            self.machine.failed_to_fetch(self.network.now)

    def _came(self, state: State) -> None:
        if self._fetching and state.round >= min(self.round, self.machine.round):
            self._load(state)

    def _do_settled(self, effect: Settled) -> None:
        self._fetching = False
        for peer in list(self.network.peers):
            self.network.send(self.name, peer, AskState(stop=True))

    def _do_average(self, effect: Average) -> None:
        order = self._attempt = effect.order
        mine = Part(order.term, order.attempt, self.sums)
        self._parts.setdefault((order.term, order.attempt), {})[self.name] = mine
        for peer in self._group(order):
            if peer != self.name:
                self.network.send(self.name, peer, mine)
        self.later(ALLREDUCE_STALL, lambda: self._gave_up(order))
        self._reduce()

    def _group(self, order: Order) -> list[PeerId]:
        return sorted(PeerId(share.peer) for share in order.shares if share.stage == self.stage)

    def _gave_up(self, order: Order) -> None:
        if self._attempt is order and self.mean is None:
            missing = set(self._group(order)) - set(self._parts[order.term, order.attempt])
            self.machine.averaged(Report(order.term, order.attempt, [], [], sorted(missing), []), self.network.now)

    def _reduce(self) -> None:
        order = self._attempt
        if order is None or self.mean is not None:
            return
        group = self._group(order)
        parts = self._parts.get((order.term, order.attempt), {})
        if set(group) - set(parts):
            return
        unsound = [(peer, "not finite") for peer in group if any(v != v for v in parts[peer].sums)]
        if unsound:
            self.machine.averaged(Report(order.term, order.attempt, [], [], [], unsound), self.network.now)
            return
        self.mean = tuple(sum(parts[peer].sums[i] for peer in group) for i in range(3))
        digests = [(peer, hashlib.sha256(repr(parts[peer].sums).encode()).digest()[:16]) for peer in group]
        group_name = f"stage-{self.stage}"
        average = Averaged(group_name, digests, 1.0, True)
        findings = [Finding(group_name, peer, sum(v * v for v in parts[peer].sums)) for peer in group]
        self.machine.averaged(Report(order.term, order.attempt, [average], findings, [], []), self.network.now)

    def _do_abandon(self, effect: Abandon) -> None:
        self._attempt = self.mean = None

    def _do_apply(self, effect: Apply) -> None:
        mean, self._attempt, self.mean = self.mean, None, None
        self._parts.clear()
        decision = effect.decision
        assert decision.round == self.round
        self.network.log.append(f"{self.network.now:.2f} {self.name} {decision.round} {decision.outcome}")
        before = self.network.outcomes.setdefault(decision.round, decision.outcome)
        assert decision.outcome == before, f"round {decision.round} ends in {before} and in {decision.outcome}"
        assert decision.outcome != "commit" or mean is not None

        def stepped() -> None:
            self.earlier = self.parameters
            if decision.outcome == "commit":
                assert mean is not None
                self.parameters = _plus(self.parameters, mean)
            self.applied.append((self.round, len(self.samples), tuple(self.samples)))
            self._turn()
            if self.round % SAVING == 0:
                self._disk[self.round] = self._state()
            for follower in sorted(self._followers):
                self.network.send(self.name, follower, self._state())
            self.machine.holds(self.round, self.digest(), self.network.now)

        self.later(STEP, stepped)


def _plus(one: Gradient, other: Gradient) -> Gradient:
    return tuple(a + b for a, b in zip(one, other, strict=True))


class SimulatedTrainer(Peer):
    """Sends micro-batches through the stages, from the last to the first as gradients go."""

    machine: Borrower

    def __init__(self, network: Network, plan: Plan, name: str, want: int = 4) -> None:
        super().__init__(network, name)
        self.plan = plan
        self.machine = Borrower(plan, self.name, want, network.now)
        self._waiting: dict[tuple[int, int, int], int] = {}  # (round, index, lease): the stage that is asked

    def flush(self) -> None:
        while self.machine.todo:
            round_, lent = self.machine.todo.popleft()
            self._ask(round_, lent, self.plan.stages - 1)
        super().flush()

    def _ask(self, round_: int, lent: Lent, stage: int) -> None:
        assert self.machine.previous is not None
        where = stages(self.machine.previous.roster)
        hosts = [peer for peer, held in where.items() if held == stage]
        holders = [peer for peer in hosts if peer in lent.holders]
        key = round_, lent.index, lent.lease
        if not hosts or round_ < self.machine.round:
            self._end(round_, lent)
            return
        self._waiting[key] = stage
        self.network.send(self.name, self.network.random.choice(holders or hosts), MicroBatch(round_, lent))
        self.later(PATIENCE, lambda: self._end(round_, lent) if self._waiting.get(key) == stage else None)

    def _end(self, round_: int, lent: Lent) -> None:
        self._waiting.pop((round_, lent.index, lent.lease), None)
        self.machine.done(round_, lent, self.network.now)

    def take(self, sender: PeerId, payload: Any) -> None:
        if not isinstance(payload, Ran):
            super().take(sender, payload)
            return
        stage = self._waiting.get((payload.round, payload.lent.index, payload.lent.lease))
        if stage is None:
            return
        if payload.well and stage > 0:
            self._ask(payload.round, payload.lent, stage - 1)
        elif payload.well:
            self._end(payload.round, payload.lent)
        else:
            self.later(0.05, lambda: self._end(payload.round, payload.lent))


class Run:
    """A run in virtual time: `stages` x `replicas` members and trainers."""

    def __init__(
        self, seed: int, stages: int, replicas: int, trainers: int, samples: int = 10, overlap: bool = False
    ) -> None:
        self.network = Network(seed)
        self.plan = Plan(b"r" * 16, stages, samples, 2, clip=0.0, overlap=overlap)
        self._names = itertools.count()
        for stage in range(stages):
            for _ in range(replicas):
                self.join(stage)
        for _ in range(trainers):
            self.new_trainer()

    def join(self, stage: int) -> SimulatedMember:
        name = f"m{next(self._names)}-{self.network.random.randrange(100)}"
        return SimulatedMember(self.network, self.plan, stage, name)

    def new_trainer(self) -> SimulatedTrainer:
        return SimulatedTrainer(self.network, self.plan, f"t{next(self._names)}")

    @property
    def members(self) -> list[SimulatedMember]:
        return [peer for peer in self.network.peers.values() if isinstance(peer, SimulatedMember)]

    @property
    def trainers(self) -> list[SimulatedTrainer]:
        return [peer for peer in self.network.peers.values() if isinstance(peer, SimulatedTrainer)]

    def coordinator(self) -> SimulatedMember | None:
        """Of the longest line and highest term."""
        found = [peer for peer in self.members if peer.machine.coordinator is not None and not peer.stalled]
        key = lambda peer: (peer.machine.round, peer.machine.coordinator.term)  # noqa: E731
        return max(found, key=key, default=None)

    def phase(self) -> Phase | None:
        coordinator = self.coordinator()
        return coordinator.machine.coordinator.phase if coordinator else None

    def kill(self, peer: Peer) -> None:
        self.network.peers.pop(peer.name, None)

    def stall(self, peer: Peer, seconds: float) -> None:
        peer.stalled = True
        self.network.at(seconds, peer.resume)

    def partition(self, some: list[Peer], seconds: float) -> None:
        inside = {peer.name for peer in some}
        cut = {frozenset((a, b)) for a in inside for b in self.network.peers if b not in inside}
        self.network.cut |= cut
        self.network.at(seconds, lambda: self.network.cut.difference_update(cut))

    def advance_to(self, round_: int, limit: float = 120.0) -> bool:
        """Let time pass until every living member holds the state of that round or a later one."""
        return self.network.run(lambda: all(peer.round >= round_ for peer in self.members), limit)
