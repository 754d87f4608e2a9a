"""Validation samples for encoder-decoders, and the eager model's answers to them.

A row of a sample is a source, in `tensors`, and for samples of logits the tokens of an answer, in `rows`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from precast.runtime.artifact.schema import Graph

from ...architectures.cache_names import cache_argument, find_cache
from ..samples import CALIBRATION_SEED, HELD_OUT_SEED, Answer, ValidationSample, repeat_tokens

__all__ = ["answer", "calibration_inputs", "held_out_samples", "validation_samples"]

Array = np.ndarray[Any, Any]
GREEDY_SOURCES = 4
GREEDY_TOKENS = 24
BEAMS = 3
"""The same as in precast.runtime.validation_worker."""


def validation_samples(graphs: list[Graph], texts: list[list[int]]) -> list[ValidationSample]:
    """Logits along given answers, for sources at the edges of each source length; greedy tokens; and a beam search."""
    encoders, decoder = [graph for graph in graphs if graph.role == "encode"], graphs[-1]
    return [
        *(sample for graph in encoders for sample in _logit_samples(graph, decoder, texts)),
        *_generated_samples(encoders[-1], decoder, texts),
    ]


HELD_OUT_LENGTH = 128


def held_out_samples(graphs: list[Graph], texts: list[list[int]]) -> list[ValidationSample]:
    """Each text as the answer to itself, or to a spectrogram, cut to fit the graphs, to be scored token by token."""
    encoder, decoder = [graph for graph in graphs if graph.role == "encode"][-1], graphs[-1]
    length = min(HELD_OUT_LENGTH, decoder.capacity)
    return [
        ValidationSample(
            f"held-out text {index + 1}",
            "score",
            [text[:length]],
            tensors=[_make_source(encoder, text, HELD_OUT_SEED + index)],
        )
        for index, text in enumerate(texts)
    ]


def calibration_inputs(graphs: list[Graph], texts: list[list[int]]) -> list[dict[str, Array]]:
    """Rows to calibrate on, each with a batch dimension of 1: the texts as answers to themselves, or to spectrograms,
    cut to the largest graphs."""
    encoder, decoder = [graph for graph in graphs if graph.role == "encode"][-1], graphs[-1]
    return [
        {
            **{name: each[None] for name, each in _make_source(encoder, text, CALIBRATION_SEED + index).items()},
            "decoder_input_ids": np.array([text[: decoder.capacity]], np.int64),
        }
        for index, text in enumerate(texts)
    ]


def _logit_samples(graph: Graph, decoder: Graph, texts: list[list[int]]) -> list[ValidationSample]:
    length, batch = int(graph.length), decoder.slots  # type: ignore[arg-type]
    sources = [_make_source(graph, (texts * (batch // len(texts) + 1))[index], index) for index in range(batch)]
    cases = {"sources, padded right": (sources, "right"), "a short batch": (sources[: max(1, batch - 1)], "right")}
    if graph.inputs[0].name == "input_ids":
        cases |= {
            "sources, padded left": (sources, "left"),
            "one token": ([_make_source(graph, texts[0][:1], 0)], "right"),
            f"all {length} tokens": ([_make_source(graph, repeat_tokens(texts, length), 0)], "right"),
        }
    return [
        ValidationSample(
            f"{graph.name}: {name}", "logits", _make_answers(len(rows), decoder, texts), side=side, tensors=rows
        )
        for name, (rows, side) in cases.items()
    ]


def _make_source(graph: Graph, text: list[int], index: int) -> dict[str, Array]:
    """A text, or a spectrogram of noise as loud as real ones, which differs by index."""
    spec = graph.inputs[0]
    if spec.name == "input_ids":
        return {spec.name: np.array(text[: int(graph.length)], np.int64)}  # type: ignore[arg-type]
    noise = np.random.default_rng(index).normal(0, 0.5, [int(size) for size in spec.shape[1:]])  # type: ignore[arg-type]
    return {spec.name: noise.astype(np.float32)}


def _make_answers(count: int, decoder: Graph, texts: list[list[int]]) -> list[list[int]]:
    """Answers of several lengths; the first fills the capacity."""
    lengths = [decoder.capacity, *(1 + 5 * index for index in range(1, count))]
    return [
        repeat_tokens(texts[index % len(texts) :], min(length, decoder.capacity))
        for index, length in enumerate(lengths)
    ]


def _generated_samples(graph: Graph, decoder: Graph, texts: list[list[int]]) -> list[ValidationSample]:
    """Greedy answers to batches of sources padded on either side, and one found by beam search."""
    count = min(GREEDY_TOKENS, decoder.capacity - 1)
    sources = [_make_source(graph, text, index) for index, text in enumerate(texts[:GREEDY_SOURCES])]
    groups = [sources[start : start + decoder.slots] for start in range(0, len(sources), decoder.slots)]
    found = [
        ValidationSample(f"greedy {index}", "greedy", side=("left", "right")[index % 2], count=count, tensors=group)
        for index, group in enumerate(groups)
    ]
    if decoder.slots >= BEAMS:
        found.append(ValidationSample(f"{BEAMS} beams", "beams", count=count, tensors=sources[:1]))
    return found if count else []


def answer(model: nn.Module, sample: ValidationSample, outputs: tuple[str, ...]) -> list[Answer]:
    """The eager answers, one row at a time and without padding."""
    sources = [_as_tensors(source) for source in sample.tensors]
    if sample.kind in ("logits", "score"):
        return [_answer_logits(model, source, row) for source, row in zip(sources, sample.rows, strict=True)]
    generate = _beam_search if sample.kind == "beams" else _greedy_search
    return [generate(model, source, sample.count) for source in sources]


def _as_tensors(source: dict[str, Array]) -> dict[str, Any]:
    given = {name: torch.from_numpy(tensor)[None] for name, tensor in source.items()}
    if "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    return given


def _answer_logits(model: nn.Module, source: dict[str, Any], row: list[int]) -> Answer:
    result = model(**source, decoder_input_ids=torch.tensor([row]), use_cache=False, return_dict=True)
    return Answer({"logits": result.logits[0].float().numpy()})


def _greedy_search(model: Any, source: dict[str, Any], count: int) -> Answer:
    tokens, margins, cache, name = [], [], None, cache_argument(model)
    ids = torch.tensor([[_start_token(model)]])
    for _ in range(count):
        result = model(**source, decoder_input_ids=ids, use_cache=True, return_dict=True, **{name: cache})
        best = result.logits[0, -1].float().topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        cache, ids = find_cache(result), best.indices[:1][None]
        states = BaseModelOutput(last_hidden_state=result.encoder_last_hidden_state)
        kept = {name: tensor for name, tensor in source.items() if name == "attention_mask"}
        source = {**kept, "encoder_outputs": states}
    return Answer({"tokens": np.array(tokens)}, np.array(margins))


def _beam_search(model: Any, source: dict[str, Any], count: int) -> Answer:
    """The score of the best answer: equally good answers may differ in their tokens, but not in their score."""
    before = model.generation_config
    # The search alone is compared, without the settings of the checkpoint's generation_config.json.
    model.generation_config = GenerationConfig(decoder_start_token_id=_start_token(model))
    try:
        found = GenerationMixin.generate(
            model, **source, num_beams=BEAMS, max_new_tokens=count, output_scores=True, return_dict_in_generate=True
        )
    finally:
        model.generation_config = before
    return Answer({"score": found.sequences_scores.float().numpy()})


def _start_token(model: Any) -> int:
    config = model.generation_config
    found = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    return found if isinstance(found, int) else 0
