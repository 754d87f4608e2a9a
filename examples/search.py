"""Find the lines of a file that mean what is asked for.

python examples/search.py notes.txt "Where is the capital?"
"""

import argparse
from pathlib import Path

import numpy as np

from precast.runtime import CompiledModel


def main() -> None:
    """Print the closest lines, the best first, with the cosine of their embeddings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("query")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--top", type=int, default=3)
    asked = parser.parse_args()

    model = CompiledModel.from_pretrained(
        asked.model, export=True, batch_size=8, sequence_length=(32, 128), dynamic_batch_size=True
    )
    lines = [line for line in asked.file.read_text("utf-8").splitlines() if line.strip()]
    vectors = model.embed([asked.query, *lines])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = vectors[1:] @ vectors[0]
    for index in np.argsort(-likeness)[: asked.top]:
        print(f"{likeness[index]:.3f}  {lines[index]}")


if __name__ == "__main__":
    main()
