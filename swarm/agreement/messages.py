"""What members and trainers of a run say to each other, with its limits; `swarm.rounds` says what it means.

Coordinator and members tell each other their whole state, again and again: an `Order` is all that a member needs to
know, a `Status` all that a coordinator does. So a message that is lost, doubled or late does no harm.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from swarm import wire
from swarm.wire import Count, Endpoint, Key, Message, Name, Text

MAX_MEMBERS = 256  # of one run
MAX_TRAINERS = 256
MAX_MICRO_BATCHES = 1 << 14  # of one round
MAX_STAGES = 1024
MAX_SAVED = 16  # rounds that a peer offers to begin from
MAX_STATE_TENSORS = 1 << 16
MAX_GROUPS = 2  # that a member averages in: its stage's, and that of a tied embedding

Round = Annotated[int, msgspec.Meta(ge=-1, le=1 << 40)]  # -1: what was before the first
Term = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Stage = Annotated[int, msgspec.Meta(ge=0, lt=MAX_STAGES)]
Index = Annotated[int, msgspec.Meta(ge=0, lt=MAX_MICRO_BATCHES)]
Digest = Annotated[bytes, msgspec.Meta(max_length=32)]  # empty: not known
Bits = Annotated[bytes, msgspec.Meta(max_length=MAX_MICRO_BATCHES // 8)]  # a set of indices, little-endian
Finite = Annotated[float, msgspec.Meta(ge=0, le=1e300)]
Factor = Annotated[float, msgspec.Meta(ge=0, le=1)]
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e15)]  # bytes a second, 0: not measured
Named = Annotated[list[Name], msgspec.Meta(max_length=MAX_MEMBERS)]
Leases = Annotated[list[tuple[Index, Count]], msgspec.Meta(max_length=256)]  # (index, lease) of what is under way


class Seat(Message):
    """A member in the roster: who, which stage, and where it listens."""

    stage: Stage
    endpoint: Endpoint


class Roster(Message):
    """Who takes part in a round. Its members and its first trainers vote; `swarm.agreement.roster` computes with it."""

    run: Key
    line: Key  # drawn when the run was begun; two beginnings of one run are two lines
    coordinator: Name
    members: Annotated[list[Seat], msgspec.Meta(min_length=1, max_length=MAX_MEMBERS)]
    trainers: Annotated[list[Name], msgspec.Meta(max_length=MAX_TRAINERS)]


class Agreed(Message):
    """The digest of the mean gradient that every member of a group holds."""

    group: Name
    digest: Digest


class Decision(Message):
    """How a round ended: the same for everyone, chosen by a majority of its voters and never changed.

    `outcome` is "commit" (one optimizer step), "skip" (the round is over without one), "stop" (so is the run), "begin"
    (there was no round: the run begins with the next one) or "lost" (nobody of a stage holds what the round began
    with: this line of the run is over, and everyone looks for a round that all stages have saved).
    """

    round: Round
    term: Term
    attempt: Count
    outcome: Annotated[str, msgspec.Meta(pattern="^(commit|skip|stop|begin|lost)$")]
    factor: Factor  # that the mean gradient is multiplied with, so that its global norm is clipped
    norm: Finite  # global, of the mean gradient, before clipping
    agreed: Annotated[list[Agreed], msgspec.Meta(max_length=MAX_STAGES + 1)]
    roster: Roster  # of the next round
    skipped: Count = 0  # rounds in a row, up to this one
    steps: Count = 0  # of the optimizer, that were taken before this round


class Accepted(Message):
    """A decision that a voter has accepted, and in which term."""

    term: Term
    decision: Decision


# --- between a coordinator and its members ---------------------------------------------------------------------------


class Share(Message):
    """One member's part in an attempt: who, in which stage, what of the round it holds, and how fast it is reached."""

    peer: Name
    stage: Stage
    samples: Count
    bandwidth: Rate


class Order(Message, tag="order"):
    """What the coordinator wants now: sent at every change, and as its sign of life.

    `phase` is 0 while the round collects, 1 when members are to count no more, 2 while `shares` average, 3 while the
    voters decide.
    """

    line: Key
    round: Round
    term: Term
    phase: Annotated[int, msgspec.Meta(ge=0, le=3)]
    attempt: Count
    shares: Annotated[list[Share], msgspec.Meta(max_length=MAX_MEMBERS)]
    void: Annotated[list[tuple[Name, Count]], msgspec.Meta(max_length=MAX_MEMBERS)]  # forget the sum of that number
    previous: Decision  # how this round came to be
    counted: Count = 0  # samples so far, for whoever shows progress
    out: Named = msgspec.field(default_factory=list)  # members that are not in this round any more: go through others


class Finding(Message):
    """What one member found of another's gradient while averaging: its squared norm over this member's part."""

    group: Name
    peer: Name
    squared: Annotated[float, msgspec.Meta(ge=0, le=1e308)]


class Averaged(Message):
    """What a member holds of a group after averaging: each part's digest, and the squared norm of its own part."""

    group: Name
    parts: Annotated[list[tuple[Name, Digest]], msgspec.Meta(max_length=MAX_MEMBERS)]
    squared: Annotated[float, msgspec.Meta(ge=0, le=1e308)]
    finite: bool


class Report(Message):
    """How an attempt went for one member.

    It has its averages, or `suspects` who were late or lost, or `unsound` senders of what cannot be a gradient.
    """

    term: Term
    attempt: Count
    averages: Annotated[list[Averaged], msgspec.Meta(max_length=MAX_GROUPS)]
    findings: Annotated[list[Finding], msgspec.Meta(max_length=MAX_GROUPS * MAX_MEMBERS)]
    suspects: Named
    unsound: Annotated[list[tuple[Name, Text]], msgspec.Meta(max_length=MAX_MEMBERS)]


class Status(Message, tag="status"):
    """How far a member is: its answer to an order, and told at every change.

    `number` grows with every status, so that an old one that comes late is known as such.
    """

    line: Key
    round: Round
    term: Term
    number: Count
    ready: bool  # whether the previous round's decision is applied
    closed: Annotated[int, msgspec.Meta(ge=-1, le=1 << 40)]  # the attempt it has stopped counting for, -1 for none
    counted: Bits
    sums: Count  # the number of the sum that holds them: grows when one is forgotten
    report: Report | None
    digest: Digest  # of parameters and optimizer state at the beginning of the round; empty until it is computed
    bandwidth: Rate
    ahead: Bits = b""  # counted of the next round, where that is begun before this one has ended
    stepping: bool = False  # whether it is about to be ready, without anybody's help: it steps, or loads what it saved
    steps: Count = 0  # of the optimizer, that its state has had


# --- between a coordinator and trainers ------------------------------------------------------------------------------


class Lent(Message):
    """A micro-batch that a trainer is to run. Lent anew, it has another `lease` and is to be run again.

    `holders` have counted it already: it need not be added to another sum of their stage, so go through them.
    """

    index: Index
    lease: Count
    holders: Named


class Take(Message, tag="take"):
    """A trainer's sign of life: what it has under way, and that it wants to have `want` of them.

    A micro-batch that it has seen lent and does not hold, it has done with, be it well or not. `ahead` is the same of
    the next round, where that is begun before this one has ended.
    """

    line: Key
    round: Round
    term: Term
    number: Count  # grows with every one
    want: Annotated[int, msgspec.Meta(ge=0, le=256)]
    seen: Count  # the highest lease of this round that it was told of
    holding: Leases
    ahead_seen: Count = 0
    ahead: Leases = msgspec.field(default_factory=list)


class Work(Message, tag="work"):
    """All that a trainer has been lent of a round, and `ahead` of the next one."""

    line: Key
    round: Round
    lent: Annotated[list[Lent], msgspec.Meta(max_length=256)]
    ahead: Annotated[list[Lent], msgspec.Meta(max_length=256)] = msgspec.field(default_factory=list)


# --- deciding, and who may ------------------------------------------------------------------------------------------


class Elect(Message, tag="elect"):
    """The sender would be the coordinator of this round's `term`: the one before is silent.

    First it only asks whether others find so too (`sounding`): one who hears badly is not to disturb the rest.
    """

    line: Key
    round: Round
    term: Term
    sounding: bool


class Granted(Message, tag="granted"):
    """The sender obeys no lower term any more (or would not). It tells what it has accepted in one."""

    line: Key
    round: Round
    term: Term
    sounding: bool
    accepted: Accepted | None


class Propose(Message, tag="propose"):
    """The round is to end like this."""

    line: Key
    round: Round
    term: Term
    decision: Decision


class Agree(Message, tag="agree"):
    """The sender has accepted what was proposed in this term."""

    line: Key
    round: Round
    term: Term


class Chosen(Message, tag="chosen"):
    """A majority has accepted it: so it is."""

    decision: Decision


class Join(Message, tag="join"):
    """The sender is not in the roster and would be, as a member of `stage` or (None) as a trainer.

    A newcomer holds nothing yet but can begin at the rounds in `saved`; one that has fetched a replica's state says
    which `round` it holds, with the state's digest.
    """

    run: Key
    stage: Stage | None
    endpoint: Endpoint | None  # None for a trainer, who is not dialled
    saved: Annotated[list[Round], msgspec.Meta(max_length=MAX_SAVED)]
    round: Round  # -1: none
    digest: Digest


# --- gradients, from member to member (peer.averaging) ---------------------------------------------------------------


class Piece(Message, tag="piece"):
    """A chunk of a member's sum for the owner of that part of the vector, or of the owner's mean for a member.

    Its body is the encoded values. The reply (`Done`) says that it is taken in: so few are on their way at once.
    """

    line: Key
    round: Round
    term: Term
    attempt: Count
    group: Name
    start: Count  # in the group's vector
    count: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]  # values
    mean: bool


# --- state, from a member to a newcomer (peer.training.transfer) ------------------------------------------------------


class OpenState(Message, tag="open-state"):
    """The sender would have a copy of the state, and every step that is made after it."""

    line: Key


class StateOpened(Message, tag="state-opened"):
    """The copy is made. The reply's body is its list of tensors, `length` the bytes of these, one after another."""

    transfer: Key
    round: Round  # at whose beginning it is the state
    length: Count
    digest: Digest


class Entry(Message):
    """One tensor of a state."""

    name: Annotated[str, msgspec.Meta(max_length=256)]
    spec: wire.TensorSpec


class ReadState(Message, tag="read-state"):
    """Some bytes of what is being transferred: of the state (`step` -1), or of the mean gradient of a round's step."""

    transfer: Key
    step: Round
    start: Count
    count: Annotated[int, msgspec.Meta(ge=1, le=1 << 23)]


class StateRead(Message, tag="state-read"):
    """The body is what was asked for."""


class NextStep(Message, tag="next-step"):
    """Tell how `round` ended, as soon as it has."""

    transfer: Key
    round: Round


class StepMade(Message, tag="step-made"):
    """How it ended. The reply's body is the list of the mean gradient's chunks, to be read one after another."""

    decision: Decision


class CodedChunk(Message):
    """Some of the mean gradient of a group: `count` values in `size` bytes."""

    group: Name
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    count: Count
    size: Count


class CloseState(Message, tag="close-state"):
    """The transfer is needed no longer."""

    transfer: Key


wire.carry(Piece, OpenState, StateOpened, ReadState, StateRead, NextStep, StepMade, CloseState)
wire.carry(Order, Status, Take, Work, Elect, Granted, Propose, Agree, Chosen, Join)
