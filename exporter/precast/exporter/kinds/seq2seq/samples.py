"""What an encoder-decoder is asked before it is published, and what the eager model says to it.

A row of a sample is a source, in its tensors, and along with it, for logits, the tokens of an answer.
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
from ..samples import Answer, ValidationSample, repeat

__all__ = ["answer", "validation_samples"]

Array = np.ndarray[Any, Any]
GREEDY_SOURCES = 4
GREEDY_TOKENS = 24
BEAMS = 3
"""As in precast.runtime.validation_worker, which searches with as many."""


def validation_samples(graphs: list[Graph], texts: list[list[int]]) -> list[ValidationSample]:
    """Logits along given answers, for sources at the edges of each encoder's length; greedy tokens; and a search."""
    encoders, decoder = [graph for graph in graphs if graph.role == "encode"], graphs[-1]
    return [
        *(sample for graph in encoders for sample in _logit_samples(graph, decoder, texts)),
        *_free_samples(encoders[-1], decoder, texts),
    ]


def _logit_samples(graph: Graph, decoder: Graph, texts: list[list[int]]) -> list[ValidationSample]:
    length, batch = int(graph.length), decoder.slots  # type: ignore[arg-type]
    sources = [_source(graph, (texts * (batch // len(texts) + 1))[index], index) for index in range(batch)]
    cases = {"sources, padded right": (sources, "right"), "a short batch": (sources[: max(1, batch - 1)], "right")}
    if graph.inputs[0].name == "input_ids":
        cases |= {
            "sources, padded left": (sources, "left"),
            "one token": ([_source(graph, texts[0][:1], 0)], "right"),
            f"all {length} tokens": ([_source(graph, repeat(texts, length), 0)], "right"),
        }
    return [
        ValidationSample(
            f"{graph.name}: {name}", "logits", _answers(len(rows), decoder, texts), side=side, tensors=rows
        )
        for name, (rows, side) in cases.items()
    ]


def _source(graph: Graph, text: list[int], index: int) -> dict[str, Array]:
    """A text, or a spectrogram of noise: as loud as real ones, and another one for each index."""
    spec = graph.inputs[0]
    if spec.name == "input_ids":
        return {spec.name: np.array(text[: int(graph.length)], np.int64)}  # type: ignore[arg-type]
    noise = np.random.default_rng(index).normal(0, 0.5, [int(size) for size in spec.shape[1:]])  # type: ignore[arg-type]
    return {spec.name: noise.astype(np.float32)}


def _answers(count: int, decoder: Graph, texts: list[list[int]]) -> list[list[int]]:
    """Answers of several lengths; the first is as long as may be."""
    lengths = [decoder.capacity, *(1 + 5 * index for index in range(1, count))]
    return [repeat(texts[index % len(texts) :], min(length, decoder.capacity)) for index, length in enumerate(lengths)]


def _free_samples(graph: Graph, decoder: Graph, texts: list[list[int]]) -> list[ValidationSample]:
    """Answers that the model finds itself: to batches of sources padded on either side, and by beam search."""
    count = min(GREEDY_TOKENS, decoder.capacity - 1)
    sources = [_source(graph, text, index) for index, text in enumerate(texts[:GREEDY_SOURCES])]
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
    sources = [_given(source) for source in sample.tensors]
    if sample.kind == "logits":
        return [_logits(model, source, row) for source, row in zip(sources, sample.rows, strict=True)]
    found = _beams if sample.kind == "beams" else _greedy
    return [found(model, source, sample.count) for source in sources]


def _given(source: dict[str, Array]) -> dict[str, Any]:
    given = {name: torch.from_numpy(tensor)[None] for name, tensor in source.items()}
    if "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    return given


def _logits(model: nn.Module, source: dict[str, Any], row: list[int]) -> Answer:
    result = model(**source, decoder_input_ids=torch.tensor([row]), use_cache=False, return_dict=True)
    return Answer({"logits": result.logits[0].float().numpy()})


def _greedy(model: Any, source: dict[str, Any], count: int) -> Answer:
    tokens, margins, cache, name = [], [], None, cache_argument(model)
    ids = torch.tensor([[_start(model)]])
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


def _beams(model: Any, source: dict[str, Any], count: int) -> Answer:
    """The score of the best answer: two that are equally good may have other tokens, but no other score."""
    before = model.generation_config
    # Only the search itself is asked for, without what the checkpoint's settings add to it.
    model.generation_config = GenerationConfig(decoder_start_token_id=_start(model))
    try:
        found = GenerationMixin.generate(
            model, **source, num_beams=BEAMS, max_new_tokens=count, output_scores=True, return_dict_in_generate=True
        )
    finally:
        model.generation_config = before
    return Answer({"score": found.sequences_scores.float().numpy()})


def _start(model: Any) -> int:
    config = model.generation_config
    found = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    return found if isinstance(found, int) else 0
