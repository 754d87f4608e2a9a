"""Encoders of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .forward import Encoder

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

    def embed(self, texts: Sequence[str]) -> Array:
        """One vector per text, [texts, hidden]: the sentence embedding of a model that was compiled with one, otherwise
        the mean of its token vectors."""
        batch = self.tokenizer(texts)
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
