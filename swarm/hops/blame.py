"""Who is at fault when a step of one session fails, and what follows from it. Pure: the clock is passed in."""

from __future__ import annotations

import math
from collections import Counter

from swarm.errors import BeyondCache, Refused, RemoteError, UnknownSession, Unreachable
from swarm.routes.avoidance import Avoidance
from swarm.types import PeerId

REFUSED_SECONDS = 1.0  # before a peer that said no in the middle of an answer is asked again


class Blame:
    """What is known of the failures of the step under way; what outlasts it goes to the client's `Avoidance`.

    Attributes:
        trouble: since when the step meets failures, None while it does not; -inf where nobody is to be waited for.
    """

    def __init__(self, avoidance: Avoidance) -> None:
        self._avoidance = avoidance
        self._refused: dict[PeerId, float] = {}  # who said no to the step, and when it may be asked again
        self._doubted: set[str] = set()  # who was asked once more
        self._pairs: Counter[tuple[str, str]] = Counter()  # who said how often that another failed
        self._since: float | None = None
        self._begun = False

    def begin(self, begun: bool) -> None:
        """A new step: what was wrong with the one before is forgiven, but not forgotten.

        `begun` is whether the session has run a step before.
        """
        self._begun = begun
        self._refused.clear()
        self._doubted.clear()
        self._since = None

    @property
    def trouble(self) -> float | None:
        """Since when the step meets failures, on the caller's clock; None while it does not.

        -inf where a session that only begins was refused: the swarm is there but full, and whoever comes with it
        wants to know that rather than wait.
        """
        return -math.inf if self._refused and not self._begun else self._since

    def doubts(self, error: RemoteError, lives: bool) -> bool:
        """Whether a peer is to be asked again before it is blamed: it has only lost its place, or another says so.

        `lives` is whether we have a connection to it ourselves.
        """
        hearsay = isinstance(error, Unreachable) and error.teller not in ("", error.peer) and lives
        if error.peer in self._doubted or not (hearsay or isinstance(error, UnknownSession | BeyondCache)):
            return False
        self._doubted.add(error.peer)
        return True

    def judge(self, error: RemoteError, lives: bool, now: float) -> PeerId | None:
        """Whose place another has to take: who is avoided from now on. None where nobody is known to be at fault.

        Where one says again and again that another failed, which to us is well, it may be the way between the two, or
        the one who says it: they are blamed in turn.
        """
        if not isinstance(error, Refused) or self._begun:
            self._since = now if self._since is None else self._since
        if not error.peer:
            return None
        peer = PeerId(error.peer)
        if isinstance(error, Refused):
            self._refused[peer] = now + REFUSED_SECONDS if self._begun else math.inf
            return peer
        if lives and error.teller not in ("", peer):
            self._pairs[error.teller, peer] += 1
            if self._pairs[error.teller, peer] % 2 == 0:
                self._avoidance.forgive(peer, now)
                peer = PeerId(error.teller)
        self._avoidance.failed(peer, now)
        return peer

    def shunned(self, now: float) -> tuple[set[PeerId], set[PeerId], set[PeerId]]:
        """Whom to do without if that is possible, whom at this moment, and whom for good."""
        resting = self._avoidance.resting(now) | {peer for peer, until in self._refused.items() if until > now}
        ever = {peer for peer, until in self._refused.items() if until == math.inf}
        return self._avoidance.avoided(now) | resting, resting, ever
