"""Which sessions come again and again, and whether a turn should wait for some of them. Pure: the clock is passed in.

A turn takes nearly as long for one session as for several. But sessions that were run together come back one by one,
each after the moment that its client takes, and whoever begins with the first makes the others wait for a turn of its
own; where clients and other stages share the machine, that turn is also time of theirs. So a turn waits for a group:
of sessions that are run for T seconds and are away for Z, (T + Z) / T groups can take turns with nobody in anybody's
way, and a group is the sessions divided by that (Little 1961; cf. the micro-batches of a pipeline, Huang et al. 2019,
"GPipe"). Whoever is far away is in a small group, and waits for nobody; and nobody waits for much longer than a turn
takes, as if it had come when one had just begun. On a machine where turns themselves wait for a processor, sessions are
away for so long because of that: there are two groups then, since what fewer turns save is time for everybody.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable

LONGEST = 1.0  # seconds that a session is away, at most, if it is to be waited for
_LATE = 2.0  # times as long as usual: then it is not waited for
_WEIGHT = 0.2  # of what was seen last
_TWO = 1.5  # groups that would fit, from which on it is two: while a single one is away, nothing is done here
_CROWDED = 0.9  # of a turn: with a processor for less of it, others on the machine have too little
_PATIENCE = 1.25  # turns that one may wait: by a little more than one, two who alternate come to be run together


class Rhythm:
    """How long turns take, and sessions are away between two steps."""

    def __init__(self) -> None:
        self._turn: float | None = None
        self._computing: float | None = None
        self._away: dict[Hashable, float] = {}  # for how long, as a rule
        self._left: dict[Hashable, float] = {}  # when, of those who are away
        self._here: set[Hashable] = set()

    def came(self, session: Hashable, now: float) -> None:
        """A step of the session is here."""
        self._here.add(session)
        left = self._left.pop(session, None)
        if left is not None and (seen := now - left) <= LONGEST:
            self._away[session] = _smoothed(self._away.get(session), seen)

    def left(self, session: Hashable, now: float) -> None:
        """What came of its step was told; it may have ended meanwhile."""
        if session in self._here:
            self._here.remove(session)
            self._left[session] = now

    def took(self, seconds: float, computing: float = 1.0) -> None:
        """A turn of short steps, in such a share of which its thread had a processor to itself."""
        self._turn = _smoothed(self._turn, seconds)
        self._computing = _smoothed(self._computing, computing)

    def ended(self, session: Hashable) -> None:
        """It does not come any more."""
        self._here.discard(session)
        self._left.pop(session, None)
        self._away.pop(session, None)

    def expects(self, now: float) -> bool:
        """Whether some session is away that should be back soon."""
        self._forget_late(now)
        return bool(self._left)

    def wait(self, here: Collection[Hashable], since: float, now: float) -> float:
        """Seconds that the next turn may wait for more than are `here`, the first of them `since` then; 0 to begin."""
        if self._turn is None or (longest := since + _PATIENCE * self._turn - now) <= 0:
            return 0.0
        self._forget_late(now)
        return longest if self._left and len(here) < self._group(here, self._turn) else 0.0

    def _group(self, here: Collection[Hashable], turn: float) -> int:
        """How many to run together."""
        away = [self._away[each] for each in (*here, *self._left) if each in self._away]
        if not away:
            return 1
        fitting = len(away) / sum(turn / (turn + each) for each in away)
        if fitting < _TWO:
            return len(away)
        return len(away) // (2 if self._is_crowded else int(max(2, fitting)))

    @property
    def _is_crowded(self) -> bool:
        return self._computing is not None and self._computing < _CROWDED

    def _forget_late(self, now: float) -> None:
        for session, left in list(self._left.items()):
            if now - left > _LATE * self._away.get(session, LONGEST / _LATE):
                del self._left[session]
                self._away.pop(session, None)

    def __repr__(self) -> str:
        return f"<Rhythm turn={self._turn} away={len(self._left)}>"


def _smoothed(before: float | None, seen: float) -> float:
    return seen if before is None else before + _WEIGHT * (seen - before)
