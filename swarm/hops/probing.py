"""Who works on a step whose answer is late: the hops are asked, and the first that cannot say so has failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from swarm import wire
from swarm.errors import DeadlineExceeded
from swarm.hops.place import Place
from swarm.types import SessionId

PROBE_SECONDS = 0.5  # for a hop to say that it lives


async def probe(places: Sequence[Place], key: SessionId, epoch: int, waiting: Callable[[], bool]) -> str:
    """Ask all hops who works on the step, as long as somebody is `waiting` for it: the peer that does.

    Places whose peers do not answer are marked as failed. Raises `DeadlineExceeded` for the first of them, or for the
    one to which the step never came.
    """
    for look in range(2):  # in the first, it may be on its way between two hops
        asked = (place.ask(key, place.soon(PROBE_SECONDS)) for place in places)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        if not waiting():
            return ""
        alive = [answer for answer in answers if isinstance(answer, wire.Alive)]
        silent = [place for place, answer in zip(places, answers, strict=True) if answer not in alive]
        if silent:
            for place in silent:
                place.failed = True
            raise DeadlineExceeded(f"no answer from {silent[0].hop}", silent[0].peer)
        at_it = [place.peer for place, a in zip(places, alive, strict=True) if a.epoch == epoch and a.waiting]
        if at_it:
            return at_it[0]
        if look == 0:
            await asyncio.sleep(PROBE_SECONDS / 2)
    raise _lost_on_its_way(places, [answer.epoch == epoch for answer in alive])


def _lost_on_its_way(places: Sequence[Place], came: Sequence[bool]) -> DeadlineExceeded:
    """All live, and nobody works on the step: it was lost behind the last hop that it came to."""
    last = max((index for index, here in enumerate(came) if here), default=-1)
    receiver = places[min(last + 1, len(places) - 1)].peer
    error = DeadlineExceeded(f"the step was lost on its way to {receiver[-6:]}", receiver)
    error.teller = places[last].peer if last >= 0 else ""
    return error
