"""What a figure was measured on: a speed without its machine says nothing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["describe", "revision", "slug", "threads", "wait_until_idle"]

# Flags that decide which kernels the libraries choose.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "asimd",
          "asimddp", "i8mm", "bf16", "sve")  # fmt: skip
_PACKAGES = ("precast", "onnxruntime", "numpy", "tokenizers", "msgspec", "click", "torch", "transformers", "onnx",
             "onnxscript", "onnx-ir", "optimum")  # fmt: skip


def describe() -> dict[str, Any]:
    """CPU, memory, system and package versions."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": threads(),
        "flags": [flag for flag in _FLAGS if flag in _cpu_field(r"flags|Features").split()],
        "hypervisor": "hypervisor" in _cpu_field("flags").split(),
        "ram_gb": round(_memory_bytes() / 1e9, 1),
        "system": _system(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def threads() -> int:
    """How many threads every contender is told to use: one per usable core."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug() -> str:
    """The CPU in a file name."""
    return re.sub(r"[^a-z0-9]+", "-", f"{_cpu()} {threads()} cores".lower()).strip("-")


def revision(folder: str = "") -> str:
    """The commit that was measured, or of a folder of the repository its state; with `+` where files differed from
    it."""
    commit = _git("rev-parse", "--short", f"HEAD:{folder}" if folder else "HEAD")
    return commit + ("+" if commit and _git("status", "--porcelain", "-uno", "--", f":/{folder}") else "")


def wait_until_idle(seconds: float) -> bool:
    """Wait until nobody computes on this machine, at most so long; returns whether that came."""
    end = time.monotonic() + seconds
    while _idle_share(0.5) < 0.95:
        if time.monotonic() > end:
            return False
    return True


def _idle_share(seconds: float) -> float:
    """How much of all cores' time nobody used in the next `seconds`; 1 where the kernel does not say."""
    before = _cpu_times()
    time.sleep(seconds)
    spent = [after - earlier for after, earlier in zip(_cpu_times(), before, strict=True)]
    # user nice system idle iowait …
    return sum(spent[3:5]) / sum(spent) if any(spent) else 1.0


def _cpu_times() -> list[int]:
    try:
        return [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return []


def _cpu() -> str:
    """Kernels on ARM give no name, only numbers."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(name: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^(?:{name})\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.platform()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", Path(__file__).parent, *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
