"""Answer validation samples: `python -m precast.runtime.validation_worker ARTIFACT SAMPLES ANSWERS VARIANT [SHA256]`.

Validation runs this in a fresh process, so that it judges what a user will run: the artifact on disk, opened by the
runtime, without the exporter's libraries.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .artifact.schema import Output
from .errors import PrecastError
from .generation.config import GenerationConfig
from .inputs.encoder_inputs import RUNNING, axes_of
from .models.base import CompiledModel
from .models.causal_lm import CompiledModelForCausalLM
from .models.seq2seq import EncoderDecoder

__all__ = ["main"]


def main(artifact: str, samples: str, answers: str, variant: str, sha256: str | None = None) -> None:
    """Read samples (JSON, and tensors beside it), write answers (npz). Arrays are named `<sample>/<row>/<name>`.

    `variant` is the compiled form that answers. `sha256` pins the artifact's digest: whoever just built it can vouch
    for its native code that way.
    """
    model = CompiledModel.from_pretrained(artifact, variant=variant, sha256=sha256)
    found: dict[str, Any] = {}
    for index, sample in enumerate(_read_samples(Path(samples))):
        for row, outputs in enumerate(_ask_model(model, sample)):
            found.update({f"{index}/{row}/{name}": array for name, array in outputs.items()})
    np.savez(answers, **found)


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples, each with its rows of `tensors` by name."""
    samples: list[dict[str, Any]] = json.loads(path.read_text())
    for sample in samples:
        sample["tensors"] = []
    with np.load(path.with_suffix(".npz")) as archive:
        for key in archive.files:
            index, row, name = key.split("/")
            rows = samples[int(index)]["tensors"]
            if int(row) == len(rows):
                rows.append({})
            rows[int(row)][name] = archive[key]
    return samples


def _ask_model(model: Any, sample: dict[str, Any]) -> list[dict[str, Any]]:
    if isinstance(model, CompiledModelForCausalLM):
        return _ask_decoder(model, sample)
    return _ask_seq2seq(model, sample) if isinstance(model, EncoderDecoder) else _ask_encoder(model, sample)


def _ask_decoder(model: Any, sample: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [np.array(row, np.int64) for row in sample["rows"]]
    adapter = _load_adapters(model, sample["adapters"])
    if sample["kind"] in ("logits", "score"):
        return [{"logits": each} for each in model.logits_at(rows, sample["positions"], adapter=adapter)]
    ids, mask = _pad_rows(rows, sample["side"])
    # The checkpoint's own generation settings play no part.
    model.generation_config = GenerationConfig(eos_token_id=[])
    whole = model.generate(ids, mask, max_new_tokens=sample["count"], adapter=adapter)
    model.generation_config = None
    return [{"tokens": row[ids.shape[1] :]} for row in whole]


def _load_adapters(model: Any, folders: list[str]) -> list[str | None] | None:
    """Load the adapters of these directories, each by its path as its name; returns the names of the rows' adapters."""
    for folder in dict.fromkeys(filter(None, folders)):
        if folder not in model.adapters:
            model.load_adapter(folder, folder)
    return [folder or None for folder in folders] or None


def _ask_seq2seq(model: Any, sample: dict[str, Any]) -> list[dict[str, Any]]:
    given, count = _seq2seq_inputs(sample), sample["count"]
    if sample["kind"] in ("logits", "score"):
        rows = [np.array(row, np.int64) for row in sample["rows"]]
        logits = model(**given, decoder_input_ids=_pad_rows(rows, "right")[0]).logits
        return [{"logits": each[: len(row)]} for each, row in zip(logits, rows, strict=True)]
    start = model.start_token(model.generation_config)
    # The checkpoint's own generation settings play no part.
    model.generation_config = GenerationConfig(eos_token_id=[])
    asked = {"decoder_input_ids": np.full((len(sample["tensors"]), 1), start), "max_new_tokens": count}
    if sample["kind"] == "greedy":
        found = [{"tokens": row[-count:]} for row in model.generate(**given, **asked)]
    else:
        search = model.generate(**given, **asked, num_beams=3, output_scores=True, return_dict_in_generate=True)
        found = [{"score": score[None]} for score in search.sequences_scores]
    model.generation_config = None
    return found


def _seq2seq_inputs(sample: dict[str, Any]) -> dict[str, Any]:
    rows = sample["tensors"]
    if "input_ids" not in rows[0]:
        return {"input_features": np.stack([row["input_features"] for row in rows])}
    ids, mask = _pad_rows([row["input_ids"] for row in rows], sample["side"])
    return {"input_ids": ids, "attention_mask": mask}


def _ask_encoder(model: Any, sample: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows in one call, padded on one side; each gets its own part of the outputs back."""
    rows = sample["tensors"]
    specs = [spec for spec in model.variant.graphs[0].inputs if spec.name in rows[0]]
    inputs: dict[str, Any] = {}
    for spec in specs:
        running = next((index - 1 for index, axis in enumerate(axes_of(spec)) if axis in RUNNING), None)
        inputs[spec.name], mask = _stack_rows([row[spec.name] for row in rows], running, sample["side"])
        if spec is specs[0] and mask is not None:
            inputs["attention_mask"] = mask.astype(np.int64)
    outputs = model(**inputs)
    real = inputs.get("attention_mask", np.ones((len(rows), 1), np.int64))
    return [
        {
            spec.name: _cut_to_row(model, spec, outputs[spec.name], row, real[row])
            for spec in model.variant.graphs[0].outputs
        }
        for row in range(len(rows))
    ]


def _stack_rows(rows: list[Any], running: int | None, side: str) -> tuple[Any, Any]:
    """Rows [...] of different sizes along one dimension as one array [rows, ...] with zeros on one side of each, and
    which positions [rows, ..., running] are real."""
    if running is None:
        return np.stack(rows), None
    width = max(row.shape[running] for row in rows)
    result = np.zeros((len(rows), *rows[0].shape[:running], width, *rows[0].shape[running + 1 :]), rows[0].dtype)
    real = np.zeros(result.shape[: running + 2], bool)
    for index, row in enumerate(rows):
        start = width - row.shape[running] if side == "left" else 0
        place: Any = (index, *[slice(None)] * running, slice(start, start + row.shape[running]))
        result[place], real[place] = row, True
    return result, real


def _cut_to_row(model: Any, spec: Output, output: Any, row: int, real: Any) -> Any:
    """Cut an output to one row: to its tokens, its frames, its own text of several."""
    mine = output[row]
    for index, axis in enumerate(spec.slice[1:]):
        before = (slice(None),) * index
        if axis == "length":
            mine = mine[(*before, real == 1)]
        elif axis == "frames":
            mine = mine[(*before, slice(model.frames(int(real.sum()))))]
        elif axis == "texts":
            mine = mine[(*before, slice(row, row + 1))]
    return mine


def _pad_rows(rows: list[Any], side: str) -> tuple[Any, Any]:
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
