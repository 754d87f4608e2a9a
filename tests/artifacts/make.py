"""`python tests/artifacts/make.py VERSION`: at a release, keep one tiny artifact of each kind for ever.

Later code must load them (tests/test_old_artifacts.py). What is already there is never made again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "helpers"))
IDS = [[5, 9, 30, 7, 200, 31]]


def main(version: str) -> None:
    """Export a decoder and an encoder and write down their answers."""
    import tiny
    import transformers

    from precast.exporter import ExportOptions, export

    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        llama = tiny.config_for("llama", **small, num_key_value_heads=1, head_dim=16)
        bert = tiny.config_for("bert", **small)
        decoder = tiny.save_checkpoint(Path(folder) / "llama", llama)
        encoder = tiny.save_checkpoint(Path(folder) / "bert", bert, transformers.AutoModel)
        export(str(decoder), HERE / version / "decoder", ExportOptions(sequence_length=(32,)))
        export(str(encoder), HERE / version / "encoder", ExportOptions(batch_size=2, sequence_length=(16,)))
        native = ExportOptions(batch_size=2, sequence_length=(32,), prefill_lengths=(8,), backend="export")
        export(str(decoder), HERE / version / "native", native)
    for kind in ("decoder", "encoder", "native"):
        answer = ask(HERE / version / kind)
        (HERE / version / f"{kind}.json").write_text(json.dumps(answer, indent=1) + "\n")


def ask(path: Path) -> dict[str, object]:
    """What an artifact answers to the one question."""
    from precast.runtime import CompiledModel

    model = CompiledModel.from_pretrained(path)
    answer: dict[str, object] = {"first": np.round(model(np.array(IDS))[0][0, -1], 5).astype(float).tolist()}
    if hasattr(model, "generate"):
        answer["tokens"] = model.generate(np.array(IDS), max_new_tokens=8)[0].tolist()
    return answer


if __name__ == "__main__":
    main(sys.argv[1])
