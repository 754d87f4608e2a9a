"""Run the child process that compiles, and describe its failures."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from subprocess import CompletedProcess

import msgspec

from precast.runtime import child
from precast.runtime.errors import ExportError
from precast.runtime.hosts.neuron_sdk import without_sdk

from .compile_worker import MISSING
from .strategies import Job

__all__ = ["compile_job", "sdk_versions"]

CHILD = "precast.exporter.backends.neuron.compile_worker"


def sdk_versions(strategy: str, instance_type: str) -> dict[str, str]:
    """The installed versions of the SDK's distributions that a strategy needs. Raises ExportError, with what to
    install, where a module cannot be imported: an installed distribution proves nothing, PyPI has placeholders."""
    done = _run_worker(["--versions", strategy], instance_type)
    lines = done.stderr.strip().splitlines()
    if done.returncode == MISSING and lines:
        raise ExportError(without_sdk(**json.loads(lines[-1])))
    if done.returncode:
        raise ExportError(
            f"AWS's Neuron SDK is installed and cannot be imported: {_describe_ending(done.returncode)}. "
            f"{_find_reason(lines)}"
        )
    found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compile_job(job: Job, folder: Path, instance_type: str) -> None:
    """Compile in a child process. Raises ExportError, which names the graph and has the compiler's own first error."""
    path = folder / "job.json"
    path.write_bytes(msgspec.json.encode(job))
    done = _run_worker([str(path)], instance_type)
    (Path(job.workdir) / "log.txt").write_text(done.stdout + done.stderr, "utf-8")
    if done.returncode or not Path(job.file).is_file():
        at = path.with_suffix(".at")
        graph = at.read_text() if at.exists() else ", ".join(item.graph.name for item in job.items)
        reason = _find_reason((done.stdout + done.stderr).splitlines())
        raise ExportError(
            f"neuronx-cc could not compile {graph} for {instance_type}: {_describe_ending(done.returncode, reason)}. "
            f"{reason}"
        )


def _run_worker(arguments: list[str], instance_type: str) -> CompletedProcess[str]:
    changes = {
        # Flags in the environment would take effect and not be recorded.
        "NEURON_CC_FLAGS": None,
        # The SDK reads it when it is imported; without it, it compiles for the machine that it runs on.
        "NEURON_PLATFORM_TARGET_OVERRIDE": instance_type,
    }
    return child.run(CHILD, *arguments, changes=changes)


_KILLED = re.compile(r"failed with -9\b|forcibly killed|\bF137\b|^Killed\b|SIGKILL", re.MULTILINE)


def _describe_ending(status: int, reason: str = "") -> str:
    """Describe how the process ended; its own message follows."""
    if status == -signal.SIGKILL or _KILLED.search(reason):
        return (
            "it was killed, as the system does where memory runs out; optlevel=1, shorter sequence_length and smaller "
            "batch_size need less, and a larger machine may compile for this one"
        )
    if status < 0:
        return f"it crashed with {signal.Signals(-status).name}"
    return f"it ended with status {status}" if status else "it wrote no file"


_CODES = re.compile(r"\[(?:NCC_)?[A-Z]{1,5}\d{3,}\]|neuronx-cc: error: ")
"""Beginnings of the compiler's own errors: [NCC_EVRF001], [NLA001] (compiler/error-codes of the documentation), and
those of its command line."""
_ERRORS = re.compile(
    r"^(?:\w+\.)*\w*(?:Error|Exception)\b.*:|\bneuronx-cc failed\b|\bterminate called\b", re.IGNORECASE
)


def _find_reason(lines: list[str]) -> str:
    """The most telling line of the output: the compiler's first own error, else Python's last, else the last line."""
    coded = [line[found.start() :] for line in lines if (found := _CODES.search(line))]
    raised = [line for line in lines if _ERRORS.search(line)]
    told = coded[:1] + raised[-1:] + [line for line in reversed(lines) if line.strip()][:1]
    return " ".join(told[0].split())[:600] if told else "It said nothing."
