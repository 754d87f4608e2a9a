"""Encoders: one forward pass over padded rows, cut back to what the caller gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .artifact.schema import Graph, Output
from .errors import InputError
from .model import CompiledModel
from .padding import align, as_ids, as_mask, pad_rows, smallest_fit, unalign
from .tensors import ModelOutput, like, to_numpy

__all__ = [
    "CompiledModelForFeatureExtraction",
    "CompiledModelForMaskedLM",
    "CompiledModelForQuestionAnswering",
    "CompiledModelForSequenceClassification",
    "CompiledModelForTokenClassification",
]

Array = np.ndarray[Any, Any]


class _Encoder(CompiledModel):
    def __call__(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> ModelOutput:
        """One forward pass.

        Args:
            input_ids: int64 [batch, length], numpy or torch.
            attention_mask: [batch, length] of 0 and 1, by default all 1. Rows may be padded on either side; the answer
                is that of the row without padding.
            token_type_ids: [batch, length], by default all 0, for models that have them.

        Returns:
            The task's outputs by name, cut to [batch, length, …] where they have these dimensions. What stands at
            padded positions means nothing.

        Raises:
            InputError: the tensors do not fit each other or the compiled sizes.
        """
        ids = as_ids(to_numpy(input_ids), self._vocabulary())
        mask = as_mask(to_numpy(attention_mask), ids)
        tensors = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
        if token_type_ids is not None:
            tensors["token_type_ids"] = self._type_ids(to_numpy(token_type_ids), ids)
        tensors, shifts = align(tensors, mask)
        graph = self._fitting(_longest(tensors["attention_mask"]))
        with self._lock:
            parts = [
                self._run(graph, {name: each[part] for name, each in tensors.items()})
                for part in self._slices(len(ids))
            ]
        outputs = {}
        for spec in graph.outputs:
            whole = np.concatenate([part[spec.name] for part in parts])
            outputs[spec.name] = like(input_ids, self._restore(whole, spec, shifts, ids.shape[1]))
        return ModelOutput(outputs)

    @property
    def lengths(self) -> list[int]:
        """The compiled sequence lengths."""
        return list(self.artifact.contract.shapes.sequence_length)

    def _type_ids(self, given: Any, ids: Array) -> Array:
        types = as_ids(given, self.config.get("type_vocab_size"), "token_type_ids")
        if types.shape != ids.shape:
            raise InputError(f"token_type_ids has the shape {list(types.shape)}, input_ids {list(ids.shape)}.")
        return types

    def _fitting(self, length: int) -> Graph:
        """The graph of the smallest compiled length that holds `length` tokens."""
        graphs = {graph.length: graph for graph in self.variant.graphs if isinstance(graph.length, int)}
        fit = smallest_fit(length, list(graphs))
        if fit is None:
            raise InputError(
                f"A row has {length} tokens; the model was compiled for {max(graphs)}. Shorten it, or compile a longer "
                f"one: {self._recompile(length)}"
            )
        return graphs[fit]

    def _run(self, graph: Graph, tensors: dict[str, Array]) -> dict[str, Array]:
        """Pad, run, and cut the rows that were added. The results own their memory."""
        assert isinstance(graph.length, int), "an encoder's length is static"
        length, rows = graph.length, len(tensors["input_ids"])
        inputs = {spec.name: np.empty((graph.batch, length), spec.dtype) for spec in graph.inputs}
        for spec in graph.inputs:
            if spec.name in tensors:
                pad_rows(inputs[spec.name], tensors[spec.name][:, :length], spec.pad)
            else:
                inputs[spec.name].fill(spec.pad)
        outputs = {spec.name: np.empty(spec.shape, spec.dtype) for spec in graph.outputs}  # type: ignore[arg-type]
        self._engine.bind(graph.name, inputs, outputs)()
        return {name: array[:rows] for name, array in outputs.items()}

    def _restore(self, whole: Array, spec: Output, shifts: Array, width: int) -> Array:
        """Cut or extend to the caller's width, and move rows back to where their padding had them."""
        if "length" not in spec.slice:
            return whole
        if whole.shape[1] < width:
            missing = np.zeros((len(whole), width - whole.shape[1], *whole.shape[2:]), whole.dtype)
            whole = np.concatenate([whole, missing], 1)
        return np.ascontiguousarray(unalign(whole[:, :width], shifts))


def _longest(mask: Array) -> int:
    """How many positions the longest row needs, once it starts at 0."""
    return int((mask * np.arange(1, mask.shape[1] + 1)).max())


class CompiledModelForFeatureExtraction(_Encoder):
    """`.last_hidden_state` [batch, length, hidden]."""

    task = "feature-extraction"

    def embed(self, texts: Sequence[str]) -> Array:
        """One vector per text, [texts, hidden]: the mean of its token vectors."""
        batch = self.tokenizer(texts)
        states = self(**batch).last_hidden_state
        weights = batch["attention_mask"][:, :, None].astype(states.dtype)
        result: Array = (states * weights).sum(1) / weights.sum(1)
        return result

    def predict(self, text: str, *, top: int = 5) -> dict[str, Any]:
        """The text's vector, as a list of numbers."""
        return {"embedding": [float(each) for each in self.embed([text])[0]]}


class CompiledModelForMaskedLM(_Encoder):
    """`.logits` [batch, length, vocabulary]."""

    task = "fill-mask"

    def predict(self, text: str, *, top: int = 5) -> dict[str, Any]:
        """The likeliest tokens for each mask token in the text. Raises InputError where it has none."""
        batch = self.tokenizer([text])
        mask_id = self.tokenizer.token_id("mask")
        places = np.flatnonzero(batch["input_ids"][0] == mask_id)
        if not len(places):
            raise InputError(f"The text has no {self.tokenizer.special_tokens.get('mask_token', 'mask token')}.")
        logits = self(**batch).logits[0, places]
        return {"masks": [self._best(row, top) for row in logits]}

    def _best(self, logits: Array, top: int) -> list[dict[str, Any]]:
        scores = _softmax(logits)
        best = np.argsort(-scores)[:top]
        return [{"token": self.tokenizer.decode([index]).strip(), "score": float(scores[index])} for index in best]


class CompiledModelForSequenceClassification(_Encoder):
    """`.logits` [batch, labels]."""

    task = "text-classification"

    def predict(self, text: str, *, top: int = 5) -> dict[str, Any]:
        """The likeliest labels with their scores: softmax over several, sigmoid for a single or for independent ones,
        the number itself for regression, as transformers' pipeline scores them."""
        logits = self(**self.tokenizer([text])).logits[0]
        kind = self.config.get("problem_type")
        if kind == "regression":
            scores = logits
        elif kind == "multi_label_classification" or len(logits) == 1:
            scores = 1 / (1 + np.exp(-logits))
        else:
            scores = _softmax(logits)
        order = np.argsort(-scores)[:top]
        return {"labels": [{"label": _label(self.config, index), "score": float(scores[index])} for index in order]}


class CompiledModelForTokenClassification(_Encoder):
    """`.logits` [batch, length, labels]."""

    task = "token-classification"

    def predict(self, text: str, *, top: int = 5) -> dict[str, Any]:
        """Every token of the text with its likeliest label."""
        scores = _softmax(self(**self.tokenizer([text])).logits[0])
        tokens = []
        for row, (start, end), owner in zip(
            scores, self.tokenizer.offsets(text), self.tokenizer.sequence_ids(text), strict=True
        ):
            if owner is not None:
                best = int(row.argmax())
                label = _label(self.config, best)
                tokens.append(
                    {"text": text[start:end], "start": start, "end": end, "label": label, "score": float(row[best])}
                )
        return {"tokens": tokens}


class CompiledModelForQuestionAnswering(_Encoder):
    """`.start_logits` and `.end_logits` [batch, length]."""

    task = "question-answering"

    def answer(self, question: str, context: str, *, longest: int = 30) -> dict[str, Any]:
        """The likeliest passage of the context, of at most `longest` tokens, with its score: the product of the
        probabilities of its start and its end."""
        output = self(**self.tokenizer([question], [context]))
        owners = self.tokenizer.sequence_ids(question, context)
        places = np.array([index for index, owner in enumerate(owners) if owner == 1])
        if not len(places):
            raise InputError("The context is empty.")
        starts, ends = (_softmax(logits[0, places]) for logits in (output.start_logits, output.end_logits))
        scores = np.triu(np.outer(starts, ends)) - np.triu(np.outer(starts, ends), longest)
        start, end = np.unravel_index(scores.argmax(), scores.shape)
        spans = self.tokenizer.offsets(question, context)
        first, last = spans[places[start]][0], spans[places[end]][1]
        return {"answer": context[first:last], "start": first, "end": last, "score": float(scores[start, end])}


def _label(config: dict[str, Any], index: int) -> str:
    return str(config.get("id2label", {}).get(str(index), f"LABEL_{index}"))


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    result: Array = shifted / shifted.sum(-1, keepdims=True)
    return result
