"""A run with as many members and trainers as can be: its messages fit on the wire, and who comes later waits."""

from __future__ import annotations

import pytest
from rounds_simulator import Run

from swarm import wire
from swarm.agreement.messages import (
    MAX_MEMBERS,
    MAX_MICRO_BATCHES,
    MAX_TRAINERS,
    Accepted,
    Agreed,
    Averaged,
    Decision,
    Finding,
    Granted,
    Order,
    Propose,
    Report,
    Roster,
    Seat,
    Share,
    Status,
)
from swarm.wire import Endpoint, Kind, Message

LINE = b"l" * 16
COUNT = 1 << 40


def name(number: int) -> str:
    return f"12D3KooW{number:044d}"


def decision(stages: int) -> Decision:
    """That of a full run: everybody has an address of IPv4 and one of IPv6, the longest that there are."""
    addresses = [("255.255.255.255", 65535), ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535)]
    seats = [Seat(number % stages, Endpoint(name(number), addresses)) for number in range(MAX_MEMBERS)]
    trainers = [name(MAX_MEMBERS + number) for number in range(MAX_TRAINERS)]
    agreed = [Agreed(f"stage-{stage}", b"d" * 32) for stage in range(stages)]
    roster = Roster(LINE, LINE, name(0), seats, trainers)
    return Decision(COUNT, 9, COUNT, "commit", 0.5, 1.5, agreed, roster, COUNT, COUNT)


def messages(stages: int) -> list[Message]:
    """The largest that are sent."""
    last, everyone = decision(stages), [name(number) for number in range(MAX_MEMBERS)]
    shares = [Share(peer, number % stages, COUNT, 1e9) for number, peer in enumerate(everyone)]
    order = Order(LINE, COUNT, 9, 2, COUNT, shares, [(peer, 9) for peer in everyone[::2]], last, COUNT, everyone[1::2])
    groups = {"stage-0": everyone[: -(-MAX_MEMBERS // stages)], **({"tied": everyone[:256]} if stages == 2 else {})}
    averages = [Averaged(group, [(peer, b"d" * 16) for peer in peers], 1.5, True) for group, peers in groups.items()]
    findings = [Finding(group, peer, 1.5) for group, peers in groups.items() for peer in peers]
    report = Report(9, COUNT, averages, findings, [], [])
    bits = b"\xff" * (MAX_MICRO_BATCHES // 8)
    status = Status(LINE, COUNT, 9, COUNT, True, COUNT, bits, COUNT, report, b"d" * 32, 1e9, bits, True, COUNT)
    granted = Granted(LINE, COUNT, 9, False, Accepted(9, last))
    return [order, status, granted, Propose(LINE, COUNT, 9, last)]


@pytest.mark.parametrize("stages", [1, 2, MAX_MEMBERS])
def test_the_largest_messages_of_a_full_run_fit_on_the_wire(stages: int) -> None:
    for message in messages(stages):
        packed = wire.pack_envelope(Kind.NOTIFY, body=message)
        assert len(packed) <= wire.MAX_HEADER, type(message).__name__
        assert wire.read_body(wire.unpack_envelope(packed)) == message


def test_who_comes_to_a_full_run_waits_until_somebody_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("swarm.agreement.cohort", "swarm.agreement.member"):
        monkeypatch.setattr(f"{module}.MAX_MEMBERS", 2)
    run = Run(0, 1, 2, 1)
    first, _ = run.members
    assert run.advance_to(1)
    late = run.join(0)
    assert run.network.run(lambda: first.round >= 4 and late.machine.held >= 4, 60.0)
    assert late.machine.crowded_out
    assert len(first.machine.previous.roster.members) == 2  # type: ignore[union-attr]
    run.kill(first)
    assert run.network.run(lambda: late.machine.ready, run.network.now + 60.0)
    assert not late.machine.crowded_out
