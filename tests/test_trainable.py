"""A stage that trains: through any cut, the gradients are those of the whole model."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
import torch
from runs import FAMILIES, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

from swarm.errors import DiskFull
from swarm.runs.layout import STAGE, TIED, Layout
from swarm.runs.run import IGNORED
from swarm.runs.trainable import TrainableStage, fresh_stage, load_stage
from swarm.runs.weights import room_on_disk
from swarm.types import Span

CUTS = {"two stages": (0, 2, 4), "three stages": (0, 1, 3, 4)}
SLOWER = ("gemma3_text", "mixtral", "qwen3")


def chain(family: str, cuts: tuple[int, ...]) -> list[TrainableStage]:
    spans = [Span(start, end) for start, end in itertools.pairwise(cuts)]
    return [fresh_stage(FAMILIES[family], span, seed=3) for span in spans]


def whole_model(family: str, stages: list[TrainableStage]) -> PreTrainedModel:
    """The uncut model as transformers has it, with the stages' weights."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32)
    model.train(False)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for stage in stages:
            for name, value in stage.parameters().items():
                weights[stage.tied.get(name, name)].copy_(value)
    return model


def back_and_forth(stages: list[TrainableStage], ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Forward keeping the inputs, backward running each stage again: as peers do it."""
    inputs = [ids]
    for stage in stages[:-1]:
        with torch.no_grad():
            inputs.append(stage.forward(inputs[-1]))
    gradient: torch.Tensor | None = None
    loss = torch.zeros(())
    for stage, given in zip(reversed(stages), reversed(inputs), strict=True):
        leaf = given if stage.first else given.clone().requires_grad_()
        output = stage.forward(leaf)
        if stage.last:
            loss = output = stage.loss(output, labels)
        torch.autograd.backward(output, gradient)
        gradient = leaf.grad
    return loss.item()


def sums(stages: list[TrainableStage]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, weight in stage.parameters().items():
            assert weight.grad is not None
            key = stage.tied.get(name, name)
            found[key] = found[key] + weight.grad if key in found else weight.grad
    return found


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in SLOWER else name for name in FAMILIES]
)
def test_the_gradient_of_every_weight_is_that_of_the_whole_model(family: str, cuts: tuple[int, ...]) -> None:
    stages, ids = chain(family, cuts), tokens(3, 12)
    model = whole_model(family, stages)
    expected = 3 * model(input_ids=ids, labels=ids).loss
    expected.backward()
    assert back_and_forth(stages, ids, ids) == pytest.approx(expected.item(), rel=1e-5)
    found = sums(stages)
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        difference = (found.pop(name) - weight.grad).norm() / weight.grad.norm()
        assert difference < 1e-5, f"{name} is off by {difference:.1e}"
    assert not found


def test_a_tied_embedding_has_the_same_values_at_both_ends() -> None:
    first, last = chain("gpt2", CUTS["two stages"])
    assert first.tied == {"transformer.wte.weight": "transformer.wte.weight"}
    assert last.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert torch.equal(first.parameters()["transformer.wte.weight"], last.parameters()["lm_head.weight"])


def test_new_weights_do_not_depend_on_the_cut() -> None:
    (whole,) = chain("llama", (0, 4))
    for stage in chain("llama", CUTS["three stages"]):
        for name, weight in stage.parameters().items():
            assert torch.equal(weight, whole.parameters()[name]), name


def test_weights_that_are_loaded_are_those_of_the_model_at_both_ends(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES["gpt2"], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    expected = dict(model.named_parameters())
    stages = [load_stage(tmp_path, span) for span in (Span(0, 1), Span(1, 4))]
    seen = set()
    for stage in stages:
        for name, weight in stage.parameters().items():
            assert torch.equal(weight, expected[stage.tied.get(name, name)]), name
            seen.add(stage.tied.get(name, name))
    assert seen == expected.keys()


def test_documents_that_start_at_position_zero_do_not_see_each_other() -> None:
    (stage,) = chain("llama", (0, 4))
    first, second = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    together = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = stage.forward(together, positions)
        alone = stage.forward(second)
    assert torch.allclose(packed[:, 5:], alone, atol=1e-5)


def test_the_loss_of_a_sample_is_the_mean_over_the_tokens_that_count() -> None:
    (stage,) = chain("llama", (0, 4))
    ids = tokens(2, 8)
    labels = ids.clone()
    labels[1, 4:] = IGNORED
    with torch.no_grad():
        logits = stage.forward(ids)
        short = stage.loss(logits[1:, :4], ids[1:, :4])
        assert torch.allclose(stage.loss(logits, labels), stage.loss(logits[:1], ids[:1]) + short, rtol=1e-6)


def test_a_stage_serves_with_the_weights_that_it_trains() -> None:
    first, _ = chain("llama", CUTS["two stages"])
    hidden = torch.randn(1, 3, 32)
    before = first.served.run(hidden)
    with torch.no_grad():
        for weight in first.parameters().values():
            weight.add_(0.05)
    assert not torch.allclose(first.served.run(hidden), before)


def test_both_ends_of_a_tied_weight_find_the_same_place_for_it() -> None:
    first, last = chain("gpt2", CUTS["two stages"])
    layouts = [Layout({n: w.shape for n, w in stage.parameters().items()}, stage.tied) for stage in (first, last)]
    for layout in layouts:
        assert list(layout.groups) == [STAGE, TIED]
        assert layout.groups[TIED] == slice(layout.size - 96 * 32, layout.size)
        assert sum(place.stop - place.start for place, _ in layout.decaying) == layout.size


# --- all weights at once, on their way to a folder -------------------------------------------------------------------


def test_gathered_weights_lie_on_disk_and_leave_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = room_on_disk(tmp_path / "new" / "model", 1000)
    room[::2] = 1.5
    assert (room.sum().item(), room.dtype) == (750.0, torch.float32)
    assert list((tmp_path / "new").iterdir()) == []

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFull, match="no room for the weights beside"):
        room_on_disk(tmp_path / "model", 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
