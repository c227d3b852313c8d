"""A look at the swarm from here: its models, who hosts them, and the route that a client would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.discovery import Discovery
from swarm.errors import NoRoute
from swarm.identity import Identity
from swarm.routes.explanation import Explanation, explain
from swarm.routes.precision import best
from swarm.routing import find_route
from swarm.transport import TcpTransport
from swarm.types import ModelId, Offer, Span

if TYPE_CHECKING:
    from swarm.network import Network


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of one model; at least one offer, or nobody would know of it."""

    model: ModelId
    offers: list[Offer]
    route: Explanation | None = None  # None where it was not asked for, or there is none
    problem: str = ""  # why there is no route


class Outlook:
    """Looks again and again. `async with` closes it."""

    def __init__(self, discovery: Discovery, network: Network | None) -> None:
        self._discovery, self._network = discovery, network

    @classmethod
    async def start(cls, initial_peers: Sequence[str], routes: bool) -> Outlook:
        """Join as a client; one that can call peers, if `routes` are to be explained. Raises as `Discovery.start`."""
        identity = Identity.generate()
        discovery = await Discovery.start(identity, initial_peers, client_mode=True)
        if not routes:
            return cls(discovery, None)
        from swarm.network import Network  # which needs torch

        return cls(discovery, Network(TcpTransport(identity), discovery))

    async def look(self, model_name: str | None = None) -> list[Sight]:
        """All models, or those that are called `model_name`. Raises `DeadlineExceeded`."""
        sights = []
        for model, listing in (await self._discovery.models()).items():
            if model_name is not None and not is_called(model, listing.name, model_name):
                continue
            if offers := await self._discovery.everything(model, listing.num_blocks):
                sights.append(await self._sight(self._network, model, offers))
        return sights

    async def _sight(self, network: Network | None, model: ModelId, offers: list[Offer]) -> Sight:
        if network is None:
            return Sight(model, offers)
        blocks = offers[0].num_blocks
        usable = list(best(offers, Span(0, blocks)))  # by a client that is not told otherwise
        network.bearings.read(offers)
        await network.take_bearings(usable, blocks)
        view = network.bearings.view()
        try:
            return Sight(model, offers, explain(find_route(usable, blocks, view=view), usable, view=view))
        except NoRoute as error:
            return Sight(model, offers, problem=str(error))

    async def __aenter__(self) -> Outlook:
        return self

    async def __aexit__(self, *_: object) -> None:
        await (self._network or self._discovery).close()


def is_called(model: ModelId, name: str, wanted: str) -> bool:
    """Whether `wanted`, a model's name or path or the beginning of its id, means this one."""
    return model.startswith(wanted) or name.casefold() == wanted.rstrip("/").rpartition("/")[2].casefold()
