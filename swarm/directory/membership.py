"""Our place in the DHT, whatever happens to the daemon: when a node dies, the next one takes over.

The next node has the same key and port, inherits the records that the last one kept, and joins through everybody
known so far. What was being asked is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from swarm.directory.dht import Node, Validator, parse_address
from swarm.errors import CannotJoin, Closed, DeadlineExceeded, LocalError
from swarm.identity import Identity

_FIRST_BACK_OFF, _LAST_BACK_OFF = 0.1, 10.0  # seconds between two attempts to start a daemon again

_Result = TypeVar("_Result")
Question = Callable[[Node], Coroutine[Any, Any, _Result]]
logger = logging.getLogger(__name__)


class Membership:
    """A DHT node, one after another.

    Attributes:
        addresses: multiaddrs with PeerId that others can dial; none in client mode.
        restarts: how often a daemon died and was replaced.
        restarted: set when it happens; whoever waits for it clears it.
    """

    def __init__(self, node: Node, start: Callable[[int], Awaitable[Node]], initial_peers: Sequence[str]) -> None:
        self._node, self._start, self._initial_peers = node, start, tuple(initial_peers)
        self._known: set[str] = set()
        self._up, self._closed = asyncio.Event(), False
        self._keeper: asyncio.Task[None] | None = None
        self.addresses: list[str] = []
        self.restarts, self.restarted = 0, asyncio.Event()

    @classmethod
    async def start(
        cls,
        identity: Identity,
        initial_peers: Sequence[str],
        *,
        host: str,
        port: int,
        announce: Sequence[str],
        client_mode: bool,
    ) -> Membership:
        """Start a node and join. Arguments and errors are those of `Discovery.start`."""
        for address in (*initial_peers, *(f"{visible}/p2p/{identity.peer}" for visible in announce)):
            parse_address(address)

        async def start(port: int) -> Node:
            return await Node.start(
                identity, host=host, port=port, announce=announce, client_mode=client_mode, validator=Validator()
            )

        self = cls(await start(port), start, initial_peers)
        try:
            await self._node.join(initial_peers)
            self.addresses = await self._node.addresses()
        except BaseException:
            await self._node.stop()
            raise
        self._up.set()
        self._keeper = asyncio.create_task(self._keep_up())
        return self

    @property
    def daemon_pid(self) -> int:
        """The process id of the present p2pd."""
        return self._node.daemon_pid

    async def ask(self, question: Question[_Result], seconds: float) -> _Result:
        """The answer of the node, or of its successor if it dies over the question.

        Raises `DeadlineExceeded` after `seconds`, `Closed` after `close`.
        """
        try:
            async with asyncio.timeout(seconds):
                while True:
                    node = await self._living()
                    with contextlib.suppress(_NodeDied):
                        return await _answer(node, question)
                    if self._node is node and not self._closed:  # its keeper has not noticed yet
                        self._up.clear()
        except TimeoutError:
            raise DeadlineExceeded(f"the DHT did not answer in {seconds:.0f} s") from None

    async def _living(self) -> Node:
        await self._up.wait()
        if self._closed:
            raise Closed("this Discovery was closed")
        return self._node

    async def look_around(self, seconds: float) -> int:
        """Remember who is connected to us, and how many these are; join again if nobody is in the routing table."""
        known = await self.ask(Node.known, seconds)
        self._known = set(known.values()) or self._known
        if self._node.neighbours == 0:
            await self._join_again()
        return len(known)

    async def _keep_up(self) -> None:
        while True:
            await asyncio.wait({self._node.gone})
            logger.warning("the DHT daemon died; starting another")
            self._up.clear()
            self.restarts += 1
            before = self._node
            await before.stop()
            self._node = await self._start_again(before.port)
            self._node.inherit(before)
            await self._join_again()
            self._up.set()
            self.restarted.set()

    async def _start_again(self, port: int) -> Node:
        back_off = _FIRST_BACK_OFF
        while True:
            try:
                return await _started(self._start(port))
            except (LocalError, OSError) as error:
                logger.warning("the DHT daemon cannot be started (%s); again in %.1f s", error, back_off)
            await asyncio.sleep(back_off)
            back_off = min(2 * back_off, _LAST_BACK_OFF)

    async def _join_again(self) -> None:
        """Back into the swarm by whoever is still there; alone, if nobody is."""
        try:
            await self._node.join({*self._initial_peers, *self._known})
        except CannotJoin as error:
            # Whom the first peer of a swarm knows may be clients alone, and these do not answer.
            level = logging.WARNING if self._initial_peers else logging.INFO
            logger.log(level, "nobody of the swarm answers: %s", error)

    async def close(self) -> None:
        """Stop the node and everything around it. May be repeated."""
        if self._closed or self._keeper is None:
            return
        self._closed = True
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
        self._up.set()  # whoever waits for a node shall see that there will be none
        await self._node.stop()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "up" if self._up.is_set() else "restarting"
        return f"<Membership {state} restarts={self.restarts} {self._node!r}>"


async def _started(start: Awaitable[Node]) -> Node:
    """Start a node, all the way: one that is given up halfway would leave its connections open."""
    starting = asyncio.ensure_future(start)
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        (node,) = await asyncio.gather(starting, return_exceptions=True)
        if isinstance(node, Node):
            await node.stop()
        raise


class _NodeDied(Exception):
    """The question has to be asked again, of the next node."""


async def _answer(node: Node, question: Question[_Result]) -> _Result:
    asking = asyncio.create_task(question(node))
    try:
        await asyncio.wait({asking, node.gone}, return_when=asyncio.FIRST_COMPLETED)
        if not node.gone.done():
            return asking.result()
    except (OSError, EOFError):  # the daemon hung up: its end is being noticed
        await asyncio.wait({node.gone})
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    raise _NodeDied
