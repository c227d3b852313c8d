"""What a swarm looks like from outside: which blocks are online how many times, and who hosts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from swarm.routing import uncovered
from swarm.types import ModelId, Offer, State


def coverage(offers: Sequence[Offer], num_blocks: int) -> list[int]:
    """How many online peers host each block."""
    counts = [0] * num_blocks
    for offer in offers:
        if offer.state is State.ONLINE:
            for block in offer.span:
                counts[block] += 1
    return counts


def as_json(model: ModelId, offers: Sequence[Offer]) -> dict[str, Any]:
    """One model's state, for programs."""
    blocks = offers[0].num_blocks if offers else 0
    return {
        "model": model,
        "name": offers[0].name if offers else "",
        "num_blocks": blocks,
        "complete": bool(offers) and not uncovered(offers, blocks),
        "coverage": coverage(offers, blocks),
        "missing": [[span.start, span.end] for span in uncovered(offers, blocks)],
        "peers": [_peer_json(offer) for offer in offers],
    }


def _peer_json(offer: Offer) -> dict[str, Any]:
    fields = asdict(offer)
    fields["span"] = [offer.span.start, offer.span.end]
    fields["addresses"] = [str(address) for address in offer.addresses]
    return {name: fields[name] for name in fields if name not in ("model", "name", "num_blocks")}


def as_table(model: ModelId, offers: Sequence[Offer]) -> RenderableType:
    """One model's state, for people."""
    blocks = offers[0].num_blocks
    table = Table(title=f"{offers[0].name}  {model[:12]}", title_justify="left", box=None, pad_edge=False)
    for column in ("peer", "blocks", "state", "tokens/s", "cache", "sessions", "dtype", "address", "version"):
        table.add_column(column, justify="right" if column in ("tokens/s", "cache", "sessions") else "left")
    for offer in sorted(offers, key=lambda offer: (offer.span, offer.peer)):
        used = 1.0 - offer.cache_free / offer.cache_tokens if offer.cache_tokens else 0.0
        table.add_row(
            offer.peer[-8:],
            str(offer.span),
            Text(offer.state, style="green" if offer.state is State.ONLINE else "yellow"),
            f"{offer.tokens_per_second:.1f}",
            f"{used:.0%} of {offer.cache_tokens}",
            str(offer.sessions),
            offer.dtype,
            str(offer.addresses[0]),
            offer.version,
        )
    return Group(table, _coverage_line(offers, blocks))


def _coverage_line(offers: Sequence[Offer], blocks: int) -> Text:
    marks = "".join(str(min(count, 9)) if count else "-" for count in coverage(offers, blocks))
    line = Text(f"replicas of blocks 0:{blocks}  {marks}  ")
    if missing := uncovered(offers, blocks):
        return line.append(f"nobody hosts {', '.join(map(str, missing))}", style="bold red")
    return line.append("every block is online", style="green")
