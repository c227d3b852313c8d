"""What was passed on brings any peer from where it is to where the others are, through rollbacks and moved rows."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.hops.history import History, Mark, Piece


class Follower:
    """A peer's content as the pieces that came made it, in plain lists: one number for each position of each row."""

    def __init__(self) -> None:
        self.number = 0
        self.rows: list[list[float]] = []

    @property
    def mark(self) -> Mark:
        return Mark(self.number, len(self.rows[0]) if self.rows else 0)

    def take(self, number: int, piece: Piece, since: int) -> None:
        """As a stage does."""
        assert piece.position == 0 or self.number in (since, number)
        assert piece.position <= self.mark.length
        if piece.rows is not None and piece.position and self.number == since != number:
            self.rows = [list(self.rows[row]) for row in piece.rows]
        if piece.position == 0:
            self.rows = [[] for _ in range(len(piece.hidden))]
        for row, values in zip(self.rows, piece.hidden[:, :, 0].tolist(), strict=True):
            row[piece.position :] = values
        self.number = number


def random_step(chance: random.Random, length: int, rows: int) -> Piece:
    """A step that goes on, or back, with or without moved rows."""
    position = length if chance.random() < 0.7 else chance.randint(0, length)
    count = chance.randint(1, 4)
    moved = [chance.randrange(rows) for _ in range(rows)] if position and chance.random() < 0.3 else None
    return Piece(position, torch.rand(rows, count, 1), rows=moved)


@given(st.integers(0, 10_000))
def test_whoever_was_anywhere_is_brought_here(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    history, leader = History(), Follower()
    followers = [Follower() for _ in range(3)]
    for number in range(1, 25):
        step = random_step(chance, history.length, rows=2)
        history.record(number, step)
        if chance.random() < 0.2:
            history.record(number, step)  # twice is as once
        leader.take(number, step, number - 1)
        for follower in followers:
            if chance.random() < 0.3:
                mark = follower.mark
                for piece in history.update(mark, history.length, most=3):
                    follower.take(number, piece, mark.number)
                assert follower.rows == leader.rows
                assert follower.mark == history.mark == leader.mark


@given(st.integers(0, 10_000))
def test_a_replay_stops_where_the_next_step_begins(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    history, leader, follower = History(), Follower(), Follower()
    for number in range(1, 12):
        before = leader.mark
        step = random_step(chance, history.length, rows=2)
        history.record(number, step)  # as a hop does that ran it, and whose next hop died of it
        if chance.random() < 0.4:
            mark = follower.mark
            for piece in history.update(mark, step.position, most=256):
                follower.take(number, piece, mark.number)
            if follower.number != number:
                assert step.position == 0 or follower.mark.number == before.number
            follower.take(number, step, number - 1)
        leader.take(number, step, number - 1)
        if follower.number == number:
            assert follower.rows == leader.rows


def test_only_what_is_new_is_sent() -> None:
    history = History()
    history.record(1, Piece(0, torch.rand(1, 100, 4)))
    history.record(2, Piece(100, torch.rand(1, 1, 4)))
    assert [(p.position, p.end) for p in history.update(Mark(1, 100), 101, 256)] == [(100, 101)]
    history.record(3, Piece(99, torch.rand(1, 3, 4)))  # what was guessed wrong is written again
    assert [(p.position, p.end) for p in history.update(Mark(1, 100), 102, 256)] == [(99, 102)]
    assert [(p.position, p.end) for p in history.update(Mark(3, 102), 102, 256)] == []


def test_moved_rows_are_told_and_not_sent() -> None:
    history = History()
    history.record(1, Piece(0, torch.rand(3, 100, 4)))
    history.record(2, Piece(100, torch.rand(3, 1, 4), rows=[1, 1, 0]))
    history.record(3, Piece(101, torch.rand(3, 1, 4), rows=[2, 0, 1]))
    [piece] = history.update(Mark(1, 100), 102, 256)
    assert (piece.position, piece.rows) == (100, [0, 1, 1])


def test_who_is_too_far_behind_begins_anew() -> None:
    history = History()
    for number in range(1, 2000):
        history.record(number, Piece(number - 1, torch.zeros(1, 1, 1)))
    assert next(history.update(Mark(1900, 1900), 1999, 4096)).position == 1900
    assert next(history.update(Mark(10, 10), 1999, 4096)).position == 0


def test_a_gap_is_no_history() -> None:
    history = History()
    history.record(1, Piece(0, torch.zeros(1, 4, 1)))
    with pytest.raises(ValueError, match="builds on step 2"):
        history.record(3, Piece(4, torch.zeros(1, 1, 1)))
    with pytest.raises(ValueError, match="cannot go on at 5"):
        history.record(2, Piece(5, torch.zeros(1, 1, 1)))
    history.record(3, Piece(0, torch.zeros(1, 2, 1)))  # from the start, nothing is missing
    assert history.mark == Mark(3, 2)
