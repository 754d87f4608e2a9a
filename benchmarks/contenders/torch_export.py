"""torch.export and torch.onnx.export by themselves: `… MODEL TARGET LENGTH THREADS`.

The plainest ONNX file of the same model that PyTorch writes: tokens in, logits of all positions out, no cache.
"""

from __future__ import annotations

import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.onnx
import transformers
from contenders.memory import forget_peak, peak, resident
from harness import serve


class Logits(torch.nn.Module):
    """The model as a function of its tokens."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def main(model: str, target: str, length: str, threads: str) -> None:
    """Serve requests."""
    torch.set_num_threads(int(threads))
    import_module("transformers.models.auto.modeling_auto")
    base = resident()

    def export(request: dict[str, Any]) -> dict[str, Any]:
        forget_peak()
        seconds, before = {}, time.perf_counter()
        for step in _steps(Path(model), Path(target), int(length)):
            after = time.perf_counter()
            seconds[step], before = after - before, after
        return {"base_bytes": base, "peak_bytes": peak(), "seconds": seconds}

    serve({}, export)


def _steps(path: Path, target: Path, length: int) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    yield "load"
    free = torch.export.Dim("length", min=1, max=length)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            Logits(model.eval()), (torch.ones(1, 8, dtype=torch.int64),), dynamic_shapes=({1: free},), strict=False
        )
        yield "torch.export"
        torch.onnx.export(program, (), target, opset_version=20, external_data=True, verbose=False)
    yield "torch.onnx"


if __name__ == "__main__":
    main(*sys.argv[1:])
