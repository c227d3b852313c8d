"""Four clients stream while a peer leaves, in virtual time: how long each step takes is the same on every machine."""

from __future__ import annotations

import statistics

import pytest
from decoding import Decoding
from virtualswarm import Client, swarm_of

pytestmark = pytest.mark.slow

SPANS = ["0:2", "2:4", "4:6"]
ARRIVES, LEAVES, TOKENS = 20, 40, 120  # steps of the first client


@pytest.mark.parametrize("hop", range(3))
def test_nobody_waits_longer_than_a_few_steps_when_a_peer_leaves(hop: int) -> None:
    """The second host of its blocks comes when all sessions are at the first, which then hands over every one."""
    swarm = swarm_of(4, spans=[*SPANS, SPANS[hop]])
    swarm.kill(3).restart(3, at_step=ARRIVES).drain(hop, at_step=LEAVES)
    outcomes = swarm.run(*(Client(Decoding("greedy", seed=n, prompt=200, tokens=TOKENS)) for n in range(4)))
    assert swarm.drained == [True]
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
        assert outcome.tokens == outcome.expected
        assert outcome.failovers >= 1  # some may have tried the second host while it was away
        usual = statistics.median(outcome.steps[ARRIVES:LEAVES])
        assert max(outcome.steps[LEAVES:]) <= 3 * usual
