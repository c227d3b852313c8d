"""How well a model predicts a text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import until
from hypothesis import given
from hypothesis import strategies as st
from inprocess import running_swarm, save_llama
from transformers import AutoModelForCausalLM

from swarm.client import SwarmModelForCausalLM
from swarm.console.perplexity import default_text, measure, read_text, windows_of
from swarm.errors import UsageError

TOKENS = [3 + (7 * index * index) % 120 for index in range(100)]


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.integers(2, 9), st.integers(2, 70))
def test_windows_are_the_text_in_order(tokens: list[int], window: int, most: int) -> None:
    windows = windows_of(tokens, window, most)
    whole = [token for each in windows for token in each]
    wanted = tokens[:most]
    assert whole in (wanted, wanted[:-1])
    assert all(2 <= len(each) <= window for each in windows)
    assert all(len(each) == window for each in windows[:-1])


@pytest.mark.parametrize(("tokens", "window"), [([], 8), ([1], 8), ([1, 2, 3], 1)])
def test_where_nothing_can_be_predicted_it_is_said(tokens: list[int], window: int) -> None:
    with pytest.raises(UsageError, match="two tokens"):
        windows_of(tokens, window, 0)


def test_the_default_text_is_english_and_long() -> None:
    text = default_text()
    assert len(text) > 100_000
    assert " the " in text


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("binary", "nowhere"):
        with pytest.raises(UsageError, match="cannot be read as text"):
            read_text(tmp_path / name)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert measure(model, windows_of(TOKENS, 32, 0)).perplexity == pytest.approx(128)


def test_it_is_the_mean_over_tokens_and_not_over_windows(tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    whole, parts = measure(model, [TOKENS[:40], TOKENS[40:43]]), [TOKENS[:40], TOKENS[40:43]]
    losses = [math.log(measure(model, [part]).perplexity) for part in parts]
    assert whole.predicted == 39 + 2
    assert math.log(whole.perplexity) == pytest.approx((39 * losses[0] + 2 * losses[1]) / 41, rel=1e-5)


def test_through_the_swarm_it_is_that_of_the_whole_model(tmp_path: Path) -> None:
    save_llama(tmp_path)
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    windows, told = windows_of(TOKENS, 32, 0), []
    with running_swarm() as swarm:
        node = swarm.serve(tmp_path, "0:6")
        with SwarmModelForCausalLM.from_pretrained(tmp_path, initial_peers=[swarm.address]) as model:
            found = measure(model, windows, lambda done, total: told.append((done, total)))
            assert "[0:6]" in found.route
            assert until(lambda: model.network.sessions._sessions == {}, 5.0)  # nothing is left open
        assert node.server is not None
    assert found.perplexity == pytest.approx(measure(whole, windows).perplexity, rel=1e-4)
    assert told == [(32, 100), (64, 100), (96, 100), (100, 100)]
    assert json.dumps(found.perplexity)
