"""Looks now and then whether this peer is needed elsewhere, and moves: drained first, never from where it must stay.

What decides is `peer.placement`; this asks it, and does what it says.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from peer.announcer import Announcer
from peer.hosting import Hosting
from peer.placement import Move, Policy, Stay, Survey, decide, pauses
from swarm.errors import RemoteError, ShoalError
from swarm.types import Span, State

log = logging.getLogger(__name__)

GLANCE_SECONDS = 30.0  # between two glances at whether a block has nobody


@dataclass(frozen=True, slots=True)
class Means:
    """What a move needs of the node.

    Attributes:
        survey: what there is of the model now; with True, no more than a glance at whether some block has nobody.
        serve: hosts a span and tells the swarm when it is online.
    """

    survey: Callable[[bool], Awaitable[Survey]]
    serve: Callable[[Span], Awaitable[None]]
    drain_timeout: float


class Mover:
    """One peer's place among the others.

    Attributes:
        since: when it came to its span, on the loop's clock.
        going: where to, while it moves.
        note: what it is about, for people; empty where it stays.
    """

    def __init__(self, hosting: Hosting, announcer: Announcer, means: Means, count: int, policy: Policy) -> None:
        self.since = asyncio.get_running_loop().time()
        self.going: Span | None = None
        self._loaded = ""
        self._hosting, self._announcer, self._means = hosting, announcer, means
        self._count, self._policy = count, policy
        self._chance = random.Random()

    @property
    def note(self) -> str:
        return f"moving to {self.going} {self._loaded}".rstrip() if self.going else ""

    def tell(self, done: int, total: int) -> None:
        """How far loading has come."""
        self._loaded = f"{done / total:.0%}" if total else ""

    async def run(self) -> None:
        """Look for ever. Raises what stands in the way where it can host neither the new span nor the old one."""
        loop = asyncio.get_running_loop()
        due = loop.time() + pauses(self._policy, self._chance)
        while True:
            await asyncio.sleep(min(GLANCE_SECONDS, self._policy.look) * self._chance.uniform(0.5, 1.0))
            try:
                if loop.time() >= due or (await self._means.survey(True)).has_hole:
                    due = loop.time() + pauses(self._policy, self._chance)
                    await self.look(await self._means.survey(False))
            except RemoteError as error:
                log.warning("the swarm does not answer error=%r", str(error))

    async def look(self, seen: Survey) -> Move | Stay:
        """Decide by what was seen, and do it."""
        mine = self._announcer.offer
        decision = decide(
            seen,
            mine,
            since=self.since,
            now=asyncio.get_running_loop().time(),
            chance=self._chance,
            count=self._count,
            policy=self._policy,
        )
        if isinstance(decision, Stay):
            log.info("staying blocks=%s reason=%r", mine.span, decision.reason)
        else:
            await self._move(decision)
        return decision

    async def _move(self, move: Move) -> None:
        before, server = self._announcer.offer.span, self._hosting.server
        assert server is not None
        log.warning("moving from=%s to=%s reason=%r", before, move.span, move.reason)
        self.going, self._loaded = move.span, ""
        try:
            await self._tell(State.DRAINING)
            if not await server.drain(self._means.drain_timeout) or await self._is_needed(before):
                log.warning("staying after all blocks=%s", before)
                server.resume()
                await self._tell(State.ONLINE)
                return
            await self._hosting.leave()
            await self._serve(move.span, before)
        finally:
            self.going = None
            self.since = asyncio.get_running_loop().time()

    async def _tell(self, state: State) -> None:
        try:
            await self._announcer.tell(state=state)
        except RemoteError as error:  # who does not see it is told when it asks
            log.warning("not every part of the swarm was told state=%s error=%r", state, str(error))

    async def _is_needed(self, span: Span) -> bool:
        """Whether somebody died meanwhile, without whom these blocks would have nobody."""
        try:
            return (await self._means.survey(False)).is_needed(self._announcer.offer.peer, span)
        except RemoteError:
            return True  # as far as we know

    async def _serve(self, span: Span, before: Span) -> None:
        try:
            await self._means.serve(span)
        except (ShoalError, OSError) as error:
            log.error("cannot host blocks=%s error=%r; back to=%s", span, str(error), before)
            await self._means.serve(before)
