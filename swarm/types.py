"""Values that every room speaks in: frozen, comparable, without behaviour beyond themselves."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NewType

PeerId = NewType("PeerId", str)
"""A peer's public key in libp2p's spelling (base58 of an identity multihash); `swarm.identity` makes and checks it."""

ModelId = NewType("ModelId", str)
"""A model named by its content: the hash of its config and weights, in hex; `swarm.files.checkpoint` computes it."""

SessionId = NewType("SessionId", bytes)
"""Sixteen random bytes, known only to the client and to the peers on its route."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A half-open range of blocks, `[start, end)`, never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"a span needs 0 <= start < end, not {self.start}:{self.end}")

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __contains__(self, other: int | Span) -> bool:
        if isinstance(other, Span):
            return self.start <= other.start and other.end <= self.end
        return self.start <= other < self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """Where a peer listens on the data plane."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class State(enum.StrEnum):
    """What a peer's offer says of itself."""

    JOINING = "joining"
    ONLINE = "online"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Coordinate:
    """Where a peer is, as far as latency goes; `swarm.coordinates` computes with it."""

    vector: tuple[float, float, float]  # seconds of round trip
    height: float  # seconds of round trip over the last mile, which no vector can express
    error: float  # relative, of what it predicts; 1 knows nothing


@dataclass(frozen=True, slots=True)
class Offer:
    """What a peer tells the swarm about itself: signed, expiring, renewed well before it expires."""

    peer: PeerId
    model: ModelId
    name: str  # what people call the model: a hint for the eye, `model` is what counts
    num_blocks: int  # of the whole model
    span: Span
    addresses: tuple[Address, ...]
    state: State
    dtype: str  # what the stage computes in: "float32", "bfloat16" or "float16"
    tokens_per_second: float  # one session's decode through the whole span, measured by the peer
    cache_tokens: int  # how many tokens all its sessions may hold together
    cache_free: int  # how many of them are not leased now
    sessions: int  # how many sessions hold a lease now
    version: str  # of Shoal
    issued: float  # DHT time in seconds since the epoch
    expires: float
    coordinate: Coordinate | None = None  # None: not known yet
    seconds_per_block: float = 0.0  # one session's decode of one token, measured by the peer; 0: not measured
    prefill_seconds_per_block: float = 0.0  # of 512 positions of one session, measured by the peer; 0: not measured
    queue: float = 0.0  # steps that another waits for, on average of late
    fixed: bool = False  # it stays at its span whatever others need: it was told to
    quantize: str = "none"  # how the blocks' weights are kept: "none" is exact, "int8" and "int4" are less
    batched: bool = True  # steps of several sessions run together; else one by one, as some families must


@dataclass(frozen=True, slots=True)
class Hop:
    """One peer of a route and the blocks it runs there: a part of its span, or all of it."""

    peer: PeerId
    addresses: tuple[Address, ...]
    span: Span
    quantize: str = "none"  # how the peer keeps the blocks' weights

    def __str__(self) -> str:
        kind = "" if self.quantize == "none" else f" {self.quantize}"
        return f"{self.peer[-6:]}[{self.span}{kind}]"


@dataclass(frozen=True, slots=True)
class Route:
    """Hops that together cover every block once, in order."""

    hops: tuple[Hop, ...]

    def __post_init__(self) -> None:
        for left, right in zip(self.hops, self.hops[1:], strict=False):
            if left.span.end != right.span.start:
                raise ValueError(f"a route needs contiguous spans, not {left.span} then {right.span}")

    def __len__(self) -> int:
        return len(self.hops)

    def __iter__(self) -> Iterator[Hop]:
        return iter(self.hops)

    def __str__(self) -> str:
        return " -> ".join(map(str, self.hops))
