"""A late joiner: a peer is launched while a run goes on, and is in the round that is collected.

The stage has 20M weights, so 240 MB of parameters and optimizer state come over the data plane, are hashed and
compared. Everything counts, from the launch of the process: imports, joining the swarm, building the stage. A round
takes about a second: a newcomer counts from the next one, and takes every step that is made while its state comes.
"""

from __future__ import annotations

import time
from pathlib import Path

from processes import LocalSwarm

from benches.plan import Plan
from benches.rows import Must, Row
from benches.trainees import Trainees, training, write_run

MUST = Must("value", "<=", 6.0)
ROUNDS = 5
CONFIG = """\
hidden_size = 512
intermediate_size = 1376
num_hidden_layers = 6
num_attention_heads = 8
num_key_value_heads = 8
max_position_embeddings = 64"""


def measure(plan: Plan) -> list[Row]:
    """One row."""
    plan.tell("join: starting the run")
    with LocalSwarm() as local:
        file = write_run(local.folder, "bench-join", '["0:6"]', 2, 8, 64, CONFIG)
        local.train(file, "--stage", "0")
        with training(file, local) as trainees:
            trainees.wait_for(1)
            trainees.next_round()
            rounds = plan.repeat("join: 20M weights", plan.rounds(ROUNDS), lambda: _join(local, trainees, file))
    return [rounds.row("join: from launch to counting, 20M weights", "s", MUST)]


def _join(local: LocalSwarm, trainees: Trainees, file: Path) -> float:
    started = time.perf_counter()
    peer = local.train(file, "--stage", "0")
    trainees.wait_for(2)
    seconds = time.perf_counter() - started
    peer.stop()
    trainees.wait_for(1)
    return seconds
