"""Random fault schedules: a seed makes a swarm, its clients and what happens to them.

`python tests/schedules.py SEED ...` runs some alone and tells what happened; `--from A --to B` a range of them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from decoding import Decoding
from virtualswarm import Client, Outcome, VirtualSwarm, swarm_of

from swarm.errors import NoRoute
from swarm.types import Span

KINDS = ("greedy", "sampling", "padded", "beams", "speculative")
HEALTHY_WITHIN = 3.0  # seconds, after which a fault that may strike any peer is over
WAIT = 10.0  # seconds that a client waits for a block's next host
LONGEST = 120.0  # virtual seconds that a run may take, and as much again for each 30-fold slowness


class Schedule:
    """What a seed stands for.

    In a *survivable* one, some route of peers meets with nothing that lasts: the answer must come. In another, all
    hosts of some block die for good: the answer must come, or the error that names the block.

    Args:
        whole: how many blocks the model has; by lot, if it is none that is given in `options`.
    """

    def __init__(self, seed: int, whole: int = 0, **options: Any) -> None:
        self.seed = seed
        self.chance = chance = random.Random(seed)
        self.doomed: Span | None = None
        self.slowest = 1.0
        hops = chance.randint(2, 6)
        blocks = whole or chance.randint(hops, 8)
        edges = [0, *sorted(chance.sample(range(1, blocks), hops - 1)), blocks]
        self.route = [Span(a, b) for a, b in itertools.pairwise(edges)]
        spans = [*self.route, *(self._replica(blocks) for _ in range(chance.randint(hops, 2 * hops)))]
        order = list(range(len(spans)))
        chance.shuffle(order)
        self.healthy = {order.index(index) for index in range(hops)}  # the peers that nothing bad happens to for long
        names = [str(spans[index]) for index in order]
        self.swarm: VirtualSwarm = swarm_of(len(names), blocks, seed, spans=names, **options)
        self.clients = [self._client() for _ in range(chance.choice((1, 1, 2)))]
        self._steps = self.clients[0].decoding.tokens
        self._nuisances()
        for _ in range(chance.randint(1, 10)):
            self._fault()
        if chance.random() < 0.1:
            self._doom()

    def _replica(self, blocks: int) -> Span:
        """Another host: of one hop's blocks, or of others."""
        if self.chance.random() < 0.6:
            return self.chance.choice(self.route)
        start = self.chance.randrange(blocks)
        return Span(start, self.chance.randint(start + 1, blocks))

    def _client(self) -> Client:
        chance = self.chance
        decoding = Decoding(
            chance.choice(KINDS), chance.randrange(1000), chance.choice((1, 3, 9, 40, 300)), chance.randint(4, 14)
        )
        return Client(decoding, standby=chance.choice((0, 0, 1, 2)), wait=WAIT)

    def _nuisances(self) -> None:
        for nuisance, most in ((self.swarm.drop, 0.01), (self.swarm.duplicate, 0.05), (self.swarm.reorder, 0.05)):
            if self.chance.random() < 0.2:
                nuisance(self.chance.choice((0.2, 1.0)) * most)
        if any("drop" in fault.name for fault in self.swarm.faults):  # each that vanishes costs seconds of the wait
            self.clients = [replace(client, wait=2 * WAIT) for client in self.clients]

    def _fault(self) -> None:
        """One that lasts, at a peer that may be lost; or one that passes, at any."""
        chance, swarm = self.chance, self.swarm
        losable = [peer for peer in range(len(swarm.spans)) if peer not in self.healthy]
        peer = chance.choice(losable)
        anyone = chance.randrange(len(swarm.spans))
        when = {"at_step": chance.randint(1, self._steps), "after": chance.uniform(0.0, 0.3)}
        brief = chance.uniform(0.05, HEALTHY_WITHIN)
        kind = chance.choice(
            ("kill", "kill", "stall", "pause", "slow", "cut", "part", "corrupt", "restart", "drain", "disconnect")
        )
        if kind == "kill":
            swarm.kill(peer, **when)
        elif kind == "restart":
            swarm.kill(anyone, **when)
            swarm.restart(anyone, when["at_step"], after=when["after"] + brief)
        elif kind == "stall":
            swarm.stall(peer, **when)
        elif kind == "pause":
            swarm.stall(anyone, seconds=brief, **when)
        elif kind == "slow":
            factor = chance.choice((3.0, 30.0, 300.0))
            self.slowest = max(self.slowest, 1.0 + factor / 30.0)
            swarm.slow(peer, factor, **when)
        elif kind == "cut":
            one_way = chance.random() < 0.5
            ends = [peer, chance.choice([-1, *(p for p in range(len(swarm.spans)) if p != peer)])]
            chance.shuffle(ends)
            swarm.partition(ends[0], ends[1], one_way=one_way, **when)
        elif kind == "part":
            swarm.partition(anyone, -1, seconds=brief, **when)
        elif kind == "corrupt":
            swarm.corrupt(peer, chance.choice((0.3, 1.0)), **when)
        elif kind == "drain":
            swarm.drain(peer, **when)
        else:
            swarm.disconnect(anyone, chance.choice([-1, *(p for p in range(len(swarm.spans)) if p != anyone)]), **when)

    def _doom(self) -> None:
        """Let all hosts of one block die for good."""
        block = self.chance.randrange(self.swarm.blocks)
        step = self.chance.randint(2, self._steps)
        self.doomed = Span(block, block + 1)
        for peer, span in enumerate(self.swarm.spans):
            if block in span:
                self.swarm.faults = [f for f in self.swarm.faults if str(f).find(f": restart {peer}") < 0]
                self.swarm.kill(peer, step, after=self.chance.uniform(0.0, 0.1))

    def run(self) -> list[Outcome]:
        """Run it. Raises `AssertionError` where it does not end as it has to."""
        outcomes = self.swarm.run(*self.clients)
        for client, outcome in zip(self.clients, outcomes, strict=True):
            self._check(client, outcome)
        return outcomes

    def _check(self, client: Client, outcome: Outcome) -> None:
        assert outcome.ended < LONGEST * self.slowest, f"{client}: it took {outcome.ended:.0f} s"
        if outcome.error is None:
            assert outcome.tokens == outcome.expected, f"{client}: {outcome.tokens} is not {outcome.expected}"
            return
        assert self.doomed is not None, f"{client}: {outcome.error!r}, and every block has a host"
        assert isinstance(outcome.error, NoRoute), f"{client}: {outcome.error!r}"
        hosted = {block for peer in self.swarm.peers for block in self.swarm.spans[peer]}
        missing = {block for start, end in outcome.error.missing for block in range(start, end)}
        assert missing - hosted, f"{client}: {outcome.error!r}, of which every block has a host"

    def __str__(self) -> str:
        told = "\n  ".join([f"seed {self.seed}", *map(str, self.clients), *str(self.swarm).split("\n")])
        return f"{told}\n  healthy: {sorted(self.healthy)}{f', doomed: {self.doomed}' if self.doomed else ''}"


def failures(seeds: Iterable[int]) -> list[int]:
    """The seeds that do not end as they have to; each is told of."""
    failed = []
    for seed in seeds:
        schedule = Schedule(seed)
        try:
            schedule.run()
        except Exception as error:  # noqa: BLE001 (every failing seed is to be told)
            failed.append(seed)
            print(f"{schedule}\n  FAILED: {type(error).__name__}: {error}\n", file=sys.stderr, flush=True)
    return failed


def _timed(record: logging.LogRecord) -> bool:
    record.now = asyncio.get_running_loop().time()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="*", type=int)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--to", dest="last", type=int, default=0)
    parser.add_argument("--log", action="store_true", help="what the session says meanwhile")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.log:
        logging.basicConfig(level=logging.INFO, format="%(now)8.3f %(name)s %(message)s")
        logging.getLogger().handlers[0].addFilter(_timed)
    started = time.perf_counter()
    for seed in options.seeds:
        schedule = Schedule(seed)
        print(schedule)
        for outcome in schedule.run():
            print(f"  {outcome}")
        print(f"  trace {schedule.swarm.trace}")
    failed = failures(range(options.first, options.last))
    print(f"{time.perf_counter() - started:.1f} s; failed: {failed}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
