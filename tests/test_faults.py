"""Sessions meet faults in virtual time; every answer is that of an undisturbed run."""

from __future__ import annotations

import pytest
from decoding import Decoding
from virtualswarm import Client, Outcome, VirtualSwarm, swarm_of

KINDS = ["greedy", "sampling", "padded", "beams", "speculative"]


def client(kind: str = "greedy", **options: int) -> Client:
    return Client(Decoding(kind, seed=5, prompt=9, tokens=14), **options)


def answered(swarm: VirtualSwarm, *clients: Client) -> list[Outcome]:
    outcomes = swarm.run(*clients)
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
        assert outcome.tokens == outcome.expected
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_an_undisturbed_run(kind: str) -> None:
    [outcome] = answered(swarm_of(3), client(kind))
    assert outcome.failovers == 0
    assert outcome.pause < 0.3


@pytest.mark.parametrize("standby", [0, 1])
@pytest.mark.parametrize("hop", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_any_hop_dies(kind: str, hop: int, standby: int) -> None:
    swarm = swarm_of(6)
    for peer in (hop, hop + 3):
        swarm.kill(peer, at_step=5, after=0.01).restart(peer, at_step=5, after=2.0)
    [outcome] = answered(swarm, client(kind, standby=standby))
    assert outcome.failovers >= 1
