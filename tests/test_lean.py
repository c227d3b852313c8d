"""The lean way through the blocks: taken only where it is told, and only once it has given the very same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from swarm.batching.lean import Lean


class Block(nn.Module):
    def forward(self, hidden_states: torch.Tensor, turn: torch.Tensor, extra: Any = None) -> tuple[torch.Tensor]:
        return (hidden_states * 2 + turn,)


class Rotary(nn.Module):
    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return position_ids.unsqueeze(-1).to(hidden.dtype)


class Owner(nn.Module):
    """A model whose forward can be made to do what cannot be told."""

    def __init__(self, scale: float = 1.0, extra: Any = None, between: float = 0.0, quirk: int = -1) -> None:
        super().__init__()
        self.rotary = Rotary()
        self.layers = nn.ModuleList([Block(), Block()])
        self.scale, self.extra, self.between, self.quirk = scale, extra, between, quirk
        self.forwards = 0

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        turn = self.rotary(hidden * self.scale, position_ids)
        extra = position_ids + 1 if self.extra == "made" else self.extra
        for number, block in enumerate(self.layers):
            if self.between and number:
                hidden = hidden + self.between
            hidden = block(hidden, turn, extra=position_ids.shape[1] if self.quirk >= 0 else extra)[0]
        return hidden + (1.0 if 0 <= self.quirk <= self.forwards else 0.0)


def run(owner: Owner, times: int, tokens: int = 1) -> Lean:
    """Every forward gives what the model's own would."""
    lean = Lean(owner, list(owner.layers))
    for number in range(times):
        hidden = torch.randn(1, tokens, 4)
        position_ids = torch.arange(number, number + tokens)[None]
        output = lean.run(lambda cache, h=hidden, p=position_ids: owner(h, p), hidden, position_ids)  # type: ignore[misc]
        turn = position_ids.unsqueeze(-1).to(torch.float32)
        if owner.quirk < 0 and not owner.between:
            torch.testing.assert_close(output, (hidden * 2 + turn) * 2 + turn)
    return lean


def test_after_three_proofs_the_model_is_not_asked_any_more() -> None:
    owner = Owner(scale=3.0, extra="a word")
    assert run(owner, 10).known
    assert owner.forwards == 4


def test_every_small_number_of_tokens_is_proven_apart_and_all_larger_ones_together() -> None:
    owner = Owner()
    lean = run(owner, 5)
    for tokens, proofs in ((3, 3), (4, 3), (40, 3), (50, 0)):
        before = owner.forwards
        hidden, ids = torch.randn(1, tokens, 4), torch.arange(tokens)[None]
        for _ in range(6):
            lean.run(lambda cache, h=hidden, i=ids: owner(h, i), hidden, ids)  # type: ignore[misc]
        assert owner.forwards == before + proofs


def test_a_few_tokens_are_run_without_a_call_of_any_block() -> None:
    owner = Owner()
    lean = run(owner, 8)
    block_type = type(owner.layers[0])
    forward = block_type.forward
    try:
        block_type.forward = lambda *_, **__: pytest.fail("a block was called")  # type: ignore[method-assign]
        hidden, ids = torch.randn(1, 1, 4), torch.tensor([[9]])
        output = lean.run(lambda cache: owner(hidden, ids), hidden, ids)
    finally:
        block_type.forward = forward  # type: ignore[method-assign]
    torch.testing.assert_close(output, (hidden * 2 + 9) * 2 + 9)


def test_where_a_record_computes_something_else_the_blocks_are_called() -> None:
    class Stamped(Block):
        stamp = 0.0

        def forward(self, hidden_states: torch.Tensor, turn: torch.Tensor, extra: Any = None) -> tuple[torch.Tensor]:
            return (hidden_states * 2 + turn + self.stamp,)  # a number that changes: a record keeps the old one

    owner = Owner()
    owner.layers = nn.ModuleList([Block(), Stamped()])
    lean = Lean(owner, list(owner.layers))
    hidden, ids = torch.ones(1, 1, 4), torch.tensor([[1]])
    for number in range(8):
        owner.layers[1].stamp = float(number)
        output = lean.run(lambda cache: owner(hidden, ids), hidden, ids)
        assert torch.equal(output, torch.full((1, 1, 4), 7.0 + number))
    assert lean.known


def test_what_cannot_be_told_is_left_to_the_model() -> None:
    for owner in (Owner(extra="made"), Owner(between=1.0)):
        lean = run(owner, 6)
        assert not lean.known
        assert lean.refuted
        assert owner.forwards == 6


def test_other_bits_refute_it() -> None:
    owner = Owner(quirk=3)
    lean = run(owner, 8)
    assert lean.refuted == "it computes something else"
    assert owner.forwards == 8


def test_watching_leaves_nothing_behind() -> None:
    owner = Owner()
    Lean(owner, list(owner.layers)).run(
        lambda cache: owner(torch.ones(1, 1, 4), torch.ones(1, 1)), torch.ones(1, 1, 4), torch.ones(1, 1)
    )
    assert all("forward" not in vars(module) for module in owner.modules())
