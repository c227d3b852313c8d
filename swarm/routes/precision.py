"""How exact the blocks are that a session runs through: chosen when it begins, and kept to its end. Pure.

Peers may keep their weights quantized (`peer serve --quantize`), and say so in their offers. What becomes of that is
the client's to say:

- `EXACT`: such peers are never used. Where nobody else hosts a block there is no route.
- `STEADY`, what clients do if they are not told otherwise: exact peers wherever there are any, quantized ones for the
  blocks that would be missing without, which is told. Once the session has begun, every block keeps its kind: when a
  host fails, only another of the same kind takes its place. So an answer is never half of one model and half of
  another, and whoever runs it again gets the same.
- `ANY`: the fastest, whatever they are, and whoever is left when a host fails.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from swarm.routing import uncovered
from swarm.types import Offer, Route, Span, State

KINDS = ("none", "int8", "int4")
"""From exact to least exact."""


class Precision(enum.Enum):
    """What a client accepts."""

    EXACT = "exact"
    STEADY = "steady"
    ANY = "any"


class Kinds:
    """What one session may use: which kind each of its blocks began with."""

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self._kept: dict[int, str] = {}

    def allowed(self, offers: Iterable[Offer], span: Span, begun: bool) -> list[Offer]:
        """What of `offers` may serve blocks of `span`: of each, the blocks that it may be used for.

        `begun` is whether the session holds anything yet.
        """
        if self.precision is Precision.ANY:
            return list(offers)
        if self.precision is Precision.EXACT:
            return [offer for offer in offers if offer.quantize == "none"]
        return list(self._as_begun(offers, span) if begun else best(offers, span))

    def _as_begun(self, offers: Iterable[Offer], span: Span) -> Iterator[Offer]:
        """Of each offer, the blocks that began with its kind."""
        runs = {kind: _runs(block for block in span if self._kept.get(block, kind) == kind) for kind in KINDS}
        return (part for offer in offers for part in _within(offer, runs.get(offer.quantize, [])))

    def note(self, route: Route) -> None:
        """These hops serve the session from now on."""
        self._kept.update({block: hop.quantize for hop in route for block in hop.span})

    def quantized(self) -> dict[str, list[Span]]:
        """Which blocks are run by quantized peers, by kind."""
        found = {kind: _runs(block for block in sorted(self._kept) if self._kept[block] == kind) for kind in KINDS[1:]}
        return {kind: spans for kind, spans in found.items() if spans}

    def refused(self, offers: Iterable[Offer], missing: Iterable[Span]) -> str:
        """Why peers that do host `missing` are not used; nothing where there are none."""
        spans = list(missing)
        hosts = [offer for offer in offers if offer.state is State.ONLINE and any(_within(offer, spans))]
        kinds = sorted({"exact" if offer.quantize == "none" else offer.quantize for offer in hosts})
        if not kinds or self.precision is Precision.ANY:
            return ""
        names = " and ".join(kinds)
        if self.precision is Precision.EXACT:
            return f"; {names} peers host them, and exact ones were asked for"
        return f"; {names} peers host them, but the session began with others: allow it to mix them, or begin anew"


def best(offers: Iterable[Offer], span: Span) -> Iterator[Offer]:
    """Of `offers`, the exact ones; of those that are less exact, the blocks of `span` that the others do not have."""
    known = list(offers)
    chosen: list[Offer] = []
    for kind in KINDS:
        missing = uncovered(chosen, span)
        chosen += [part for offer in known if offer.quantize == kind for part in _within(offer, missing)]
    return iter(chosen)


def _within(offer: Offer, spans: Sequence[Span]) -> Iterator[Offer]:
    """`offer` for as many neighbouring blocks as possible of those in `spans`: a session is at a peer only once."""
    ends = [(max(offer.span.start, span.start), min(offer.span.end, span.end)) for span in spans]
    if common := [Span(start, end) for start, end in ends if start < end]:
        yield replace(offer, span=max(common, key=len))


def _runs(blocks: Iterable[int]) -> list[Span]:
    """Ascending numbers as spans."""
    runs: list[Span] = []
    for block in blocks:
        if runs and runs[-1].end == block:
            runs[-1] = Span(runs[-1].start, block + 1)
        else:
            runs.append(Span(block, block + 1))
    return runs
