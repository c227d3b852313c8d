"""What a swarm looks like from outside: which blocks are online how many times, who hosts them, and the route there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from swarm.routes.explanation import Choice, Cost, Explanation
from swarm.routing import uncovered
from swarm.types import Hop, ModelId, Offer, State

WIDE = 110  # columns that a whole table needs


def coverage(offers: Sequence[Offer], num_blocks: int) -> list[int]:
    """How many online peers host each block."""
    counts = [0] * num_blocks
    for offer in offers:
        if offer.state is State.ONLINE:
            for block in offer.span:
                counts[block] += 1
    return counts


def as_json(model: ModelId, offers: Sequence[Offer]) -> dict[str, Any]:
    """One model's state, for programs; it has at least one offer, or nobody would know of it."""
    blocks = offers[0].num_blocks
    missing = uncovered(offers, blocks)
    return {
        "model": model,
        "name": offers[0].name,
        "num_blocks": blocks,
        "complete": not missing,
        "coverage": coverage(offers, blocks),
        "missing": [[span.start, span.end] for span in missing],
        "peers": [_peer_json(offer) for offer in offers],
    }


def _peer_json(offer: Offer) -> dict[str, Any]:
    fields = asdict(offer)
    fields["span"] = [offer.span.start, offer.span.end]
    fields["addresses"] = [str(address) for address in offer.addresses]
    return {name: fields[name] for name in fields if name not in ("model", "name", "num_blocks")}


def as_table(model: ModelId, offers: Sequence[Offer], wide: bool = True) -> RenderableType:
    """One model's state, for people; not `wide`, it has no addresses and fits into 80 columns."""
    blocks = offers[0].num_blocks
    table = Table(title=f"{offers[0].name}  {model[:12]}", title_justify="left", box=None, pad_edge=False)
    for column in ("peer", "blocks", "state", "tokens/s", "cache", "sessions", "dtype", "version"):
        numbers = column in ("tokens/s", "cache", "sessions")
        table.add_column(column, justify="right" if numbers else "left", no_wrap=True)
    if wide:
        table.add_column("address", no_wrap=True)
    for offer in sorted(offers, key=lambda offer: (offer.span, offer.peer)):
        table.add_row(*_cells(offer), *([str(offer.addresses[0])] if wide else []))
    return Group(table, *_remarks(offers), _coverage_line(offers, blocks))


def _cells(offer: Offer) -> Iterator[str | Text]:
    yield offer.peer[-8:]
    yield str(offer.span)
    yield Text(offer.state, style="green" if offer.state is State.ONLINE else "yellow")
    yield f"{offer.tokens_per_second:.1f}"
    yield f"{offer.cache_tokens - offer.cache_free}/{offer.cache_tokens}"
    yield str(offer.sessions)
    yield offer.dtype if offer.quantize == "none" else offer.quantize
    yield offer.version


def _remarks(offers: Sequence[Offer]) -> Iterator[Text]:
    if alone := sorted(offer.peer[-8:] for offer in offers if not offer.batched):
        yield Text(f"sessions run one by one at {', '.join(alone)}: this family cannot be batched", style="dim")


def _coverage_line(offers: Sequence[Offer], blocks: int) -> Text:
    marks = "".join(str(min(count, 9)) if count else "-" for count in coverage(offers, blocks))
    line = Text(f"replicas of blocks 0:{blocks}  {marks}  ")
    if missing := uncovered(offers, blocks):
        return line.append(f"nobody hosts {', '.join(map(str, missing))}", style="bold red")
    return line.append("every block is online", style="green")


# --- a route, explained ---------------------------------------------------------------------------------------------


def route_json(route: Explanation | None, problem: str = "") -> dict[str, Any]:
    """A route for programs, in milliseconds per token; nothing where none was asked for."""
    if route is None:
        return {"route": None, "problem": problem} if problem else {}
    hops = [_choice_json(choice) for choice in route.choices]
    return {"route": {"milliseconds": 1000 * route.seconds, "back": 1000 * route.back, "hops": hops}}


def _choice_json(choice: Choice) -> dict[str, Any]:
    return {
        **_hop_json(choice.hop),
        "milliseconds": 1000 * choice.cost.seconds,
        "way": 1000 * choice.cost.way,
        "turn": 1000 * choice.cost.turn,
        "blocks": 1000 * choice.cost.blocks,
        "instead": [_hop_json(hop) for hop in choice.instead],
        "extra": 1000 * choice.extra if math.isfinite(choice.extra) else None,
        "reason": choice.reason,
    }


def _hop_json(hop: Hop) -> dict[str, Any]:
    return {"peer": hop.peer, "span": [hop.span.start, hop.span.end]}


def route_table(route: Explanation) -> RenderableType:
    """A route for people: what each hop takes, and why it is this one. Fits into 80 columns."""
    table = Table(title="route from here, ms per token", title_justify="left", box=None, pad_edge=False)
    for column in ("peer", "blocks", "way", "turn", "run", "all", "next best"):
        table.add_column(column, justify="left" if column in ("peer", "next best") else "right", no_wrap=True)
    for choice in route.choices:
        instead = ", ".join(f"{hop.peer[-8:]} {hop.span}" for hop in choice.instead) or "-"
        table.add_row(choice.hop.peer[-8:], str(choice.hop.span), *_times(choice.cost), instead)
    table.add_row("back", "", f"{1000 * route.back:.1f}")
    table.add_row("in all", "", "", "", "", f"{1000 * route.seconds:.1f}")
    reasons = [
        Text(f"{choice.hop.peer[-8:]} {choice.hop.span}: {choice.reason}", style="dim") for choice in route.choices
    ]
    return Group(table, *reasons)


def _times(cost: Cost) -> Iterator[str]:
    for seconds in (cost.way, cost.turn, cost.blocks, cost.seconds):
        yield f"{1000 * seconds:.1f}"
