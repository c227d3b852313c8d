"""A prompt of 512 tokens through two stages, against the whole model in one process with one thread.

A figure is the prompt's tokens over the seconds of a `generate()` call for one new token: opening the session counts.
The stages work on different pieces of the prompt at the same time, so two of them are faster than one machine. Every
round has another prompt: what peers still hold of an earlier one is not what is measured.
"""

from __future__ import annotations

from processes import LocalSwarm

from benches.generation import begun_elsewhere, generate, prompt, whole_model
from benches.plan import Plan
from benches.rows import Must, Row
from swarm.client import SwarmModelForCausalLM
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve

MUST = Must("ratio", ">=", 1.5)
ROUNDS = 9
STAGES = 2
PROMPT_TOKENS = 512


def measure(plan: Plan) -> list[Row]:
    """One row for the speed and one for whether the token is the same."""
    plan.tell("prefill: loading the whole model")
    checkpoint = Checkpoint(resolve(DEFAULT_MODEL))
    blocks: int = checkpoint.config().num_hidden_layers
    whole, ids = whole_model(checkpoint.folder), prompt(checkpoint.folder, PROMPT_TOKENS)
    with LocalSwarm() as local:
        for stage in range(STAGES):
            span = f"{blocks * stage // STAGES}:{blocks * (stage + 1) // STAGES}"
            local.serve(str(checkpoint.folder), "--blocks", span)
        local.wait_online(checkpoint.model_id, blocks, STAGES)
        with SwarmModelForCausalLM.from_pretrained(checkpoint.folder, initial_peers=[local.address]) as model:
            found, expected = list[list[int]](), list[list[int]]()
            prompts, same_prompts = begun_elsewhere(ids), begun_elsewhere(ids)

            def through_the_swarm() -> float:
                generated = generate(model, next(prompts), 1)
                found.append(generated.tokens)
                return PROMPT_TOKENS / generated.seconds

            def alone() -> float:
                generated = generate(whole, next(same_prompts), 1)
                expected.append(generated.tokens)
                return PROMPT_TOKENS / generated.seconds

            case = f"prefill: {PROMPT_TOKENS} tokens, {STAGES} stages"
            for warming_up in (through_the_swarm, through_the_swarm, alone, alone):
                warming_up()
            rounds = plan.alternate(case, plan.rounds(ROUNDS), through_the_swarm, alone)
    share = sum(left == right for left, right in zip(found, expected, strict=True)) / len(found)
    return [
        rounds.row(case, "tokens/s", MUST),
        Row(f"{case}, equal answers", share, "of all", must=Must("value", "==", 1.0)),
    ]
