"""What a hop adds to a token: a model so small that its mathematics is next to nothing, one block a peer.

A figure is the milliseconds per decoded token through the swarm, less those of the same model in the client's
process, over the number of peers: one hop is a peer and the message that leads to it, with the answer's way home
shared among them. The slope is what each peer beyond the first adds: (added by 4 - added by 1) / 3.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
from processes import Failed, LocalSwarm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benches.generation import generate, whole_model
from benches.plan import Plan
from benches.rows import Must, Rounds, Row
from swarm.client import SwarmModelForCausalLM
from swarm.files.checkpoint import Checkpoint

PEERS = (1, 2, 4)
MUST = Must("value", "<=", 0.5)
ROUNDS = 9
NEW_TOKENS = 128


def measure(plan: Plan) -> list[Row]:
    """A row for each number of peers, and one for the slope."""
    rows, added = [], {}
    for peers in PEERS:
        with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
            rounds = _through(peers, plan, _tiny_model(Path(folder), peers))
        milliseconds = [1e3 * (value - alone) for value, alone in zip(rounds.values, rounds.references, strict=True)]
        added[peers] = statistics.median(milliseconds)
        case = f"hop: {peers} peer{'s' if peers > 1 else ''}"
        rows.append(Rounds([each / peers for each in milliseconds]).row(case, "ms/hop", MUST))
    slope = (added[PEERS[-1]] - added[PEERS[0]]) / (PEERS[-1] - PEERS[0])
    return [*rows, Row(f"hop: slope, {PEERS[0]} to {PEERS[-1]} peers", slope, "ms/hop")]


def _tiny_model(folder: Path, blocks: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    logging.disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _through(peers: int, plan: Plan, folder: Path) -> Rounds:
    """Seconds per token through so many peers and in this process."""
    case = f"hop: {peers} peer{'s' if peers > 1 else ''}"
    plan.tell(f"{case}, starting")
    whole, ids = whole_model(folder), torch.arange(1, 9).unsqueeze(0)
    with LocalSwarm() as local:
        for block in range(peers):
            local.serve(str(folder), "--blocks", f"{block}:{block + 1}")
        local.wait_online(Checkpoint(folder).model_id, peers, peers)
        with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[local.address]) as model:
            if generate(model, ids, NEW_TOKENS).tokens != generate(whole, ids, NEW_TOKENS).tokens:
                raise Failed(f"{case}: the swarm's answer is not the whole model's")
            return plan.alternate(
                case,
                plan.rounds(ROUNDS),
                lambda: generate(model, ids, NEW_TOKENS).decode_seconds,
                lambda: generate(whole, ids, NEW_TOKENS).decode_seconds,
            )
