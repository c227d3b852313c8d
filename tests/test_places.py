"""Where real peers go, and where they move: processes that are told no blocks."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest
from commands import run
from hosts import Model, make_model, offered, until
from nursery import Forked
from processes import LocalSwarm, PeerProcess, terminated_like_interrupted

from swarm.types import Span, State

pytestmark = pytest.mark.slow

BLOCK = 2 * 2 * 8 * 4 * 1024  # bytes of 1024 tokens' cache, which is most of what a block of the model takes
ROOM = ("--cache-tokens", "1024", "--memory", str(4 * BLOCK))  # for three blocks, with their weights
RESTLESS = ("--look-seconds", "0.5", "--stay-seconds", "0")
SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture
def swarm(model: Model) -> Iterator[LocalSwarm]:
    with terminated_like_interrupted(), LocalSwarm(popen=Forked) as swarm:
        yield swarm


def span_of(swarm: LocalSwarm, model: Model, peer: PeerProcess) -> Span | None:
    """What the peer hosts, None where it is not online."""
    if not peer.identity.exists():
        return None
    offer = offered(swarm, model).get(peer.peer)
    return offer.span if offer is not None and offer.state is State.ONLINE else None


@pytest.mark.timeout(180)
def test_a_peer_takes_what_is_uncovered_and_moves_when_blocks_lose_their_host(swarm: LocalSwarm, model: Model) -> None:
    first = swarm.serve(str(model.folder), "--blocks", "0:3")
    assert until(lambda: span_of(swarm, model, first), SECONDS)
    second = swarm.serve(str(model.folder), *ROOM, *RESTLESS)
    assert until(lambda: span_of(swarm, model, second), SECONDS) == Span(3, 6), second.output()

    third = swarm.serve(str(model.folder), "--num-blocks", "3", *ROOM, *RESTLESS)
    taken = until(lambda: span_of(swarm, model, third), SECONDS)
    assert taken is not None, third.output()
    lost, other = (second, Span(3, 6)) if taken == Span(0, 3) else (first, Span(0, 3))
    assert lost.stop(signal.SIGTERM) == 0

    # Where the two that are left host the same blocks, it is by lot which of them stays.
    left = [third] if lost is second else [second, third]
    outputs = [peer.output for peer in left]
    assert until(lambda: other in (span_of(swarm, model, peer) for peer in left), SECONDS), [tell() for tell in outputs]
    assert sum(f'event="moving" from={taken} to={other}' in tell() for tell in outputs) == 1

    generate = ("swarm", "generate", model.folder, "hi", "--max-new-tokens", 5, "--initial-peers", swarm.address)
    ended = run(*generate, "--wait", 20)
    assert (ended.returncode, ended.stdout) == (0, model.says("hi", 5) + "\n"), ended.stderr

    told = run("swarm", "status", "--route", "--json", SHOAL_INITIAL_PEERS=swarm.address)
    (seen,) = json.loads(told.stdout)
    assert [hop["span"] for hop in seen["route"]["hops"]] == [[0, 3], [3, 6]]
    assert all(hop["milliseconds"] > 0 and hop["reason"] for hop in seen["route"]["hops"])


def test_a_machine_without_room_for_a_block_says_so(swarm: LocalSwarm, model: Model) -> None:
    peer = swarm.serve(str(model.folder), "--memory", "10kB")
    assert peer.process.wait(SECONDS) == 1
    assert "error: one block needs " in peer.output()
