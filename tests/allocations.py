"""What torch's own profiler sees allocated on a CPU, inside ops too."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Bytes that the CPU's allocator handed out more than it got back since the start, after each of its events."""
    totals: list[int] = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()
    gc.disable()  # else what an earlier test left in a cycle may be given back within
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        yield totals
    gc.enable()
    live = 0
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        totals.append(live)
