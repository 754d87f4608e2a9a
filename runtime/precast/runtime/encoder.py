"""Encoders of text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from .arguments import only_known
from .companions import companions_of
from .forward import Encoder
from .sentences import SentenceRules, sentence_rules
from .tokenizer import listed_texts

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
        """What sentence-transformers does to texts; nothing for a model that is none of its. Raises FormatError."""
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
        batch = self.tokenizer.pad([self.sentence_rules.encoding(self.tokenizer, text, prompt=prompt)
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


class CompiledModelForTokenClassification(Encoder):
    """`.logits` [batch, length, labels]."""

    task = "token-classification"


class CompiledModelForMultipleChoice(Encoder):
    """`.logits` [batch, choices], of input_ids [batch, choices, length]."""

    task = "multiple-choice"


class CompiledModelForQuestionAnswering(Encoder):
    """`.start_logits` and `.end_logits` [batch, length]."""

    task = "question-answering"
