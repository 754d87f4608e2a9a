"""Pipelines that classify texts and fill masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from ..errors import InputError
from ..generation.probabilities import softmax
from .base import (
    Array,
    Batch,
    PlainTextPipeline,
)
from .scores import classify_row, label, top_indices

__all__ = ["FillMaskPipeline", "TextClassificationPipeline"]


class TextClassificationPipeline(PlainTextPipeline):
    """Labels of texts, or of pairs of texts."""

    takes_pairs = True

    def __call__(self, inputs: Any = None, **options: Any) -> Any:
        """As `Pipeline.__call__`. As from transformers, one text has its list of labels in another list where it is
        `pipeline()` that was told top_k, and not this call."""
        answer = super().__call__(inputs, **options)
        is_told_once = "top_k" in self.options and "top_k" not in options
        return [answer] if is_told_once and isinstance(options.get("inputs", inputs), str) else answer

    def _as_list(self, inputs: Any) -> tuple[list[Any], bool]:
        """As `Pipeline._as_list`; [[a, b]] is a pair, as transformers once had them and still takes them."""
        given, is_one = super()._as_list(inputs)
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
        rows = [classify_row(config, row, function_to_apply) for row in outputs["logits"]]
        if top_k is not ...:
            return outputs.answer([row[:top_k] for row in rows])
        if return_all_scores:
            names = [label(config, index) for index in range(outputs["logits"].shape[1])]
            answers: list[Any] = [sorted(row, key=lambda each: names.index(each["label"])) for row in rows]
        else:
            answers = [row[0] for row in rows]
        return answers if is_text else outputs.answer(answers)


def _is_old_pair(given: Any) -> bool:
    return isinstance(given, list) and len(given) == 1 and isinstance(given[0], list) and len(given[0]) == 2


class FillMaskPipeline(PlainTextPipeline):
    """The likeliest tokens in place of a text's mask token."""

    def __call__(self, inputs: Any = None, **options: Any) -> Any:
        """As `Pipeline.__call__`; as from transformers, a list of one text has the answer of that text."""
        answer = super().__call__(inputs, **options)
        return answer[0] if isinstance(inputs, list) and len(inputs) == 1 else answer

    def _encoding(self, text: str, pair: str | None, **how: Any) -> tokenizers.Encoding:
        """Raises InputError where a text has no mask token."""
        encoding = super()._encoding(text, pair, **how)
        if self._mask_id() not in encoding.ids:
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
        for encoding, logits in zip(outputs.notes["encodings"], self._own_values(outputs, "logits"), strict=True):
            ids = np.array(encoding.ids)
            places = np.flatnonzero(ids == self._mask_id())
            filled = [self._fill_mask(ids, at, logits[at], top_k, allowed, len(places) == 1) for at in places.tolist()]
            answers.append(filled[0] if len(places) == 1 else filled)
        return outputs.answer(answers)

    def _fill_mask(
        self, ids: Array, place: int, logits: Array, count: int, allowed: Array | None, is_only: bool
    ) -> list[dict[str, Any]]:
        scores = softmax(logits)
        candidates = np.arange(len(scores)) if allowed is None else allowed
        fillings = []
        for token in candidates[top_indices(scores[candidates], count)]:
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

    def _mask_id(self) -> int:
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
