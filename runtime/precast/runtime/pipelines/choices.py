"""Pipelines that choose among labels or answers given with the input."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError, PrecastWarning
from ..generation.probabilities import softmax
from .base import Array, Batch, Pipeline, TextPipeline
from .scores import labels, top_indices

__all__ = ["LabelledPipeline", "MultipleChoicePipeline", "ZeroShotClassificationPipeline", "fill_template", "labels_of"]


class LabelledPipeline(Pipeline):
    """A pipeline that takes its labels with each call."""

    def __call__(self, inputs: Any = None, candidate_labels: Any = ..., **options: Any) -> Any:
        """As `Pipeline.__call__`, with the labels by position or name."""
        if candidate_labels is not ...:
            options["candidate_labels"] = candidate_labels
        return super().__call__(inputs, **options)


class ZeroShotClassificationPipeline(LabelledPipeline, TextPipeline):
    """Classification by labels given with the text: a model of natural language inference scores whether each follows
    from it (Yin et al. 2019)."""

    names = ("sequences",)

    def preprocess(
        self,
        inputs: Any,
        *,
        candidate_labels: str | Sequence[str] = (),
        hypothesis_template: str = "This example is {}.",
        truncation: bool = False,
    ) -> Batch:
        """Each text with each label, as token ids.

        Args:
            inputs: a text or a list of texts. As in transformers, they are cut to the length that the tokenizer says.
            candidate_labels: the labels; a string names several with commas.
            hypothesis_template: the sentence that is to follow from the text, {} stands for the label.
            truncation: cut also texts that are longer than compiled for, instead of refusing them.
        """
        texts, is_one = self._as_list(inputs)
        if wrong := [each for each in texts if not isinstance(each, str) or not each]:
            raise InputError(f"An input is a text of one character at least; this is {wrong[0]!r:.80}.")
        names = labels_of(candidate_labels)
        cut = {"length": self._max_length() if truncation else self.tokenizer.max_length, "strategy": "only_first"}
        encodings = [
            self._encoding(text, fill_template(hypothesis_template, name), **cut) for text in texts for name in names
        ]
        return Batch(self._as_arrays(encodings), texts, is_one, labels=names)

    def postprocess(self, outputs: Batch, *, multi_label: bool = False) -> Any:
        """{"sequence", "labels", "scores"} for each text, the likeliest label first.

        Args:
            outputs: of `forward`.
            multi_label: whether several labels can be right: each is scored by itself, entailment against
                contradiction. Otherwise the scores sum to 1.
        """
        names = outputs.notes["labels"]
        scores = self._label_scores(outputs["logits"].reshape(len(outputs.inputs), len(names), -1), multi_label)
        answers = []
        for text, row in zip(outputs.inputs, scores, strict=True):
            order = top_indices(row, None)
            answers.append(
                {"sequence": text, "labels": [names[at] for at in order], "scores": [float(row[at]) for at in order]}
            )
        return outputs.answer(answers)

    def _label_scores(self, logits: Array, multi_label: bool) -> Array:
        """Probabilities [texts, labels] from logits [texts, labels, classes]."""
        entailment = self._entailment_class(logits.shape[2])
        if multi_label or logits.shape[1] == 1:
            contradiction = -1 if entailment == 0 else 0
            return softmax(logits[..., [contradiction, entailment]])[..., 1]
        return softmax(logits[..., entailment])

    def _entailment_class(self, classes: int) -> int:
        """The index of the class 'entailment'; that of the last class where no label is called so, as in
        transformers."""
        names = labels(self.model.config)
        given = self.model.config.get("label2id")
        for name, index in (given if isinstance(given, dict) else {name: at for at, name in names.items()}).items():
            if name.lower().startswith("entail") and index in range(classes):
                return int(index)
        warnings.warn(
            f"Zero-shot classification takes a model of natural language inference, one of whose labels is "
            f"'entailment'; this model's are: {', '.join(names.values()) or 'unnamed'}. The last one is taken for it; "
            f"where that is wrong, correct label2id in the checkpoint's config.json and export it again.",
            PrecastWarning,
            stacklevel=2,
        )
        return -1


class MultipleChoicePipeline(TextPipeline):
    """Chooses the continuation that fits a text best."""

    def preprocess(self, inputs: Any, *, truncation: bool = False) -> Batch:
        """Each prompt with each of its choices, as token ids [inputs, choices, length].

        Args:
            inputs: {"prompt": text, "choices": [text, …]}, or a list of these, all with the same number of choices.
            truncation: cut what is longer than compiled for, instead of refusing it.
        """
        given, is_one = self._as_list(inputs)
        counts = {len(choices) for _, choices in map(_prompt_and_choices, given)}
        if len(counts) > 1:
            raise InputError(f"All inputs of a list must have the same number of choices; these have {sorted(counts)}.")
        length = self._max_length() if truncation else None
        encodings = [
            self._encoding(prompt, choice, length=length)
            for prompt, choices in map(_prompt_and_choices, given)
            for choice in choices
        ]
        flat = self._as_arrays(encodings)
        arrays = {name: rows.reshape(len(given), *counts, -1) for name, rows in flat.items()}
        return Batch(arrays, given, is_one)

    def postprocess(self, outputs: Batch) -> Any:
        """{"choice": index, "answer": text, "score", "scores": of all choices} for each input."""
        answers = []
        for given, scores in zip(outputs.inputs, softmax(outputs["logits"]), strict=True):
            index = int(scores.argmax())
            answers.append(
                {"choice": index, "answer": given["choices"][index], "score": float(scores[index]),
                 "scores": np.asarray(scores, float).tolist()}
            )  # fmt: skip
        return outputs.answer(answers)


def labels_of(given: str | Sequence[str]) -> list[str]:
    """The labels that were named, in a list or with commas between them. Raises InputError where there is none."""
    names = [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given)
    found = [name for name in names if name]
    if not found or not all(isinstance(name, str) for name in found):
        raise InputError("Name the labels to choose from: candidate_labels=['politics', 'sports'].")
    return found


def fill_template(template: str, name: str) -> str:
    """Put a label into a template. Raises InputError where it has no place for one."""
    try:
        sentence = template.format(name)
    except (ValueError, LookupError, AttributeError) as error:
        raise InputError(f"hypothesis_template={template!r} takes no label: {error}.") from None
    if sentence == template:
        raise InputError(f"hypothesis_template={template!r} has no {{}}, where the label goes.")
    return sentence


def _prompt_and_choices(given: Any) -> tuple[str, list[str]]:
    choices = given.get("choices") if isinstance(given, dict) and given.keys() == {"prompt", "choices"} else None
    if choices and isinstance(choices, list | tuple):
        return given["prompt"], list(choices)
    raise InputError(f'An input is {{"prompt": text, "choices": [text, …]}}; this is {given!r:.80}.')
