"""One session as its peer sees it: the ways to its client, its next hop and its spares, and what was passed on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from peer.outlet import Failed, Outlet
from peer.scheduler import NORMAL, Work
from peer.stage import SessionState, StepInput
from swarm import tensors, wire
from swarm.errors import Forgotten, RemoteError, UnknownSession, Unreachable
from swarm.hops.history import History, Mark, Piece
from swarm.links.frames import Buffer
from swarm.rpc import Link, Rpc
from swarm.types import PeerId, SessionId
from swarm.wire import Rounding

log = logging.getLogger(__name__)

REPLAY_POSITIONS = 256  # of a replayed step, at most: other sessions' steps go between
FEED_SECONDS = 0.2  # between two times that spares are told what is new
ECHO_SECONDS = 0.3  # for the next hop to show that the way to it still is one
REDIAL_SECONDS = 0.5  # for it to answer on another, where it is not; both well within what the client waits for us
DIAL_SECONDS = 2.5  # for the next hop to answer, well within what the client waits for us


@dataclass(slots=True)
class Spare:
    """Who is told late what the next hop is told."""

    outlet: Outlet
    hops: int  # that it goes through
    mark: Mark = field(default_factory=Mark)  # how far it was told


class ServedSession:
    """A session's state here, and everybody that it has to do with.

    Attributes:
        next: who runs the blocks after ours; None where we are the last.
        history: what was passed on; None where that was too much to keep.
        epoch: of the latest attempt of which something came; what is older is dropped.
        came: of the latest of which the step itself came.
        opened: of the latest in which the client said its terms.
        priority: of its steps.
        outdated: whether what it holds was computed with weights that have changed since.
    """

    def __init__(self, rpc: Rpc, key: SessionId, link: Link, state: SessionState) -> None:
        self.key = key
        self.client = Outlet(rpc, link)
        self.state = state
        self.next: Outlet | None = None
        self.history: History | None = History()
        self.epoch = 0
        self.came = 0
        self.opened = 0
        self.priority = NORMAL
        self.rounding: Rounding | None = None  # of what is passed on; chosen when the session is opened
        self.returning: list[Work] = []  # steps that wait for what the session holds to come back to the pool
        self.outdated = False
        self._rpc = rpc
        self._end = state.model.span.end
        self._spares: dict[PeerId, Spare] = {}
        self._told: Spare | None = None  # what the next hop was until now, and told
        self._failed: Failed | None = None  # hears where what was passed on last may not have come
        self._feeding: asyncio.TimerHandle | None = None
        self._closed = False
        self._answering = 0, 0  # epoch and number of the step that is answered
        self._answer: list[torch.Tensor] = []  # what the client wants of the step that is run in pieces

    def heard_from(self, link: Link) -> None:
        """The client speaks over `link`: over another than before, where it lost its connection and came back."""
        if self.client.link is not link:
            self.client = Outlet(self._rpc, link)

    @property
    def outward(self) -> int:
        """Messages that wait for their way to be free, and steps for their session to be back."""
        return len(self.client) + (len(self.next) if self.next else 0) + len(self.returning)

    async def set_next(self, endpoint: wire.Endpoint | None) -> None:
        """Who runs the following blocks from now on.

        Raises `Unreachable`, `WrongKey`, or `UnknownSession` where the session ended meanwhile.
        """
        same = self.next is not None and endpoint == self.next.endpoint
        if self.next is not None and same and await self.next.answers(self.next.link.soon(ECHO_SECONDS)):
            return
        seconds = self.next.link.soon(REDIAL_SECONDS, trips=4) if self.next is not None and same else DIAL_SECONDS
        outlet: Outlet | None = None
        told: Spare | None = None
        if endpoint is not None and (spare := self._spares.get(PeerId(endpoint.peer))) is not None:
            outlet, told = spare.outlet, spare
        elif endpoint is not None:
            outlet = await self.dial(endpoint, seconds)
        if self._closed:
            raise UnknownSession("the session ended while its next hop was dialled")
        if self.next is not None:
            self.next.close()
        self.next, self._told = outlet, told
        self._spares.clear()
        if outlet is not None:
            outlet.watch(self._lost_next)

    async def dial(self, endpoint: wire.Endpoint, seconds: float = DIAL_SECONDS) -> Outlet:
        """The way to another peer. Raises `Unreachable` or `WrongKey`."""
        try:
            async with asyncio.timeout(seconds):
                return await Outlet.open(self._rpc, endpoint)
        except TimeoutError:
            raise Unreachable(f"{endpoint.peer} did not answer in time", endpoint.peer) from None

    # --- steps: out ------------------------------------------------------------------------------------------------

    def pass_on(self, message: wire.Step, step: StepInput, output: torch.Tensor, more: bool, failed: Failed) -> None:
        """A step, or a piece with `more` to come, was run: tell the next hop or, after the last, the client.

        `failed` hears where that cannot be.
        """
        self._failed = failed
        if self.next is not None:
            onward, replay = replace(step, hidden=output), max(message.replay - 1, 0)
            header, body = step_message(
                self.key, message.epoch, self._end, message.keep, onward, self.rounding, replay, more
            )
            self.next.send(header, body, failed)
        elif not message.replay:
            self._answer_client(message, output, more)

    def _lost_next(self, error: RemoteError) -> None:
        """The client is told at once, rather than finding out by its deadline."""
        if self._failed is not None:
            self._failed(error)

    def _answer_client(self, message: wire.Step, output: torch.Tensor, more: bool) -> None:
        """Tell the client, once the last piece is there."""
        if (message.epoch, message.number) != self._answering:
            self._answering, self._answer = (message.epoch, message.number), []
        self._answer.append(output)
        wanted = self._answer[0] if len(self._answer) == 1 else torch.cat(self._answer, 1)
        wanted = wanted[:, -message.keep :] if message.keep else wanted
        self._answer = [wanted] if more and message.keep else self._answer
        if not more:
            spec = tensors.spec_of(wanted, self.rounding or "float32")
            answer = wire.Output(message.session, message.epoch, message.number, spec)
            self.client.send(answer, tensors.encode([wanted], [spec]), unheard)
            self._answer = []

    def keep(self, step: StepInput, output: torch.Tensor) -> None:
        """Upstream backup: remember what was passed on."""
        if self.next is None:
            self.history = None
            return
        if self._spares and self._feeding is None:
            self._feeding = asyncio.get_running_loop().call_later(FEED_SECONDS, self._feed)
        if step.position == 0 and self.history is None:
            self.history = History()
        if self.history is None:
            return
        try:
            self.history.record(
                step.number, Piece(step.position, output, step.position_ids, step.mask, step.rows), step.since
            )
        except ValueError:  # we were the last hop before, or have kept nothing for a while
            self.history = None

    def kept_output(self, message: wire.Step) -> torch.Tensor | None:
        """What a step put out that comes again after a failure further on; None where it has to be run.

        For a session of which nothing waits to be run.
        """
        history, state = self.history, self.state
        end = message.position + message.hidden.shape[1]
        same = history is not None and history.mark == (message.number, end) == (state.number, state.length)
        if history is None or not same or message.replay or message.more or self.next is None:
            return None
        [piece] = history.pieces(message.position, end, end - message.position)
        return piece.hidden

    # --- replay, spares --------------------------------------------------------------------------------------------

    def replay(self, message: wire.Replay, failed: Failed) -> None:
        """Bring the next hop to where `message` wants it. Raises `Forgotten`."""
        history = self.history
        if self.next is None or history is None or history.length < message.end:
            raise Forgotten(f"{history.length if history else 0} of {message.end} positions are kept")
        self.epoch = max(self.epoch, message.epoch)
        spare, self._told = self._told, None
        if spare is None or spare.hops != message.hops:
            spare = Spare(self.next, message.hops, Mark(message.number, message.length))
        self._update(spare, history, message.end, failed)

    def feed(self, outlet: Outlet, hops: int) -> None:
        """From now on, tell a spare too. Raises `Forgotten`."""
        if self.history is None:
            raise Forgotten("what was passed on is not kept")
        self._spares[outlet.peer] = Spare(outlet, hops)
        self._feed()

    def _feed(self) -> None:
        """Tell the spares what is new: after the step, together with others, so that no step waits for it."""
        self._feeding = None
        if self.history is None:
            self._spares.clear()
            return
        for peer, spare in self._spares.items():
            self._update(spare, self.history, self.history.length, self._dropping(peer))

    def drop_spare(self, peer: PeerId) -> bool:
        """If `peer` is a spare, tell it no more: it missed something, or has another part in the session now."""
        return self._spares.pop(peer, None) is not None

    def _dropping(self, peer: PeerId) -> Failed:
        def drop(error: RemoteError) -> None:
            self.drop_spare(peer)

        return drop

    def _update(self, spare: Spare, history: History, end: int, failed: Failed) -> None:
        for piece in history.update(spare.mark, end, REPLAY_POSITIONS):
            step = StepInput(
                history.number,
                piece.position,
                piece.hidden,
                piece.rows,
                piece.position_ids,
                piece.mask,
                since=piece.since,
            )
            header, body = step_message(self.key, self.epoch, self._end, 0, step, self.rounding, spare.hops)
            spare.outlet.send(header, body, failed)
        spare.mark = history.mark

    def close(self) -> None:
        """It is over."""
        self._closed = True
        if self.next is not None:
            self.next.close()
        if self._feeding is not None:
            self._feeding.cancel()
        self._spares.clear()
        self._failed = None  # which knows the session

    def __repr__(self) -> str:
        return f"<ServedSession {self.key.hex()[:8]} {self.state.model.span} at {self.state.length}>"


def unheard(error: RemoteError) -> None:
    """The client is gone: nobody is left to tell, and its lease will end."""


def step_message(
    key: bytes,
    epoch: int,
    block: int,
    keep: int,
    step: StepInput,
    rounding: Rounding | None = None,
    replay: int = 0,
    more: bool = False,
) -> tuple[wire.Step, Sequence[Buffer]]:
    """A step as it goes to the next hop, its hidden states rounded so."""
    extras = [extra for extra in (step.position_ids, step.mask) if extra is not None]
    header = wire.Step(
        key,
        epoch,
        step.number,
        step.position,
        keep,
        tensors.spec_of(step.hidden, rounding or "float32"),
        step.rows,
        None if step.position_ids is None else tensors.spec_of(step.position_ids),
        None if step.mask is None else tensors.spec_of(step.mask),
        replay,
        more,
        step.since or 0,
        block,
    )
    return header, tensors.encode([step.hidden, *extras], header.specs())


def step_input(message: wire.Step, body: memoryview) -> StepInput:
    """A step that has come. Raises `BadTensor`."""
    views = iter(tensors.decode(body, message.specs()))
    return StepInput(
        number=message.number,
        position=message.position,
        hidden=next(views),
        rows=message.rows,
        position_ids=next(views) if message.position_ids is not None else None,
        mask=next(views) if message.mask is not None else None,
        since=message.since if message.replay else None,
    )
