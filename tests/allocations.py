"""How much memory a piece of work takes besides what is there: counted by torch's own profiler, the same every time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.profiler import ProfilerActivity, profile


class Allocated:
    """What torch has allocated on the CPU within a `with`."""

    peak = 0  # bytes


@contextlib.contextmanager
def allocated() -> Iterator[Allocated]:
    """`Allocated`, whose `peak` is known when the `with` is over: of what is neither freed nor was there before."""
    found = Allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        yield found
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        found.peak = max(found.peak, now)
