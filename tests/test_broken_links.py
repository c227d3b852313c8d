"""Links break in mid-answer, between real machines as far as the kernel can make them: it is the whole model's answer.

What is lost here is lost in silence. No socket is closed and no packet says that another did not arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
from hosts import Model, clean_swarm, disturbed, generated, make_model, until
from machines import PORT, Lan, Machine, Unavailable, lan
from processes import LocalSwarm, PeerProcess

from swarm import SwarmModelForCausalLM, wire
from swarm.errors import RemoteError
from swarm.session import Session
from swarm.types import Address, PeerId

pytestmark = [pytest.mark.alone, pytest.mark.timeout(180)]

WAIT = 60.0  # seconds, on a machine as busy as may be
SPANS = ("0:3", "3:6", "0:3", "3:6")


@dataclass
class Net:
    """A peer on a machine of its own for each of `SPANS`, and a client on ours."""

    lan: Lan
    swarm: LocalSwarm
    model: Model
    peers: list[tuple[PeerProcess, Machine]] = field(default_factory=list)

    def serve(self, span: str, machine: Machine) -> None:
        listen = f"{machine.address}:{PORT}"
        options = ("--blocks", span, "--listen", listen, "--lease-seconds", "20")
        self.peers.append((self.swarm.serve(str(self.model.folder), *options, within=machine.within), machine))

    def machine(self, session: Session, hop: int) -> Machine:
        """Of who serves the hop now."""
        assert session.route is not None
        return next(machine for peer, machine in self.peers if peer.peer == session.route.hops[hop].peer)

    def mend(self, client: Any) -> None:
        """Undo all that was broken, and wait until everybody answers again."""
        for _, machine in self.peers:
            machine.mend()
        for peer, machine in self.peers:
            assert until(
                lambda peer=peer, machine=machine: client.background.run(_answers(client, peer, machine)), WAIT
            )


async def _answers(client: Any, peer: PeerProcess, machine: Machine) -> bool:
    try:
        link = await client.network.rpc.connect(PeerId(peer.peer), [Address(machine.address, PORT)])
        await link.call(wire.Echo(), timeout=1.0)
    except RemoteError:
        return False
    return True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def net(model: Model) -> Iterator[Net]:
    try:
        with lan() as network, clean_swarm(f"{network.address}:0") as swarm:
            net = Net(network, swarm, model)
            for span in SPANS:
                net.serve(span, network.machine())
            for peer, _ in net.peers:
                peer.address()
            yield net
    except Unavailable as error:
        pytest.skip(str(error))
    assert network.namespaces() == []


@pytest.fixture
def client(net: Net) -> Iterator[Any]:
    with SwarmModelForCausalLM.from_pretrained(
        net.model.folder, initial_peers=[net.swarm.address], wait=20, failover_wait=WAIT
    ) as client:
        yield client
        net.mend(client)


Break = Callable[[Net, Session], None]


def cut(hop: int) -> Break:
    return lambda net, session: net.machine(session, hop).cut()


def deafen(hop: int) -> Break:
    """What others send to it is lost; what it sends arrives."""
    return lambda net, session: net.machine(session, hop).lose("INPUT")


def mute(hop: int) -> Break:
    """It hears everything, and nobody hears it."""
    return lambda net, session: net.machine(session, hop).lose("OUTPUT")


def part(net: Net, session: Session) -> None:
    """What the first hop sends to the second is lost; the client reaches both."""
    first, second = net.machine(session, 0), net.machine(session, 1)
    second.lose("INPUT", "--source", first.address)


def forget(hop: int) -> Break:
    """A router on the way forgets the client's connection; a new one would work."""

    def action(net: Net, session: Session) -> None:
        machine = net.machine(session, hop)
        for connection in psutil.Process().net_connections("tcp"):
            if connection.raddr and connection.raddr == (machine.address, PORT):
                machine.lose("INPUT", "--protocol", "tcp", "--sport", str(connection.laddr.port))

    return action


@pytest.mark.parametrize(
    "broken",
    [cut(0), cut(1), deafen(0), deafen(1), mute(0), mute(1), part, forget(0), forget(1)],
    ids=["down-0", "down-1", "deaf-0", "deaf-1", "mute-0", "mute-1", "parted", "forgotten-0", "forgotten-1"],
)
def test_a_link_breaks(net: Net, client: Any, broken: Break) -> None:
    tokens, _ = disturbed(client, 20, {5: lambda session: broken(net, session)})
    assert tokens == net.model.continues(20)


def test_a_link_is_back_before_the_answer_ends(net: Net, client: Any) -> None:
    """What was held up on the way arrives late; it is not taken for anything else."""

    def back(_: Session) -> None:
        net.mend(client)

    actions = {4: lambda session: cut(1)(net, session), 8: back, 10: lambda session: cut(0)(net, session), 14: back}
    tokens, _ = disturbed(client, 30, actions)
    assert tokens == net.model.continues(30)


def test_connections_to_a_peer_that_died_unseen_are_half_open(net: Net, client: Any) -> None:
    """Its link was down when it died, so nobody was told; it is up again, and the next bytes meet a reset."""

    def die(session: Session) -> None:
        machine = net.machine(session, 1)
        machine.cut()
        next(peer for peer, its in net.peers if its is machine).kill()
        machine.mend()

    tokens, _ = disturbed(client, 20, {5: die})
    assert tokens == net.model.continues(20)
    net.peers = [(peer, machine) for peer, machine in net.peers if peer.process.poll() is None]


def test_the_only_host_is_found_again_over_a_new_connection(net: Net, client: Any) -> None:
    """Nobody else has the last blocks by now: the session goes on where it was."""
    tokens, _ = disturbed(client, 20, {5: lambda session: forget(1)(net, session)})
    assert tokens == net.model.continues(20)
    assert generated(client, 20) == net.model.continues(20)
