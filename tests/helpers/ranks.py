"""Models that several processes run: what these processes are, and what the eager model says."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

PRECAST = [sys.executable, "-m", "precast"]


def eager_tokens(checkpoint: Path, ids, count: int, **options):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(torch.tensor(ids), **options).numpy()


def workers_of(path: Path) -> list[int]:
    """The processes whose command line names the artifact."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"precast.runtime.distributed.worker" in words and str(path).encode() in words:
                found.append(int(folder.name))
    return found


def wait_until(is_so, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it did not come to be in time"
        time.sleep(0.02)


def others_than(model) -> set[int]:
    """Workers of other models over the same artifact."""
    mine = {process.pid for process in model._engine._group._processes.values()}
    return set(workers_of(model.artifact.path)) - mine


CHILD = """
import sys
import numpy as np
from precast.runtime import CompiledModelForCausalLM
model = CompiledModelForCausalLM.from_pretrained(sys.argv[1])
print("ready", flush=True)
while True:
    model.generate(np.arange(3, 10)[None], max_new_tokens=30, eos_token_id=[])
"""


def endless(path: Path) -> subprocess.Popen:
    """A process that generates with the artifact until it is killed."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def run(command, **changes):
    environment = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def kill_at_random(copy: Path, times: int) -> None:
    """Kill one of the processes that run an artifact at a random moment, so many times: all end within five seconds."""
    chance = random.Random(0)
    for _ in range(times):
        with endless(copy) as process:
            wait_until(lambda: workers_of(copy), 60)
            time.sleep(chance.uniform(0, 2))
            os.kill(chance.choice([process.pid, *workers_of(copy)]), signal.SIGKILL)
            assert process.wait(timeout=5) != 0
        wait_until(lambda: not workers_of(copy), 5)
