"""Hidden states rounded on their way: where, by whose wish, and the same again whoever takes over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import Swarm, running_swarm, save_llama

from swarm.client import SwarmModelForCausalLM
from swarm.errors import DeadlineExceeded, UsageError
from swarm.hops import rounding
from swarm.wire import Rounding

PROMPT = torch.arange(3, 43).unsqueeze(0)


# --- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["", "127.0.0.1", "::1", "192.168.1.7", "10.0.0.3", "172.16.5.5", "fe80::1%eth0"])
@pytest.mark.parametrize("speed", [1.0, 1e9])
async def test_near_links_are_exact_however_slow(host: str, speed: float) -> None:
    assert await rounding.choose(Clock(), Way(host, speed), "auto") == "float32"


@pytest.mark.parametrize(
    ("speed", "expected"), [(1e9, "float32"), (5e6, "float32"), (2e6, "bfloat16"), (1e5, "int8"), (0.0, "int8")]
)
@pytest.mark.parametrize("host", ["203.0.113.7", "2a00:1450::5", "::ffff:8.8.8.8"])
async def test_far_links_are_rounded_where_they_are_slow(host: str, speed: float, expected: Rounding) -> None:
    way = Way(host if host != "203.0.113.7" else "8.8.4.4", speed)
    assert await rounding.choose(Clock(), way, "auto") == expected
    calls = way.calls
    assert await rounding.choose(Clock(), way, "auto") == expected
    assert way.calls == calls  # it is measured once


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("host", ["127.0.0.1", "8.8.8.8"])
async def test_what_a_client_asks_for_is_done(asked: Rounding, host: str) -> None:
    assert await rounding.choose(Clock(), Way(host, 1.0), asked, own="int8") == asked
    assert await rounding.choose(Clock(), Way(host, 1.0), "auto", own=asked) == asked


class Clock:
    """An `Rpc`, as far as it is needed: the clock that `Way` moves."""

    now = 0.0

    def clock(self) -> float:
        return Clock.now


class Way:
    """A `Link` on which bytes take their time."""

    def __init__(self, host: str, speed: float) -> None:
        self.host, self._real, self.speed, self.calls = host, speed, None, 0

    async def call(self, message: object, body: tuple[bytes, ...] = (), *, timeout: float) -> None:
        self.calls += 1
        seconds = 0.05 + 2 * sum(map(len, body)) / max(self._real, 1e-9)
        if seconds > timeout:
            raise DeadlineExceeded("too slow")
        Clock.now += seconds


# --- in a swarm -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with running_swarm() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def roundings(output: Any) -> list[Rounding]:
    live = output.past_key_values.session._live
    return [live.sending, *(place.rounding for place in live.places)]


@pytest.mark.slow
def test_every_link_is_rounded_as_asked_and_a_replay_is_the_same_again(
    swarm: Swarm, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = save_llama(folder)
    with torch.no_grad():
        expected = whole(PROMPT).logits
    first = swarm.serve(folder, "0:3", wire_dtype="bfloat16")
    second = swarm.serve(folder, "3:6")
    options = {"initial_peers": [swarm.address]}
    with SwarmModelForCausalLM.from_pretrained(folder, exact=True, **options) as model:
        output = model(PROMPT)
        assert roundings(output) == ["float32"] * 3
        assert off(output.logits, expected) < 1e-5
    with SwarmModelForCausalLM.from_pretrained(folder, **options) as model:
        output = model(PROMPT)
        assert roundings(output) == ["float32", "bfloat16", "float32"]  # the peer's own wish
        assert 1e-5 < off(output.logits, expected) < 0.02
        assert "hidden states are rounded on their way" in caplog.text
    with SwarmModelForCausalLM.from_pretrained(folder, wire_dtype="int8", **options) as model:
        undisturbed = model(PROMPT)
        assert roundings(undisturbed) == ["int8"] * 3
        assert 1e-3 < off(undisturbed.logits, expected) < 0.1
        cache = model(PROMPT[:, :-1]).past_key_values
        swarm.serve(folder, "0:3")
        swarm.serve(folder, "3:6")
        swarm.kill(first)
        swarm.kill(second)
        last = model(PROMPT[:, -1:], past_key_values=cache).logits
        assert cache.session.failovers
        assert off(last[:, -1], undisturbed.logits[:, -1]) < 1e-4  # far less than rounding costs


def test_what_there_is_not_cannot_be_asked_for(folder: Path) -> None:
    with pytest.raises(UsageError, match="there are auto, float32, bfloat16, int8"):
        SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[], wire_dtype="int2")
