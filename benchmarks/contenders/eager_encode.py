"""An encoder in eager PyTorch, float32, with PyTorch's own attention: `… MODEL THREADS`."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
from harness import serve
from transformers import AutoModel


def main(path: str, threads: str) -> None:
    """Serve requests, as `precast_encode` does."""
    torch.set_num_threads(int(threads))
    model = AutoModel.from_pretrained(path, attn_implementation="sdpa").eval()
    serve({}, lambda request: _repeat(model, request))


@torch.inference_mode()
def _repeat(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    inputs = {name: torch.from_numpy(values) for name, values in np.load(request["inputs"]).items()}
    found, times = model(**inputs), []
    for _ in range(request["calls"]):
        started = time.perf_counter()
        found = model(**inputs)
        times.append(time.perf_counter() - started)
    if request["outputs"]:
        np.save(request["outputs"], found.last_hidden_state.numpy())
    return {"milliseconds": 1e3 * float(np.median(times))}


if __name__ == "__main__":
    main(*sys.argv[1:])
