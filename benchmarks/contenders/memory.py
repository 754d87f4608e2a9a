"""A process's memory, as the kernel counts it: resident pages, files that are mapped included."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["beside", "forget_peak", "peak", "private", "proportional", "resident", "tree"]


def resident() -> int:
    """Bytes now."""
    return _field("VmRSS")


def peak(process: int | str = "self") -> int:
    """The most bytes since the process began or `forget_peak`."""
    return _field("VmHWM", process)


def proportional(process: int | str = "self") -> int:
    """Bytes now, of which those that several processes share are divided among them."""
    return _field("Pss", process, "smaps_rollup")


def private(process: int | str = "self") -> int:
    """Bytes now that no other process shares."""
    return sum(_field(name, process, "smaps_rollup") for name in ("Private_Clean", "Private_Dirty"))


def beside(process: int, *folders: Path) -> int:
    """Resident bytes now, less those of files below `folders` that are mapped."""
    maps = Path(f"/proc/{process}/smaps").read_text()
    resident = re.findall(
        r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)\n(?:.*\n){2,5}?Rss: +(\d+) kB", maps, re.MULTILINE
    )
    within = [str(folder.resolve()) + "/" for folder in folders]
    return sum(int(count) * 1024 for file, count in resident if not any(file.startswith(each) for each in within))


def tree(process: int) -> int:
    """Bytes now of a process and all its descendants; what they share is counted once."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return proportional(process) + sum(tree(int(child)) for child in children)
    except (OSError, AssertionError):
        # It ended while it was looked at.
        return 0


def forget_peak() -> None:
    """Let the peak start anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _field(name: str, process: int | str = "self", file: str = "status") -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{process}/{file}").read_text(), re.MULTILINE)
    assert found, f"this kernel does not report {name}"
    return int(found[1]) * 1024
