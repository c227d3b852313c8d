"""Sessions meet faults in virtual time; every answer is that of an undisturbed run, and comes soon."""

from __future__ import annotations

from typing import Any

import pytest
from decoding import Decoding
from msgspec import structs
from virtualswarm import CLIENT, Client, Outcome, VirtualSwarm, peer_name, swarm_of

from peer import server
from peer.scheduler import LOW, NORMAL
from swarm.errors import NoRoute, RemoteError
from swarm.hops.liveroute import LiveRoute

KINDS = ["greedy", "sampling", "padded", "beams", "speculative"]


def client(kind: str = "greedy", prompt: int = 9, tokens: int = 14, **options: Any) -> Client:
    return Client(Decoding(kind, 5, prompt, tokens), **options)


def answered(swarm: VirtualSwarm, *clients: Client) -> list[Outcome]:
    outcomes = swarm.run(*clients)
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
        assert outcome.tokens == outcome.expected
    return outcomes


def route_of(swarm: VirtualSwarm, number: int = 0) -> list[int]:
    """The peers on a client's route, in the middle of a run."""
    [session] = swarm.clients[number].sessions._sessions.values()
    assert session.route is not None
    names = {peer_name(number): number for number in range(len(swarm.spans))}
    return [names[hop.peer] for hop in session.route]


def kill_hops(*hops: int) -> Any:
    """Kill whoever is at these places of the first client's route now."""

    def kill(swarm: VirtualSwarm) -> None:
        for peer in [route_of(swarm)[hop] for hop in hops]:
            swarm._kill(peer)

    return kill


@pytest.fixture
def blamed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """The errors that sessions met: their kind, whom they are about, and who told of them."""
    seen: list[tuple[str, str, str]] = []
    fault = LiveRoute.fault

    def noting(self: LiveRoute, error: RemoteError) -> None:
        seen.append((type(error).__name__, error.peer, error.teller))
        fault(self, error)

    monkeypatch.setattr(LiveRoute, "fault", noting)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_an_undisturbed_run(kind: str) -> None:
    [outcome] = answered(swarm_of(3), client(kind))
    assert outcome.failovers == 0
    assert outcome.pause < 0.3


# --- peers die --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hops", [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]], ids=str)
def test_any_hops_die(kind: str, hops: list[int]) -> None:
    [outcome] = answered(swarm_of(6).do(kill_hops(*hops), at_step=5, after=0.01), client(kind))
    assert outcome.failovers >= 1
    assert outcome.pause < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_standby_only_the_last_positions_are_run_again(kind: str) -> None:
    run: list[int] = []

    def count(swarm: VirtualSwarm) -> None:
        run.append(sum(each.server.tokens for each in swarm.peers.values()))

    swarm = swarm_of(6).do(kill_hops(1), at_step=24, after=0.001).do(count, at_step=24, after=0.002)
    [outcome] = answered(swarm.do(count, at_step=25), client(kind, prompt=300, tokens=30, standby=1))
    assert outcome.failovers == 1
    assert outcome.steps[23] < 0.3
    assert run[1] - run[0] < len(outcome.expected) * 30  # of 300 at each hop


def test_a_spare_is_of_low_priority_until_it_takes_a_place() -> None:
    seen: list[list[int]] = []

    def look(swarm: VirtualSwarm) -> None:
        sessions = (each for peer in swarm.peers.values() for each in peer.server._sessions)
        seen.append(sorted(session.priority for session in sessions))

    swarm = swarm_of(6).do(look, at_step=20).do(kill_hops(0, 1), at_step=21).do(look, at_step=23)
    answered(swarm, client("greedy", prompt=100, tokens=30, standby=1))
    hops = len(seen[0]) // 2
    assert seen == [[LOW] * hops + [NORMAL] * hops, [NORMAL] * hops]


def test_an_undisturbed_standby_is_not_told_the_text_again_when_beams_move() -> None:
    swarm = swarm_of(6)
    answered(swarm, client("beams", prompt=300, tokens=24, standby=1))
    most = max(each.server.tokens for each in swarm.peers.values())
    assert most < 3 * (300 + 24 + 20)


def test_replacements_die_too() -> None:
    swarm = swarm_of(12)
    for after in (0.01, 0.05, 0.08):
        swarm.do(kill_hops(1), at_step=5, after=after)
    [outcome] = answered(swarm, client(prompt=300))
    assert outcome.failovers == 3


def test_the_same_span_fails_again_and_again() -> None:
    swarm = swarm_of(15)
    for step in range(2, 14, 3):
        swarm.do(kill_hops(1), at_step=step)
    [outcome] = answered(swarm, client())
    assert outcome.failovers >= 4


def test_two_clients_lose_the_same_peers() -> None:
    swarm = swarm_of(6).kill(1, at_step=4).kill(0, at_step=6, after=0.01).kill(5, at_step=8)
    outcomes = answered(swarm, client("greedy"), client("beams", standby=1))
    assert max(outcome.pause for outcome in outcomes) < 0.6


def test_other_cuts_of_the_blocks_take_the_place() -> None:
    swarm = swarm_of(6, spans=["0:2", "2:4", "4:6", "0:3", "3:5", "5:6"])
    for peer in (0, 1, 2):
        swarm.kill(peer, at_step=5)
    answered(swarm, client())


def test_a_peer_that_is_on_the_route_already_takes_more() -> None:
    swarm = swarm_of(3, spans=["0:3", "3:6", "0:6"]).kill(0, at_step=4).kill(1, at_step=6)
    answered(swarm, client("speculative"))


def test_where_nothing_was_kept_it_comes_from_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BACKUP_BYTES", 0)
    answered(swarm_of(6).do(kill_hops(2), at_step=5).do(kill_hops(1), at_step=9), client("beams"))


def test_a_hop_that_lives_does_not_run_the_step_again() -> None:
    swarm = swarm_of(4, spans=["0:3", "3:6", "3:6", "3:6"]).do(kill_hops(1), at_step=5, after=0.04)
    answered(swarm, client(prompt=100))
    assert swarm.peers[0].server.tokens == 100 + 13


# --- and come back, or not --------------------------------------------------------------------------------------------


def test_the_next_host_is_waited_for() -> None:
    swarm = swarm_of(3).kill(1, at_step=5).restart(1, at_step=5, after=8.0)
    [outcome] = answered(swarm, client("beams", wait=10.0))
    assert 8.0 < outcome.pause < 10.0


@pytest.mark.parametrize("standby", [0, 1])
def test_without_a_host_the_error_names_the_blocks(standby: int) -> None:
    swarm = swarm_of(5).kill(1, at_step=5).kill(4, at_step=5)
    [outcome] = swarm.run(client(wait=6.0, standby=standby))
    assert isinstance(outcome.error, NoRoute)
    assert outcome.error.missing == ((2, 4),)
    assert 6.0 <= outcome.pause < 9.0


def test_before_the_first_step_nobody_is_waited_for() -> None:
    [outcome] = swarm_of(2, spans=["0:2", "2:4"], blocks=6).run(client())
    assert isinstance(outcome.error, NoRoute)
    assert outcome.error.missing == ((4, 6),)
    assert outcome.ended < 0.5


# --- peers and ways fall silent ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_stopped_peer_costs_about_a_second(kind: str, hop: int) -> None:
    def stop(swarm: VirtualSwarm) -> None:
        swarm.network.stall(peer_name(route_of(swarm)[hop]))

    [outcome] = answered(swarm_of(6).do(stop, at_step=5), client(kind))
    assert 0.5 < outcome.pause < 1.6


def test_a_peer_that_wakes_confuses_nobody() -> None:
    swarm = swarm_of(6)
    for number in range(3):
        swarm.stall(number, at_step=5, seconds=0.3 + number, after=0.02)
    answered(swarm, client("beams", tokens=30), client("speculative", tokens=30))


def test_the_way_between_two_hops_is_cut() -> None:
    def cut(swarm: VirtualSwarm) -> None:
        first, second, _ = (peer_name(peer) for peer in route_of(swarm))
        swarm.network.partition(first, second)

    [outcome] = answered(swarm_of(6).do(cut, at_step=5), client())
    assert outcome.pause < 3.0


def test_the_only_host_cannot_be_reached_from_the_hop_before_it() -> None:
    swarm = swarm_of(5, spans=["0:2", "0:2", "0:2", "2:4", "4:6"])

    def cut(swarm: VirtualSwarm) -> None:
        swarm.network.partition(peer_name(route_of(swarm)[0]), peer_name(3), one_way=True)

    [outcome] = answered(swarm.do(cut, at_step=5), client())
    assert outcome.pause < 8.0


def test_a_slow_peer_is_waited_for() -> None:
    [outcome] = answered(swarm_of(3).slow(1, 3000.0, at_step=4), client(tokens=6))
    assert outcome.failovers == 0


def test_a_peer_that_has_become_very_slow_is_left_for_another() -> None:
    def slow(swarm: VirtualSwarm) -> None:
        swarm.network.slow(peer_name(route_of(swarm)[1]), 3000.0, only_work=True)

    [outcome] = answered(swarm_of(6).do(slow, at_step=4), client())
    assert outcome.failovers == 1
    assert outcome.pause < 12.0


def test_far_peers_are_given_the_time_that_the_way_takes() -> None:
    [outcome] = answered(swarm_of(6, latency=0.3).do(kill_hops(1), at_step=4, after=1.0), client(tokens=6))
    assert outcome.failovers == 1


# --- connections break ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_client_that_lost_its_connection_goes_on_where_it_was(hop: int) -> None:
    swarm = swarm_of(3).disconnect(hop, CLIENT, at_step=5, after=0.02)
    [outcome] = answered(swarm, client(prompt=100))
    assert outcome.failovers == 0
    assert outcome.pause == outcome.steps[0]
    assert swarm.peers[0].server.tokens <= 100 + 13 + 1


def test_a_broken_connection_between_hops_is_told_at_once(blamed: list[tuple[str, str, str]]) -> None:
    [outcome] = answered(swarm_of(3).disconnect(1, 2, at_step=5, after=0.034), client(prompt=100))
    assert blamed == [("Unreachable", "peer2", "peer1")]
    assert outcome.failovers == 0
    assert outcome.pause == outcome.steps[0]


def test_a_session_whose_leases_have_ended_begins_anew(blamed: list[tuple[str, str, str]]) -> None:
    def end_leases(swarm: VirtualSwarm) -> None:
        for each in swarm.peers.values():
            for session in each.server._sessions:
                each.server._sessions.end(session.key)

    [outcome] = answered(swarm_of(3).do(end_leases, at_step=5), client("beams"))
    assert {kind for kind, _, _ in blamed} == {"UnknownSession"}
    assert outcome.failovers == 0
    assert outcome.pause < 0.5


# --- nonsense ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hop", [0, 1, 2])
@pytest.mark.parametrize("kind", ["greedy", "beams"])
def test_nonsense_is_a_failure(kind: str, hop: int) -> None:
    def corrupt(swarm: VirtualSwarm) -> None:
        swarm.network.corrupt(peer_name(route_of(swarm)[hop]))

    [outcome] = answered(swarm_of(6).do(corrupt, at_step=5), client(kind))
    assert outcome.failovers >= 1
    assert outcome.pause < 5.0


@pytest.mark.parametrize("field", ["epoch", "number"])
def test_an_answer_to_what_was_never_asked_is_a_failure(field: str, blamed: list[tuple[str, str, str]]) -> None:
    def confuse(swarm: VirtualSwarm) -> None:
        [session] = swarm.peers[route_of(swarm)[2]].server._sessions
        answer: Any = session._answer_client
        session._answer_client = lambda message, output, more: answer(  # type: ignore[method-assign]
            structs.replace(message, **{field: getattr(message, field) + 1}), output, more
        )

    [outcome] = answered(swarm_of(6).do(confuse, at_step=5), client())
    assert [kind for kind, _, _ in blamed] == ["Malformed"]
    assert outcome.failovers == 1
    assert outcome.pause < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_messages_that_vanish_come_twice_or_late_change_nothing(kind: str) -> None:
    swarm = swarm_of(9).drop(0.02).duplicate(0.05).reorder(0.05)
    answered(swarm, client(kind, standby=1), client("beams"))


# --- leaving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_who_leaves_is_replaced_without_a_pause(kind: str, blamed: list[tuple[str, str, str]]) -> None:
    swarm = swarm_of(6)
    for peer in (0, 1, 2):
        swarm.drain(peer, at_step=4, after=0.01 * peer)
    outcomes = answered(swarm, client(kind, prompt=100, tokens=40), client("greedy", prompt=100, tokens=40))
    assert swarm.drained == [True] * 3
    assert blamed == []
    for outcome in outcomes:
        later = sorted(outcome.steps[1:])
        assert later[-1] < 4 * later[len(later) // 2]


def test_who_leaves_without_a_replacement_is_used_until_it_goes() -> None:
    swarm = swarm_of(3).drain(1, at_step=4, seconds=0.3).restart(1, at_step=4, after=3.0)
    [outcome] = answered(swarm, client())
    assert swarm.drained == [False]
    assert outcome.pause > 2.0
