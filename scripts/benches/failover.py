"""How long an answer stands still when a hop is killed in its middle, with and without a spare that follows.

Three stages, each at two peers. A peer of the route (first, middle and last in turn) gets SIGKILL at a moment drawn
at random in the middle of the answer, within a token's time. The pause is the longest gap between two tokens from
then on, less the median gap of that answer. The next answer begins when another peer has come in the dead one's place.
Wanted are medians over the kills, and that every answer is the whole model's.
"""

from __future__ import annotations

import random
import statistics
import threading

import torch
from processes import LocalSwarm, PeerProcess

from benches.generation import generate, prompt, whole_model
from benches.plan import Plan
from benches.rows import Must, Rounds, Row
from swarm.client import SwarmCache, SwarmModelForCausalLM
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve

MUST = {0: Must("value", "<=", 1.0), 1: Must("value", "<=", 0.3)}  # spares at each hop: seconds
EXACT = Must("value", "==", 1.0)
ROUNDS = 20
STAGES, REPLICAS = 3, 2
PROMPT_TOKENS, NEW_TOKENS = 128, 96
KILLED_AT = (32, 80)  # new tokens: when spares have had time to catch up, and there is an answer left to disturb
SEED = 3


def measure(plan: Plan) -> list[Row]:
    """For each number of spares: the pause, the longest one, and whether the answers are the same."""
    plan.tell("failover: loading the whole model")
    checkpoint = Checkpoint(resolve(DEFAULT_MODEL))
    ids = prompt(checkpoint.folder, PROMPT_TOKENS)
    expected = generate(whole_model(checkpoint.folder), ids, NEW_TOKENS).tokens
    plan.tell("failover: starting six peers")
    with LocalSwarm() as local:
        swarm = _Stages(local, checkpoint)
        return [row for standby in MUST for row in _over_kills(plan, swarm, standby, ids, expected)]


class _Stages:
    """Peers that together hold the model several times, and stay as many."""

    def __init__(self, local: LocalSwarm, checkpoint: Checkpoint) -> None:
        self.local = local
        self.folder = checkpoint.folder
        blocks: int = checkpoint.config().num_hidden_layers
        spans = [f"{blocks * stage // STAGES}:{blocks * (stage + 1) // STAGES}" for stage in range(STAGES)]
        self.peers = [(self._start(span), span) for span in spans * REPLICAS]
        for peer, _ in self.peers:
            peer.address()

    def _start(self, span: str) -> PeerProcess:
        return self.local.serve(str(self.folder), "--blocks", span)

    def named(self, name: str) -> PeerProcess:
        """The peer of that PeerId."""
        return next(peer for peer, _ in self.peers if peer.peer == name)

    def replace_dead(self) -> None:
        """Put another peer in the place of each that was killed, and wait until it is online."""
        fresh = [
            (self._start(span), span) if peer.process.poll() is not None else (peer, span) for peer, span in self.peers
        ]
        for (peer, _), (before, _) in zip(fresh, self.peers, strict=True):
            if peer is not before:
                peer.address()
        self.peers = fresh


def _over_kills(plan: Plan, swarm: _Stages, standby: int, ids: torch.Tensor, expected: list[int]) -> list[Row]:
    case = f"failover: {'standby' if standby else 'without standby'}"
    address, chance = swarm.local.address, random.Random(SEED)
    equal, gaps, pauses = [], [], []
    with SwarmModelForCausalLM.from_pretrained(
        swarm.folder, initial_peers=[address], failover_wait=30.0, standby=standby
    ) as model:
        usual = statistics.median(generate(model, ids, NEW_TOKENS).gaps)
        rounds = plan.rounds(ROUNDS)
        for number in range(rounds):
            plan.tell(f"{case}, kill {number + 1} of {rounds}")
            killer = _Killer(swarm, number % STAGES, chance.randint(*KILLED_AT), chance.uniform(0.0, usual))
            answer = generate(model, ids, NEW_TOKENS, killer.told, killer.cache)
            equal.append(answer.tokens == expected)
            gaps.append(statistics.median(answer.gaps))
            pauses.append(max(answer.gaps[killer.at - 1 :]) - gaps[-1])
            killer.cache.close()
            swarm.replace_dead()
    return [
        Rounds(pauses).row(case, "s", MUST[standby]),
        Row(f"{case}, the longest", max(pauses), "s"),
        Rounds(gaps).row(f"{case}, gap between tokens", "s"),
        Row(f"{case}, equal answers", statistics.mean(equal), "of all", must=EXACT),
    ]


class _Killer:
    """Kills a peer of the route of the session in `cache`, `after` seconds after its token number `at` has come."""

    def __init__(self, swarm: _Stages, hop: int, at: int, after: float) -> None:
        self.swarm = swarm
        self.hop = hop
        self.at = at
        self.after = after
        self.cache = SwarmCache(PROMPT_TOKENS + NEW_TOKENS)

    def told(self, count: int) -> None:
        """So many new tokens there are."""
        if count == self.at:
            assert self.cache.route is not None
            victim = self.swarm.named(self.cache.route.hops[self.hop].peer)
            threading.Timer(self.after, victim.process.kill).start()
