"""One sequence through two stages with int8 and int4 weights, against the whole model in fp32 in one process.

A figure is the new tokens over the seconds of the whole `generate()` call, as in `single`, and so is the reference:
transformers' own `generate()` in the client's process, with one thread as every peer. The client's head is quantized
like the blocks are. For how many tokens the answer is the exact model's is shown as well; what that does to quality is
measured by `quality`.
"""

from __future__ import annotations

from typing import Any

import torch
from processes import LocalSwarm

from benches.generation import NEW_TOKENS, begun_elsewhere, generate, prompt, whole_model
from benches.plan import Plan
from benches.rows import Must, Row
from swarm.client import SwarmModelForCausalLM
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve

MUST = Must("ratio", ">=", 2.0)
ROUNDS = 7


def measure(plan: Plan) -> list[Row]:
    """For each kind a row of speed, and one of how long the answer is the exact one."""
    plan.tell("quant: loading the whole model")
    checkpoint = Checkpoint(resolve(DEFAULT_MODEL))
    whole, ids = whole_model(checkpoint.folder), prompt(checkpoint.folder)
    return [row for kind in ("int8", "int4") for row in _through(kind, plan, checkpoint, whole, ids)]


def _through(kind: str, plan: Plan, checkpoint: Checkpoint, whole: Any, ids: torch.Tensor) -> list[Row]:
    blocks: int = checkpoint.config().num_hidden_layers
    case = f"quant: {kind}, 2 stages"
    plan.tell(f"{case}, starting")
    with LocalSwarm() as local:
        for span in (f"0:{blocks // 2}", f"{blocks // 2}:{blocks}"):
            local.serve(str(checkpoint.folder), "--blocks", span, "--quantize", kind)
        local.wait_online(checkpoint.model_id, blocks, 2)
        options: dict[str, Any] = {"initial_peers": [local.address], "quantize": kind}
        with SwarmModelForCausalLM.from_pretrained(checkpoint.folder, **options) as model:
            expected = generate(whole, ids).tokens  # the first of either warms up
            found = generate(model, ids).tokens
            prompts, same_prompts = begun_elsewhere(ids), begun_elsewhere(ids)
            next(prompts)  # which peers still hold some of
            next(same_prompts)
            rounds = plan.alternate(
                case,
                plan.rounds(ROUNDS),
                lambda: NEW_TOKENS / generate(model, next(prompts)).seconds,
                lambda: NEW_TOKENS / generate(whole, next(same_prompts)).seconds,
            )
    pairs = enumerate(zip(found, expected, strict=True))
    alike = next((index for index, (left, right) in pairs if left != right), NEW_TOKENS)
    return [rounds.row(case, "tokens/s", MUST), Row(f"{case}, like fp32 for", alike, "tokens")]
