"""What a process keeps of models that it dropped, what a fork of it can do with one, and what one without PyTorch: run
in a child, which is killed where it hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LOADS = """
import gc, os, sys
import numpy as np
from precast.runtime import CompiledModel

def held():
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), len(maps.readlines())

def use():
    opened = CompiledModel.from_pretrained(sys.argv[1], threads=1, prepack=False)
    opened.generate(np.array([[5, 9, 30]]), max_new_tokens=2)
    del opened
    gc.collect()

use(), use()
before = held()
for _ in range(10):
    use()
descriptors, mappings = held()
# An allocator may take a little more; ten loads that keep something keep ten.
assert descriptors == before[0] and mappings < before[1] + 10, (before, descriptors, mappings)
"""

FORK = """
import os, signal, sys
import numpy as np
from precast.runtime import CompiledModel, errors

opened = CompiledModel.from_pretrained(sys.argv[1], threads=int(sys.argv[2]), prepack=False)
prompt = np.array([[5, 9, 30]])
found = opened.generate(prompt, max_new_tokens=4)
child = os.fork()
if child == 0:
    signal.alarm(30)
    opened.reset()
    try:
        assert np.array_equal(opened.generate(prompt, max_new_tokens=4), found)
    except errors.UsageError as error:
        assert all(each in str(error) for each in (str(os.getpid()), str(os.getppid()), "spawn", "threads=1")), error
        sys.exit(3)
    sys.exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

WITHOUT_TORCH = """
import json, sys
# Neither imported nor there to be.
sys.modules.update(dict.fromkeys(["torch", "transformers", "onnxruntime"]))
from precast.runtime import CompiledModel
model = CompiledModel.from_pretrained(sys.argv[1], threads=2)
print(json.dumps(model.generate(json.loads(sys.argv[2]), max_new_tokens=int(sys.argv[3]), do_sample=False).tolist()))
"""


def generate_without_torch(path: Path, ids: list[list[int]], count: int) -> list[list[int]]:
    """The greedy answer of at most `count` tokens to each row of ids, which a decoder's begins with."""
    found: list[list[int]] = json.loads(_run(WITHOUT_TORCH, path, json.dumps(ids), str(count)))
    return found


def check_loads(path: Path) -> None:
    """A model that was dropped leaves no descriptor and no mapping."""
    _run(LOADS, path)


def check_fork(path: Path, *, has_threads: bool = False) -> None:
    """With one thread a fork goes on; with more, unless it has threads of its own, it is told at once why it cannot."""
    assert _run(FORK, path, "1") == "0"
    assert _run(FORK, path, "2") == ("0" if has_threads else "3")


def _run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
