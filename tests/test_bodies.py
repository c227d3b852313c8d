"""The memory of large messages, which is used again."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from swarm.links import bodies
from swarm.links.bodies import body_of, forget_spare

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_spare() -> Iterator[None]:
    gc.collect()
    forget_spare()
    yield
    forget_spare()


def place(body: memoryview) -> int:
    return int(np.frombuffer(body, np.uint8).ctypes.data)


def test_memory_is_used_again_once_nobody_looks_at_it() -> None:
    body = body_of(MEGABYTE)
    before = place(body)
    tensor = torch.frombuffer(body[16:], dtype=torch.float32)
    del body
    assert place(other := body_of(MEGABYTE)) != before
    tensor.fill_(1.0)
    assert len(other) == MEGABYTE
    del tensor
    assert place(body_of(MEGABYTE - 5)) == before


@pytest.mark.parametrize("length", [1, 1 << 17, (1 << 18) + 1, MEGABYTE, 1 << 22, (1 << 22) + 1])
def test_a_body_has_the_length_that_was_asked_for(length: int) -> None:
    body = body_of(length)
    assert (len(body), body.format, body.readonly) == (length, "B", False)


def test_what_is_spare_can_be_given_back() -> None:
    kept = [body_of(MEGABYTE) for _ in range(3)]
    places = {place(body) for body in kept}
    kept.clear()
    assert {place(body) for body in [body_of(MEGABYTE), body_of(MEGABYTE)]} <= places
    forget_spare()
    assert not any(bodies._spare.values())
