"""Trace files of single steps, by torch.profiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from ..quiet import silence

__all__ = ["profile_steps"]


@contextmanager
def profile_steps(folder: Path, *, active: int, repeat: int, skip_first: int) -> Iterator[Any]:
    """Record operators: leave out `skip_first` steps, then record `active` ones, `repeat` times. What is yielded has
    `step()`, to be called after each step. Every recording is a file `steps-N.json` in `folder`, in Chrome's trace
    format."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def write(found: Any) -> None:
        written.append(folder / f"steps-{len(written) + 1}.json")
        found.export_chrome_trace(str(written[-1]))

    with silence():
        # Its warning asks for steps that warm up, which whoever skips the first has run.
        plan = schedule(wait=0, warmup=0, active=active, repeat=repeat, skip_first=skip_first)
    activities = supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as found:
        yield found
