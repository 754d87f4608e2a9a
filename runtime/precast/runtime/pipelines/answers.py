"""Passages of a text that answer a question.

The rules are those of the question-answering pipeline that transformers had up to version 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

from ..errors import InputError
from .base import Array, Batch, TextPipeline
from .scores import softmax

__all__ = ["QuestionAnsweringPipeline"]

Answer = dict[str, Any]
Piece = tuple[tokenizers.Encoding, Array, Array]


class QuestionAnsweringPipeline(TextPipeline):
    """Answers to questions, as passages of a context."""

    def __call__(self, inputs: Any = None, **options: Any) -> Any:
        """As `Pipeline.__call__`; one question can also be given as question=…, context=…."""
        if inputs is None and {"question", "context"} <= options.keys():
            inputs = {name: options.pop(name) for name in ("question", "context")}
        return super().__call__(inputs, **options)

    def preprocess(self, inputs: Any, *, truncation: bool = False, doc_stride: int | None = None) -> Batch:
        """Questions with their contexts as token ids.

        Args:
            inputs: {"question": text, "context": text}, or a list of these.
            truncation: read only the beginning of a context that is longer than compiled for.
            doc_stride: by how many tokens the pieces of a longer context overlap; by default 128, or half of what was
                compiled if that is less.
        """
        given, is_one = self._listed(inputs)
        pieces = [self._pieces(*_question_and_context(each), doc_stride)[: 1 if truncation else None] for each in given]
        encodings = [each for piece in pieces for each in piece]
        owners = [index for index, piece in enumerate(pieces) for _ in piece]
        return Batch(self._arrays(encodings), given, is_one, encodings=encodings, owners=owners)

    def _pieces(self, question: str, context: str, stride: int | None) -> list[tokenizers.Encoding]:
        length = self._longest()
        around = len(self.tokenizer.encode(question, ""))
        if around >= length:
            raise InputError(
                f"The question alone has {around} tokens; the model was compiled for {length}. Shorten it, or compile "
                f"the model with a larger --sequence-length."
            )
        room = length - around
        stride = min(128, length // 2, room - 1) if stride is None else stride
        if stride >= room:
            raise InputError(
                f"doc_stride={stride} must be less than {room}: beside this question that is all that a piece of "
                f"{length} tokens holds of the context, and each must get on."
            )
        pieces: list[tokenizers.Encoding] = self.tokenizer.encodings(
            question, context, length=length, stride=stride, strategy="only_second"
        )
        return pieces

    def postprocess(
        self,
        outputs: Batch,
        *,
        top_k: int = 1,
        max_answer_len: int = 15,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
    ) -> Any:
        """{"score", "start", "end", "answer"} for each question; a list of them, the likeliest first, for top_k > 1.

        Args:
            outputs: of `forward`.
            top_k: how many answers. The same passage found several times counts once, with the sum of the scores.
            max_answer_len: the most tokens in an answer.
            handle_impossible_answer: let the empty answer compete, for models that were trained to give none.
            align_to_words: answers begin and end where words do.
        """
        pieces: list[list[Piece]] = [[] for _ in outputs.inputs]
        logits = (self._own(outputs, "start_logits"), self._own(outputs, "end_logits"))
        for owner, *piece in zip(outputs.notes["owners"], outputs.notes["encodings"], *logits, strict=True):
            pieces[owner].append((piece[0], piece[1], piece[2]))
        answers = []
        for given, own in zip(outputs.inputs, pieces, strict=True):
            found = self._found(given["context"], own, top_k, max_answer_len, align_to_words)
            if handle_impossible_answer:
                none = min(float(np.prod(_first(*piece))) for piece in own)
                found.append({"score": none, "start": 0, "end": 0, "answer": ""})
            best = sorted(found, key=lambda each: -each["score"])[:top_k]
            answers.append(best[0] if top_k == 1 else best)
        return outputs.answer(answers)

    def _found(self, context: str, pieces: list[Piece], count: int, longest: int, align_to_words: bool) -> list[Answer]:
        # Neighbouring tokens of one word give the same answer, so there must be some to spare.
        spare = 2 * count + 10 if align_to_words else count
        found: list[Answer] = []
        for piece in pieces:
            start, end = _probabilities(*piece)
            for first, last, score in _spans(start, end, longest, spare):
                _add(found, context, *_place(piece[0], first, last, align_to_words), score)
        return found


def _question_and_context(given: Any) -> tuple[str, str]:
    if not (isinstance(given, dict) and {"question", "context"} == given.keys()) or not all(
        isinstance(text, str) for text in given.values()
    ):
        raise InputError(f'An input is {{"question": text, "context": text}}; this is {given!r:.80}.')
    if not given["context"].strip() or not given["question"].strip():
        raise InputError("The question or its context is empty.")
    return given["question"], given["context"]


def _probabilities(
    encoding: tokenizers.Encoding, start: Array, end: Array, beside: Sequence[int] = ()
) -> tuple[Array, Array]:
    """Of every token of the context, and of those `beside` it, to be the first or the last one; of others 0."""
    allowed = np.array([owner == 1 for owner in encoding.sequence_ids])
    allowed[list(beside)] = True
    first, last = (softmax(np.where(allowed, logits, -np.inf)) for logits in (start, end))
    return first, last


def _first(encoding: tokenizers.Encoding, start: Array, end: Array) -> tuple[float, float]:
    """The probabilities that an answer starts and ends at the first token, by which models say that there is none."""
    first, last = _probabilities(encoding, start, end, [0])
    return float(first[0]), float(last[0])


def _spans(start: Array, end: Array, longest: int, count: int) -> Iterator[tuple[int, int, float]]:
    """The `count` best (first token, last token, probability) of at most `longest` tokens."""
    scores = np.tril(np.triu(np.outer(start, end)), longest - 1)
    for flat in np.argsort(-scores, axis=None, kind="stable")[:count]:
        first, last = divmod(int(flat), len(end))
        if scores[first, last] > 0:
            yield first, last, float(scores[first, last])


def _place(encoding: tokenizers.Encoding, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """The characters of the context that tokens `first` to `last` stand for."""
    words = [encoding.token_to_word(token) for token in (first, last)] if align_to_words else []
    spans = [encoding.word_to_chars(word, 1) for word in words if word is not None]
    if len(spans) == 2 and spans[0] and spans[1]:
        return spans[0][0], spans[1][1]
    return encoding.offsets[first][0], encoding.offsets[last][1]


def _add(answers: list[Answer], context: str, start: int, end: int, score: float) -> None:
    text = context[start:end]
    for answer in answers:
        if answer["answer"].lower() == text.lower():
            answer["score"] += score
            return
    answers.append({"score": score, "start": start, "end": end, "answer": text})
