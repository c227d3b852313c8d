"""Which peers to avoid for a while: longer with every failure, forgiven with time. Pure: the clock is passed in."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.types import PeerId

FIRST_SECONDS = 5.0  # after one failure
FIRST_REST_SECONDS = 0.5
LONGEST_REST_SECONDS = 1.0  # so that the only host of a block is asked soon after it has come back
LONGEST_SECONDS = 300.0
FORGIVEN_SECONDS = 600.0  # without a failure, and the count begins anew


@dataclass(slots=True)
class _Record:
    failures: int
    failed: float  # when, the last time
    until: float

    @property
    def rested(self) -> float:
        """When it may be asked again where nobody else is left."""
        return self.failed + min(FIRST_REST_SECONDS * 2.0 ** (self.failures - 1), LONGEST_REST_SECONDS)


class Avoidance:
    """One client's memory of who failed it."""

    def __init__(self) -> None:
        self._records: dict[PeerId, _Record] = {}

    def failed(self, peer: PeerId, now: float) -> None:
        """`peer` failed; twice at the same moment counts once."""
        record = self._records.get(peer)
        if record is None or now - record.failed > FORGIVEN_SECONDS:
            record = self._records[peer] = _Record(0, now, now)
        elif now == record.failed:
            return
        record.failures += 1
        record.failed = now
        record.until = now + min(FIRST_SECONDS * 2.0 ** (record.failures - 1), LONGEST_SECONDS)

    def forgive(self, peer: PeerId, now: float) -> None:
        """The last time, it may have been another."""
        if (record := self._records.get(peer)) is not None:
            record.until = now

    def avoided(self, now: float) -> set[PeerId]:
        """Whom to do without if that is possible."""
        return {peer for peer, record in self._records.items() if record.until > now}

    def resting(self, now: float) -> set[PeerId]:
        """Whom not to ask again yet even where nobody else is left; a part of those that are avoided."""
        return {peer for peer, record in self._records.items() if now < min(record.rested, record.until)}

    def __repr__(self) -> str:
        return f"<Avoidance peers={len(self._records)}>"
