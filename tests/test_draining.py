"""Four clients stream while a peer leaves, in virtual time: how long each step takes is the same on every machine."""

from __future__ import annotations

import statistics

import pytest
from decoding import Decoding
from virtualswarm import POSITION_SECONDS, STEP_SECONDS, Client, swarm_of

from peer.scheduler import FIRST_BUDGET, Budget

pytestmark = pytest.mark.slow

SPANS = ["0:2", "2:4", "4:6"]
ARRIVES, LEAVES, TOKENS = 20, 40, 120  # steps of the first client
TURN = STEP_SECONDS + FIRST_BUDGET * POSITION_SECONDS


@pytest.fixture(autouse=True)
def bounded_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns are timed by the real clock, in which these take nothing: let them stay as long as before they were."""
    monkeypatch.setattr(Budget, "took", lambda self, tokens, seconds: None)


@pytest.mark.parametrize("hop", range(3))
def test_nobody_waits_longer_than_for_a_few_turns_when_a_peer_leaves(hop: int) -> None:
    """The second host of its blocks comes when all sessions are at the first, which then hands over every one.

    A step at the second may find others' sessions being brought there: it waits for the turn under way, not for them.
    """
    swarm = swarm_of(4, spans=[*SPANS, SPANS[hop]])
    swarm.kill(3).restart(3, at_step=ARRIVES).drain(hop, at_step=LEAVES)
    outcomes = swarm.run(*(Client(Decoding("greedy", seed=n, prompt=200, tokens=TOKENS)) for n in range(4)))
    assert swarm.drained == [True]
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
        assert outcome.tokens == outcome.expected
        assert outcome.failovers >= 1  # some may have tried the second host while it was away
        usual = statistics.median(outcome.steps[ARRIVES:LEAVES])
        assert max(outcome.steps[LEAVES:]) <= usual + 3 * TURN
