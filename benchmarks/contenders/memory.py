"""A process's memory, as the kernel counts it: resident pages, files that are mapped included."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["forget_peak", "peak", "proportional", "resident"]


def resident() -> int:
    """Bytes now."""
    return _field("VmRSS")


def peak(process: int | str = "self") -> int:
    """The most bytes since the process began or `forget_peak`."""
    return _field("VmHWM", process)


def proportional(process: int | str = "self") -> int:
    """Bytes now, of which those that several processes share are divided among them."""
    return _field("Pss", process, "smaps_rollup")


def forget_peak() -> None:
    """Let the peak start anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _field(name: str, process: int | str = "self", file: str = "status") -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{process}/{file}").read_text(), re.MULTILINE)
    assert found, f"this kernel does not report {name}"
    return int(found[1]) * 1024
