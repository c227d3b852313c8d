"""Single tokens attend to what lies where it is: in one run of slots or in several, as if it were gathered."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from swarm.batching.pool import Run
from swarm.batching.singles import attend

SEEN: list[list[Run]] = [[(3, 40)], [(100, 500), (600, 980)], [(5, 6), (9, 12), (0, 2)], [(0, 530), (700, 701)]]


@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_every_token_gets_what_it_would_from_its_slots_gathered(dtype: torch.dtype, bound: float, width: int) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(1, 2, 981, 8, dtype=dtype), torch.randn(1, 2, 981, width, dtype=dtype)
    query = torch.randn(1, 4, 6, 8, dtype=dtype).transpose(1, 2)
    found = attend(query, keys, values, SEEN, 0.3)
    assert found.shape == (1, 4, 6, width)
    for index, runs in enumerate(SEEN):
        slots = torch.cat([torch.arange(*run) for run in runs])
        key, value = (kept[:, :, slots].repeat_interleave(3, 1).double() for kept in (keys, values))
        expected = scaled_dot_product_attention(query[:, :, index : index + 1].double(), key, value, scale=0.3)
        assert float((found[:, index].double() - expected[:, :, 0]).abs().max()) < bound


def test_a_lower_precision_is_widened() -> None:
    keys, query = torch.randn(1, 2, 64, 8).bfloat16(), torch.randn(1, 2, 1, 8)
    found = attend(query, keys, keys, [[(0, 64)]], None)
    assert torch.allclose(
        found[0, 0], scaled_dot_product_attention(query, keys.float(), keys.float())[0, :, 0], atol=1e-6
    )
