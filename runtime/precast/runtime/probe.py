"""`python -m precast.runtime.probe ARTIFACT QUESTIONS ANSWERS [SHA256]`: answer a file of questions with an artifact.

Validation runs this in a fresh process, so that what it judges is what a user will run: the artifact as it lies on
disk, opened by the runtime, without the exporter's libraries.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .decoder import CompiledModelForCausalLM
from .errors import PrecastError
from .model import CompiledModel

__all__ = ["main"]


def main(artifact: str, questions: str, answers: str, sha256: str | None = None) -> None:
    """Read questions (JSON), write answers (npz). Arrays are named `<question>/<row>/<output>`.

    `sha256` pins the artifact's digest: whoever just built it can vouch for its native code that way.
    """
    model = CompiledModel.from_pretrained(artifact, sha256=sha256)
    found: dict[str, Any] = {}
    for index, question in enumerate(json.loads(Path(questions).read_text())):
        answer = _ask_decoder if isinstance(model, CompiledModelForCausalLM) else _ask_encoder
        for row, outputs in enumerate(answer(model, question)):
            found.update({f"{index}/{row}/{name}": array for name, array in outputs.items()})
    np.savez(answers, **found)


def _ask_decoder(model: Any, question: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [np.array(row, np.int64) for row in question["rows"]]
    if question["kind"] in ("logits", "score"):
        return [{"logits": each} for each in model.logits_at(rows, question["positions"])]
    ids, mask = _padded(rows, question["side"])
    # Spelled out, so that the checkpoint's own generation settings play no part.
    whole = model.generate(
        ids, mask, max_new_tokens=question["count"], do_sample=False, eos_token_id=[], stop_strings=[],
        repetition_penalty=1.0, no_repeat_ngram_size=0,
    )  # fmt: skip
    return [{"tokens": row[ids.shape[1] :]} for row in whole]


def _ask_encoder(model: Any, question: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [np.array(row, np.int64) for row in question["rows"]]
    ids, mask = _padded(rows, question["side"])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if question["types"]:
        inputs["token_type_ids"], _ = _padded([np.array(row, np.int64) for row in question["types"]], question["side"])
    outputs = model(**inputs)
    sliced = {spec.name: "length" in spec.slice for spec in model.variant.graphs[0].outputs}
    return [
        {name: array[row][mask[row] == 1] if sliced[name] else array[row] for name, array in outputs.items()}
        for row in range(len(rows))
    ]


def _padded(rows: list[Any], side: str) -> tuple[Any, Any]:
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[index, start : start + len(row)] = row
        mask[index, start : start + len(row)] = 1
    return ids, mask


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PrecastError as error:
        sys.exit(f"{type(error).__name__}: {error}")
