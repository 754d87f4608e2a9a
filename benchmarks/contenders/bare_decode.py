"""The least that decoding with ONNX Runtime takes: `… MODEL.onnx THREADS`.

A session, buffers bound once per length, argmax; nothing of ours but the graph. What our runtime adds to it is what
sets the two apart.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import onnxruntime
from harness import serve

VALUE = onnxruntime.OrtValue.ortvalue_from_numpy


class Bound:
    """The graph bound to arrays for `length` tokens per step; caches are updated in place."""

    def __init__(self, session: Any, caches: dict[str, Any], length: int) -> None:
        self.ids, self.positions = np.zeros((1, length), np.int64), np.full((1, 1), length - 1, np.int64)
        self.past, self.new = np.zeros(1, np.int32), np.full(1, length, np.int32)
        self.logits = np.zeros((1, 1, session.get_outputs()[0].shape[-1]), np.float32)
        self._session, self._binding = session, session.io_binding()
        self._kept: list[Any] = []
        names = [each.name for each in session.get_inputs()]
        inputs = dict(zip(names, (self.ids, self.past, self.new, self.positions, *caches.values()), strict=True))
        outputs = [self.logits, *caches.values()]
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, self._keep(array))
        for spec, array in zip(session.get_outputs(), outputs, strict=True):
            self._binding.bind_ortvalue_output(spec.name, self._keep(array))

    def step(self, tokens: Any, past: int) -> Any:
        self.ids[0], self.past[0] = tokens, past
        self._session.run_with_iobinding(self._binding)
        return self.logits[0, 0]

    def _keep(self, array: Any) -> Any:
        value = VALUE(array)
        self._kept.append((array, value))
        return value


def main(path: str, threads: str) -> None:
    """Serve requests."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = int(threads), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    caches = {spec.name: np.zeros(spec.shape, np.float32) for spec in session.get_inputs()[4:]}
    bound: dict[int, Bound] = {}

    def repeat(request: dict[str, Any]) -> dict[str, Any]:
        for length in {len(request["prompt"]), 1} - bound.keys():
            bound[length] = Bound(session, caches, length)
        return _decode(bound[len(request["prompt"])], bound[1], request)

    serve({}, repeat)


def _decode(prefill: Bound, decode: Bound, request: dict[str, Any]) -> dict[str, Any]:
    prompt, kept = request["prompt"], []
    tokens: list[int] = []
    stamps, started = [], time.perf_counter()
    logits = prefill.step(prompt, 0)
    for index in range(request["count"]):
        if index:
            logits = decode.step(tokens[-1], len(prompt) + index - 1)
        tokens.append(int(logits.argmax()))
        stamps.append(time.perf_counter() - started)
        if request["logits"]:
            kept.append(logits.copy())
    if request["logits"]:
        np.save(request["logits"], np.stack(kept))
    return {"tokens": tokens, "stamps": stamps}


if __name__ == "__main__":
    main(*sys.argv[1:])
