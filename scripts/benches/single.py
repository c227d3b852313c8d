"""One sequence through 1, 2 and 3 stages, against the whole model in one process.

A figure is the new tokens over the seconds of the whole `generate()` call, so opening the session and reading the
prompt count; every round has another prompt, so that peers have nothing of it yet. The reference is transformers' own
`generate()` in the client's process, with one thread as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from processes import LocalSwarm

from benches.generation import NEW_TOKENS, PROMPT_TOKENS, begun_elsewhere, generate, prompt, whole_model
from benches.plan import Plan
from benches.rows import Must, Row
from swarm.client import SwarmModelForCausalLM
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve

MUST = {1: 0.95, 2: 0.92, 3: 0.90}  # stages: of the reference's speed
ROUNDS = 7


def measure(plan: Plan) -> list[Row]:
    """Three rows of speed and three of whether the answers are the same."""
    plan.tell("single: loading the whole model")
    checkpoint = Checkpoint(resolve(DEFAULT_MODEL))
    whole, ids = whole_model(checkpoint.folder), prompt(checkpoint.folder)
    assert ids.shape[1] == PROMPT_TOKENS
    return [row for stages in MUST for row in _through(stages, plan, checkpoint, whole, ids)]


def _through(stages: int, plan: Plan, checkpoint: Checkpoint, whole: Any, ids: torch.Tensor) -> list[Row]:
    blocks: int = checkpoint.config().num_hidden_layers
    case = f"single: {stages} stage{'s' if stages > 1 else ''}"
    plan.tell(f"{case}, starting")
    with LocalSwarm() as local:
        for number in range(stages):
            local.serve(
                str(checkpoint.folder), "--blocks", f"{blocks * number // stages}:{blocks * (number + 1) // stages}"
            )
        local.wait_online(checkpoint.model_id, blocks, stages)
        with SwarmModelForCausalLM.from_pretrained(checkpoint.folder, initial_peers=[local.address]) as model:
            return _compare(plan, case, Must("ratio", ">=", MUST[stages]), model, whole, ids)


def _compare(plan: Plan, case: str, must: Must, model: Any, whole: Any, ids: torch.Tensor) -> list[Row]:
    answers: dict[str, list[list[int]]] = {"swarm": [], "whole": []}

    def speed(name: str, of: Any, prompts: Iterator[torch.Tensor]) -> float:
        generated = generate(of, next(prompts))
        answers[name].append(generated.tokens)
        return NEW_TOKENS / generated.seconds

    through_the_swarm = partial(speed, "swarm", model, begun_elsewhere(ids))
    alone = partial(speed, "whole", whole, begun_elsewhere(ids))
    for warming_up in (through_the_swarm, alone):
        warming_up()
    rounds = plan.alternate(case, plan.rounds(ROUNDS), through_the_swarm, alone)
    pairs = list(zip(answers["swarm"], answers["whole"], strict=True))
    share = sum(found == expected for found, expected in pairs) / len(pairs)
    return [
        rounds.row(case, "tokens/s", must),
        Row(f"{case}, equal answers", share, "of all", must=Must("value", "==", 1.0)),
    ]
