"""The gaps between tokens that four clients see while prompts of 1,024 tokens keep arriving at the same two stages.

Four clients, each a process, decode; a fifth sends one prompt after the other. A figure is the 99th percentile of all
gaps that end while prompts arrive; the reference is their median. Both are of the same rounds and the same machine.
"""

from __future__ import annotations

import itertools
import statistics

from benches.askers import Answer, asking
from benches.generation import prompt
from benches.plan import Plan
from benches.rows import Must, Rounds, Row
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve

MUST = Must("ratio", "<=", 4.0)
ROUNDS = 3
STAGES = 2
CLIENTS = 4
NEW_TOKENS = 96
ARRIVING_TOKENS = 1024
ARRIVING = 4  # prompts, in a round


def measure(plan: Plan) -> list[Row]:
    """One row."""
    checkpoint = Checkpoint(resolve(DEFAULT_MODEL))
    short, long = (prompt(checkpoint.folder, count)[0].tolist() for count in (32, ARRIVING_TOKENS))
    late, usual = [], []
    plan.tell("mixed: starting five clients")
    with asking(checkpoint, STAGES, CLIENTS + 1) as (arriving, *running):
        for number in range(1, (count := plan.rounds(ROUNDS)) + 1):
            plan.tell(f"mixed, round {number} of {count}")
            for client in running:
                client.ask(short, NEW_TOKENS)
            prompts = []
            for index in range(ARRIVING):
                arriving.ask(long[index:] + long[:index], 1)  # each is another: nothing of it is there already
                prompts.append(arriving.answer())
            gaps = _gaps([client.answer() for client in running], prompts)
            late.append(1e3 * statistics.quantiles(gaps, n=100)[98])
            usual.append(1e3 * statistics.median(gaps))
    return [Rounds(late, usual).row(f"mixed: p99 gap of {CLIENTS} clients, over the median", "ms", MUST)]


def _gaps(answers: list[Answer], prompts: list[Answer]) -> list[float]:
    """Seconds, of those that end before the last prompt was read."""
    end = prompts[-1].times[-1]
    return [after - before for answer in answers for before, after in itertools.pairwise(answer.times) if after <= end]
