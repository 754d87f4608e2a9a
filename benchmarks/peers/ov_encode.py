"""An encoder by OpenVINO: `… GRAPH.onnx THREADS f32|bf16`."""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino
from harness import serve


def main(path: str, threads: str, precision: str) -> None:
    """Serve requests: the median milliseconds of `calls`; `outputs` is where the first output goes."""
    options = {
        "INFERENCE_NUM_THREADS": int(threads),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
    serve({"packages": {"openvino": version("openvino")}}, lambda asked: _repeat(request, asked))


def _repeat(runner: Any, request: dict[str, Any]) -> dict[str, Any]:
    inputs = dict(np.load(request["inputs"]))
    taken = {name for port in runner.model_inputs for name in port.names}
    inputs = {name: values for name, values in inputs.items() if name in taken}
    runner.infer(inputs)
    times = []
    for _ in range(request["calls"]):
        started = time.perf_counter()
        runner.infer(inputs)
        times.append(time.perf_counter() - started)
    if request["outputs"]:
        np.save(request["outputs"], np.array(runner.get_output_tensor(0).data, np.float32))
    return {"milliseconds": 1e3 * float(np.median(times))}


if __name__ == "__main__":
    main(*sys.argv[1:])
