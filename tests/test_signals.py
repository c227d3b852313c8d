"""Real peers are killed, stopped, woken, restarted and asked to leave in mid-answer: it is the whole model's answer."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hosts import (
    BLOCKS,
    PROMPT,
    Hosts,
    Model,
    alive,
    clean_swarm,
    disturbed,
    generated,
    make_model,
    offered,
    p2pd_of,
    until,
)
from processes import LocalSwarm, PeerProcess

from swarm import SwarmModelForCausalLM, wire
from swarm.session import Session
from swarm.types import PeerId

pytestmark = [pytest.mark.alone, pytest.mark.timeout(180)]

WAIT = 60.0  # seconds for a peer to come, on a machine as busy as may be


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    with clean_swarm() as swarm:
        yield swarm


@pytest.fixture(scope="module")
def hosts(swarm: LocalSwarm, model: Model) -> Hosts:
    """Who hosts the model; a test asks for as many as it needs."""
    return Hosts(swarm, model, ("0:2", "2:4", "4:6"))


def on_route(session: Session) -> set[PeerId]:
    return {hop.peer for hop in session.route or ()}


def client_of(swarm: LocalSwarm, model: Model, **options: Any) -> Any:
    return SwarmModelForCausalLM.from_pretrained(
        model.folder, initial_peers=[swarm.address], wait=20, failover_wait=WAIT, **options
    )


@pytest.mark.parametrize("standby", [0, 1])
def test_the_first_the_middle_and_the_last_hop_are_killed(
    swarm: LocalSwarm, hosts: Hosts, model: Model, standby: int
) -> None:
    hosts.fill(2)

    def spares_follow(session: Session) -> None:
        assert until(lambda: all(place.spares for place in session._live.places), WAIT)

    with client_of(swarm, model, standby=standby) as client:
        actions = {4: hosts.kill(0), 8: hosts.kill(1), 12: hosts.kill(2)}
        if standby:
            actions = {2: spares_follow} | actions
        tokens, session = disturbed(client, 20, actions)
    assert tokens == model.continues(20)
    assert all(hosts.named(peer).process.poll() is None for peer in on_route(session))


def test_a_peer_comes_back_under_its_name_in_mid_answer(swarm: LocalSwarm, hosts: Hosts, model: Model) -> None:
    """It was the only host of its blocks: the answer waits, and goes on with a peer that knows nothing of it."""
    hosts.fill(1)
    back: list[PeerProcess] = []

    def restart(session: Session) -> None:
        before = hosts.at(session, 1)
        before.kill()
        back.append(swarm.again(before))

    with client_of(swarm, model) as client:
        tokens, session = disturbed(client, 20, {5: restart})
    assert tokens == model.continues(20)
    assert back[0].peer in on_route(session)
    hosts.peers["2:4"].append(back[0])


def test_stopped_peers_are_passed_over_and_confuse_nobody_when_they_wake(
    swarm: LocalSwarm, hosts: Hosts, model: Model
) -> None:
    hosts.fill(2)
    stopped: list[PeerProcess] = []

    def stop(hop: int) -> Any:
        def action(session: Session) -> None:
            stopped.append(hosts.at(session, hop))
            stopped[-1].process.send_signal(signal.SIGSTOP)

        return action

    with client_of(swarm, model) as client:

        def wake(session: Session) -> None:
            """Once it answers, it has also done what it was asked to do before."""
            assert stopped[-1].peer not in on_route(session)
            stopped[-1].process.send_signal(signal.SIGCONT)
            client.background.run(answers(client, stopped[-1]))

        actions = {4: stop(1), 8: wake, 10: stop(0), 14: wake, 16: stop(2), 20: wake}
        tokens, _ = disturbed(client, 30, actions)
        assert tokens == model.continues(30)
        assert generated(client, 30) == model.continues(30)
    assert all(peer.process.poll() is None for peer in stopped)


async def answers(client: Any, peer: PeerProcess) -> None:
    offers = await client.network.offers(client.chain.model, BLOCKS)
    offer = next(offer for offer in offers if offer.peer == peer.peer)
    link = await client.network.rpc.connect(offer.peer, offer.addresses)
    await link.call(wire.Echo(), timeout=WAIT)


def undisturbed(client: Any, model: Model, action: Any) -> bool:
    """Whether an answer in which `action` is done is right, and nobody's place had to be taken after it."""
    before: list[int] = []

    def act(session: Session) -> None:
        before.append(session.failovers)  # offers outlive who was killed by a minute: some may have been tried
        action(session)

    tokens, session = disturbed(client, 20, {5: act})
    return tokens == model.continues(20) and session.failovers == before[0]


def test_the_daemon_of_a_serving_peer_is_killed(swarm: LocalSwarm, hosts: Hosts, model: Model) -> None:
    """The DHT has no part in an answer."""
    hosts.fill(1)
    peer = hosts.peers["2:4"][0]
    before = p2pd_of(peer)
    with client_of(swarm, model) as client:
        assert undisturbed(client, model, lambda session: before.kill())
    assert until(lambda: not alive(before) and p2pd_of(peer), WAIT)
    assert until(lambda: peer.peer in offered(swarm, model), WAIT)


def test_peers_that_are_asked_to_leave_hand_their_sessions_over(swarm: LocalSwarm, hosts: Hosts, model: Model) -> None:
    hosts.fill(2)
    leaving: list[PeerProcess] = []

    def ask(hop: int, number: signal.Signals) -> Any:
        def action(session: Session) -> None:
            leaving.append(hosts.at(session, hop))
            leaving[-1].ask_to_end(number)

        return action

    def gone(_: Session) -> None:
        assert leaving[-1].process.wait(WAIT) == 0, leaving[-1].output()

    with client_of(swarm, model) as client:
        actions = {4: ask(1, signal.SIGTERM), 9: gone, 12: ask(0, signal.SIGINT), 17: gone}
        actions |= {20: ask(2, signal.SIGTERM), 25: gone}
        tokens, session = disturbed(client, 30, actions)
        assert tokens == model.continues(30)
        blamed = client.network.sessions.avoidance.avoided(0.0)
    assert not {peer.peer for peer in leaving} & (blamed | on_route(session))
    for peer in leaving:
        said = peer.output().splitlines()[-2:]
        # More than one where a client before could not say goodbye to a peer that was stopped.
        assert re.match(r"leaving: \d+ sessions? to hand over to other hosts of blocks ", said[0]), said
        assert said[1] == "every session was handed over or had ended"


def test_leaving_ends_at_once_where_it_must(swarm: LocalSwarm, tmp_path_factory: pytest.TempPathFactory) -> None:
    """By a second Ctrl-C, and when `--drain-timeout` is over: nobody else hosts these blocks."""
    models = [make_model(tmp_path_factory.mktemp("lonely"), seed) for seed in (1, 2)]
    options = ([], ["--drain-timeout", "0.5"])
    peers = [swarm.serve(str(each.folder), *more) for each, more in zip(models, options, strict=True)]
    for peer, lonely, twice in zip(peers, models, (True, False), strict=True):
        peer.address()
        with client_of(swarm, lonely) as client:
            cache = client(PROMPT).past_key_values
            peer.process.send_signal(signal.SIGINT)
            assert until(lambda peer=peer: "leaving: " in peer.output(), WAIT)
            if twice:
                peer.process.send_signal(signal.SIGINT)
            assert peer.process.wait(WAIT) == (130 if twice else 0)
            assert ("1 session left behind" in peer.output()) is not twice
            assert "Traceback" not in peer.output()
            cache.close()


def test_a_swarm_outlives_its_bootstrap_node(swarm: LocalSwarm, hosts: Hosts, model: Model) -> None:
    """Answers go on, peers and clients come through anybody, and a peer that came so takes a dead one's place."""
    hosts.fill(1)
    with client_of(swarm, model) as client:
        assert undisturbed(client, model, lambda session: swarm.bootstrap_process.kill())
        swarm.address = hosts.peers["4:6"][0].address()
        hosts.fill(2)
        tokens, _ = disturbed(client, 20, {5: hosts.kill(1)})
        assert tokens == model.continues(20)
    with client_of(swarm, model) as newcomer:
        assert generated(newcomer, 20) == model.continues(20)
