"""What a peer does while nobody uses it: rehearse short steps, and measure again how fast it is."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from peer.announcer import Announcer
from peer.hosting import Hosting
from swarm.errors import ShoalError
from swarm.types import State

LOOK_SECONDS = 1.0  # between two looks whether somebody does
QUIET_SECONDS = 5.0  # that nobody did: who comes online in time of need is used at once
FIRST_SECONDS = 10.0  # after it came online, a stage is measured again: what started with it has settled
MEASURED_SECONDS = 60.0  # and then so often
MEASURING_SHARE = 0.005  # of the time, at most


class Quiet:
    """Uses the time that nobody else does.

    Args:
        bandwidth: to others, in bytes per second; None where it is not known.
    """

    def __init__(self, hosting: Hosting, announcer: Announcer, bandwidth: Callable[[], float | None]) -> None:
        self._hosting = hosting
        self._announcer = announcer
        self._bandwidth = bandwidth

    async def use(self) -> None:
        """For ever."""
        used = time.monotonic()
        due = used + FIRST_SECONDS
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._hosting.is_used:
                used = time.monotonic()
            if time.monotonic() - used < QUIET_SECONDS:
                continue
            while await self._hosting.rehearse():
                pass
            if time.monotonic() >= due:
                due = await self._measure()

    async def _measure(self) -> float:
        """Let the offer say what was found; when to do so again."""
        started = time.monotonic()
        capacity = await self._hosting.measure_again()
        ended = time.monotonic()
        offer = self._announcer.offer
        if capacity is not None and offer.state is State.ONLINE:
            speed = capacity.tokens_per_second(len(offer.span), self._bandwidth())
            with contextlib.suppress(ShoalError):  # it is told with the next renewal
                await self._announcer.keep(tokens_per_second=speed, seconds_per_block=capacity.seconds_per_block)
        return ended + max(MEASURED_SECONDS, (ended - started) / MEASURING_SHARE)
