"""Feature extraction: vectors of texts, images and sounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import UsageError
from .audio import AudioFeatureExtractionPipeline
from .base import Array, Batch, Count, Padding, Pipeline, TextPipeline, TokenizerOptions, Truncation, text_and_pair
from .vision import ImageFeatureExtractionPipeline

__all__ = ["FeatureExtractionPipeline"]


class FeatureExtractionPipeline(TextPipeline):
    """Vectors of texts; of images and sounds where the model takes these."""

    takes_pairs = True

    @classmethod
    def of(cls, model: Any) -> type[Pipeline]:
        """The class for the kind of input that the model takes."""
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
        given, is_one = self._as_list(inputs)
        told = {"truncation": truncation, "max_length": max_length, "padding": padding,
                "add_special_tokens": add_special_tokens}  # fmt: skip
        how = TokenizerOptions.of(told, tokenizer_kwargs, tokenize_kwargs).cut(self._max_length())
        rules = self.model.sentence_rules
        encodings = [rules.encode_text(self.tokenizer, *text_and_pair(each), prompt=prompt, **how) for each in given]
        return Batch(self._as_arrays(encodings), given, is_one, encodings=encodings)

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
        return outputs.answer([pool(states).tolist() for states in self._own_values(outputs, "last_hidden_state")])


_POOLING: dict[str, Callable[[Array], Array]] = {
    "none": lambda states: states[None],
    "mean": lambda states: np.asarray(states.mean(0)),
    "cls": lambda states: np.asarray(states[0]),
}
