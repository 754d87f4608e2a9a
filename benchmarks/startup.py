"""How long does a user wait: for the first token from the start of the process, for an import, for `--help`?

Measured from outside, from spawning a process to the first byte that it prints or to its end. The artifact was opened
once before, so its files are verified and in the file cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import HERE, Answer, ContenderError, Target, alternate, environment, summary
from plan import PEER_MODEL, PEER_PYTHON, PROMPT, Plan, script

__all__ = ["first_token", "measure"]

ROUNDS = 20
FIRST, IMPORT, HELP = "precast generate, first token", "import precast.runtime", "precast --help"
OPEN, FLOOR, GENAI = "… and CompiledModelForCausalLM", "python -c pass", "onnxruntime-genai, first token"


def measure(plan: Plan) -> Answer:
    """Alternate all commands in fresh processes, after one round that warms the file cache."""
    artifact = plan.ready_artifact()
    actions = _actions(plan, [str(script("precast")), "generate", str(artifact), "--prompt", PROMPT, "-q"])
    alternate(actions, 1)
    results = alternate(actions, plan.rounds(ROUNDS), plan.begin)
    seconds = {name: [each["seconds"] for each in rounds] for name, rounds in results.items()}
    answer = Answer("Start-up, fresh processes", ["", "median ms", "min", "max"])
    for name, values in seconds.items():
        figures = answer.figures[name] = summary([1e3 * value for value in values])
        answer.rows.append([name, *(f"{figures[key]:.0f}" for key in ("median", "min", "max"))])
    limits = {FIRST: 1000.0, IMPORT: 150.0, HELP: 150.0}
    answer.targets = [Target(name, answer.figures[name]["median"], limit, unit="ms") for name, limit in limits.items()]
    if problem := plan.peer_problem():
        answer.notes.append(problem)
    return answer


def first_token(plan: Plan, artifact: Path) -> dict[str, Any]:
    """Seconds from spawning `precast generate` to the first byte of its answer."""
    generate = [str(script("precast")), "generate", str(artifact), "--prompt", PROMPT, "-q"]
    return _timed(_asked(generate, plan), True)


def _asked(generate: list[str], plan: Plan) -> list[str]:
    return [*generate, "--threads", str(plan.threads), "--max-new-tokens", "8", "--temperature", "0"]


def _actions(plan: Plan, generate: list[str]) -> dict[str, Callable[[], dict[str, Any]]]:
    opened = "from precast.runtime import CompiledModelForCausalLM"
    commands = {
        FIRST: _asked(generate, plan),
        IMPORT: [sys.executable, "-c", "import precast.runtime"],
        OPEN: [sys.executable, "-c", opened],
        HELP: [str(script("precast")), "--help"],
        FLOOR: [sys.executable, "-c", "pass"],
    }
    if plan.peer_problem() is None:
        commands[GENAI] = [*map(str, (PEER_PYTHON, "-m", "peers.genai", PEER_MODEL, plan.threads, PROMPT))]
    return {name: partial(_timed, line, name in (FIRST, GENAI)) for name, line in commands.items()}


def _timed(command: Sequence[str], to_first_byte: bool) -> dict[str, Any]:
    """Seconds from spawning to the first byte, or to the end. Raises ContenderError where the command fails."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=HERE, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        seen = time.perf_counter()
        _, errors = process.communicate()
        ended = time.perf_counter()
    if process.returncode or (to_first_byte and not first):
        raise ContenderError(f"{command[0]} ended with {process.returncode}: {errors.decode()[-500:]}")
    return {"seconds": (seen if to_first_byte else ended) - started}
