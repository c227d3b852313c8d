"""What a peer says of the way it runs its blocks, where that is not as one would expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import save_random
from test_quantized_stage import CONFIGS, SMALL
from transformers import Lfm2Config

from peer.hosting import remarks
from swarm.model import load_stage
from swarm.quantization.weights import Kind
from swarm.types import Span

LFM2 = Lfm2Config(**SMALL, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False)


@pytest.mark.parametrize(
    ("config", "quantize", "said"),
    [
        (CONFIGS["llama"], "none", ""),
        (CONFIGS["llama"], "int8", ""),
        (CONFIGS["mixtral"], "none", ""),
        (CONFIGS["mixtral"], "int8", "of experts are kept in full precision"),
        (LFM2, "none", "sessions run one by one"),
    ],
)
def test_it_says_what_is_unexpected_and_only_that(config: Any, quantize: str, said: str, tmp_path: Path) -> None:
    save_random(tmp_path, config)
    kind: Kind | None = "int8" if quantize == "int8" else None
    model = load_stage(tmp_path, Span(0, 2), dtype=torch.float32, quantize=kind)
    assert said in " ".join(found := list(remarks(model, quantize)))
    assert len(found) == (said != "")
