"""The reference: the checkpoint in eager fp32 PyTorch, greedy: `… MODEL.gguf THREADS`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from harness import serve


def main(path: str, threads: str) -> None:
    """Serve requests."""
    torch.set_num_threads(int(threads))
    file = Path(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    serve({}, lambda request: _decode(model, request))


@torch.inference_mode()
def _decode(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    ids, cache, kept = torch.tensor([request["prompt"]]), None, []
    tokens, stamps, started = [], [], time.perf_counter()
    for _ in range(request["count"]):
        result = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = result.past_key_values, result.logits[0, -1]
        tokens.append(int(logits.argmax()))
        stamps.append(time.perf_counter() - started)
        ids = torch.tensor([[tokens[-1]]])
        if request["logits"]:
            kept.append(logits.numpy())
    if request["logits"]:
        np.save(request["logits"], np.stack(kept))
    return {"tokens": tokens, "stamps": stamps}


if __name__ == "__main__":
    main(*sys.argv[1:])
