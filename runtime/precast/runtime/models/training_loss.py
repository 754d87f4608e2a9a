"""The losses that transformers computes when a model is given `labels`.

Sources: transformers' loss/loss_utils.py for language models and token classification, its modelling files for
the rest. A loss is the mean over all labelled positions; a label of -100 is none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np

from ..arguments import refuse_unknown
from ..errors import InputError
from ..generation.probabilities import log_softmax
from ..inputs.padding import as_array
from ..inputs.tensors import ModelOutput, convert_like, to_numpy
from .call_options import without_switches

__all__ = ["NOT_LABELLED", "next_token_loss", "class_loss", "sequence_loss", "span_loss", "with_labels"]

Array = np.ndarray[Any, Any]
NOT_LABELLED = -100


def class_loss(logits: Array, labels: Array) -> np.float32:
    """Cross entropy of logits [..., classes] and labels int [...]: masked tokens, tokens, images, choices; an
    encoder-decoder's tokens.

    Raises InputError where shapes differ, a label is no class, or nothing is labelled.
    """
    if labels.shape != logits.shape[:-1]:
        raise InputError(f"labels has the shape {list(labels.shape)}; this model's are {list(logits.shape[:-1])}.")
    if labels.dtype.kind not in "iu":
        raise InputError(f"labels must be whole numbers (int64); these are {labels.dtype}.")
    known = labels != NOT_LABELLED
    if not known.any():
        raise InputError(f"Nothing is labelled: labels hold {NOT_LABELLED} only.")
    chosen, rows = labels[known], logits[known].astype(np.float32)
    if chosen.min() < 0 or chosen.max() >= rows.shape[1]:
        wrong = int(chosen.min()) if chosen.min() < 0 else int(chosen.max())
        raise InputError(f"labels hold {wrong}; the classes are 0..{rows.shape[1] - 1}, and {NOT_LABELLED} for none.")
    return np.float32(-np.take_along_axis(log_softmax(rows), chosen[:, None], 1).mean())


def next_token_loss(logits: Array, labels: Array) -> np.float32:
    """`class_loss` of logits [batch, length, vocabulary] against the labels [batch, length] of the next positions."""
    if labels.shape != logits.shape[:-1]:
        raise InputError(f"labels has the shape {list(labels.shape)}, input_ids {list(logits.shape[:-1])}.")
    return class_loss(logits[:, :-1], labels[:, 1:])


def sequence_loss(logits: Array, labels: Array, problem_type: str | None) -> np.float32:
    """The loss of whole sequences or images, logits [batch, classes].

    By `problem_type`: "regression" is the mean squared error; "single_label_classification" is cross entropy with
    labels int [batch]; "multi_label_classification" is binary cross entropy with labels float [batch, classes]. Where
    it is None, as in transformers: one class is regression, whole numbers are single labels, others several.
    """
    if problem_type is None and logits.shape[-1] > 1:
        problem_type = "single_label_classification" if labels.dtype.kind in "iu" else "multi_label_classification"
    if problem_type == "single_label_classification":
        return class_loss(logits, labels.reshape(-1))
    if labels.size != logits.size:
        raise InputError(f"labels has the shape {list(labels.shape)}; this model's are {list(logits.shape)}.")
    labels = labels.reshape(logits.shape).astype(np.float32)
    if problem_type == "multi_label_classification":
        return np.float32((np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))).mean())
    return np.float32(((logits - labels) ** 2).mean())


def span_loss(start_logits: Array, end_logits: Array, starts: Array, ends: Array, mask: Array) -> np.float32:
    """Mean of the cross entropies of where answers start and end, logits [batch, length], positions int [batch].

    Padding, where mask [batch, length] is 0, takes no part; a position at or after the end is not counted, as in
    transformers, which says so for answers that were cut off.
    """
    return np.float32((_position_loss(start_logits, starts, mask) + _position_loss(end_logits, ends, mask)) / 2)


def with_labels(call: Callable[..., ModelOutput]) -> Callable[..., Any]:
    """Let a model's call take `labels` — for question answering `start_positions` and `end_positions` — and answer with
    `.loss` as its first output, a number of the labels' kind: numpy or torch. It then takes the switches of
    transformers' models, too (`without_switches`)."""

    own = inspect.signature(call).parameters.values()
    takes_any = any(each.kind is each.VAR_KEYWORD for each in own)
    known = [*(each.name for each in own if each.name != "self"), *_NAMES]

    @wraps(call)
    def labelled(self: Any, *tensors: Any, **named: Any) -> Any:
        named, is_named = without_switches(named)
        outputs = with_loss(self, *tensors, **named)
        return outputs if is_named else tuple(outputs.values())

    def with_loss(self: Any, *tensors: Any, **named: Any) -> ModelOutput:
        if not takes_any:
            refuse_unknown("This model's call", named, known)
        labels = {name: named.pop(name) for name in _NAMES if name in named}
        given = {name: _as_labels(value, name) for name, value in labels.items() if value is not None}
        if "labels" in given and hasattr(self, "start_token") and named.get("decoder_input_ids") is None:
            named["decoder_input_ids"] = _shift_right(self, given["labels"])
        outputs = call(self, *tensors, **named)
        if not given:
            return outputs
        arrays = {name: to_numpy(value) for name, value in outputs.items()} | given
        arrays["mask"] = to_numpy(named.get("attention_mask", tensors[1] if len(tensors) > 1 else None))
        task = "text2text-generation" if hasattr(self, "start_token") else self.artifact.contract.task
        loss = np.asarray(_task_loss(task, self.config, arrays, set(given)))
        return ModelOutput(loss=convert_like(labels[next(iter(given))], loss), **outputs)

    return labelled


def _as_labels(value: Any, name: str) -> Array:
    """Labels as an array of numbers. Raises InputError for anything else."""
    labels = as_array(to_numpy(value), name)
    if labels.dtype.kind not in "biuf" or not labels.size:
        raise InputError(f"{name} must be numbers, at least one; these are {value!r:.80}.")
    return labels


def _shift_right(model: Any, labels: Array) -> Array:
    """The decoder_input_ids that belong to `labels`: these shifted right by one, padding where there is none."""
    pad = model.config.get("pad_token_id") or 0
    known = np.where(labels == NOT_LABELLED, pad, labels)
    if model.config.get("model_type") == "mbart":
        # Its answers begin with the language, which is the last of the labels.
        last = (known != pad).sum(1) - 1
        return np.concatenate([np.take_along_axis(known, last[:, None], 1), known[:, :-1]], 1)
    start = model.start_token(model.generation_config)
    return np.concatenate([np.full_like(known[:, :1], start), known[:, :-1]], 1)


_NAMES = ("labels", "start_positions", "end_positions")
_BY_CLASS = ("fill-mask", "token-classification", "multiple-choice", "audio-classification",
             "text2text-generation", "summarization", "translation")  # fmt: skip
_BY_SEQUENCE = ("text-classification", "image-classification")
_TASKS = (*_BY_SEQUENCE, "question-answering", "text-generation", *_BY_CLASS)


def _task_loss(task: str, config: Mapping[str, Any], arrays: Mapping[str, Any], given: set[str]) -> np.float32:
    if task not in _TASKS:
        raise InputError(f"The loss of {task} is not computed here; it is for: {', '.join(_TASKS)}.")
    wanted = set(_NAMES[1:]) if task == "question-answering" else {"labels"}
    if given != wanted:
        raise InputError(f"{task} has its loss from {' and '.join(sorted(wanted))}, not from {', '.join(given)} alone.")
    if task == "question-answering":
        logits = arrays["start_logits"]
        mask = np.ones(logits.shape) if arrays["mask"] is None else arrays["mask"]
        return span_loss(logits, arrays["end_logits"], arrays["start_positions"], arrays["end_positions"], mask)
    logits, labels = arrays["logits"], np.asarray(arrays["labels"])
    if task in _BY_SEQUENCE:
        return sequence_loss(logits, labels, config.get("problem_type"))
    return next_token_loss(logits, labels) if task == "text-generation" else class_loss(logits, labels)


def _position_loss(logits: Array, positions: Array, mask: Array) -> float:
    positions = np.clip(np.asarray(positions).reshape(-1), 0, logits.shape[1])
    labels = np.where(positions == logits.shape[1], NOT_LABELLED, positions)
    return float(class_loss(np.where(mask.astype(bool), logits, -np.inf), labels))
