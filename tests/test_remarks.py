"""What a peer says of the way it runs its blocks, where that is not as one would expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import save_random
from test_quantized_stage import CONFIGS, SMALL
from transformers import Lfm2Config, Llama4TextConfig

from peer.hosting import remarks
from swarm.model import load_stage
from swarm.quantization.weights import Kind
from swarm.types import Span

LLAMA4 = Llama4TextConfig(**SMALL, num_local_experts=2, head_dim=16, intermediate_size_mlp=96)
LFM2 = Lfm2Config(**SMALL, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False)


@pytest.mark.parametrize(
    ("config", "quantize", "said"),
    [
        (CONFIGS["llama"], "none", []),
        (CONFIGS["llama"], "int8", []),
        (CONFIGS["mixtral"], "none", []),
        (CONFIGS["mixtral"], "int8", []),
        (LLAMA4, "int8", ["sessions run one by one", "of experts stay in full precision"]),
        (LFM2, "none", ["sessions run one by one"]),
    ],
)
def test_it_says_what_is_unexpected_and_only_that(config: Any, quantize: str, said: list[str], tmp_path: Path) -> None:
    save_random(tmp_path, config)
    kind: Kind | None = "int8" if quantize == "int8" else None
    model = load_stage(tmp_path, Span(0, 2), dtype=torch.float32, quantize=kind)
    found = list(remarks(model, quantize))
    assert len(found) == len(said)
    assert all(fragment in remark for fragment, remark in zip(said, found, strict=True))
