"""A relay makes a link late, and nothing else of it: order, bytes, ends and throughput are those of loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import relay
import torch
from inprocess import save_llama
from nursery import Forked
from processes import LocalSwarm
from relay import HOST, Relay

from swarm import SwarmCache, SwarmModelForCausalLM
from swarm.files.checkpoint import Checkpoint

ONE_WAY = 0.05

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def relayed(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> AsyncIterator[Stream]:
    """A connection to `serve`, which listens behind a relay."""
    server = await asyncio.start_server(serve, HOST, 0)
    monkeypatch.setattr(relay, "listening_port", lambda pid: server.sockets[0].getsockname()[1])
    between = Relay(ONE_WAY)
    port = await between.open()
    between.lead(port, os.getpid())
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
        await between.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says back what it hears, and ends when the other side does."""
    while piece := await reader.read(1 << 16):
        writer.write(piece)
        await writer.drain()
    writer.close()


async def test_what_is_said_is_heard_later_and_no_sooner(monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> None:
    async with relayed(monkeypatch, echo) as (reader, writer):
        for word in (b"first", b"second"):
            started = time.monotonic()
            writer.write(word)
            assert await reader.readexactly(len(word)) == word
            assert time.monotonic() - started >= 2 * ONE_WAY


async def test_bytes_keep_their_order_and_the_end_comes_last(
    monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    """More than the relay keeps under way at a time, in pieces of any size."""
    monkeypatch.setattr(relay, "WINDOW", 1 << 18)
    said = random.Random(0).randbytes(3 << 20)

    async def say(writer: asyncio.StreamWriter) -> None:
        chance, start = random.Random(1), 0
        while start < len(said):
            end = start + chance.randint(1, 1 << 18)
            writer.write(said[start:end])
            await writer.drain()
            start = end
        writer.write_eof()

    async with relayed(monkeypatch, echo) as (reader, writer):
        saying = asyncio.ensure_future(say(writer))
        assert await reader.read() == said
        await saying


async def test_pieces_are_under_way_together(monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> None:
    """Many at once come in the time of one: a delay is no limit to what a link carries."""
    count = 200
    async with relayed(monkeypatch, echo) as (reader, writer):
        started = time.monotonic()
        for _ in range(count):
            writer.write(b"x" * 1000)
            await asyncio.sleep(0)
        await reader.readexactly(count * 1000)
        assert time.monotonic() - started < count * ONE_WAY / 2


async def test_a_side_that_breaks_is_told_to_the_other(monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> None:
    broken = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read(1) == b"x"
        writer.transport.abort()
        broken.set()

    async with relayed(monkeypatch, listen) as (reader, writer):
        writer.write(b"x")
        await broken.wait()
        with contextlib.suppress(ConnectionResetError):  # or it ends, which is not silence either
            assert await reader.read() == b""


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_no_two_peers_of_a_swarm_are_nearer_than_they_are_told_to_be(tmp_path: Path) -> None:
    """From the client to the first, on to the second, and home: three links a token; and drafts save some of them."""
    whole = save_llama(tmp_path)
    ids = torch.tensor([[5, 17, 23, 42]])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
    expected = whole.generate(ids, **options).tolist()
    with LocalSwarm(one_way=ONE_WAY, popen=Forked) as local:
        for blocks in ("0:3", "3:6"):
            local.serve(str(tmp_path), "--blocks", blocks)
        local.wait_online(Checkpoint(tmp_path).model_id, 6, 2)
        for speculate in ("off", "auto"):
            cache = SwarmCache()
            with SwarmModelForCausalLM.from_pretrained(
                tmp_path, initial_peers=[local.address], speculate=speculate
            ) as model:
                started = time.monotonic()
                found = model.generate(ids, past_key_values=cache, **options)
                trips = 1 + (cache.tuner.counts.trips if speculate == "auto" else found.shape[1] - ids.shape[1] - 1)
                assert time.monotonic() - started >= trips * 3 * ONE_WAY
            assert found.tolist() == expected
    assert cache.tuner.counts.accepted > 0
    assert trips < 40
