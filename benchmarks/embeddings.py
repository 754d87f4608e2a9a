"""Are compiled MiniLM embeddings sentence-transformers' own? Needs `pip install sentence-transformers`.

python benchmarks/embeddings.py build/models/all-MiniLM-L6-v2
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from machine import describe
from sentence_transformers import SentenceTransformer

from precast.exporter import ExportOptions, export
from precast.runtime import CompiledModel

TEXTS = Path(__file__).parents[1] / "exporter/precast/exporter/kinds/heldout.txt"
LENGTH = 128


def main(checkpoint: str) -> None:
    """Embed sentences of prose, short and long, both ways; print the largest difference and the smallest cosine."""
    theirs = SentenceTransformer(checkpoint, device="cpu")
    sentences = [part.strip() for part in TEXTS.read_text("utf-8").replace("\n", " ").split(".") if part.strip()]
    sentences += ["今天天气很好。", "Größe, naïve, façade — and a 🦊.", "a"]
    with tempfile.TemporaryDirectory() as folder:
        options = ExportOptions(
            task="feature-extraction", batch_size=(8,), sequence_length=(32, LENGTH), dynamic_batch_size=True
        )
        export(checkpoint, Path(folder) / "out", options)
        model = CompiledModel.from_pretrained(Path(folder) / "out")
        sentences = [each for each in sentences if len(model.tokenizer.encode(each)) <= LENGTH]
        found = model.embed(sentences)
    expected = theirs.encode(sentences, convert_to_numpy=True)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    result = {
        "question": "embeddings",
        "machine": describe(),
        "sentence_transformers": version("sentence-transformers"),
        "sentences": len(sentences),
        "max_abs_difference": float(np.abs(found - expected).max()),
        "min_cosine": float(cosines.min()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
