"""What a swarm looks like from outside."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from rich.console import Console
from test_routing import BLOCKS, offer, swarms

from swarm.console.outlook import Outlook, is_called
from swarm.console.status import WIDE, as_json, as_table, coverage, route_json, route_table
from swarm.errors import NoRoute
from swarm.routes.explanation import explain
from swarm.routing import View, find_route
from swarm.types import ModelId, Offer, State

MODEL = ModelId("ab" * 32)
OFFERS = [
    offer(1, 2, 5, speed=0.04, state=State.JOINING),
    offer(0, 0, 3, speed=1234.56, free=25, sessions=2),
    offer(2, 2, 4),
]


def shown(offers: list[Offer], width: int) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(as_table(MODEL, offers, width >= WIDE))
    return capture.get()


async def test_the_route_is_the_one_that_a_client_would_take_not_a_faster_one_that_is_less_exact() -> None:
    class FakeBearings:
        def read(self, offers: list[Offer]) -> None:
            pass

        def view(self) -> View:
            return View()

    class FakeNetwork:
        bearings = FakeBearings()

        async def take_bearings(self, offers: list[Offer], blocks: int) -> None:
            pass

    quick = dataclasses.replace(offer(1, 0, BLOCKS, speed=1000), quantize="int8")
    outlook = Outlook(None, None)  # type: ignore[arg-type] # neither is asked
    for offers, wanted in (([offer(0, 0, BLOCKS, speed=1), quick], "none"), ([quick], "int8")):
        sight = await outlook._sight(FakeNetwork(), MODEL, offers)  # type: ignore[arg-type]
        assert sight.route is not None
        assert [choice.hop.quantize for choice in sight.route.choices] == [wanted]


def test_json_is_what_a_program_needs() -> None:
    told = json.loads(json.dumps(as_json(MODEL, OFFERS)))
    assert told["model"] == MODEL
    assert told["num_blocks"] == BLOCKS
    assert told["coverage"] == [1, 1, 2, 1, 0, 0]
    assert told["missing"] == [[4, 6]]
    assert told["complete"] is False
    peer = next(peer for peer in told["peers"] if peer["peer"] == "peer0")
    assert peer["span"] == [0, 3]
    assert peer["addresses"] == ["127.0.0.1:4000"]
    assert (peer["state"], peer["cache_tokens"], peer["cache_free"], peer["sessions"]) == ("online", 100, 25, 2)
    assert peer["version"] == "0.1.0"


def test_table_of_a_swarm_with_a_gap() -> None:
    text = shown(OFFERS, WIDE)
    lines = text.splitlines()
    assert lines[0].split() == ["tiny", MODEL[:12]]
    assert lines[2].split() == ["peer0", "0:3", "online", "1234.6", "75/100", "2", "float32", "0.1.0", "127.0.0.1:4000"]
    assert lines[-1] == "replicas of blocks 0:6  1121--  nobody hosts 4:6"


def test_who_runs_sessions_one_by_one_is_named() -> None:
    told = shown([dataclasses.replace(OFFERS[0], batched=False), OFFERS[1]], WIDE)
    assert "sessions run one by one at peer1" in told
    assert "one by one" not in shown(OFFERS, WIDE)
    assert as_json(MODEL, [dataclasses.replace(OFFERS[0], batched=False)])["peers"][0]["batched"] is False


def test_table_of_a_whole_swarm() -> None:
    assert shown([offer(0, 0, 6)], 80).splitlines()[-1] == "replicas of blocks 0:6  111111  every block is online"


def test_a_narrow_table_has_one_line_for_each_peer() -> None:
    offers = [offer(number, 0, 6, speed=9999.9, state=State.DRAINING, free=0) for number in range(10)]
    lines = shown(offers, 80).splitlines()
    assert len(lines) == 2 + 10 + 1
    assert max(map(len, lines)) <= 80
    assert all(line.split()[0] == f"peer{number}" for number, line in enumerate(lines[2:-1]))


def test_more_than_nine_replicas_take_one_column_still() -> None:
    assert "999999" in shown([offer(number, 0, 6) for number in range(12)], 80)


@given(swarms.filter(bool))
def test_coverage_counts_who_is_online(offers: list[Offer]) -> None:
    counts = coverage(offers, BLOCKS)
    assert sum(counts) == sum(len(each.span) for each in offers if each.state is State.ONLINE)
    assert as_json(MODEL, offers)["complete"] == all(counts)


@pytest.mark.parametrize(
    ("wanted", "means_it"),
    [("tiny", True), ("./models/tiny/", True), ("org/Tiny", True), ("abab", True), ("tin", False), ("ba", False)],
)
def test_what_a_model_may_be_called(wanted: str, means_it: bool) -> None:
    assert is_called(MODEL, "tiny", wanted) is means_it


def test_a_peer_with_quantized_weights_says_so() -> None:
    quantized = dataclasses.replace(offer(0, 0, 6), quantize="int4")
    assert "int4" in shown([quantized], 80).splitlines()[2].split()
    assert as_json(MODEL, [quantized])["peers"][0]["quantize"] == "int4"


CHOICE = [offer(0, 0, 3, speed=10), offer(1, 3, 6, speed=10), offer(2, 3, 6, speed=5)]


def test_a_route_for_programs() -> None:
    told = json.loads(json.dumps(route_json(explain(find_route(CHOICE, BLOCKS), CHOICE))))["route"]
    first, last = told["hops"]
    assert (first["peer"], first["span"], first["instead"], first["extra"]) == ("peer0", [0, 3], [], None)
    assert first["reason"] == "nobody else hosts all of 0:3"
    assert (last["peer"], last["instead"]) == ("peer1", [{"peer": "peer2", "span": [3, 6]}])
    assert last["extra"] == pytest.approx(100)
    assert last["reason"] == "the next best is slower (+100.0 ms)"
    assert told["milliseconds"] == pytest.approx(sum(hop["milliseconds"] for hop in told["hops"]) + told["back"])
    assert all(hop["way"] + hop["turn"] + hop["blocks"] == pytest.approx(hop["milliseconds"]) for hop in told["hops"])


def test_a_route_for_people() -> None:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(route_table(explain(find_route(CHOICE, BLOCKS), CHOICE)))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[2] == ["peer0", "0:3", "0.0", "2.0", "100.0", "102.0", "-"]
    assert lines[3] == ["peer1", "3:6", "0.0", "2.0", "100.0", "102.0", "peer2", "3:6"]
    assert lines[4:6] == [["back", "0.0"], ["in", "all", "204.0"]]
    assert lines[6:] == [
        ["peer0", "0:3:", "nobody", "else", "hosts", "all", "of", "0:3"],
        ["peer1", "3:6:", "the", "next", "best", "is", "slower", "(+100.0", "ms)"],
    ]


def test_where_there_is_no_route_the_reason_is_told() -> None:
    with pytest.raises(NoRoute) as caught:
        find_route(CHOICE[:1], BLOCKS)
    assert route_json(None, str(caught.value)) == {"route": None, "problem": str(caught.value)}
    assert route_json(None) == {}
