"""The cores, memory, CPU features and installed versions that this process may use."""

from __future__ import annotations

import os
import re
import resource
from functools import cache
from importlib import metadata
from pathlib import Path

__all__ = [
    "GLIBC", "available_bytes", "cpu_flags", "installed_version", "memory_bytes", "usable_cores", "version_numbers",
]  # fmt: skip

GLIBC = "glibc"
"""No distribution, but the system's C library, of which native code needs a version too."""

_STAND_INS = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-rocm"),
}
"""The same library under other names: builds that are installed in place of the plain one."""


def usable_cores() -> int:
    """The cores that this process may use, which in a container are fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def installed_version(name: str) -> str | None:
    """The version of a distribution, or of one that stands in for it, or of glibc; None where there is neither."""
    if name == GLIBC:
        return _glibc_version()
    for each in (name, *_STAND_INS.get(name, ())):
        try:
            return metadata.version(each)
        except metadata.PackageNotFoundError:
            continue
    return None


def version_numbers(version: str) -> tuple[int, ...]:
    """The release's numbers without zeros at the end: 1.31 is 1.31.0."""
    plain = re.sub(r"(\.0+)+$", "", version.split("+", maxsplit=1)[0])
    return tuple(int(part) for part in re.findall(r"\d+", plain)[:4])


def _glibc_version() -> str | None:
    try:
        # "glibc 2.36"
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")[2] or None
    except (ValueError, OSError):
        return None


def memory_bytes() -> int:
    """The memory that this process may use: the machine's, or less if its cgroup or a limit of its own says so."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    total = total if own == resource.RLIM_INFINITY else min(total, own)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def available_bytes() -> int:
    """The memory that is free now, of that which this process may use."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return memory_bytes()
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    return min(memory_bytes(), int(found[1]) * 1024) if found else memory_bytes()


@cache
def cpu_flags() -> frozenset[str]:
    """The flags the kernel reports; empty where it reports none (only native variants ask)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()
