"""The all-reduce between processes on loopback, beside hivemind's averager and torch's gloo.

All are told to begin at the same moment; a figure is the milliseconds until the last of them has its mean. Ours is
over TLS and checks and digests what it is sent; gloo's and hivemind's are as they come. hivemind is given its group's
size and has found its group before the clock runs. One thread a process; the means are checked.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from processes import Failed

from benches.child import running
from benches.plan import Plan
from benches.rows import Must, Row

ROUNDS = 7
CHANCES = 3
MILLION = 1_000_000
SIZES = (1, 10, 50)  # million values
PROCESSES = (2, 4)
TOLERANCE = {"float32": 1e-5, "float16": 1e-3}  # of the mean, relative


@dataclass(frozen=True, slots=True)
class Case:
    """Ours against one other."""

    processes: int
    millions: int
    dtype: str
    other: str

    @property
    def name(self) -> str:
        return f"allreduce: {self.processes} processes, {self.millions}M {self.dtype}, over {self.other}"

    @property
    def must(self) -> Must | None:
        """At least twice as fast as hivemind where the vector is large; at most three times gloo's time."""
        if self.other == "gloo":
            return Must("ratio", "<=", 3.0)
        return Must("ratio", "<=", 0.5) if self.millions >= 10 else None


def measure(plan: Plan) -> list[Row]:
    """A row for each case."""
    sizes = SIZES[:2] if plan.quick else SIZES
    return [
        _measured(plan, Case(processes, millions, dtype, other))
        for processes in PROCESSES
        for millions in sizes
        for dtype in ("float32", "float16")
        for other in ("hivemind", "gloo")
    ]


def _measured(plan: Plan, case: Case) -> Row:
    """hivemind gets stuck now and then, and is given another chance."""
    for _ in range(CHANCES - 1):
        try:
            return _compare(plan, case)
        except Failed as error:
            if case.other != "hivemind":
                raise
            plan.tell(f"{case.name}, once more: {error}")
    return _compare(plan, case)


def _compare(plan: Plan, case: Case) -> Row:
    plan.tell(f"{case.name}, starting")
    length = case.millions * MILLION
    with _group("ours", case, length) as ours, _group(case.other, case, length) as other:
        for group in (ours, other):
            group.average()  # what is allocated and dialled the first time
        rounds = plan.alternate(case.name, plan.rounds(ROUNDS), ours.average, other.average)
    return rounds.row(case.name, "ms", case.must)


class Group:
    """Processes that average with one another."""

    def __init__(self, way: str, dtype: str, processes: list[subprocess.Popen[str]], places: list[Any]) -> None:
        self._way = way
        self._tolerance = TOLERANCE["float32" if way == "gloo" else dtype]
        self._processes = processes
        self._ask(places)

    def average(self) -> float:
        """Milliseconds until the last one has the mean. Raises `Failed` where one has another."""
        answers = self._ask({})
        if self._way == "hivemind":  # it says when it has found its group, and is told to go on
            answers = self._ask({})
        if any(answer["error"] > self._tolerance for answer in answers):
            raise Failed(f"{self._way} averaged wrongly: {answers}")
        return 1e3 * max(answer["seconds"] for answer in answers)

    def _ask(self, what: Any) -> list[Any]:
        """Tell all, then hear all."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()
        return [self._hear(process) for process in self._processes]

    def _hear(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        if not (line := process.stdout.readline()):
            raise Failed(f"a process that averages by {self._way} ended; what it says is above")
        return json.loads(line)


@contextlib.contextmanager
def _group(way: str, case: Case, length: int) -> Iterator[Group]:
    script = ["hivemind_reducer.py"] if way == "hivemind" else ["reducer.py", way]
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(running(*script, str(rank), str(length), case.dtype)) for rank in range(case.processes)
        ]
        yield Group(way, case.dtype, [process for process, _ in started], [json.loads(line) for _, line in started])
        for process, _ in started:
            assert process.stdin is not None
            process.stdin.close()
