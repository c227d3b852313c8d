"""What `swarm status` shows, once or again and again."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from swarm.errors import RemoteError

if TYPE_CHECKING:
    from swarm.console.outlook import Outlook, Sight

WATCH_SECONDS = 1.0


async def show_status(
    initial_peers: list[str], model_name: str | None, as_json: bool, watch: bool, route: bool
) -> None:
    from swarm.console.outlook import Outlook

    async with await Outlook.start(initial_peers, route) as outlook:
        if watch:
            await _watch(outlook, model_name, as_json)
        else:
            _show(await outlook.look(model_name), model_name, as_json)


async def _watch(outlook: Outlook, model_name: str | None, as_json: bool) -> None:
    screen = Console()
    live = Live(console=screen, auto_refresh=False) if screen.is_terminal and not as_json else None
    with live or nullcontext():
        while True:
            with suppress(RemoteError):  # the DHT did not answer in time: what was seen last stays
                sights = await outlook.look(model_name)
                if live is None:
                    _show(sights, model_name, as_json)
                else:
                    live.update(_tables(sights, model_name, screen), refresh=True)
            await asyncio.sleep(WATCH_SECONDS)


def _tables(sights: list[Sight], model_name: str | None, screen: Console) -> RenderableType:
    from swarm.console.status import WIDE, as_table, route_table

    if not sights:
        return f"nobody hosts {model_name or 'a model'}"
    wide = screen.width >= WIDE or not screen.is_terminal
    parts: list[RenderableType] = []
    for sight in sights:
        parts.append(as_table(sight.model, sight.offers, wide))
        if sight.route is not None:
            parts.append(route_table(sight.route))
        elif sight.problem:
            parts.append(Text(f"no route: {sight.problem}", style="red"))
    return Group(*parts)


def _show(sights: list[Sight], model_name: str | None, as_json: bool) -> None:
    from swarm.console.status import WIDE, route_json
    from swarm.console.status import as_json as described

    if as_json:
        print(json.dumps([described(s.model, s.offers) | route_json(s.route, s.problem) for s in sights]), flush=True)
        return
    screen = Console()
    if not screen.is_terminal:
        screen.width = WIDE  # a file has no edge
    screen.print(_tables(sights, model_name, screen))
