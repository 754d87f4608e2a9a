"""Our export, step by step: `… MODEL TARGET LENGTH THREADS`. Memory counts from what the imports took."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from contenders.memory import forget_peak, peak, resident
from harness import serve


class Steps:
    """Time and peak memory of each step that the export reports, and of what lies between them."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._at = time.perf_counter()
        forget_peak()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.lap("between")
        yield
        self.lap(name)

    def lap(self, name: str) -> None:
        """Close what has gone on since the last lap under `name`."""
        now = time.perf_counter()
        self.found.append({"step": name, "seconds": now - self._at, "peak_bytes": peak(), "bytes_after": resident()})
        forget_peak()
        self._at = now


def main(model: str, target: str, length: str, threads: str) -> None:
    """Serve requests; each exports once, so ask only once where a fresh process matters."""
    exporter = _import()
    import torch

    torch.set_num_threads(int(threads))
    base = resident()

    def export(request: dict[str, Any]) -> dict[str, Any]:
        options = exporter.ExportOptions(
            batch_size=1, sequence_length=(int(length),), validate=request["validate"], force=True
        )
        steps = Steps()
        exporter.export(model, target, options, on_step=steps)
        steps.lap("between")
        return {"base_bytes": base, "steps": steps.found}

    serve({}, export)


def _import() -> Any:
    """The exporter with what it imports on the way, whatever the checkpoint."""
    from precast import exporter

    exporter.quiet_libraries()
    for name in ("precast.exporter.pipeline", "precast.exporter.backends.onnx.compiler", "optimum.exporters.tasks",
                 "transformers.exporters.onnxruntime_fusions", "torch.onnx", "torch.export"):  # fmt: skip
        importlib.import_module(name)
    return exporter


if __name__ == "__main__":
    main(*sys.argv[1:])
