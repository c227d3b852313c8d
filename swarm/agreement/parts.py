"""Which member adds up which part of a vector: parts in proportion to how fast each is reached. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from swarm.agreement.messages import Share
from swarm.types import PeerId

LEAST = 1 / 8  # of the usual bandwidth: slower members are still given as much
MOST = 8.0

TIED = "tied"  # the group of an embedding that first and last stage share


def group_of_stage(stage: int) -> str:
    """The name of the group of a stage's replicas."""
    return f"stage-{stage}"


def sharing(shares: Sequence[Share], group: str, stages: int) -> list[Share]:
    """Who averages in a group, in the order of the attempt."""
    if group == TIED:
        return [share for share in shares if share.stage in (0, stages - 1)]
    return [share for share in shares if group_of_stage(share.stage) == group]


def parts(shares: Sequence[Share], length: int) -> dict[PeerId, range]:
    """The part of a vector of `length` values that each member owns; with two, or unmeasured, equal ones.

    Of n values, a member with the share p sends and receives (1 - p) n of sums and (m - 1) p n of means: so what is
    slow is spared by a small part.
    """
    weights = _weights([share.bandwidth for share in shares])
    total = sum(weights)
    ends = [round(length * min(weight / total, 1.0)) for weight in itertools.accumulate(weights)]
    ends[-1] = length
    return {
        PeerId(share.peer): range(start, end)
        for share, (start, end) in zip(shares, itertools.pairwise([0, *ends]), strict=True)
    }


def _weights(bandwidths: Sequence[float]) -> list[float]:
    if len(bandwidths) < 3 or not all(bandwidths):
        return [1.0] * len(bandwidths)
    usual = statistics.median(bandwidths)
    return [min(max(each, LEAST * usual), MOST * usual) for each in bandwidths]
