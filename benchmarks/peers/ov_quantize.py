"""An encoder quantized by NNCF for OpenVINO: `… GRAPH.onnx SAMPLES.npz TARGET.xml`.

Samples are named `<number>/<input>`, each of the graph's shapes.
"""

from __future__ import annotations

import sys

import nncf
import numpy as np
import openvino


def main(path: str, samples: str, target: str) -> None:
    """Quantize weights and activations after training, as NNCF does for transformers."""
    model = openvino.Core().read_model(path)
    taken = {name for port in model.inputs for name in port.names}
    rows: dict[str, dict[str, np.ndarray]] = {}
    for name, array in np.load(samples).items():
        number, _, argument = name.partition("/")
        if argument in taken:
            rows.setdefault(number, {})[argument] = array
    dataset = nncf.Dataset(list(rows.values()))
    quantized = nncf.quantize(
        model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows), fast_bias_correction=True
    )
    openvino.save_model(quantized, target, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
