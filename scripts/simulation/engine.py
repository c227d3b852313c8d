"""The run of a simulated swarm: peers come, load, look round, move, drain and die; clients come and look for routes."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from functools import partial

from peer.placement import Move, best_span, decide, pauses
from simulation.clients import Answer, ask
from simulation.geography import measured
from simulation.hosting import Hosting, Peer, first_offer
from simulation.load import Load, saturate
from simulation.machines import Settings, draw_machine
from swarm.coordinates import update
from swarm.types import Span, State

RAMP = 0.5  # of the warm-up, in which the first peers come
TICK = 60.0  # seconds between two calls of a peer that are timed
FIRST_SAMPLES = 32  # round trips that a newcomer measures
DRAIN = 30.0  # seconds
EXPIRY = 50.0  # seconds until the offer of a peer that died is gone
LOAD_SECONDS, LOAD_SECONDS_PER_BLOCK = 30.0, 6.0  # to fetch weights and get ready
SAMPLE = 120.0  # seconds between two points of the plot


class Simulation:
    """One seeded run."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.now = 0.0
        self.hostings = [Hosting(model, settings.policy.keepers) for model in settings.models]
        self.answers: dict[str, list[Answer]] = {model.name: [] for model in settings.models}
        self.loads: dict[str, list[Load]] = {model.name: [] for model in settings.models}
        self._chance = random.Random(settings.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._numbers = itertools.count()
        for hosting in self.hostings:
            self._plan(hosting)

    def run(self, tell: Callable[[float, str], None] = lambda seconds, text: None) -> None:
        """To the end. `tell` hears how many simulated seconds have gone by, and what is done."""
        while self._events and self._events[0][0] <= self.settings.end:
            self.now, _, event = heapq.heappop(self._events)
            event()
            tell(self.now, f"{sum(len(hosting.peers) for hosting in self.hostings)} peers")
        self.now = self.settings.end
        for hosting in self.hostings:
            self._pass_time(hosting)

    @property
    def measuring(self) -> bool:
        """Whether the warm-up is over."""
        return self.now > self.settings.warm_up

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), event))

    def _plan(self, hosting: Hosting) -> None:
        """Who comes to this model, and when it is looked at."""
        settings, chance = self.settings, self._chance
        count = round(settings.peers * hosting.model.share)
        for _ in range(count):
            self._after(chance.uniform(0.0, RAMP * settings.warm_up), partial(self._arrive, hosting))
        if settings.churn > 0:
            self._after(self._until_next(hosting), partial(self._arrive_and_again, hosting))
        self._after(TICK, partial(self._tick, hosting))
        self._after(SAMPLE, partial(self._sample, hosting))
        self._after(settings.warm_up, partial(self._pass_time, hosting))
        for _ in range(settings.clients):
            when = chance.uniform(settings.warm_up, settings.end)
            self._after(when, partial(self._ask, hosting))
        for number in range(settings.loads):
            self._after(
                settings.warm_up + settings.measured * (number + 1) / settings.loads, partial(self._load, hosting)
            )

    # --- coming and going -----------------------------------------------------------------------------------------

    def _until_next(self, hosting: Hosting) -> float:
        peers_per_second = self.settings.churn * self.settings.peers * hosting.model.share / 3600
        return self._chance.expovariate(peers_per_second)

    def _arrive_and_again(self, hosting: Hosting) -> None:
        self._arrive(hosting)
        self._after(self._until_next(hosting), partial(self._arrive_and_again, hosting))

    def _arrive(self, hosting: Hosting) -> None:
        machine = draw_machine(next(self._numbers), hosting.model, self._chance)
        hosting.directory.refresh(self.now)
        speed = 1.0 / (machine.seconds_per_block * machine.blocks)
        span = best_span(hosting.directory.survey(self._chance), machine.blocks, speed, self._chance)
        peer = Peer(machine, first_offer(machine, hosting.model, span), self.now)
        self._pass_time(hosting)
        hosting.peers[machine.peer] = peer
        hosting.directory.offers[machine.peer] = peer.offer
        self._after(_loading(span), partial(self._come_online, hosting, peer))
        if self.settings.churn > 0:
            stays = self._chance.expovariate(self.settings.churn / 3600)
            dies = self._chance.random() < self.settings.deaths
            self._after(stays, partial(self._die if dies else self._leave, hosting, peer))

    def _come_online(self, hosting: Hosting, peer: Peer) -> None:
        if self._is_gone(hosting, peer) or peer.leaving:
            return
        first = peer.coordinate.error >= 1.0
        others = list(hosting.peers.values())
        for _ in range(FIRST_SAMPLES if first else 0):
            self._time_a_call(peer, self._chance.choice(others))
        self._pass_time(hosting)
        hosting.become(peer, State.ONLINE, peer.offer.span)
        peer.since = self.now
        if first:
            self._after(pauses(self.settings.policy, self._chance), partial(self._look, hosting, peer))

    def _die(self, hosting: Hosting, peer: Peer) -> None:
        self._pass_time(hosting)
        if not self._is_gone(hosting, peer):
            hosting.vanish(peer)
            self._after(EXPIRY, partial(self._forget, hosting, peer))

    def _leave(self, hosting: Hosting, peer: Peer) -> None:
        self._pass_time(hosting)
        peer.leaving = True
        hosting.become(peer, State.DRAINING, peer.offer.span)
        self._after(DRAIN, partial(self._left, hosting, peer))

    def _left(self, hosting: Hosting, peer: Peer) -> None:
        self._pass_time(hosting)
        hosting.vanish(peer)
        self._forget(hosting, peer)

    def _forget(self, hosting: Hosting, peer: Peer) -> None:
        hosting.directory.offers.pop(peer.machine.peer, None)

    def _is_gone(self, hosting: Hosting, peer: Peer) -> bool:
        return peer.machine.peer not in hosting.peers

    # --- living ---------------------------------------------------------------------------------------------------

    def _look(self, hosting: Hosting, peer: Peer) -> None:
        """Look round for a better place, now and then."""
        if self._is_gone(hosting, peer) or peer.leaving:
            return
        self._after(pauses(self.settings.policy, self._chance), partial(self._look, hosting, peer))
        hosting.directory.refresh(self.now)
        decision = decide(
            hosting.directory.survey(self._chance),
            peer.offer,
            since=peer.since,
            now=self.now,
            chance=self._chance,
            count=peer.machine.blocks,
            policy=self.settings.policy,
        )
        if isinstance(decision, Move):
            hosting.moves += self.measuring
            self._pass_time(hosting)
            hosting.become(peer, State.DRAINING, peer.offer.span)
            self._after(DRAIN, partial(self._begin_anew, hosting, peer, decision.span))

    def _begin_anew(self, hosting: Hosting, peer: Peer, span: Span) -> None:
        if not self._is_gone(hosting, peer) and not peer.leaving:
            self._pass_time(hosting)
            hosting.become(peer, State.JOINING, span)
            self._after(_loading(span), partial(self._come_online, hosting, peer))

    def _tick(self, hosting: Hosting) -> None:
        """Every peer times a call, and renews its offer."""
        online = hosting.online
        for peer in online:
            self._time_a_call(peer, self._chance.choice(online))
            hosting.become(peer, State.ONLINE, peer.offer.span)
        self._after(TICK, partial(self._tick, hosting))

    def _time_a_call(self, peer: Peer, other: Peer) -> None:
        if other is not peer:
            rtt = measured(peer.machine.place, other.machine.place, self._chance)
            peer.coordinate = update(peer.coordinate, other.coordinate, rtt, self._chance)

    # --- being looked at ------------------------------------------------------------------------------------------

    def _ask(self, hosting: Hosting) -> None:
        hosting.directory.refresh(self.now)
        if (answer := ask(hosting, self._chance)) is not None:
            self.answers[hosting.model.name].append(answer)

    def _load(self, hosting: Hosting) -> None:
        self.loads[hosting.model.name].append(saturate(hosting, self._chance))

    def _sample(self, hosting: Hosting) -> None:
        hosting.take_sample(self.now)
        self._after(SAMPLE, partial(self._sample, hosting))

    def _pass_time(self, hosting: Hosting) -> None:
        hosting.pass_time(self.now, self.measuring)


def _loading(span: Span) -> float:
    return LOAD_SECONDS + LOAD_SECONDS_PER_BLOCK * len(span)
