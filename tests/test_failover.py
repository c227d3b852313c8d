"""Hops die in mid-answer; the answer is that of an undisturbed run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import AtStep, Swarm, running_swarm, save_llama
from transformers import LogitsProcessorList, set_seed

from peer.node import Node
from swarm import SwarmModelForCausalLM
from swarm.errors import NoRoute

pytestmark = pytest.mark.slow

PROMPT = torch.tensor([[5, 17, 23, 42, 99, 7, 64]])
TOKENS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return save_llama(folder)


@pytest.fixture
def swarm(folder: Path, whole: Any) -> Iterator[Swarm]:
    with running_swarm() as swarm:
        yield swarm


def host_of(swarm: Swarm, model: Any, cache: Any, hop: int) -> Node:
    """The node that serves a hop of the session."""
    peer = cache.route.hops[hop].peer
    return next(node for node in swarm.nodes if node.identity.peer == peer)


def generate(model: Any, actions: dict[int, Callable[[], None]] | None = None, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": TOKENS, "do_sample": False, **options}
    set_seed(11)
    result: list[list[int]] = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        logits_processor=LogitsProcessorList([AtStep(actions or {})]),
        **options,
    ).tolist()
    return result


def live_caches(model: Any) -> list[Any]:
    """The sessions of the client."""
    return list(model.network.sessions._sessions.values())


def killing(swarm: Swarm, model: Any, hop: int) -> Callable[[], None]:
    def kill() -> None:
        peer = live_caches(model)[-1].route.hops[hop].peer
        swarm.kill(next(node for node in swarm.nodes if node.identity.peer == peer))

    return kill


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.2},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["greedy", "sampling", "beams", "speculation"],
)
def test_every_hop_dies_in_turn(folder: Path, whole: Any, swarm: Swarm, options: dict[str, Any]) -> None:
    for blocks in ("0:2", "2:4", "4:6", "0:2", "2:4", "4:6"):
        swarm.serve(folder, blocks)
    expected = generate(whole, **options)
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[swarm.address], wait=10) as model:
        actions = {3: killing(swarm, model, 1), 5: killing(swarm, model, 0), 7: killing(swarm, model, 2)}
        assert generate(model, actions, **options) == expected
        assert len(swarm.nodes) == 3


def test_two_hops_die_at_once_and_their_blocks_are_cut_otherwise(folder: Path, whole: Any, swarm: Swarm) -> None:
    for blocks in ("0:2", "2:4", "4:6", "0:3", "3:5", "4:6"):
        swarm.serve(folder, blocks)
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[swarm.address], wait=10) as model:

        def kill_all_but_spares() -> None:
            for node in swarm.nodes[:2]:
                swarm.kill(node)

        assert generate(model, {4: kill_all_but_spares}) == generate(whole)


def test_a_block_without_a_host_is_waited_for(folder: Path, whole: Any, swarm: Swarm) -> None:
    for blocks in ("0:3", "3:6"):
        swarm.serve(folder, blocks)
    told: list[Any] = []

    def replace_when_missed(missing: Any) -> None:
        told.append(missing)
        swarm.serve_soon(folder, "3:6")

    with SwarmModelForCausalLM.from_pretrained(
        folder, initial_peers=[swarm.address], wait=30, on_missing=replace_when_missed
    ) as model:
        assert generate(model, {4: killing(swarm, model, 1)}) == generate(whole)
    assert [(span.start, span.end) for span in told[0]] == [(3, 6)]


def test_an_answer_that_cannot_go_on_carries_what_there_is(folder: Path, whole: Any, swarm: Swarm) -> None:
    for blocks in ("0:3", "3:6"):
        swarm.serve(folder, blocks)
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[swarm.address], failover_wait=0.2) as model:
        with pytest.raises(NoRoute, match="3:6") as caught:
            generate(model, {4: killing(swarm, model, 1)})
        assert caught.value.generated is not None
        assert caught.value.generated.tolist()[0] == generate(whole)[0][: PROMPT.shape[1] + 4]


@pytest.mark.parametrize(
    ("options", "speculate"),
    [({}, "off"), ({"num_beams": 3}, "off"), ({}, "lookup"), ({"do_sample": True, "top_k": 5}, "lookup")],
    ids=str,
)
def test_standby_takes_over(folder: Path, whole: Any, swarm: Swarm, options: dict[str, Any], speculate: str) -> None:
    connected = {"initial_peers": [swarm.address], "wait": 10, "standby": 1, "speculate": speculate}
    for blocks in ("0:2", "2:4", "4:6", "0:2", "2:4", "4:6"):
        swarm.serve(folder, blocks)
    with SwarmModelForCausalLM.from_pretrained(folder, **connected) as model:

        def wait_for_spares() -> None:
            session = live_caches(model)[-1]
            swarm.background.run(until(lambda: all(place.spares for place in session._live.places)))

        actions = {2: wait_for_spares, 4: killing(swarm, model, 0), 6: killing(swarm, model, 1)}
        assert generate(model, actions, **options) == generate(whole, **options)
        assert len(swarm.nodes) == 4


def test_a_peer_that_leaves_is_replaced_before_it_goes(folder: Path, whole: Any, swarm: Swarm) -> None:
    for blocks in ("0:2", "2:4", "4:6", "0:2", "2:4", "4:6"):
        swarm.serve(folder, blocks)
    drained: list[bool] = []
    leaving: list[threading.Thread] = []
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[swarm.address], wait=10) as model:

        def leave() -> None:
            session = live_caches(model)[-1]
            for hop in session.route.hops:
                node = next(node for node in swarm.nodes if node.identity.peer == hop.peer)
                thread = threading.Thread(target=lambda node=node: drained.append(swarm.background.run(node.drain(20))))
                thread.start()
                leaving.append(thread)

        assert generate(model, {3: leave}) == generate(whole)
        for thread in leaving:
            thread.join()
        assert drained == [True, True, True]
        assert model.network.sessions.avoidance.avoided(0.0) == set()  # nobody is blamed


def test_an_idle_session_is_handed_over(folder: Path, whole: Any, swarm: Swarm) -> None:
    for blocks in ("0:3", "3:6", "3:6"):
        swarm.serve(folder, blocks)
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[swarm.address], wait=10) as model:
        cache = model(PROMPT).past_key_values
        node = host_of(swarm, model, cache, 1)
        assert swarm.background.run(node.drain(20))
        swarm.stop(node)
        onward = model(torch.tensor([[9]]), past_key_values=cache).logits[:, -1]
        with torch.no_grad():
            expected = whole(torch.cat([PROMPT, torch.tensor([[9]])], dim=1)).logits[:, -1]
        assert torch.allclose(onward, expected, atol=1e-5)


async def until(true: Callable[[], bool]) -> None:
    """Wait for what no event tells of."""
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
