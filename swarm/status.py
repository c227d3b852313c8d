"""What a swarm looks like from outside: which blocks are online how many times, and who hosts them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from swarm.routing import uncovered
from swarm.types import ModelId, Offer, State

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
    return Group(table, _coverage_line(offers, blocks))


def _cells(offer: Offer) -> Iterator[str | Text]:
    yield offer.peer[-8:]
    yield str(offer.span)
    yield Text(offer.state, style="green" if offer.state is State.ONLINE else "yellow")
    yield f"{offer.tokens_per_second:.1f}"
    yield f"{offer.cache_tokens - offer.cache_free}/{offer.cache_tokens}"
    yield str(offer.sessions)
    yield offer.dtype if offer.quantize == "none" else offer.quantize
    yield offer.version


def _coverage_line(offers: Sequence[Offer], blocks: int) -> Text:
    marks = "".join(str(min(count, 9)) if count else "-" for count in coverage(offers, blocks))
    line = Text(f"replicas of blocks 0:{blocks}  {marks}  ")
    if missing := uncovered(offers, blocks):
        return line.append(f"nobody hosts {', '.join(map(str, missing))}", style="bold red")
    return line.append("every block is online", style="green")
