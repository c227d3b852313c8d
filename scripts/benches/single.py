"""One sequence through 1, 2 and 3 stages, against the whole model in one process.

A figure is the new tokens over the seconds of the whole `generate()` call, so opening the session and reading the
prompt count. The reference is transformers' own `generate()` in the client's process, with one thread as well.
"""

from __future__ import annotations

from typing import Any

import torch
from processes import LocalSwarm

from benches.generation import NEW_TOKENS, PROMPT_TOKENS, generate, prompt, whole_model
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
    expected = generate(whole, ids).tokens  # the first of either warms up
    equal = [generate(model, ids).tokens == expected]

    def through_the_swarm() -> float:
        generated = generate(model, ids)
        equal.append(generated.tokens == expected)
        return NEW_TOKENS / generated.seconds

    rounds = plan.alternate(
        case, plan.rounds(ROUNDS), through_the_swarm, lambda: NEW_TOKENS / generate(whole, ids).seconds
    )
    share = sum(equal) / len(equal)
    return [
        rounds.row(case, "tokens/s", must),
        Row(f"{case}, equal answers", share, "of all", must=Must("value", "==", 1.0)),
    ]
