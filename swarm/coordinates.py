"""Network coordinates: an estimate of the latency between any two peers, from a few round trips of each. Pure.

Vivaldi with height (Dabek, Cox, Kaashoek, Morris: "Vivaldi: A Decentralized Network Coordinate System", SIGCOMM
2004, sections 2.5 to 2.6 and 5.4). Every round trip is a spring of that length between two peers; each peer moves
its own end. The height is the last mile: it comes on top of any distance and no vector can shorten it.

Beyond the paper, because peers lie: a sample that cannot be is ignored (`fault` names why), nobody's claim to be
certain is believed beyond a floor, and one sample moves a peer the less the surer the peer is of its place.
"""

from __future__ import annotations

import math
import random

from swarm.types import Coordinate

LONGEST = 10.0  # seconds; a longer round trip says something of a queue, not of where a peer is
FARTHEST = 30.0  # seconds from the origin, the end of the world
MIN_HEIGHT = 1e-4  # seconds of round trip
WORST_ERROR = 1.0
BEST_ERROR = 0.02
CREDIBLE_ERROR = 0.1  # the least error that is believed of others

_TIMESTEP = 0.35  # c_c; the paper has 0.25, which takes half as many samples again to settle
_ERROR_GAIN = 0.25  # c_e of the paper
_STRIDE = 0.2  # seconds that one sample may move a peer that knows nothing; in proportion less for surer ones
_SAME_PLACE = 1e-9  # seconds

NOWHERE = Coordinate((0.0, 0.0, 0.0), MIN_HEIGHT, WORST_ERROR)
"""Where a peer begins, that has measured nothing."""


def distance(a: Coordinate, b: Coordinate) -> float:
    """The expected round trip between two peers in seconds; one way is half of that."""
    return math.dist(a.vector, b.vector) + a.height + b.height


def fault(theirs: Coordinate, rtt: float) -> str | None:
    """Why a sample tells nothing, None where it does: what `update` ignores, by name."""
    if not math.isfinite(rtt):
        return "a round trip that is no number"
    if rtt <= 0:
        return "a round trip that ended before it began"
    if rtt > LONGEST:
        return f"a round trip of more than {LONGEST:g} s"
    if not all(map(math.isfinite, (*theirs.vector, theirs.height, theirs.error))):
        return "a coordinate that is no number"
    if math.hypot(*theirs.vector) > FARTHEST or not 0 <= theirs.height <= FARTHEST or theirs.error < 0:
        return "a coordinate beyond the end of the world"
    return None


def update(mine: Coordinate, theirs: Coordinate, rtt: float, chance: random.Random | None = None) -> Coordinate:
    """My coordinate after a round trip of `rtt` seconds to a peer that says it is at `theirs`.

    Returns `mine`, unchanged, for a sample with a `fault`. `chance` chooses a direction where both are in one place.
    """
    if fault(theirs, rtt) is not None:
        return mine
    expected = distance(mine, theirs)
    weight = mine.error / (mine.error + max(theirs.error, CREDIBLE_ERROR))
    gain = _ERROR_GAIN * weight
    error = min(abs(expected - rtt) / rtt, WORST_ERROR) * gain + mine.error * (1 - gain)
    limit = _STRIDE * mine.error
    force = min(max(_TIMESTEP * weight * (rtt - expected), -limit), limit)
    return _moved(mine, theirs, force, min(max(error, BEST_ERROR), WORST_ERROR), chance)


def _moved(
    mine: Coordinate, theirs: Coordinate, force: float, error: float, chance: random.Random | None
) -> Coordinate:
    """`mine` pushed by `force` seconds away from `theirs`: along the vector and, in proportion, up (section 5.4).

    Where both are in one place, there is no proportion: they are parted if they are to be farther from each other,
    else only their last miles can be shorter.
    """
    apart = math.dist(mine.vector, theirs.vector)
    heights = mine.height + theirs.height
    up = force * heights / (apart + heights) if apart > _SAME_PLACE else min(force, 0.0)
    height = min(max(mine.height + up, MIN_HEIGHT), FARTHEST)
    x, y, z = (
        place + (force - up) * axis
        for place, axis in zip(mine.vector, _direction(mine, theirs, apart, chance), strict=True)
    )
    beyond = max(1.0, math.hypot(x, y, z) / FARTHEST)
    return Coordinate((x / beyond, y / beyond, z / beyond), height, error)


def _direction(
    mine: Coordinate, theirs: Coordinate, apart: float, chance: random.Random | None
) -> tuple[float, float, float]:
    """From `theirs` to `mine`, of length 1; any direction where they are in one place."""
    if apart > _SAME_PLACE:
        x, y, z = ((a - b) / apart for a, b in zip(mine.vector, theirs.vector, strict=True))
        return x, y, z
    if chance is None:
        return 1.0, 0.0, 0.0
    x, y, z = (chance.gauss(0.0, 1.0) for _ in range(3))
    length = math.hypot(x, y, z) or 1.0
    return x / length, y / length, z / length
