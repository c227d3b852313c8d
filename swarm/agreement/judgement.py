"""Whether an attempt at averaging is what it must be, and who is to blame where it is not. Pure."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from swarm.agreement.messages import Agreed, Averaged, Report, Share
from swarm.types import PeerId

SANE_NORM = 1e3  # a member's gradient per sample, over the lower median of its group's


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an attempt came to.

    Attributes:
        blamed: who is at fault, and why; the attempt is void then.
        finite: whether the averages are.
        norm: global, of the mean gradient.
        agreed: the digest of every group.
    """

    blamed: Mapping[PeerId, str]
    finite: bool = True
    norm: float = 0.0
    agreed: tuple[Agreed, ...] = ()


def judge(shares: Sequence[Share], reports: Mapping[PeerId, Report]) -> Verdict:
    """The verdict on an attempt in which every member of `shares` has reported an average of each of its groups."""
    blamed = _insane(shares, reports)
    finite, squared, agreed = True, 0.0, []
    for group, averages in sorted(_by_group(reports).items()):
        blamed |= _deviating(averages)
        finite = finite and all(average.finite for average in averages.values())
        squared += sum(average.squared for average in averages.values())
        agreed.append(Agreed(group, digest_of(averages[min(averages)])))
    norm = math.sqrt(squared) if finite else 0.0
    return Verdict(blamed, finite and math.isfinite(norm), norm, tuple(agreed))


def digest_of(average: Averaged) -> bytes:
    """One digest of all parts of an average."""
    return hashlib.sha256(b"".join(peer.encode() + digest for peer, digest in average.parts)).digest()


def _by_group(reports: Mapping[PeerId, Report]) -> dict[str, dict[PeerId, Averaged]]:
    groups: dict[str, dict[PeerId, Averaged]] = defaultdict(dict)
    for peer, report in reports.items():
        for average in report.averages:
            groups[average.group][peer] = average
    return groups


def _deviating(averages: Mapping[PeerId, Averaged]) -> dict[PeerId, str]:
    """Who holds something else than the others: of a part, the one that differs, or the owner that told two stories."""
    parts: dict[str, dict[PeerId, bytes]] = defaultdict(dict)
    for peer, average in averages.items():
        for owner, digest in average.parts:
            parts[owner][peer] = digest
    blamed: dict[PeerId, str] = {}
    for owner, digests in parts.items():
        if len(set(digests.values())) == 1 and len(digests) == len(averages):
            continue
        (common, count), *_ = Counter(digests.values()).most_common()
        if digests.get(PeerId(owner)) == common and count > 1:
            others = {peer for peer in averages if digests.get(peer) != common}
            blamed |= dict.fromkeys(others, "holds another average than the others")
        else:
            blamed[PeerId(owner)] = "sent different averages to different members"
    return blamed


def _insane(shares: Sequence[Share], reports: Mapping[PeerId, Report]) -> dict[PeerId, str]:
    """Whose gradient is far larger, per sample, than those of its group."""
    samples = {share.peer: share.samples for share in shares}
    squared: dict[str, Counter[str]] = defaultdict(Counter)
    for report in reports.values():
        for finding in report.findings:
            squared[finding.group][finding.peer] += finding.squared  # type: ignore[assignment]
    blamed = {}
    for sums in squared.values():
        norms = {peer: math.sqrt(value) / samples[peer] for peer, value in sums.items() if samples.get(peer)}
        if len(norms) < 2:
            continue
        usual = statistics.median_low(norms.values())
        for peer, norm in norms.items():
            if norm > SANE_NORM * usual > 0:
                blamed[PeerId(peer)] = f"sent a gradient of norm {norm:.3g} a sample, where {usual:.3g} is usual"
    return blamed


def accused(reports: Mapping[PeerId, Report], order: Sequence[PeerId]) -> PeerId | None:
    """Of those that members say kept them from averaging, the one most say it of; of two, the one later in `order`."""
    voices = Counter(PeerId(peer) for report in reports.values() for peer in report.suspects)
    ranked = [peer for peer in order if peer in voices]
    return max(ranked, key=lambda peer: (voices[peer], order.index(peer)), default=None)


def doubly_counted(counted: Mapping[PeerId, Collection[int]], order: Sequence[PeerId]) -> set[PeerId]:
    """Whose sums of one stage are to be forgotten so that no micro-batch is in two.

    Of those who claim what others claim, first who does so with the most others, then who claims the most: who claims
    all that was lent must not be believed more than those who have run it. Of equals, the last in `order`.
    """
    left = {peer: frozenset(indices) for peer, indices in counted.items()}
    void: set[PeerId] = set()
    while sum(map(len, left.values())) > len(frozenset[int]().union(*left.values())):
        rivals = {
            peer: sum(not mine.isdisjoint(theirs) for other, theirs in left.items() if other != peer)
            for peer, mine in left.items()
        }
        worst = max(left, key=lambda peer: (rivals[peer], len(left[peer]), order.index(peer)))
        void.add(worst)
        del left[worst]
    return void


def differing(digests: Mapping[PeerId, bytes], order: Sequence[PeerId]) -> set[PeerId]:
    """Which replicas of one stage hold other parameters than most; of two halves, the one with the first in `order`."""
    known = {peer: digest for peer, digest in digests.items() if digest}
    if len(set(known.values())) < 2:
        return set()
    holders: dict[bytes, list[PeerId]] = defaultdict(list)
    for peer in sorted(known, key=order.index):
        holders[known[peer]].append(peer)
    right = max(holders.values(), key=lambda peers: (len(peers), -order.index(peers[0])))
    return set(known) - set(right)
