"""What a session asks for when it needs hops: which blocks, between whom, and who is to be left out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from swarm.types import PeerId, Route, Span


class Shunned(NamedTuple):
    """Whom a route has to do without."""

    rather: set[PeerId]  # if that is possible
    now: set[PeerId]  # at this moment: they are given some rest
    ever: set[PeerId]  # for good


class Neighbours(NamedTuple):
    """Who feeds a part of a route, and whom it feeds; None is the client."""

    before: PeerId | None = None
    after: PeerId | None = None


class RouteFinder(Protocol):
    """Finds hops for a span."""

    def __call__(
        self,
        span: Span,
        shunned: Callable[[], Shunned],
        since: float | None,
        neighbours: Neighbours,
    ) -> Awaitable[Route]:
        """The best route of the moment between `neighbours`; waits for missing blocks as long as the user wants.

        `since` is when the trouble began, on the loop's clock: None where the session only begins, and -inf not to
        wait at all. Raises `NoRoute`.
        """
