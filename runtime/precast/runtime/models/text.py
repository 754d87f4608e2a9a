"""Encoders of text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..arguments import only_known
from ..errors import InputError
from ..inputs.companions import companions_of
from ..inputs.encoder_inputs import Rows
from ..inputs.sentence_texts import SentenceRules, sentence_rules
from ..inputs.tokenizer import listed_texts
from .encoder_base import Encoder

__all__ = [
    "CompiledModelForFeatureExtraction",
    "CompiledModelForMaskedLM",
    "CompiledModelForMultipleChoice",
    "CompiledModelForQuestionAnswering",
    "CompiledModelForSequenceClassification",
    "CompiledModelForTokenClassification",
]

Array = np.ndarray[Any, Any]


class CompiledModelForFeatureExtraction(Encoder):
    """`.last_hidden_state` [batch, length, hidden]."""

    task = "feature-extraction"

    @cached_property
    def sentence_rules(self) -> SentenceRules:
        """What sentence-transformers does to texts before encoding; nothing for other models. Raises FormatError."""
        return sentence_rules(companions_of(self.artifact), self.artifact.path)

    @only_known
    def embed(self, texts: str | Sequence[str], *, prompt: str | None = None) -> Array:
        """One vector per text, [texts, hidden]: the sentence embedding of a model that was compiled with one, otherwise
        the mean of its token vectors.

        Args:
            texts: as sentence-transformers does, they are cut to the checkpoint's max_seq_length.
            prompt: stands before each text; by default the checkpoint's default prompt, where it names one.

        Raises:
            InputError: a text is longer than compiled for.
        """
        batch = self.tokenizer.pad([self.sentence_rules.encode_text(self.tokenizer, text, prompt=prompt)
                                    for text in listed_texts(texts)])  # fmt: skip
        outputs = self(**batch)
        if "sentence_embedding" in outputs:
            return np.asarray(outputs.sentence_embedding)
        weights = batch["attention_mask"][:, :, None].astype(np.float32)
        return np.asarray((outputs.last_hidden_state * weights).sum(1) / weights.sum(1))


class CompiledModelForMaskedLM(Encoder):
    """`.logits` [batch, length, vocabulary]."""

    task = "fill-mask"


class CompiledModelForSequenceClassification(Encoder):
    """`.logits` [batch, labels]."""

    task = "text-classification"

    def _check_rows(self, rows: Rows) -> None:
        """Raise InputError for a row without the token that this model answers by."""
        kind = self.config.get("model_type")
        if kind not in _LAST_END:
            return
        token = self.config.get("eos_token_id", _LAST_END[kind])
        ends = (rows.tensors["input_ids"] == token) & (rows.tensors["attention_mask"] == 1)
        if not ends.any(-1).all():
            raise InputError(
                f"Row {int(ends.any(-1).argmin())} has no end-of-sequence token, {token}; a {kind} model classifies by "
                f"its last one. The checkpoint's tokenizer ends each text in it; by hand, add it as the last token."
            )


_LAST_END = {"bart": 2, "bigbird_pegasus": 1, "mbart": 2, "mt5": 1, "mvp": 2, "plbart": 2, "t5": 1, "umt5": 1}
"""Encoder-decoders that classify by their state at the last end-of-sequence token: which that is, where their config
does not say."""


class CompiledModelForTokenClassification(Encoder):
    """`.logits` [batch, length, labels]."""

    task = "token-classification"


class CompiledModelForMultipleChoice(Encoder):
    """`.logits` [batch, choices], of input_ids [batch, choices, length]."""

    task = "multiple-choice"


class CompiledModelForQuestionAnswering(Encoder):
    """`.start_logits` and `.end_logits` [batch, length]."""

    task = "question-answering"
