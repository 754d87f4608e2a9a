"""Texts in; vectors, labels, or the tokens behind a mask out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, UsageError
from .base import Array, Batch, Pipeline, TextPipeline, text_and_pair
from .scores import best, label, sigmoid, softmax

__all__ = ["FeatureExtractionPipeline", "FillMaskPipeline", "TextClassificationPipeline", "classify"]

_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "none": lambda logits: logits,
}


class FeatureExtractionPipeline(TextPipeline):
    """Vectors of texts; of images and sounds where the model takes these."""

    @classmethod
    def of(cls, model: Any) -> type[Pipeline]:
        """The class for what the model takes."""
        from .audio import AudioFeatureExtractionPipeline
        from .vision import ImageFeatureExtractionPipeline

        kinds = {"input_ids": cls, "pixel_values": ImageFeatureExtractionPipeline}
        return kinds.get(model.main_input_name, AudioFeatureExtractionPipeline)

    def preprocess(self, inputs: Any, *, truncation: bool = False, prompt: str | None = None) -> Batch:
        """Texts as token ids.

        Args:
            inputs: a text; or a pair of texts, {"text": …, "text_pair": …}; or a list of these. A model of
                sentence-transformers cuts them to its max_seq_length, as that library does.
            truncation: cut what is longer than compiled for, instead of refusing it.
            prompt: stands before each text; by default the default prompt of a model of sentence-transformers.
        """
        given, is_one = self._listed(inputs)
        rules, length = self.model.sentence_rules, self._longest() if truncation else None
        encodings = [rules.encoding(self.tokenizer, *text_and_pair(each), prompt=prompt, length=length)
                     for each in given]  # fmt: skip
        return Batch(self._arrays(encodings), given, is_one, encodings=encodings)

    def postprocess(self, outputs: Batch, *, pooling: str | None = None) -> Any:
        """Nested lists of numbers for each text.

        Args:
            outputs: of `forward`.
            pooling: "none" gives every token's vector, [1, tokens, hidden]; "mean" their mean, [hidden]; "cls" the
                first one, [hidden]. By default the sentence embedding [hidden] of a model that was compiled with one,
                and otherwise "none", as transformers' pipeline gives them.
        """
        if pooling is None and "sentence_embedding" in outputs:
            return outputs.answer(outputs["sentence_embedding"].tolist())
        pool = _POOLING.get(pooling or "none")
        if pool is None:
            raise UsageError(f"pooling={pooling!r} is not known; choose one of: {', '.join(_POOLING)}.")
        return outputs.answer([pool(states).tolist() for states in self._own(outputs, "last_hidden_state")])


_POOLING: dict[str, Callable[[Array], Array]] = {
    "none": lambda states: states[None],
    "mean": lambda states: np.asarray(states.mean(0)),
    "cls": lambda states: np.asarray(states[0]),
}


class TextClassificationPipeline(TextPipeline):
    """Labels of texts, or of pairs of texts."""

    def postprocess(self, outputs: Batch, *, top_k: Any = ..., function_to_apply: str | None = None) -> Any:
        """[{"label", "score"}, …] for each text, the likeliest first.

        Args:
            outputs: of `forward`.
            top_k: how many labels; None is all. Where it is not given, a list of texts gets {"label", "score"} for
                each, without a list around it, as from transformers.
            function_to_apply: "softmax", "sigmoid" or "none"; by default what the model's problem type asks for:
                nothing for regression, sigmoid for one or for independent labels, softmax otherwise.
        """
        rows = [classify(self.model.config, row, function_to_apply) for row in outputs["logits"]]
        if top_k is ...:
            return rows[0][:1] if outputs.is_one else [row[0] for row in rows]
        return outputs.answer([row[:top_k] for row in rows])


def classify(config: dict[str, Any], logits: Array, function: str | None = None) -> list[dict[str, Any]]:
    """All labels with their scores, the highest first. Raises UsageError for an unknown function."""
    if function is not None and function not in _FUNCTIONS:
        raise UsageError(f"function_to_apply={function!r} is not known; choose one of: {', '.join(_FUNCTIONS)}.")
    scores = _FUNCTIONS[function or _function_of(config, len(logits))](logits)
    return [{"label": label(config, index), "score": float(scores[index])} for index in best(scores, None)]


def _function_of(config: dict[str, Any], labels: int) -> str:
    problem = config.get("problem_type")
    if problem == "regression":
        return "none"
    return "sigmoid" if problem == "multi_label_classification" or labels == 1 else "softmax"


class FillMaskPipeline(TextPipeline):
    """What may stand where a text has the mask token."""

    def preprocess(self, inputs: Any, *, truncation: bool = False) -> Batch:
        """Texts as token ids. Raises InputError where a text has no mask token."""
        batch = super().preprocess(inputs, truncation=truncation)
        for text, encoding in zip(batch.inputs, batch.notes["encodings"], strict=True):
            if self._mask() not in encoding.ids:
                raise InputError(f"{text!r:.80} has no {self.tokenizer.special_tokens['mask_token']}, the mask token.")
        return batch

    def postprocess(self, outputs: Batch, *, top_k: int = 5, targets: str | Sequence[str] | None = None) -> Any:
        """For each text its likeliest fillings, [{"score", "token", "token_str", "sequence"}, …]; for a text with
        several masks a list of such lists.

        Args:
            outputs: of `forward`.
            top_k: how many fillings.
            targets: consider only these words, each of which must be one token.
        """
        allowed = None if targets is None else self._token_ids([targets] if isinstance(targets, str) else targets)
        answers = []
        for encoding, logits in zip(outputs.notes["encodings"], self._own(outputs, "logits"), strict=True):
            ids = np.array(encoding.ids)
            places = np.flatnonzero(ids == self._mask())
            filled = [self._fillings(ids, at, logits[at], top_k, allowed, len(places) == 1) for at in places.tolist()]
            answers.append(filled[0] if len(places) == 1 else filled)
        return outputs.answer(answers)

    def _fillings(
        self, ids: Array, place: int, logits: Array, count: int, allowed: Array | None, is_only: bool
    ) -> list[dict[str, Any]]:
        scores = softmax(logits)
        candidates = np.arange(len(scores)) if allowed is None else allowed
        fillings = []
        for token in candidates[best(scores[candidates], count)]:
            sequence = np.where(np.arange(len(ids)) == place, token, ids)
            fillings.append(
                {
                    "score": float(scores[token]),
                    "token": int(token),
                    "token_str": self.tokenizer.decode([token], skip_special_tokens=False),
                    # With several masks the others stay visible.
                    "sequence": self.tokenizer.decode(sequence, skip_special_tokens=is_only),
                }
            )
        return fillings

    def _mask(self) -> int:
        mask = self.tokenizer.token_id("mask")
        if mask is None:
            raise InputError(f"The tokenizer of {self.tokenizer.path} has no mask token.")
        return int(mask)

    def _token_ids(self, targets: Sequence[str]) -> Array:
        if not targets:
            raise InputError("targets is empty; name at least one word.")
        return np.unique([self._token_id(target) for target in targets])

    def _token_id(self, target: str) -> int:
        found: int | None = self.tokenizer.vocabulary_id(target)
        if found is not None:
            return found
        ids = self.tokenizer.encode(target, add_special_tokens=False)
        if len(ids) != 1:
            tokens = ", ".join(repr(self.tokenizer.token(each)) for each in ids)
            raise InputError(f"The target {target!r} is {len(ids)} tokens ({tokens}); a mask is filled by one.")
        return int(ids[0])
