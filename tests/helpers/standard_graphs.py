"""Graphs of an artifact that are to be of the ONNX standard alone, and their answers by another runtime."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

__all__ = ["check_standard", "openvino_answers"]

OPENVINO = Path(__file__).parents[2] / "build" / "peers" / "openvino-genai"
_SCRIPT = """
import sys
import numpy, openvino
path, given, found, names = sys.argv[1:]
# On its own it computes in bfloat16 where the CPU does, and rounds activations of weights in 8 bits and fewer.
exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
model = openvino.Core().compile_model(path, "CPU", exact)
results = model(dict(numpy.load(given)))
numpy.savez(found, **{name: results[name] for name in names.split(",")})
"""


def check_standard(path: Path) -> Counter[str]:
    """Check that every graph below `path` is valid and has no operator of another domain; returns how many nodes of
    each kind they have."""
    kinds: Counter[str] = Counter()
    for file in sorted(path.rglob("*.onnx")):
        onnx.checker.check_model(os.fspath(file), full_check=True)
        model = ir.load(file)
        assert dict(model.opset_imports) == {"": 21}
        assert not model.functions
        for node in model.graph.all_nodes():
            assert node.domain == "", node.op_type
            kinds[node.op_type] += 1
    assert kinds["DequantizeLinear"]
    return kinds


def openvino_answers(
    path: Path, inputs: Mapping[str, np.ndarray], outputs: list[str], folder: Path
) -> dict[str, np.ndarray]:
    """What OpenVINO, in the environment that `make peers` makes, computes with the graph at `path`."""
    if not (OPENVINO / "complete").exists():
        pytest.skip("`make peers` installs OpenVINO")
    np.savez(folder / "given.npz", **inputs)
    command = [OPENVINO / "bin" / "python", "-c", _SCRIPT, path, folder / "given.npz", folder / "found.npz"]
    done = subprocess.run([*map(str, command), ",".join(outputs)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(folder / "found.npz"))
