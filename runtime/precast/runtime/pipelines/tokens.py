"""Token classification: labels of tokens, words and entities.

The rules are those of transformers' TokenClassificationPipeline: how tokens make words, words entities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import tokenizers

from ..errors import UsageError
from ..generation.probabilities import softmax
from .base import Array, Batch, TextPipeline
from .scores import label

__all__ = ["TokenClassificationPipeline"]

Found = dict[str, Any]


class TokenClassificationPipeline(TextPipeline):
    """Entities in texts."""

    def preprocess(self, inputs: Any, *, truncation: bool = False, stride: int | None = None) -> Batch:
        """Texts as token ids.

        Args:
            inputs: a text or a list of texts. As in transformers, they are cut to the length that the tokenizer says.
            truncation: cut also what is longer than compiled for, instead of refusing it.
            stride: read a longer text in pieces that overlap by so many tokens; takes an aggregation_strategy.
        """
        given, is_one = self._as_list(inputs)
        length = self._max_length() if truncation or stride is not None else self.tokenizer.max_length
        pieces = [self.tokenizer.encodings(text, length=length, stride=stride or 0) for text in given]
        kept = pieces if stride is not None else [own[:1] for own in pieces]
        owners = [index for index, own in enumerate(kept) for _ in own]
        encodings = [each for own in kept for each in own]
        return Batch(self._as_arrays(encodings), given, is_one, encodings=encodings, owners=owners)

    def postprocess(
        self, outputs: Batch, *, aggregation_strategy: str = "none", ignore_labels: Sequence[str] = ("O",)
    ) -> Any:
        """The entities of each text, in their order.

        Args:
            outputs: of `forward`.
            aggregation_strategy: "none" gives every token, {"entity", "score", "index", "word", "start", "end"}. The
                others give groups of neighbours with the same label, {"entity_group", "score", "word", "start",
                "end"}, where a label B-X begins a new one: "simple" of tokens; "first", "average" and "max" of words,
                whose label is that of their first token, of the mean of their tokens' probabilities, or of the most
                certain token.
            ignore_labels: labels that are no entities.

        `start` and `end` are the first character and one past the last.
        """
        strategy = aggregation_strategy.lower()
        if strategy not in ("none", "simple", *_WORD_STRATEGIES):
            raise UsageError(
                f"aggregation_strategy={aggregation_strategy!r} is not known; choose one of: none, simple, "
                f"{', '.join(_WORD_STRATEGIES)}."
            )
        answers: list[list[list[Found]]] = [[] for _ in outputs.inputs]
        rows = zip(
            outputs.notes["owners"], outputs.notes["encodings"], self._own_values(outputs, "logits"), strict=True
        )
        for owner, encoding, logits in rows:
            found = self._find_entities(outputs.inputs[owner], encoding, softmax(logits), strategy)
            kept = [each for each in found if (each.get("entity") or each.get("entity_group")) not in ignore_labels]
            answers[owner].append(kept)
        if strategy == "none" and any(len(pieces) > 1 for pieces in answers):
            raise UsageError("stride= reads texts in pieces, which takes an aggregation_strategy other than 'none'.")
        return outputs.answer([pieces[0] if len(pieces) == 1 else _without_overlap(pieces) for pieces in answers])

    def _find_entities(self, text: str, encoding: tokenizers.Encoding, scores: Array, strategy: str) -> list[Found]:
        tokens = list(self._read_tokens(text, encoding, scores, strategy))
        if strategy in _WORD_STRATEGIES:
            words = [
                self._word_entity(group, _WORD_STRATEGIES[strategy]) for group in _split_runs(tokens, _begins_word)
            ]
            return [self._group_entity(group) for group in _split_runs(words, _begins_entity)]
        entities = [self._token_entity(token) for token in tokens]
        if strategy == "none":
            return entities
        return [self._group_entity(group) for group in _split_runs(entities, _begins_entity)]

    def _read_tokens(self, text: str, encoding: tokenizers.Encoding, scores: Array, strategy: str) -> Iterator[Found]:
        unknown = self.tokenizer.token_id("unk")
        special = encoding.special_tokens_mask
        for index, (start, end) in enumerate(encoding.offsets):
            if special[index]:
                continue
            word, written = encoding.tokens[index], text[start:end]
            if self.tokenizer.marks_subwords:
                goes_on = len(word) != len(written)
            else:
                goes_on = start > 0 and " " not in text[start - 1 : start + 1]
            if encoding.ids[index] == unknown:
                word, goes_on = written, False
            yield {
                "word": word,
                "scores": scores[index],
                "start": start,
                "end": end,
                "index": index,
                "goes_on": goes_on,
            }

    def _token_entity(self, token: Found) -> Found:
        top_indices = int(token["scores"].argmax())
        return {
            "entity": label(self.model.config, top_indices),
            "score": float(token["scores"][top_indices]),
            **{name: token[name] for name in ("index", "word", "start", "end")},
        }

    def _word_entity(self, tokens: list[Found], pick: Callable[[Array], Array]) -> Found:
        scores = pick(np.stack([token["scores"] for token in tokens]))
        top_indices = int(scores.argmax())
        return {
            "entity": label(self.model.config, top_indices),
            "score": float(scores[top_indices]),
            **self._text_span(tokens),
        }

    def _group_entity(self, entities: list[Found]) -> Found:
        score = np.mean([each["score"] for each in entities])
        name = entities[0]["entity"].split("-", 1)[-1]
        return {"entity_group": name, "score": float(score), **self._text_span(entities)}

    def _text_span(self, parts: list[Found]) -> Found:
        word = self.tokenizer.join([part["word"] for part in parts])
        return {"word": word, "start": parts[0]["start"], "end": parts[-1]["end"]}


_WORD_STRATEGIES: dict[str, Callable[[Array], Array]] = {
    "first": lambda scores: scores[0],
    "average": lambda scores: scores.mean(0),
    "max": lambda scores: scores[scores.max(1).argmax()],
}


def _split_runs(items: list[Found], begins: Callable[[Found, Found], bool]) -> list[list[Found]]:
    """Runs of items; `begins(before, item)` says where a new one starts."""
    if not items:
        return []
    runs = [[items[0]]]
    for before, item in pairwise(items):
        if begins(before, item):
            runs.append([])
        runs[-1].append(item)
    return runs


def _begins_word(before: Found, token: Found) -> bool:
    return not token["goes_on"]


def _begins_entity(before: Found, entity: Found) -> bool:
    begins, kind = _split_tag(entity["entity"])
    return begins or kind != _split_tag(before["entity"])[1]


def _split_tag(name: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and of which kind: B-X does, I-X and X do not."""
    return name.startswith("B-"), name[2:] if name.startswith(("B-", "I-")) else name


def _without_overlap(pieces: list[list[Found]]) -> list[Found]:
    """The entities of overlapping pieces: of two that overlap the longer, of equally long ones the likelier."""
    kept: list[Found] = []
    for entity in sorted((each for piece in pieces for each in piece), key=lambda each: each["start"]):
        if not kept or not kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept.append(entity)
        elif _overlap_weight(entity) > _overlap_weight(kept[-1]):
            kept[-1] = entity
    return kept


def _overlap_weight(entity: Found) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]
