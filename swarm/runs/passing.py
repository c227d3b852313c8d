"""Handing a micro-batch to the next stage, and to another replica of it where the first one fails.

What was sent is kept until the answer is there, so that nothing before the failed hop is done again.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from swarm import tensors
from swarm.errors import BadTensor, Malformed, RemoteError, StaleRound, Unreachable
from swarm.rpc import Rpc
from swarm.runs.wire_passes import Pass, Passed
from swarm.types import Address, PeerId
from swarm.wire import Endpoint

log = logging.getLogger(__name__)

FIRST_PATIENCE = 120.0  # seconds for a pass, before anything was measured
FLOOR = 10.0  # seconds, at least
MULTIPLE = 6.0  # of what passes took of late
EVALUATION = -1  # the round of a pass that only wants the loss


@dataclass(frozen=True, slots=True)
class Parcel:
    """A micro-batch as it goes to a stage. B samples, N positions, H hidden size."""

    round: int
    index: int
    inputs: torch.Tensor  # [B, N] or [B, N, H]
    labels: torch.Tensor  # [B, N]
    position_ids: torch.Tensor | None = None  # [B, N]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    loss: float  # sum over samples, in nats
    gradient: torch.Tensor | None  # with respect to what was sent
    lost: tuple[PeerId, ...]  # who failed on the way


class Passing:
    """Calls the next stage, with the patience that follows from what calls took of late."""

    def __init__(self, rpc: Rpc, run: bytes) -> None:
        self._rpc = rpc
        self._run = run
        self._recent: deque[float] = deque(maxlen=16)

    @property
    def patience(self) -> float:
        """Seconds to wait for an answer."""
        return max(FLOOR, MULTIPLE * statistics.median(self._recent)) if self._recent else FIRST_PATIENCE

    async def send(self, parcel: Parcel, route: Sequence[Sequence[Endpoint]]) -> Answer:
        """Have a micro-batch run by the stages of `route`: for each, its replicas, whom to ask first.

        Raises:
            StaleRound: its round is over.
            RemoteError: no replica of the first of these stages could do it; the last one's reason.
        """
        failed: list[PeerId] = []
        last: RemoteError = Unreachable("nobody holds the next stage")
        for candidate in route[0]:
            try:
                answer = await self._ask(candidate, parcel, route[1:])
                return Answer(answer.loss, answer.gradient, (*failed, *answer.lost))
            except StaleRound:
                raise
            except RemoteError as error:
                blamed = PeerId(error.peer or candidate.peer)
                log.info(
                    "hop failed peer=%s round=%d index=%d error=%r", blamed, parcel.round, parcel.index, str(error)
                )
                failed.append(blamed)
                last = error
        raise last

    async def _ask(self, candidate: Endpoint, parcel: Parcel, onward: Sequence[Sequence[Endpoint]]) -> Answer:
        link = await self._rpc.connect(PeerId(candidate.peer), [Address(*pair) for pair in candidate.addresses])
        parts = [part for part in (parcel.inputs, parcel.labels, parcel.position_ids) if part is not None]
        message = Pass(
            self._run,
            parcel.round,
            parcel.index,
            tensors.spec_of(parcel.inputs),
            tensors.spec_of(parcel.labels),
            None if parcel.position_ids is None else tensors.spec_of(parcel.position_ids),
            [list(candidates) for candidates in onward],
        )
        loop = asyncio.get_running_loop()
        started = loop.time()
        reply, body = await link.call(message, tensors.encode(parts), timeout=self.patience)
        self._recent.append(loop.time() - started)
        if not isinstance(reply, Passed):
            raise Malformed("an answer to Pass that is none", link.peer)
        try:
            return Answer(reply.loss, _gradient(reply, body, parcel), tuple(map(PeerId, reply.lost)))
        except BadTensor as error:
            error.peer = link.peer
            raise


def _gradient(reply: Passed, body: memoryview, parcel: Parcel) -> torch.Tensor | None:
    """Not finite is allowed: it is what a scaled loss may come to, and the round is discarded for it."""
    wanted = parcel.inputs.is_floating_point() and parcel.round != EVALUATION
    if (reply.gradient is not None) != wanted:
        raise BadTensor("a gradient where none belongs, or none where one belongs")
    if reply.gradient is None:
        return None
    (gradient,) = tensors.decode(body, [reply.gradient])
    if gradient.shape != parcel.inputs.shape or not gradient.is_floating_point():
        raise BadTensor(f"a gradient of shape {list(gradient.shape)}, {list(parcel.inputs.shape)} was sent")
    return gradient


def ordered(seats: Iterable[Endpoint], first: Iterable[str], avoid: Iterable[str], turn: int) -> list[Endpoint]:
    """Replicas of one stage: those in `first` before all others, the others in turn, those to `avoid` last."""
    rest = sorted(seats, key=lambda seat: seat.peer)
    turned = rest[turn % len(rest) :] + rest[: turn % len(rest)] if rest else []
    preferred, avoided = set(first), set(avoid)
    return sorted(turned, key=lambda seat: (seat.peer in avoided, seat.peer not in preferred))
