"""PyTorch, greedy: `… MODEL THREADS [TYPE [compiled]]`; in eager fp32 it is the reference.

MODEL is a .gguf file or a checkpoint's directory. Compiled: `torch.compile` of a step over a static cache, and the
prompt in eager mode, as transformers' own `generate` does it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from harness import serve

CAPACITY = 512


class Eager:
    """The checkpoint with a cache that grows."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        gguf = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        attention = "eager" if type(self) is Eager else "sdpa"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, **gguf
        ).eval()
        self.cache: Any = None

    def begin(self) -> None:
        """Forget what came before."""
        self.cache = None

    def step(self, tokens: list[int], past: int) -> Any:
        """The logits after the last of `tokens`, `[vocabulary]`."""
        result = self._run(tokens, past_key_values=self.cache)
        self.cache = result.past_key_values
        return result.logits[0, -1]

    def read(self, tokens: list[int]) -> Any:
        """The logits after each of `tokens`, `[tokens, vocabulary]`, in one pass."""
        return self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    def _run(self, tokens: list[int], **options: Any) -> Any:
        return self.model(input_ids=torch.tensor([tokens]), use_cache=True, logits_to_keep=1, **options)


class Compiled(Eager):
    """A static cache and a compiled step; what it takes to compile counts as loading."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        super().__init__(path, dtype)
        self.cache = transformers.StaticCache(config=self.model.config, max_cache_len=CAPACITY)
        self._eager = self.model.forward
        self._compiled = torch.compile(self.model.forward, dynamic=False)
        with torch.inference_mode():
            self.step([0, 0], 0)
            self.step([0], 2)

    def begin(self) -> None:
        """Forget what came before."""
        self.cache.reset()

    def step(self, tokens: list[int], past: int) -> Any:
        """The logits after the last of `tokens`, `[vocabulary]`."""
        self.model.forward = self._compiled if len(tokens) == 1 else self._eager
        positions = torch.arange(past, past + len(tokens))[None]
        return self._run(tokens, past_key_values=self.cache, position_ids=positions).logits[0, -1]

    def read(self, tokens: list[int]) -> Any:
        """The logits after each of `tokens`, `[tokens, vocabulary]`, by the compiled step."""
        self.begin()
        return torch.stack([self.step([token], past).clone() for past, token in enumerate(tokens)])


def main(path: str, threads: str, dtype: str = "float32", way: str = "eager") -> None:
    """Serve requests."""
    torch.set_num_threads(int(threads))
    model = {"eager": Eager, "compiled": Compiled}[way](Path(path), getattr(torch, dtype))
    serve({}, lambda request: _decode(model, request), lambda request: _force(model, request))


@torch.inference_mode()
def _decode(model: Eager, request: dict[str, Any]) -> dict[str, Any]:
    ids, past, kept = request["prompt"], 0, []
    tokens: list[int] = []
    stamps, started = [], time.perf_counter()
    model.begin()
    for _ in range(request["count"]):
        logits = model.step(ids, past)
        tokens.append(int(logits.argmax()))
        stamps.append(time.perf_counter() - started)
        past, ids = past + len(ids), tokens[-1:]
        if request["logits"]:
            kept.append(logits.float().numpy())
    if request["logits"]:
        np.save(request["logits"], np.stack(kept))
    return {"tokens": tokens, "stamps": stamps}


@torch.inference_mode()
def _force(model: Eager, request: dict[str, Any]) -> dict[str, Any]:
    np.save(request["logits"], model.read(request["text"]).float().numpy())
    return {}


if __name__ == "__main__":
    main(*sys.argv[1:])
