"""`make demo`: compile a real chat model and let it answer, in two commands that anyone can repeat."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROMPT = "What is the capital of France?"


def main(model: str, target: str) -> None:
    """Export if that was not done yet, then generate; each command is shown before it runs."""
    precast = str(Path(sys.executable).with_name("precast"))
    if not (Path(target) / "config.json").exists():
        _run([precast, "export", model, "--sequence-length", "512", "-o", target])
    size = sum(path.stat().st_size for path in Path(target).iterdir())
    print(f"\nThe artifact lies in {Path(target).resolve()}, {size / 1e6:,.0f} MB.\n")
    _run([precast, "generate", target, "--chat", "--prompt", PROMPT])


def _run(command: list[str]) -> None:
    words = [Path(command[0]).name, *(f'"{word}"' if " " in word else word for word in command[1:])]
    print("$", " ".join(words), flush=True)
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
