"""Many clients at once, each a process of its own, through two stages: what all get together, against one alone.

A figure is the new tokens of all over the seconds from the moment they are asked to the last one's last token, prompts
included. The reference is the first of them alone, in the same round. Prompts differ in length; in fp32 every answer
is compared with the whole model's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from benches.askers import Asker, asking
from benches.generation import generate, prompt, whole_model
from benches.plan import Plan
from benches.rows import Must, Row
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve

CLIENTS = (1, 4, 8, 16)
MUST = {("float32", 8): Must("ratio", ">=", 4.0), ("bfloat16", 8): Must("ratio", ">=", 6.0)}
ROUNDS = 5
STAGES = 2
NEW_TOKENS = 64
LONGEST = 33  # tokens of a prompt


def measure(plan: Plan) -> list[Row]:
    """A row for each number of clients and each dtype, and one for whether the answers are the whole model's."""
    plan.tell("aggregate: loading the whole model")
    checkpoint = Checkpoint(resolve(DEFAULT_MODEL))
    ids = prompt(checkpoint.folder, LONGEST)
    prompts = [ids[:, : LONGEST - number] for number in range(max(CLIENTS))]
    expected = _expected(whole_model(checkpoint.folder), prompts)
    rows: list[Row] = []
    for dtype in ("float32", "bfloat16"):
        plan.tell(f"aggregate: starting {max(CLIENTS)} clients, {dtype}")
        with asking(checkpoint, STAGES, max(CLIENTS), dtype) as askers:
            equal: list[bool] = []
            rows += [_compare(plan, dtype, askers[:count], prompts, expected, equal) for count in CLIENTS]
        if dtype == "float32":
            case = "aggregate: equal answers, float32"
            rows.append(Row(case, sum(equal) / len(equal), "of all", must=Must("value", "==", 1.0)))
    return rows


def _expected(whole: Any, prompts: Sequence[torch.Tensor]) -> list[list[int]]:
    return [generate(whole, ids, NEW_TOKENS).tokens for ids in prompts]


def _compare(
    plan: Plan,
    dtype: str,
    askers: Sequence[Asker],
    prompts: Sequence[torch.Tensor],
    expected: Sequence[list[int]],
    equal: list[bool],
) -> Row:
    def through(those: Sequence[Asker]) -> float:
        started = time.perf_counter()
        for asker, ids in zip(those, prompts, strict=False):
            asker.ask(ids[0].tolist(), NEW_TOKENS)
        answers = [asker.answer() for asker in those]
        seconds = time.perf_counter() - started
        equal.extend(answer.tokens == whole for answer, whole in zip(answers, expected, strict=False))
        return len(those) * NEW_TOKENS / seconds

    case = f"aggregate: {len(askers)} client{'s' if len(askers) > 1 else ''}, {dtype}"
    through(askers)  # warms up
    rounds = plan.alternate(case, plan.rounds(ROUNDS), lambda: through(askers), lambda: through(askers[:1]))
    return rounds.row(case, "tokens/s", MUST.get((dtype, len(askers))))
