"""What a member wants done, in the order in which it is to be done: see `swarm.agreement.member`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from swarm.agreement.messages import Decision, Order, Roster
from swarm.types import PeerId


@dataclass(frozen=True, slots=True)
class Restore:
    """Load what was saved at the beginning of `round`, then say `holds`."""

    round: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Take the state from one of `sources` and then every step it makes, saying `holds` each time, until `Settled`."""

    sources: tuple[PeerId, ...]
    roster: Roster


@dataclass(frozen=True, slots=True)
class Settled:
    """What is held is what is needed: stop fetching; from now on the steps are our own."""


@dataclass(frozen=True, slots=True)
class Average:
    """Average the sums as the order says, then say `averaged`. What was begun before is void."""

    order: Order


@dataclass(frozen=True, slots=True)
class Abandon:
    """The attempt that was begun is void."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Step, or skip the round, as was decided; then say `holds`."""

    decision: Decision


@dataclass(frozen=True, slots=True)
class Void:
    """Forget the sums of a round, this one or the next, then say `voided`."""

    round: int


Effect: TypeAlias = Restore | Fetch | Settled | Average | Abandon | Apply | Void
