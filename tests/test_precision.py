"""Exact and quantized peers: who may serve a session, and who may take over in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inprocess import Swarm, running_swarm, save_llama
from test_routing import offer

from swarm.client import SwarmModelForCausalLM
from swarm.errors import NoRoute, UsageError
from swarm.routes.precision import KINDS, Kinds, Precision, best
from swarm.routing import find_route, uncovered
from swarm.types import Hop, Offer, Route, Span

ALL = Span(0, 6)


def peer(number: int, start: int, end: int, quantize: str = "none", speed: float = 1.0) -> Offer:
    return dataclasses.replace(offer(number, start, end, speed=speed), quantize=quantize)


def served(offers: list[Offer]) -> list[str]:
    return [f"{each.peer}:{each.span}:{each.quantize}" for each in offers]


@st.composite
def swarms_of_kinds(draw: st.DrawFn) -> list[Offer]:
    spans = st.tuples(st.integers(0, 5), st.integers(1, 6)).map(lambda pair: (pair[0], min(6, sum(pair))))
    found = draw(st.lists(st.tuples(spans, st.sampled_from(KINDS)), max_size=8))
    return [peer(number, *span, kind) for number, (span, kind) in enumerate(found)]


# --- who may serve ----------------------------------------------------------------------------------------------------


@given(swarms_of_kinds())
def test_a_block_that_an_exact_peer_hosts_is_never_given_to_another(offers: list[Offer]) -> None:
    chosen = list(best(offers, ALL))
    exact = {block for each in offers if each.quantize == "none" for block in each.span}
    assert not [each for each in chosen if each.quantize != "none" and exact & set(each.span)]
    assert len({each.peer for each in chosen}) == len(chosen)
    known = {each.peer: each.span for each in offers}
    assert all(each.span in known[each.peer] for each in chosen)


@given(swarms_of_kinds())
def test_what_a_session_began_with_is_what_may_take_over(offers: list[Offer]) -> None:
    kinds = Kinds(Precision.STEADY)
    allowed = kinds.allowed(offers, ALL, begun=False)
    if uncovered(allowed, ALL):
        return
    route = find_route(allowed, ALL)
    kinds.note(route)
    began = {block: hop.quantize for hop in route for block in hop.span}
    later = kinds.allowed(offers, ALL, begun=True)
    assert not uncovered(later, ALL)  # those that serve it may go on
    assert all(began[block] == each.quantize for each in later for block in each.span)


def test_quantized_peers_serve_what_would_be_missing() -> None:
    offers = [peer(0, 0, 3), peer(1, 0, 6, "int8", speed=100), peer(2, 0, 6, "int4", speed=1000)]
    assert served(list(best(offers, ALL))) == ["peer0:0:3:none", "peer1:3:6:int8"]


def test_exact_peers_alone_serve_who_asks_for_them() -> None:
    kinds = Kinds(Precision.EXACT)
    offers = [peer(0, 0, 3), peer(1, 0, 6, "int8")]
    assert served(kinds.allowed(offers, ALL, begun=False)) == ["peer0:0:3:none"]
    assert kinds.refused(offers, [Span(3, 6)]) == "; int8 peers host them, and exact ones were asked for"


def test_anybody_serves_who_allows_a_mix() -> None:
    offers = [peer(0, 0, 3), peer(1, 0, 6, "int8")]
    kinds = Kinds(Precision.ANY)
    assert kinds.allowed(offers, ALL, begun=True) == offers
    assert kinds.refused(offers, [Span(3, 6)]) == ""


def test_blocks_that_quantized_peers_run_are_told() -> None:
    kinds = Kinds(Precision.STEADY)
    assert kinds.quantized() == {}
    hops = [("none", 0, 1), ("int8", 1, 2), ("int8", 2, 4), ("int4", 4, 5), ("none", 5, 6)]
    places = [Hop(offer(0, 0, 1).peer, (), Span(start, end), kind) for kind, start, end in hops]
    kinds.note(Route(tuple(places)))
    assert kinds.quantized() == {"int8": [Span(1, 4)], "int4": [Span(4, 5)]}
    kinds.note(Route((Hop(places[0].peer, (), Span(1, 4), "none"),)))
    assert kinds.quantized() == {"int4": [Span(4, 5)]}


def test_both_at_once_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not both"):
        SwarmModelForCausalLM.from_pretrained(tmp_path, initial_peers=[], exact=True, mix=True)


# --- in a swarm -------------------------------------------------------------------------------------------------------

PROMPT = torch.arange(3, 12).unsqueeze(0)
WIDE = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with running_swarm() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder, **WIDE)
    return folder


@pytest.mark.slow
def test_quantized_peers_are_used_told_and_kept_apart(swarm: Swarm, folder: Path) -> None:
    told: list[dict[str, list[Span]]] = []
    int8 = swarm.serve(folder, "0:6", quantize="int8")
    options = {"initial_peers": [swarm.address], "failover_wait": 0.0}
    with SwarmModelForCausalLM.from_pretrained(folder, exact=True, **options) as model:
        with pytest.raises(NoRoute, match="int8 peers host them, and exact ones were asked for"):
            model(PROMPT)
        exact = swarm.serve(folder, "0:3")
        with pytest.raises(NoRoute, match="3:6"):
            model(PROMPT)
    with SwarmModelForCausalLM.from_pretrained(folder, on_quantized=told.append, **options) as model:
        output = model(PROMPT)
        assert told == [{"int8": [Span(3, 6)]}]
        assert [hop.quantize for hop in output.past_key_values.route] == ["none", "int8"]
        swarm.kill(exact)
        with pytest.raises(NoRoute, match="int8 peers host them, but the session began with others"):
            model(PROMPT[:, :1], past_key_values=output.past_key_values)
    with SwarmModelForCausalLM.from_pretrained(folder, mix=True, on_quantized=told.append, **options) as model:
        output = model(PROMPT)
        assert str(output.past_key_values.route).endswith("[0:6 int8]")
        another = swarm.serve(folder, "0:6")
        swarm.kill(int8)
        output = model(PROMPT[:, :1], past_key_values=output.past_key_values)
        assert [hop.quantize for hop in output.past_key_values.route] == ["none"]
        assert told[-2:] == [{"int8": [Span(0, 6)]}, {}]
        swarm.stop(another)
