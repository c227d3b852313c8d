"""Rounds under faults, in virtual time: one commit by all or none, nothing counted twice, the curve of one process."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from faults import chosen
from rounds_simulator import Part, Peer, Reference, Run, SimulatedMember

from swarm.agreement.cohort import GIVE_UP
from swarm.rounds import Phase

SHAPES = ((1, 2, 1), (1, 3, 2), (2, 2, 1), (2, 2, 2), (2, 3, 2))  # stages, replicas, trainers
ROUNDS = 6
FAULTY_ROUNDS = (1, 2, 3)
LIMIT = 180.0  # seconds of virtual time


def nan(part: Part) -> Part:
    return replace(part, sums=(float("nan"), *part.sums[1:]))


class Schedule:
    """One or two faults of a seed's choosing, each when a round comes to a phase of its choosing."""

    def __init__(self, run: Run, seed: int) -> None:
        self.run = run
        self.random = random.Random(seed)
        self.seed = seed
        self.told: list[str] = []
        names = chosen(seed, self.random, two=seed % 2 > 0)
        self._waiting = [
            (getattr(self, name), self.random.choice(FAULTY_ROUNDS), Phase(self.random.randrange(4))) for name in names
        ]

    def look(self) -> None:
        """Let what is due happen."""
        coordinator = self.run.coordinator()
        if coordinator is None or coordinator.machine.coordinator is None:
            return
        now = coordinator.machine.round, coordinator.machine.coordinator.phase
        for each in [each for each in self._waiting if now >= each[1:]]:
            self._waiting.remove(each)
            self.told.append(f"{each[0].__name__} in round {each[1]} at {each[2].name}")
            each[0]()

    def _spare(self) -> SimulatedMember:
        """A member whose stage has another one that is well: the coordinator, as often as not."""
        well = [peer for peer in self.run.members if not peer.stalled]
        spare = [peer for peer in well if sum(other.stage == peer.stage for other in well) > 1]
        coordinator = self.run.coordinator()
        if coordinator in spare and self.random.random() < 0.5:
            return coordinator
        return self.random.choice(spare or well)

    def kill(self) -> None:
        peer = self._spare()
        if sum(other.stage == peer.stage for other in self.run.members) > 1:
            self.run.kill(peer)

    def kill_a_trainer(self) -> None:
        if not self.run.trainers:  # another was killed a moment ago, and the next has not come yet
            return
        self.run.kill(self.random.choice(self.run.trainers))
        self.run.network.at(1.0, lambda: self.run.new_trainer())

    def stall(self) -> None:
        peer: Peer = self.random.choice([self._spare(), *self.run.trainers])
        self.run.stall(peer, self.random.choice([0.3, 1.0, 3.0, 8.0]))

    def slow(self) -> None:
        peer = self._spare().name
        self.run.network.slow[peer] = self.random.choice([0.05, 0.3, 1.5])
        self.run.network.at(4.0, lambda: self.run.network.slow.pop(peer, None))

    def partition(self) -> None:
        peers: list[Peer] = [*self.run.members, *self.run.trainers]
        some = self.random.sample(peers, self.random.randrange(1, len(peers)))
        self.run.partition(some, self.random.choice([0.5, 2.5, 6.0]))

    def drop(self) -> None:
        self._for_a_while("loss", self.random.choice([0.1, 0.5]))

    def duplicate(self) -> None:
        self._for_a_while("doubling", 0.5)

    def _for_a_while(self, what: str, share: float) -> None:
        setattr(self.run.network, what, share)
        self.run.network.at(3.0, lambda: setattr(self.run.network, what, 0.0))

    def corrupt(self) -> None:
        peer = self._spare().name
        target = self.run.network
        lies: list[Callable[[Part], Part]] = [
            nan,
            lambda part: replace(part, sums=tuple(v + target.random.random() for v in part.sums)),
            lambda part: replace(part, sums=tuple(v * 1e30 for v in part.sums)),
        ]
        target.corrupt[peer] = self.random.choice(lies)
        target.at(3.0, lambda: target.corrupt.pop(peer, None))

    def late_join(self) -> None:
        self.run.join(self.random.randrange(self.run.plan.stages))


def check(run: Run, curves: list[Reference], story: str) -> None:
    """Every living member is on the curve of one process, wherever it is."""
    for member in run.members:
        if member.round >= 0:
            expected = curves[member.stage].at(member.round)
            assert member.parameters == expected, f"{story}: {member.name} in round {member.round}"
        for samples in (member.samples, member.samples_ahead):
            assert len(set(samples)) == len(samples), f"{story}: counted twice in one sum"


def play(seed: int, overlap: bool = False) -> None:
    """One schedule, checked after every event, until everyone is through and in step."""
    run = Run(seed, *SHAPES[seed % len(SHAPES)], overlap=overlap)
    schedule = Schedule(run, seed)
    curves = [Reference(run.plan, stage, run.network.outcomes) for stage in range(run.plan.stages)]

    def over() -> bool:
        schedule.look()
        check(run, curves, f"seed {seed}, {schedule.told}")
        rounds = [member.round for member in run.members]
        return min(rounds) >= ROUNDS and max(rounds) - min(rounds) <= 1 and not schedule._waiting

    ended = run.network.run(over, LIMIT)
    state = [(peer.name, peer.round, peer.machine.round, peer.machine.coordinator) for peer in run.members]
    assert ended, f"seed {seed}, {schedule.told}: not through by {run.network.now:.0f} s: {state}"


@pytest.mark.parametrize("seed", range(27))
@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlap"])
def test_every_replica_stays_on_the_curve_of_one_process_whatever_fails(seed: int, overlap: bool) -> None:
    play(seed, overlap)


def test_a_trainer_that_missed_how_a_round_ended_helps_to_replace_a_coordinator_that_died() -> None:
    """Without it, the other replica is no majority."""
    run = Run(0, 1, 2, 1)
    assert run.advance_to(2)
    assert run.network.run(lambda: run.phase() is Phase.DECIDE, LIMIT)
    run.partition([*run.trainers], 1.5)
    assert run.advance_to(3)
    coordinator = run.coordinator()
    assert coordinator is not None
    assert run.trainers[0].machine.round == 2
    run.kill(coordinator)
    assert run.advance_to(5, run.network.now + 30.0)


def test_a_trainer_that_was_cut_off_with_a_coordinator_finds_the_one_elected_meanwhile() -> None:
    run = Run(0, 2, 2, 1)
    assert run.advance_to(2)
    before = run.coordinator()
    assert before is not None
    run.partition([before, *run.trainers], 6.0)
    assert run.network.run(lambda: run.coordinator() is not before, LIMIT)
    assert run.advance_to(4, run.network.now + 10.0)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_nobody_holds_any_more_is_gone_on_with_from_what_was_saved(stage: int) -> None:
    """The others wait for it, as it may be cut off; then all go back to the last round that every stage has saved."""
    run = Run(0, 2, 2, 1)
    assert run.advance_to(3)
    for member in [member for member in run.members if member.stage == stage]:
        run.kill(member)
    run.join(stage)
    began = run.network.now
    assert run.network.run(lambda: all(member.round == 2 for member in run.members), LIMIT)
    assert run.network.now - began > GIVE_UP
    assert run.advance_to(6)
    check(run, [Reference(run.plan, stage, run.network.outcomes) for stage in range(2)], "after a stage was lost")


@pytest.mark.parametrize("seed", [801, 1017, 1215, 1375])
def test_who_has_left_a_line_of_the_run_comes_back_with_nothing_of_it(seed: int) -> None:
    """What these seeds choose leaves too few to decide, or nobody who holds the last step."""
    play(seed)
    play(seed, overlap=True)


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("fifty", range(10))
def test_five_hundred_schedules(fifty: int) -> None:
    for seed in range(50 * fifty, 50 * (fifty + 1)):
        play(seed)
        play(seed, overlap=True)
