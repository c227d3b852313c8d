"""Perplexity of an English text through peers with exact, int8 and int4 weights, against the whole model in fp32.

The text is CPython's own (`pydoc_data.topics`), read in windows of 512 tokens by the function of `swarm evaluate
perplexity`. The reference is transformers' own model in this process. Nothing here depends on how busy the machine is.
"""

from __future__ import annotations

from typing import Any

from processes import LocalSwarm

from benches.generation import whole_model
from benches.plan import Plan
from benches.rows import Must, Row
from swarm.client import SwarmModelForCausalLM
from swarm.console.conversation import load_tokenizer
from swarm.console.perplexity import WINDOW, default_text, windows_of
from swarm.console.perplexity import measure as perplexity
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve

MUST = {"none": 1.0001, "int8": 1.01, "int4": 1.08}  # how weights are kept: of the reference's perplexity, at most
WINDOWS, QUICK_WINDOWS = 16, 3


def measure(plan: Plan) -> list[Row]:
    """A row for each way to keep weights."""
    checkpoint = Checkpoint(resolve(DEFAULT_MODEL))
    tokenizer: Any = load_tokenizer(str(checkpoint.folder))
    tokens = tokenizer(default_text(), verbose=False)["input_ids"]
    windows = windows_of(tokens, WINDOW, WINDOW * (QUICK_WINDOWS if plan.quick else WINDOWS))
    plan.tell("quality: the whole model")
    reference = perplexity(whole_model(checkpoint.folder), windows).perplexity
    rows = []
    for kind, bound in MUST.items():
        plan.tell(f"quality: {kind}")
        found = _through(kind, checkpoint, windows)
        case = f"quality: {'exact' if kind == 'none' else kind} weights, {len(windows)} windows of {WINDOW}"
        rows.append(Row(case, found, "perplexity", reference, found / reference, must=Must("ratio", "<=", bound)))
    return rows


def _through(kind: str, checkpoint: Checkpoint, windows: list[list[int]]) -> float:
    with LocalSwarm() as local:
        local.serve(str(checkpoint.folder), "--quantize", kind)
        local.wait_online(checkpoint.model_id, checkpoint.config().num_hidden_layers, 1)
        with SwarmModelForCausalLM.from_pretrained(checkpoint.folder, initial_peers=[local.address]) as model:
            return perplexity(model, windows).perplexity
