"""What a run of the benchmarks works with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import machine
from harness import HERE, ContenderError, environment

__all__ = ["CAPACITY", "NATIVE", "PEER_MODEL", "PEER_PYTHON", "PROMPT", "Plan", "script"]

BUILD = HERE.parent / "build"
PEER_PYTHON = BUILD / "peers" / "onnxruntime-genai" / "bin" / "python"
PEER_MODEL = BUILD / "peers" / "smollm2-genai-fp32"

_INT8 = ("--backend", "aoti", "--quantize", "int8")
_SOURCE = ("--backend", "aoti", "--quantize", "source")
NATIVE = {
    "aoti-fp32": ("--backend", "aoti"),
    "aoti-bf16": ("--backend", "aoti", "--auto-cast", "matmul"),
    "aoti-int8": _INT8,
    "aoti-int8-64": (*_INT8, "--method", "awq", "--group-size", "64", "--asymmetric"),
    "aoti-int8-kv16": (*_INT8, "--kv-cache", "float16"),
    "aoti-source": _SOURCE,
    "aoti-source-kv16": (*_SOURCE, "--kv-cache", "float16"),
}
"""Schemes of native code, and how they are asked for."""
CAPACITY = 512
# 107 tokens, whose greedy continuation by SmolLM2-135M-Instruct goes on for more than 128.
PROMPT = """<|im_start|>user
I am writing a small guide for visitors of an old lighthouse. It has a spiral staircase of two hundred steps, a brass \
lamp, and a lens that was ground in Paris. The keeper's family lived there for three generations, and the youngest \
daughter kept the light burning through the great storm when nobody else could. Please write the text for the sign \
beside the door: tell visitors what they will see on each floor, why the light was built, and what they should be \
careful about.<|im_end|>
<|im_start|>assistant
"""


@dataclass(frozen=True)
class Plan:
    """A run: the checkpoint, where files go, how often.

    Attributes:
        artifact: what was exported from `model` before, or None to export it anew.
        artifacts: the same for each scheme of quantization; what is not there is exported.
        without: peers whose name contains one of these take no part.
        is_quick: few repetitions, to see that all works; its figures are noise.
        patience: before each repetition, wait at most so many seconds until nobody else computes here.
        note: shows progress to the person who waits.
    """

    model: Path
    artifact: Path | None
    artifacts: Mapping[str, Path]
    without: tuple[str, ...]
    work: Path
    threads: int
    is_quick: bool
    patience: float
    note: Callable[[str], None]
    given_up: list[str] = field(default_factory=list)

    def rounds(self, number: int) -> int:
        """`number`, or fewer in a quick run."""
        return min(2, number) if self.is_quick else number

    def begin(self, name: str) -> None:
        """Show what comes next, and wait for a quiet machine; repetitions that had to do without are remembered."""
        self.note(name)
        if self.patience and not machine.wait_until_idle(self.patience):
            self.given_up.append(name)

    def ready_artifact(self) -> Path:
        """The artifact to measure; exported by the code as it is now, unless the caller named one."""
        target = self.artifact or self.work / "artifact"
        if self.artifact is None:
            self.export(target.name)
        return target

    def scheme_artifact(self, scheme: str) -> Path:
        """The artifact of a scheme: `fp32`, a value of `--quantize`, or one of NATIVE. Raises ContenderError if it is
        refused."""
        if scheme in self.artifacts:
            return self.artifacts[scheme]
        if scheme == "fp32":
            return self.ready_artifact()
        return self.export(f"artifact-{scheme}", *NATIVE.get(scheme, ("--quantize", scheme)))

    def export(
        self, name: str, *options: str, batch: int = 1, model: Path | None = None, capacity: int = CAPACITY
    ) -> Path:
        """Export a decoder into the working folder. Raises ContenderError where it is refused."""
        target = self.work / name
        self._export(self.command(target, *options, batch=batch, model=model, capacity=capacity), target)
        return target

    def export_as(self, target: Path, model: Path, *options: str) -> None:
        """Export any model. Raises ContenderError where it is refused."""
        self._export(
            [str(script("precast")), "export", str(model), *options, "-o", str(target), "--force", "-q"], target
        )

    def _export(self, command: list[str], target: Path) -> None:
        self.note(f"exporting {target.name}")
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise ContenderError(f"{' '.join(command[1:])}: {done.stderr.strip() or done.returncode}")

    def command(
        self, target: Path, *options: str, batch: int = 1, model: Path | None = None, capacity: int = CAPACITY
    ) -> list[str]:
        """The command line of an export."""
        shape = ("--batch-size", str(batch), "--sequence-length", str(capacity))
        given = (str(model or self.model), *shape, *options, "-o", str(target))
        return [str(script("precast")), "export", *given, "--force", "-q"]

    def peer_problem(self) -> str | None:
        """Why onnxruntime-genai cannot take part, if so."""
        if PEER_PYTHON.exists() and PEER_MODEL.exists():
            return None
        return "onnxruntime-genai is not there (`make peers` installs it); its figures are missing."


def script(name: str) -> Path:
    """An installed command of this environment."""
    return Path(sys.executable).with_name(name)
