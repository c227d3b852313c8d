"""Which work goes into the next turn of the compute thread. Pure: the clock is passed in.

A turn takes what is ready of all sessions, up to a budget of tokens: first what has waited too long, then by priority;
of the rest the short steps before the long ones, which are cut into pieces, and of two clients the one that was given
less. So a decode is in the next turn (which may wait a little for others: `peer.rhythm`), a prompt advances with every
turn that has room, what nobody waits for makes no turn long that a decode waits for, and nothing waits for ever:
whatever is `patience` old goes before everything younger. Cf. Agrawal et al. 2024, "Sarathi-Serve" (chunked prefills
among decodes), and Demers et al. 1989, fair queuing by virtual time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

SHORT = 16  # positions of a step that counts as a decode: one token, or a few to be verified
PIECE = 16  # positions: a piece of a long step has some multiple of it, but for the last
OVER = 1.25  # times the tokens that are left in a turn, which one piece may have
PATIENCE = 0.5  # seconds that work may wait before it goes first
LOW_PATIENCE = 2.0  # the same, of low priority
LOW, NORMAL = -1, 0  # priorities
TURN_SECONDS = 0.1  # that a turn is to take at most
LONG_SECONDS = 0.15  # the same, while nobody waits for a next token: fewer and larger pieces are less work
LOW_SHARE = 0.3  # of a turn, at most, for long steps of low priority, while somebody waits for a next token
FORGET = 64  # clients for each session that waits, before those who are done are forgotten
FIRST_BUDGET = 64  # tokens, before anything was measured
BUDGETS = 16, 4096  # tokens, at least and at most


@dataclass(slots=True, eq=False)
class Work:
    """One step of a session, to be run at once or in pieces.

    Attributes:
        session: of which only one step runs in a turn, in the order in which they came.
        client: who shares fairly with other clients.
        rows: B.
        count: N, positions.
        arrived: seconds on the caller's clock; for the caller to keep.
        what: for the caller's use.
        group: only work of one group runs in the same turn.
        priority: higher goes first.
        deadline: after which nobody wants it, unless it was begun before; on the caller's clock.
        done: positions that were given out already.
        since: when it was last given a turn, or came.
    """

    session: Hashable
    client: Hashable
    rows: int
    count: int
    arrived: float
    what: Any = None
    group: Hashable = None
    priority: int = NORMAL
    deadline: float = math.inf
    done: int = 0
    since: float = field(init=False)

    def __post_init__(self) -> None:
        self.since = self.arrived

    @property
    def patience(self) -> float:
        """Seconds that it may wait before it goes first."""
        return PATIENCE if self.priority >= NORMAL else LOW_PATIENCE

    @property
    def is_short(self) -> bool:
        """Whether it counts as a decode."""
        return self.count <= SHORT


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Positions `start` to `end` of a piece of work, counted from its own first."""

    work: Work
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether the work is done with it."""
        return self.end == self.work.count

    @property
    def tokens(self) -> int:
        """Rows times positions."""
        return self.work.rows * (self.end - self.start)


@dataclass(slots=True)
class Turn:
    """What to run now, and what is not to be run any more."""

    slices: list[Slice] = field(default_factory=list)
    late: list[Work] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of all slices."""
        return sum(each.tokens for each in self.slices)


class Scheduler:
    """Work that waits.

    Args:
        together: whether work of several sessions runs in one turn.
    """

    def __init__(self, together: bool = True) -> None:
        self._together = together
        self._queues: dict[Hashable, deque[Work]] = {}  # by session
        self._given: dict[Hashable, float] = {}  # tokens, by client, in virtual time
        self._now_given = 0.0  # what the client that was served last had been given

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, work: Work) -> None:
        """It waits from now on. A client that comes back does not get what it might have had meanwhile."""
        self._queues.setdefault(work.session, deque()).append(work)
        self._given[work.client] = max(self._given.get(work.client, 0.0), self._now_given)

    def last(self, session: Hashable) -> Work | None:
        """What waits for a session and came last, unless some of it was given out."""
        queue = self._queues.get(session)
        return queue[-1] if queue and not queue[-1].done else None

    @property
    def sessions(self) -> Collection[Hashable]:
        """Of which something waits."""
        return self._queues.keys()

    def decodes_since(self) -> float | None:
        """When the first came, if what waits could run in one turn with more: short steps that are not of low priority.

        None where there is something else, or nothing.
        """
        first = [queue[0] for queue in self._queues.values()]
        if not self._together or not all(work.is_short and work.priority >= NORMAL for work in first):
            return None
        return min((work.since for work in first), default=None)

    @property
    def has_decodes(self) -> bool:
        """Whether a short step waits."""
        return any(queue[0].is_short for queue in self._queues.values())

    def cancel(self, session: Hashable, unwanted: Callable[[Work], bool] = lambda _: True) -> list[Work]:
        """Take out the session's `unwanted` work, begun or not; what is running is not here any more."""
        queue = self._queues.get(session, ())
        out = [work for work in queue if unwanted(work)]
        self._keep(session, [work for work in queue if not unwanted(work)])
        return out

    def prioritize(self, session: Hashable, priority: int) -> None:
        """What waits for a session has another priority from now on."""
        for work in self._queues.get(session, ()):
            work.priority = priority

    def turn(self, now: float, budget: int, spare: int | None = None) -> Turn:
        """The next turn: of `budget` tokens, or of a single piece where the smallest is larger.

        No more than `spare` of them, if that is told, are of long steps of low priority.
        """
        turn = Turn(late=self._late(now))
        left, spare = budget, budget if spare is None else spare
        for work in sorted((queue[0] for queue in self._queues.values()), key=lambda work: self._rank(work, now)):
            if turn.slices and (not self._together or work.group != turn.slices[0].work.group):
                continue
            last = work.priority < NORMAL and not work.is_short
            if (count := _fitting(work, min(left, spare) if last else left, alone=not turn.slices)) > 0:
                turn.slices.append(Slice(work, work.done, work.done + count))
                left -= work.rows * count
                spare -= work.rows * count if last else 0
        for piece in turn.slices:
            self._take(piece, now)
        return turn

    def _rank(self, work: Work, now: float) -> tuple[float, ...]:
        if now - work.since >= work.patience:
            return (0, work.since)
        return (1, -work.priority, not work.is_short, self._given[work.client], work.since)

    def _take(self, piece: Slice, now: float) -> None:
        work = piece.work
        self._now_given = max(self._now_given, self._given[work.client])
        self._given[work.client] += piece.tokens
        work.done, work.since = piece.end, now
        if piece.is_last:
            self._keep(work.session, list(self._queues[work.session])[1:])
        if len(self._queues) == 0:
            self._given.clear()
            self._now_given = 0.0
        elif len(self._given) > FORGET * len(self._queues):
            self._forget_clients()

    def _forget_clients(self) -> None:
        """Those of whom nothing waits: where it is never quiet, more and more come and go."""
        waiting = {work.client for queue in self._queues.values() for work in queue}
        self._given = {client: tokens for client, tokens in self._given.items() if client in waiting}

    def _keep(self, session: Hashable, works: Iterable[Work]) -> None:
        queue = deque(works)
        if queue:
            self._queues[session] = queue
        else:
            self._queues.pop(session, None)

    def _late(self, now: float) -> list[Work]:
        late = [work for queue in self._queues.values() for work in queue if _is_late(work, now)]
        for session in {work.session for work in late}:
            self.cancel(session, lambda work: _is_late(work, now))
        return late

    def __repr__(self) -> str:
        return f"<Scheduler sessions={len(self._queues)} steps={len(self)}>"


def _is_late(work: Work, now: float) -> bool:
    return work.deadline <= now and not work.done


def _fitting(work: Work, left: int, alone: bool) -> int:
    """How many positions of it fit into `left` tokens; some in any case where it would be `alone`.

    What has to be cut is cut evenly: a small rest takes nearly as long as a piece. For the same reason the last piece
    may be a little larger than what is left.
    """
    wanted, most = work.count - work.done, left // work.rows
    if wanted <= most:
        return wanted
    least = wanted if work.is_short else min(wanted, PIECE)
    if work.is_short or most < least:
        return least if alone else 0
    pieces = math.ceil(wanted / (OVER * most))
    even = min(wanted, math.ceil(wanted / pieces / PIECE) * PIECE)
    return even if even <= OVER * most else most - most % PIECE


class Budget:
    """How many tokens a turn takes, going by how long turns took: long enough for the products, short enough to wait.

    What a token costs depends on how many there are, as the weights are read once for all of them: so nothing is
    divided by their number, but the budget is raised or lowered until a turn that uses it takes the time that one is to
    take. Cf. the profile-driven token budget of Sarathi-Serve.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._tokens: float | None = None

    @property
    def tokens(self) -> int:
        """Of a turn now."""
        return FIRST_BUDGET if self._tokens is None else round(self._tokens)

    def took(self, tokens: int, seconds: float) -> None:
        """A turn of so many tokens took so long. One that used little of the budget tells nothing of it."""
        if 2 * tokens < self.tokens:
            return
        least, most = BUDGETS
        change = math.sqrt(self._seconds / max(seconds, 1e-9))  # the root: one turn alone may have been held up
        self._tokens = min(max(self.tokens * min(max(change, 0.5), 2.0), least), most)
