"""The fixed cost of a round: from the last gradient, at whichever member, to the step of the last one.

The gradient has a thousand values, so that next to nothing is transferred; what is left is closing, averaging,
digesting, deciding by a majority and stepping. Every member is a process of its own, on loopback.
"""

from __future__ import annotations

import contextlib
import json
import statistics

from processes import Failed

from benches.child import running
from benches.plan import Plan
from benches.rows import Must, Rounds, Row

REPLICAS = (2, 4)
ROUNDS = 60
WARM = 3  # rounds
MUST = Must("value", "<=", 50.0)


def measure(plan: Plan) -> list[Row]:
    """A row for each number of replicas, and one for the slowest rounds."""
    rows = []
    for replicas in REPLICAS:
        case = f"round: {replicas} replicas"
        plan.tell(f"{case}, running")
        costs = _costs(replicas, plan.rounds(ROUNDS) + WARM + 5)
        rows.append(Rounds(costs).row(case, "ms", MUST))
        rows.append(Row(f"{case}, 9th decile", statistics.quantiles(costs, n=10)[-1], "ms"))
    return rows


def _costs(replicas: int, rounds: int) -> list[float]:
    """Milliseconds of every round that all members took part in."""
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(running("rounder.py", str(rank), str(replicas), str(rounds)))
            for rank in range(replicas + 1)
        ]
        places = [json.loads(line) for _, line in started]
        for process, _ in started:
            assert process.stdin is not None
            process.stdin.write(json.dumps(places) + "\n")
            process.stdin.flush()
        told = []
        for process, _ in started[:-1]:  # the last is the trainer
            assert process.stdout is not None
            if not (line := process.stdout.readline()):
                raise Failed("a member ended; what it says is above")
            told.append(json.loads(line))
        for process, _ in started:
            assert process.stdin is not None
            process.stdin.close()
    common = sorted(set.intersection(*(set(each) for each in told)), key=int)
    over = [(max(each[r][0] for each in told), max(each[r][1] for each in told)) for r in common[WARM:]]
    return [1e3 * (stepped - counted) for counted, stepped in over]
