"""Who may hold how much of the cache, and until when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.cache import Leases
from swarm.errors import NoRoom
from swarm.types import SessionId

A, B, C = (SessionId(bytes([letter]) * 16) for letter in b"abc")


def test_a_full_cache_says_no_at_once_and_changes_nothing() -> None:
    leases = Leases(100)
    leases.grant(A, 60, now=0.0)
    with pytest.raises(NoRoom, match="asks for 41 tokens of cache, 40 of 100 are free"):
        leases.grant(B, 41, now=0.0)
    assert (len(leases), leases.used, leases.free) == (1, 60, 40)
    leases.grant(B, 40, now=0.0)
    assert leases.free == 0
    leases.release(A)
    leases.release(A)
    assert leases.free == 60
    assert repr(leases) == "<Leases sessions=1 used=40/100>"


def test_a_lease_grows_and_shrinks_in_place() -> None:
    leases = Leases(100)
    leases.grant(A, 40, now=0.0)
    leases.grant(A, 100, now=0.0)
    assert leases.free == 0
    with pytest.raises(NoRoom):
        leases.grant(A, 101, now=0.0)
    assert leases.used == 100
    leases.grant(A, 10, now=0.0)
    assert leases.used == 10


def test_a_lease_ends_unless_its_session_shows_life() -> None:
    leases = Leases(100, duration=30.0)
    leases.grant(A, 10, now=0.0)
    leases.grant(B, 10, now=10.0)
    assert leases.expired(29.9) == []
    leases.renew(A, now=29.0)
    assert leases.expired(40.0) == [B]
    assert leases.used == 20  # until it is released
    assert leases.expired(59.0) == [A, B]
    leases.grant(A, 10, now=59.0)
    assert leases.expired(59.0) == [B]


keys = st.sampled_from([A, B, C])
grants = st.tuples(st.just("grant"), keys, st.integers(0, 80))
releases = st.tuples(st.just("release"), keys, st.just(0))


@given(st.lists(grants | releases, max_size=40))
def test_what_is_leased_is_the_sum_of_the_leases_and_never_too_much(steps: list[tuple[str, SessionId, int]]) -> None:
    leases, held = Leases(100), dict[SessionId, int]()
    for what, key, tokens in steps:
        if what == "release":
            leases.release(key)
            held.pop(key, None)
        elif sum(held.values()) - held.get(key, 0) + tokens <= 100:
            leases.grant(key, tokens, now=0.0)
            held[key] = tokens
        else:
            with pytest.raises(NoRoom):
                leases.grant(key, tokens, now=0.0)
        assert leases.used == sum(held.values()) <= 100
        assert len(leases) == len(held)
