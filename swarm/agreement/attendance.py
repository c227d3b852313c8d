"""A run's participant, driven: its messages over rpc, its clock by the loop; `swarm.agreement.participant` decides."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping

from swarm.agreement.assignments import Plan
from swarm.agreement.borrower import Borrower
from swarm.agreement.messages import (
    Agree,
    Chosen,
    Decision,
    Elect,
    Granted,
    Join,
    Lent,
    Order,
    Propose,
    Roster,
    Status,
    Take,
    Work,
)
from swarm.agreement.participant import Participant
from swarm.agreement.roster import members
from swarm.errors import Closed, ShoalError
from swarm.rpc import Link, Rpc
from swarm.types import Address, PeerId
from swarm.wire import Endpoint, Message

log = logging.getLogger(__name__)

TICK = 0.05  # seconds
MAX_UNSENT = 16  # messages to one peer that wait until it is dialled; the oldest are dropped, and said again anyway
KINDS: tuple[type[Message], ...] = (Agree, Chosen, Elect, Granted, Join, Order, Propose, Status, Take, Work)

Known = Callable[[], Mapping[PeerId, Endpoint]]
"""The members of the run that the DHT knows of, and where they listen."""


class Attendance:
    """Drives one participant, from `start` to `close`."""

    def __init__(self, rpc: Rpc, participant: Participant, known: Known) -> None:
        self.rpc = rpc
        self.participant = participant
        self._known = known
        self._loop = asyncio.get_running_loop()
        self._clock: asyncio.Task[None] | None = None
        self._dialling: dict[PeerId, deque[Message]] = {}
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._closed = False
        for kind in KINDS:
            rpc.listen(kind, self._hear)

    def start(self) -> None:
        """Take part from now on."""
        self._clock = asyncio.create_task(self._tick())

    @property
    def now(self) -> float:
        """The participant's clock."""
        return self._loop.time()

    @property
    def round(self) -> int:
        """The round that is being collected, -1 as long as it is not known."""
        return self.participant.round

    @property
    def roster(self) -> Roster | None:
        """Who is in it."""
        return self.participant.previous.roster if self.participant.previous is not None else None

    @property
    def stopped(self) -> bool:
        """Whether the run has stopped: too many rounds in a row had to be skipped."""
        return self.participant.stopped

    async def decided(self) -> Decision:
        """The next decision, in their order. Raises `Closed` when this is closed."""
        await self.until(lambda: bool(self.participant.decided))
        return self.participant.decided.popleft()

    @property
    def samples(self) -> int:
        """How many samples of the round are counted in every stage."""
        order = self.participant.order
        return order.counted if order is not None and order.round == self.round else 0

    def hosts(self, stage: int) -> list[PeerId]:
        """The members of a stage that a micro-batch may go through in this round."""
        order, roster = self.participant.order, self.roster
        out = order.out if order is not None and order.round == self.round else []
        seats = roster.members if roster is not None else []
        return [PeerId(s.endpoint.peer) for s in seats if s.stage == stage and s.endpoint.peer not in out]

    def endpoint_of(self, peer: PeerId) -> Endpoint | None:
        """Where a member listens, as far as roster or DHT tell."""
        seats = self.roster.members if self.roster is not None else []
        return next((seat.endpoint for seat in seats if seat.endpoint.peer == peer), None) or self._known().get(peer)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds()`, which is asked whenever something happened. Raises `Closed` when this is closed."""
        if holds():
            return
        if self._closed:
            raise Closed("this peer takes part in the run no longer")
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((holds, future))
        await future

    # --- in ----------------------------------------------------------------------------------------------------------

    def _hear(self, link: Link, message: Message, body: memoryview) -> None:
        self.participant.receive(link.peer, message, self.now)
        self.flush()

    async def _tick(self) -> None:
        while not self._closed:
            self.participant.meet(self._known().keys())
            self.participant.tick(self.now)
            self.flush()
            await asyncio.sleep(TICK)

    # --- out ---------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send and do what the participant wants sent and done; call it after everything it is told."""
        outbox, self.participant.outbox = self.participant.outbox, []
        for peer, message in outbox:
            self._send(peer, message)
        for holds, future in list(self._waiting):
            if holds() or future.done():
                self._waiting.remove((holds, future))
                if not future.done():
                    future.set_result(None)

    def _send(self, peer: PeerId, message: Message) -> None:
        if (link := self.rpc.link_to(peer)) is not None:
            link.tell(message)
        elif peer in self._dialling:
            self._dialling[peer].append(message)
        elif (endpoint := self.endpoint_of(peer)) is not None:
            self._dialling[peer] = deque([message], maxlen=MAX_UNSENT)
            self.rpc.spawn(self._dial(peer, endpoint))

    async def _dial(self, peer: PeerId, endpoint: Endpoint) -> None:
        try:
            link = await self.rpc.connect(peer, [Address(*pair) for pair in endpoint.addresses])
            for message in self._dialling[peer]:
                link.tell(message)
        except ShoalError as error:
            log.debug("cannot reach a participant peer=%s error=%r", peer[-6:], str(error))
        finally:
            del self._dialling[peer]

    async def close(self) -> None:
        """Take part no longer."""
        self._closed = True
        if self._clock is not None:
            self._clock.cancel()
            await asyncio.gather(self._clock, return_exceptions=True)
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(Closed("this peer takes part in the run no longer"))
        self._waiting.clear()


class TrainerAttendance(Attendance):
    """Drives a trainer: gives it micro-batches, and keeps it within everyone's reach though it does not listen.

    Args:
        want: how many micro-batches it would have under way at once.
    """

    participant: Borrower

    def __init__(self, rpc: Rpc, plan: Plan, known: Known, want: int) -> None:
        super().__init__(rpc, Borrower(plan, rpc.peer, want, asyncio.get_running_loop().time()), known)

    async def next(self) -> tuple[int, Lent]:
        """The next micro-batch to run, and its round. Raises `Closed` once the run or this has stopped."""
        await self.until(lambda: bool(self.participant.todo) or self.participant.stopped)
        if self.participant.stopped:
            raise Closed("the run has stopped: too many rounds in a row had to be skipped")
        return self.participant.todo.popleft()

    def done(self, round_: int, lent: Lent) -> None:
        """A micro-batch has ended, well or not."""
        self.participant.done(round_, lent, self.now)
        self.flush()

    def flush(self) -> None:
        super().flush()
        if self.roster is not None:  # whoever coordinates next must be able to reach us
            for peer in members(self.roster):
                if self.rpc.link_to(peer) is None and peer not in self._dialling:
                    self._reach(peer)

    def _reach(self, peer: PeerId) -> None:
        if (endpoint := self.endpoint_of(peer)) is not None:
            self._dialling[peer] = deque(maxlen=MAX_UNSENT)
            self.rpc.spawn(self._dial(peer, endpoint))
