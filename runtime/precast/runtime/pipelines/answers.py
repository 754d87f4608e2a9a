"""Question answering: find the passages of a context that answer a question.

The rules are those of the question-answering pipeline that transformers had up to version 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tokenizers

from ..errors import InputError, UsageError
from ..generation.probabilities import softmax
from .base import Array, Batch, TextPipeline

__all__ = ["QuestionAnsweringPipeline"]

Answer = dict[str, Any]

# As many tokens of question and context as transformers' pipeline reads at once.
_PIECE = 384
# And the logit of a token that is no part of an answer, as there.
_NEVER = -10000.0


class Piece(NamedTuple):
    """One piece of a context with its scores.

    Attributes:
        encoding: its tokens.
        allowed: bool [tokens], those that an answer may begin or end with.
        start, end: [tokens], the probabilities that an answer begins, ends there.
        none: the probability that there is no answer.
    """

    encoding: tokenizers.Encoding
    allowed: Array
    start: Array
    end: Array
    none: float


class QuestionAnsweringPipeline(TextPipeline):
    """Answers to questions, as passages of a context."""

    def __call__(self, inputs: Any = None, context: Any = None, **options: Any) -> Any:
        """As `Pipeline.__call__`, also of a question and its context: pipe(question, context), by position or name;
        several questions, as a list, take one context or a list of as many. A list of one question has one answer."""
        question = options.pop("question", None if context is None else inputs)
        if question is not None or context is not None:
            inputs = _pair_inputs(question, context)
        answer = super().__call__(inputs, **options)
        return answer[0] if isinstance(inputs, list) and len(inputs) == 1 else answer

    def preprocess(
        self, inputs: Any, *, truncation: bool = False, doc_stride: int | None = None, max_seq_len: int | None = None
    ) -> Batch:
        """Questions with their contexts as token ids.

        Args:
            inputs: {"question": text, "context": text}, or a list of these.
            truncation: read only the beginning of a context that does not fit.
            doc_stride: by how many tokens the pieces of a longer context overlap; by default 128, or half a piece if
                that is less.
            max_seq_len: the most tokens of a piece, its question included; by default 384, or what was compiled if
                that is less.
        """
        given, is_one = self._as_list(inputs)
        asked = [_question_and_context(each) for each in given]
        length = self._piece_length(max_seq_len)
        pieces = [self._split_context(question, context, length, doc_stride) for question, context in asked]
        pieces = [own[: 1 if truncation else None] for own in pieces]
        encodings = [each for piece in pieces for each in piece]
        owners = [index for index, piece in enumerate(pieces) for _ in piece]
        return Batch(self._as_arrays(encodings), given, is_one, encodings=encodings, owners=owners)

    def _piece_length(self, asked: int | None) -> int:
        compiled = int(max(self.model.artifact.contract.shapes.sequence_length))
        if asked is not None and asked > compiled:
            raise UsageError(
                f"max_seq_len={asked} is more than the {compiled} tokens that the model was compiled for. Leave it "
                f"out, or compile the model with sequence_length={asked}."
            )
        return min(_PIECE, self._max_length()) if asked is None else asked

    def _split_context(self, question: str, context: str, length: int, stride: int | None) -> list[tokenizers.Encoding]:
        around = len(self.tokenizer.encode(question, ""))
        if around >= length:
            raise InputError(
                f"The question alone has {around} tokens; pieces have {length}. Shorten it, raise max_seq_len where it "
                f"is given, or compile the model with a larger sequence_length."
            )
        room = length - around
        stride = min(128, length // 2, room - 1) if stride is None else stride
        if stride >= room:
            raise InputError(
                f"doc_stride={stride} must be less than {room}: beside this question that is all that a piece of "
                f"{length} tokens holds of the context, and each must get on."
            )
        # Models that are padded on the left were trained with the question behind its context.
        texts, cut = (
            ((question, context), "only_second") if self._context_index == 1 else ((context, question), "only_first")
        )
        pieces: list[tokenizers.Encoding] = self.tokenizer.encodings(*texts, length=length, stride=stride, strategy=cut)
        return pieces

    @property
    def _context_index(self) -> int:
        """The index of the context in the pair of texts."""
        return 0 if self.tokenizer.padding_side == "left" else 1

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
        for name, count in (("top_k", top_k), ("max_answer_len", max_answer_len)):
            if count < 1:
                raise UsageError(f"{name}={count} must be at least 1.")
        pieces: list[list[Piece]] = [[] for _ in outputs.inputs]
        logits = (self._own_values(outputs, "start_logits"), self._own_values(outputs, "end_logits"))
        for owner, encoding, *own in zip(outputs.notes["owners"], outputs.notes["encodings"], *logits, strict=True):
            pieces[owner].append(self._score_piece(encoding, own[0], own[1]))
        answers = []
        for given, parts in zip(outputs.inputs, pieces, strict=True):
            found = self._find_answers(given["context"], parts, top_k, max_answer_len, align_to_words)
            if handle_impossible_answer or not found:
                found.append({"score": min(piece.none for piece in parts), "start": 0, "end": 0, "answer": ""})
            best = sorted(found, key=lambda each: -each["score"])[:top_k]
            answers.append(best[0] if top_k == 1 else best)
        return outputs.answer(answers)

    def _score_piece(self, encoding: tokenizers.Encoding, start: Array, end: Array) -> Piece:
        """Softmax over the tokens of the context and the classification tokens, which stand for "no answer"; the first
        token is then excluded, as it cannot be part of one."""
        allowed = np.array([owner == self._context_index for owner in encoding.sequence_ids])
        allowed |= np.array(encoding.ids) == self.tokenizer.token_id("cls")
        first, last = (softmax(np.where(allowed, logits.astype(float), _NEVER)) for logits in (start, end))
        none = float(first[0] * last[0])
        allowed[0] = False
        return Piece(encoding, allowed, first, last, none)

    def _find_answers(
        self, context: str, pieces: list[Piece], count: int, longest: int, align_to_words: bool
    ) -> list[Answer]:
        # Neighbouring tokens of one word give the same answer, so there must be some to spare.
        spare = 2 * count + 10 if align_to_words else count
        found: list[Answer] = []
        for piece in pieces:
            for first, last in _best_spans(piece, longest, spare):
                place = _character_span(piece.encoding, first, last, align_to_words, self._context_index)
                _add_answer(found, context, *place, float(piece.start[first] * piece.end[last]))
        return found


def _pair_inputs(question: Any, context: Any) -> Any:
    """Pair questions with contexts, as inputs. Raises InputError where their numbers differ."""
    if isinstance(question, list):
        contexts = context if isinstance(context, list) else [context] * len(question)
        if len(contexts) != len(question):
            raise InputError(
                f"There are {len(question)} questions and {len(contexts)} contexts; each question takes one."
            )
        return [_pair_inputs(each, own) for each, own in zip(question, contexts, strict=True)]
    return {"question": question, "context": context}


def _question_and_context(given: Any) -> tuple[str, str]:
    if not (isinstance(given, dict) and {"question", "context"} == given.keys()) or not all(
        isinstance(text, str) for text in given.values()
    ):
        raise InputError(f'An input is {{"question": text, "context": text}}; this is {given!r:.80}.')
    if not given["context"].strip() or not given["question"].strip():
        raise InputError("The question or its context is empty.")
    return given["question"], given["context"]


def _best_spans(piece: Piece, longest: int, count: int) -> list[tuple[int, int]]:
    """The `count` likeliest (first token, last token) of at most `longest` tokens."""
    scores = np.outer(piece.start, piece.end)
    allowed = np.tril(np.triu(np.outer(piece.allowed, piece.allowed)), longest - 1)
    order = np.argsort(-np.where(allowed, scores, -1), axis=None, kind="stable")[: min(count, allowed.sum())]
    return [divmod(int(flat), len(piece.end)) for flat in order]


def _character_span(
    encoding: tokenizers.Encoding, first: int, last: int, align_to_words: bool, text: int
) -> tuple[int, int]:
    """The character span of tokens `first` to `last` in the context, which is the first or the second `text`."""
    words = [encoding.token_to_word(token) for token in (first, last)] if align_to_words else []
    spans = [encoding.word_to_chars(word, text) for word in words if word is not None]
    if len(spans) == 2 and spans[0] and spans[1]:
        return spans[0][0], spans[1][1]
    return encoding.offsets[first][0], encoding.offsets[last][1]


def _add_answer(answers: list[Answer], context: str, start: int, end: int, score: float) -> None:
    text = context[start:end]
    for answer in answers:
        if answer["answer"].lower() == text.lower():
            answer["score"] += score
            return
    answers.append({"score": score, "start": start, "end": end, "answer": text})
