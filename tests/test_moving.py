"""A peer takes the blocks that need it, and moves when others need it more: real nodes in this process."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import Swarm, running_swarm, save_llama

import peer.quiet
from peer import capacity
from peer.node import Node
from peer.placement import Move
from swarm import SwarmCache, SwarmModelForCausalLM
from swarm.errors import ModelCorrupt
from swarm.types import Offer, Span, State

PROMPT = torch.tensor([[5, 17, 23, 42, 99, 7, 64]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return save_llama(folder)


@pytest.fixture
def swarm(whole: Any) -> Iterator[Swarm]:
    with running_swarm() as swarm:
        yield swarm


def answer(model: Any) -> list[int]:
    tokens: list[int] = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=10, do_sample=False
    )[0].tolist()
    return tokens


def wait(swarm: Swarm, true: Callable[[], bool]) -> None:
    """Wait for what no event tells of."""

    async def until() -> None:
        async with asyncio.timeout(50):
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    swarm.background.run(until())


def offer_of(node: Node) -> Offer:
    assert node._announcer is not None
    return node._announcer.offer


def serves(node: Node, start: int, end: int) -> bool:
    offer = offer_of(node)
    return (offer.span, offer.state) == (Span(start, end), State.ONLINE)


def restless(swarm: Swarm, folder: Path, weak: Node | None = None) -> Node:
    """A peer of three blocks, those of the `weak` one, that moves at once for a hole, and for nothing else."""
    if weak is not None and weak._announcer is not None:
        swarm.background.run(weak._announcer.tell(tokens_per_second=1.0))
    node = swarm.serve(folder, num_blocks=3, look_seconds=0.2)
    wait(swarm, lambda: node.mover is not None)
    assert node.mover is not None
    node.mover._policy = replace(node.mover._policy, urgent_stay=0.0)
    return node


def test_what_was_measured_in_a_hurry_is_measured_again_once_nobody_uses_it(
    folder: Path, whole: Any, swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = capacity.measure
    monkeypatch.setattr(capacity, "measure", lambda *args: replace(measured(*args), seconds_per_block=2.0))
    monkeypatch.setattr(peer.quiet, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(peer.quiet, "FIRST_SECONDS", 0.1)
    monkeypatch.setattr(peer.quiet, "MEASURED_SECONDS", 0.1)
    node = swarm.serve(folder, "0:6")
    assert offer_of(node).tokens_per_second < 0.1
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[swarm.address]) as model:
        cache = SwarmCache()
        with torch.no_grad():
            model(PROMPT, past_key_values=cache)
        hosting = node.hosting
        assert hosting is not None
        assert node.server is not None
        assert node.server.sessions == 1
        assert swarm.background.run(hosting.measure_again()) is None  # not while somebody uses it
        cache.close()
    wait(swarm, lambda: offer_of(node).seconds_per_block < 1.0 and offer_of(node).tokens_per_second > 1.0)


@pytest.mark.slow
def test_a_newcomer_takes_what_is_missing_and_as_much_as_fits(folder: Path, swarm: Swarm) -> None:
    swarm.serve(folder, "0:2")
    block = 2 * 2 * 8 * 4 * 1000  # bytes of 1000 tokens' cache, which is most of what a block of this model takes
    node = swarm.serve(folder, cache_tokens=1008, memory=int(2.9 * block))
    offer = offer_of(node)
    assert offer.span in (Span(2, 4), Span(4, 6))
    assert offer.seconds_per_block > 0
    assert offer.prefill_seconds_per_block > 0
    assert offer.cache_free == 1008
    assert node._bandwidth is not None
    assert serves(swarm.serve(folder), 0, 6)  # all of it fits


@pytest.mark.slow
def test_newcomers_that_come_together_do_not_take_the_same(folder: Path, swarm: Swarm) -> None:
    threads = [swarm.serve_soon(folder, None, num_blocks=3) for _ in range(2)]
    for thread in threads:
        thread.join()
    assert sorted(offer_of(node).span for node in swarm.nodes) == [Span(0, 3), Span(3, 6)]


@pytest.mark.slow
def test_a_peer_moves_to_blocks_that_lost_their_host(folder: Path, whole: Any, swarm: Swarm) -> None:
    first, second = swarm.serve(folder, "0:3"), swarm.serve(folder, "3:6")
    node = restless(swarm, folder, second)
    assert node.server is not None
    before = weakref.ref(node.server._stage)
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[swarm.address], wait=30) as model:
        assert answer(model) == answer(whole)
        assert serves(node, 3, 6)
        swarm.stop(first)
        wait(swarm, lambda: serves(node, 0, 3))
        wait(swarm, lambda: before() is None)  # nothing is left of the old span
        assert answer(model) == answer(whole)


@pytest.mark.slow
def test_a_session_is_handed_over_before_its_peer_moves(folder: Path, whole: Any, swarm: Swarm) -> None:
    swarm.serve(folder, "3:6")
    node = swarm.serve(folder, num_blocks=3, look_seconds=3600)
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[swarm.address], wait=30) as model:
        cache = model(PROMPT).past_key_values
        assert node.identity.peer in {hop.peer for hop in cache.route.hops}
        swarm.serve(folder, "0:3")
        assert node.mover is not None
        swarm.background.run(node.mover._move(Move(Span(3, 6), "the test wants it")))
        assert serves(node, 3, 6)
        assert node.identity.peer not in {hop.peer for hop in cache.route.hops}
        onward = model(torch.tensor([[9]]), past_key_values=cache).logits[:, -1]
        with torch.no_grad():
            expected = whole(torch.cat([PROMPT, torch.tensor([[9]])], dim=1)).logits[:, -1]
        assert torch.allclose(onward, expected, atol=1e-5)


@pytest.mark.slow
def test_who_is_needed_after_all_stays(folder: Path, swarm: Swarm) -> None:
    swarm.serve(folder, "3:6")
    node = swarm.serve(folder, num_blocks=3, look_seconds=3600)
    wait(swarm, lambda: node.mover is not None)
    assert node.mover is not None
    assert node.server is not None
    swarm.background.run(node.mover._move(Move(Span(3, 6), "whoever else had its blocks has just died")))
    assert serves(node, 0, 3)
    assert not node.server.draining


@pytest.mark.slow
def test_the_only_host_of_a_block_stays(folder: Path, swarm: Swarm, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "peer.mover")
    node = restless(swarm, folder)
    home = offer_of(node).span
    wait(swarm, lambda: caplog.text.count("staying blocks") > 3)
    assert serves(node, home.start, home.end)


@pytest.mark.slow
def test_who_cannot_load_the_new_span_goes_back(
    folder: Path, swarm: Swarm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = swarm.serve(folder, "0:3"), swarm.serve(folder, "3:6")
    node = restless(swarm, folder, second)
    home = offer_of(node).span
    assert node.hosting is not None
    load = node.hosting._load

    def damaged(span: Span) -> Any:
        if span != home:
            raise ModelCorrupt("a file is damaged")
        return load(span)

    monkeypatch.setattr(node.hosting, "_load", damaged)
    swarm.stop(first)
    wait(swarm, lambda: "cannot host blocks" in caplog.text and serves(node, home.start, home.end))
