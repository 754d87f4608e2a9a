"""Texts in; vectors, labels, or the tokens behind a mask out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers

from ..errors import InputError, UsageError
from .base import (
    Array,
    Batch,
    Count,
    Padding,
    Pipeline,
    PlainTextPipeline,
    TextPipeline,
    TokenizerOptions,
    Truncation,
    text_and_pair,
)
from .scores import best, label, sigmoid, softmax

__all__ = ["FeatureExtractionPipeline", "FillMaskPipeline", "TextClassificationPipeline", "classify"]

_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "none": lambda logits: logits,
}


class FeatureExtractionPipeline(TextPipeline):
    """Vectors of texts; of images and sounds where the model takes these."""

    takes_pairs = True

    @classmethod
    def of(cls, model: Any) -> type[Pipeline]:
        """The class for what the model takes."""
        from .audio import AudioFeatureExtractionPipeline
        from .vision import ImageFeatureExtractionPipeline

        kinds = {"input_ids": cls, "pixel_values": ImageFeatureExtractionPipeline}
        return kinds.get(model.main_input_name, AudioFeatureExtractionPipeline)

    def preprocess(
        self,
        inputs: Any,
        *,
        truncation: Truncation = None,
        max_length: Count | None = None,
        padding: Padding = False,
        add_special_tokens: bool = True,
        tokenizer_kwargs: TokenizerOptions | None = None,
        tokenize_kwargs: TokenizerOptions | None = None,
        prompt: str | None = None,
    ) -> Batch:
        """Texts as token ids.

        Args:
            inputs: a text; or a pair of texts, (…, …) or {"text": …, "text_pair": …}; or a list of these. A model of
                sentence-transformers cuts them to its max_seq_length, as that library does.
            truncation, max_length, padding, add_special_tokens: as TokenizerOptions says.
            tokenizer_kwargs: a dict of these, which goes before them; tokenize_kwargs is the same, as transformers
                calls it here.
            prompt: stands before each text; by default the default prompt of a model of sentence-transformers.
        """
        given, is_one = self._listed(inputs)
        told = {"truncation": truncation, "max_length": max_length, "padding": padding,
                "add_special_tokens": add_special_tokens}  # fmt: skip
        how = TokenizerOptions.of(told, tokenizer_kwargs, tokenize_kwargs).cut(self._longest())
        rules = self.model.sentence_rules
        encodings = [rules.encoding(self.tokenizer, *text_and_pair(each), prompt=prompt, **how) for each in given]
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


class TextClassificationPipeline(PlainTextPipeline):
    """Labels of texts, or of pairs of texts."""

    takes_pairs = True

    def __call__(self, inputs: Any = None, **options: Any) -> Any:
        """As `Pipeline.__call__`. As from transformers, one text has its list of labels in another list where it is
        `pipeline()` that was told top_k, and not this call."""
        answer = super().__call__(inputs, **options)
        is_told_once = "top_k" in self.options and "top_k" not in options
        return [answer] if is_told_once and isinstance(options.get("inputs", inputs), str) else answer

    def _listed(self, inputs: Any) -> tuple[list[Any], bool]:
        """As `Pipeline._listed`; [[a, b]] is a pair, as transformers once had them and still takes them."""
        given, is_one = super()._listed(inputs)
        return [tuple(each[0]) if _is_old_pair(each) else each for each in given], is_one

    def postprocess(
        self,
        outputs: Batch,
        *,
        top_k: Any = ...,
        function_to_apply: str | None = None,
        return_all_scores: bool = False,
    ) -> Any:
        """[{"label", "score"}, …] for each text, the likeliest first.

        Args:
            outputs: of `forward`.
            top_k: how many labels; None is all. Where it is not given, each of a list of texts gets {"label", "score"}
                without a list around it, as from transformers.
            function_to_apply: "softmax", "sigmoid" or "none"; by default what the model's problem type asks for:
                nothing for regression, sigmoid for one or for independent labels, softmax otherwise.
            return_all_scores: all labels in the model's own order, with one text's list in another list, as
                transformers had it up to version 4. Does nothing where top_k is given.
        """
        config, is_text = self.model.config, outputs.is_one and isinstance(outputs.inputs[0], str)
        rows = [classify(config, row, function_to_apply) for row in outputs["logits"]]
        if top_k is not ...:
            return outputs.answer([row[:top_k] for row in rows])
        if return_all_scores:
            names = [label(config, index) for index in range(outputs["logits"].shape[1])]
            answers: list[Any] = [sorted(row, key=lambda each: names.index(each["label"])) for row in rows]
        else:
            answers = [row[0] for row in rows]
        return answers if is_text else outputs.answer(answers)


def classify(config: dict[str, Any], logits: Array, function: str | None = None) -> list[dict[str, Any]]:
    """All labels with their scores, the highest first. Raises UsageError for an unknown function."""
    if function is not None and function not in _FUNCTIONS:
        raise UsageError(f"function_to_apply={function!r} is not known; choose one of: {', '.join(_FUNCTIONS)}.")
    scores = _FUNCTIONS[function or _function_of(config, len(logits))](logits)
    return [{"label": label(config, index), "score": float(scores[index])} for index in best(scores, None)]


def _is_old_pair(given: Any) -> bool:
    return isinstance(given, list) and len(given) == 1 and isinstance(given[0], list) and len(given[0]) == 2


def _function_of(config: dict[str, Any], labels: int) -> str:
    problem = config.get("problem_type")
    if problem == "regression":
        return "none"
    return "sigmoid" if problem == "multi_label_classification" or labels == 1 else "softmax"


class FillMaskPipeline(PlainTextPipeline):
    """What may stand where a text has the mask token."""

    def __call__(self, inputs: Any = None, **options: Any) -> Any:
        """As `Pipeline.__call__`; as from transformers, a list of one text has the answer of that text."""
        answer = super().__call__(inputs, **options)
        return answer[0] if isinstance(inputs, list) and len(inputs) == 1 else answer

    def _encoding(self, text: str, pair: str | None, **how: Any) -> tokenizers.Encoding:
        """Raises InputError where a text has no mask token."""
        encoding = super()._encoding(text, pair, **how)
        if self._mask() not in encoding.ids:
            raise InputError(f"{text!r:.80} has no {self.tokenizer.special_tokens['mask_token']}, the mask token.")
        return encoding

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
