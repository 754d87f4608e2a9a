"""OpenVINO GenAI's pipeline with its own defaults, counted in token ids: `… MODEL THREADS [exact]`.

On CPUs that have bf16, its defaults compute in it and keep the cache in 8 bits; as a user would find it. With `exact`
it computes in float32 throughout, so that only the weights are rounded.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from harness import serve


class _Clock(openvino_genai.StreamerBase):
    """Notes when each token came."""

    def __init__(self) -> None:
        super().__init__()
        self.stamps: list[float] = []

    def write(self, token: Any) -> Any:
        now = time.perf_counter()
        self.stamps += [now] * (len(token) if isinstance(token, list) else 1)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}


def main(path: str, threads: str, way: str = "") -> None:
    """Serve requests."""
    options = {"INFERENCE_NUM_THREADS": int(threads), **(EXACT if way == "exact" else {})}
    pipeline = openvino_genai.LLMPipeline(path, "CPU", **options)
    facts = {"packages": {name: version(name) for name in ("openvino-genai", "openvino")}}
    serve(facts, lambda request: _decode(pipeline, request), lambda request: _force(path, options, request))


def _decode(pipeline: Any, request: dict[str, Any]) -> dict[str, Any]:
    config = openvino_genai.GenerationConfig(max_new_tokens=request["count"], do_sample=False, ignore_eos=True)
    prompt, clock, started = openvino.Tensor(np.array([request["prompt"]], np.int64)), _Clock(), time.perf_counter()
    result = pipeline.generate(prompt, config, clock)
    return {"tokens": list(map(int, result.tokens[0])), "stamps": [stamp - started for stamp in clock.stamps]}


def _force(path: str, options: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Its pipeline gives no logits: the same file with the same options, by OpenVINO itself."""
    model = openvino.Core().compile_model(Path(path) / "openvino_model.xml", "CPU", options).create_infer_request()
    rows = []
    for position, token in enumerate(request["text"]):
        inputs = {
            "input_ids": np.array([[token]], np.int64),
            "attention_mask": np.ones((1, position + 1), np.int64),
            "position_ids": np.array([[position]], np.int64),
            "beam_idx": np.zeros(1, np.int32),
        }
        rows.append(np.array(model.infer(inputs)["logits"], np.float32)[0, -1].copy())
    np.save(request["logits"], np.stack(rows))
    return {}


if __name__ == "__main__":
    main(*sys.argv[1:])
