"""Convert tokenizers that transformers has in Python only to a tokenizer.json: those over sentencepiece (Marian,
M2M100, PLBart, …) and over bytes (ByT5).

A tokenizer over sentencepiece takes pieces from that library, and their ids from a vocabulary of its own. transformers
can build a tokenizer from the sentencepiece file; here its pieces get the ids of that vocabulary. Special tokens and
templates are read off the Python tokenizer, and the result is used only if both agree on many texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

__all__ = ["ConvertedTokenizer", "convert_tokenizer"]

_SPACE = "▁"
# Private-use characters serve as marks; in texts they are replaced by one that is no mark, and unknown as well.
_PRIVATE = "[\U000f0000-\U000ffffd]"
_OTHER = "\U0010fffd"
_UNMATCHED = "\U000ffffd"
"""Marks a token of the vocabulary that no text may become."""
_ENDED = "\U000ffffc"
"""Marks the end of a special token in decoded text."""
_KEPT = "\U000ffffb"
"""The space of a token that sentencepiece does not know, which decoding keeps at the beginning of a text."""
_CODES = 0xF0000
_UNIGRAM, _PAIRS = 1, 2
_NORMAL, _USER_DEFINED, _BYTE = 1, 4, 6

_TEXTS = [
    "", " ", "Hello, world!", "  two  spaces \n and\ta tab ", "Größe, naïve, façade — and a 🦊.", "今天天气很好。",
    "Привет, мир", "สวัสดี", "ﬁne １２３ ＡＢＣ", "don't stop 3.14 % 100,000", "<unk> </s> <pad>", "a</s>b", "</s>",
    ">>fr<< Hello", " >>fr<< Hello", ">>xx<<Hello", "a >> b << c", "▁x ▁▁y", "tail ", "e\u0301 o\u0308", "\u200bzero",
    "UPPER lower MiXeD", "x" * 60, "http://a.b/c?d=e&f=g", "مرحبا بالعالم", "한국어 문장입니다.",
]  # fmt: skip


class ConvertedTokenizer:
    """A tokenizer of the tokenizers library that answers as one in Python does.

    Attributes:
        tokenizer: of the tokenizers library.
        vocabulary: the size of the vocabulary; higher ids are pieces that it lacks, so unknown tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, unknown: int, *, end: str | None = None) -> None:
        self.tokenizer, self.vocabulary, self._unknown = tokenizer, vocabulary, unknown
        # The end token, where one at the end of a text is not repeated.
        self._end = end

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of tokenizer_config.json that the runtime needs beside tokenizer.json."""
        own = {"size": self.vocabulary, "unknown": self._unknown, "mark": _UNMATCHED, "end": self._end}
        return {"own_vocabulary": {name: value for name, value in own.items() if value is not None}}

    def encode(self, text: str, pair: str | None = None) -> list[int]:
        """The ids of a text, or of a pair of texts, as `precast.runtime.inputs.tokenizer` computes them."""
        if self._end and text.rstrip().endswith(self._end):
            text = text.rstrip().removesuffix(self._end).rstrip()
        found = self.tokenizer.encode(text, pair)
        return [self._vocabulary_id(*each) for each in zip(found.ids, found.tokens, strict=True)]

    def _vocabulary_id(self, index: int, token: str) -> int:
        """The id of a token in the vocabulary, which may have tokens that sentencepiece has no piece for."""
        if index < self.vocabulary and index != self._unknown:
            return index
        known = self.tokenizer.token_to_id(_UNMATCHED + token)
        return self._unknown if known is None else int(known)


def convert_tokenizer(tokenizer: Any) -> ConvertedTokenizer | None:
    """Convert a tokenizer in Python to one of the tokenizers library; None where that would answer otherwise."""
    if type(tokenizer).__name__ == "ByT5Tokenizer":
        found = _convert_bytes(tokenizer)
        return found if _answers_alike(found, tokenizer, []) else None
    model = getattr(tokenizer, "spm_source", None) or getattr(tokenizer, "sp_model", None)
    if model is None or getattr(tokenizer, "separate_vocabs", False):
        return None
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto.FromString(model.serialized_model_proto())
    if proto.trainer_spec.model_type not in (_UNIGRAM, _PAIRS):
        return None
    names = _PieceNames(tokenizer, proto)
    if proto.trainer_spec.model_type == _PAIRS and names.has_unknown_text:
        return None
    found = _convert_sentencepiece(tokenizer, proto, names)
    return found if _answers_alike(found, tokenizer, [piece.piece for piece in proto.pieces]) else None


def _convert_sentencepiece(tokenizer: Any, proto: Any, names: _PieceNames) -> ConvertedTokenizer:
    from transformers.convert_slow_tokenizer import SpmConverter

    is_unigram = proto.trainer_spec.model_type == _UNIGRAM
    plain: Any = [(each.piece, each.score) for each in proto.pieces]
    vocabulary = plain if is_unigram else {piece: index for index, (piece, _) in enumerate(plain)}
    base = json.loads(SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary).to_str())
    if is_unigram:
        base["model"].update(vocab=names.with_scores(), unk_id=tokenizer.unk_token_id)
    else:
        base["model"].update(vocab={name: index for index, name in enumerate(names.all)}, unk_token=tokenizer.unk_token)
    made = Tokenizer.from_str(json.dumps(base))
    _add_language_codes(made, names.codes)
    _set_decoder(made, tokenizer, names.codes)
    _add_special_tokens(made, tokenizer)
    return ConvertedTokenizer(made, names.vocabulary, tokenizer.unk_token_id)


def _convert_bytes(tokenizer: Any) -> ConvertedTokenizer:
    """Convert ByT5's tokenizer: tokens are the bytes of a text, and bytes that make no character decode to nothing."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    text = {shown: tokenizer.convert_tokens_to_ids(chr(byte)) for byte, shown in bytes_to_unicode().items()}
    made = Tokenizer(models.BPE({**special, **text}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\ufffd", "")])
    _add_special_tokens(made, tokenizer)
    return ConvertedTokenizer(made, len(tokenizer), tokenizer.unk_token_id, end=tokenizer.eos_token)


class _PieceNames:
    """The name of each id in the model: its piece, or a marked token that no text can become."""

    def __init__(self, tokenizer: Any, proto: Any) -> None:
        self._scores = {piece.piece: piece.score for piece in proto.pieces
                        if piece.type in (_NORMAL, _USER_DEFINED, _BYTE)}  # fmt: skip
        self._lowest = min(piece.score for piece in proto.pieces if piece.type == _NORMAL)
        # M2M100 has the tokens of languages beside its vocabulary.
        vocabulary = {**tokenizer.get_vocab(), **getattr(tokenizer, "lang_token_to_id", {})}
        own = {index: token for token, index in vocabulary.items()}
        added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        special = {index: tokenizer.convert_ids_to_tokens(index) for index in tokenizer.all_special_ids}
        before = _SPACE if proto.normalizer_spec.add_dummy_prefix else ""
        codes = [code for code in getattr(tokenizer, "supported_language_codes", []) if code in vocabulary]
        self.codes = {code: before + chr(_CODES + at) for at, code in enumerate(codes, 1)}
        kept = {**added, **special}
        self.all = [
            kept[index] if index in kept else self._name_of(own.get(index, str(index)))
            for index in range(max(own.keys() | kept.keys()) + 1)
        ]
        known = set(self.all)
        beyond = [piece for piece in self._scores if piece not in known]
        beyond += [before + chr(_CODES)] if hasattr(tokenizer, "supported_language_codes") else []
        self.vocabulary = len(self.all)
        self.all += beyond
        # A model of byte pairs does not tell which text an unknown token was.
        marked = [name.removeprefix(_UNMATCHED) for name in self.all if name.startswith(_UNMATCHED)]
        self.has_unknown_text = any(not self._scores.keys() & set(name) for name in marked)

    def with_scores(self) -> list[tuple[str, float]]:
        """Every name with its score; language codes have the best score there is."""
        codes = {*self.codes.values(), _SPACE + chr(_CODES), chr(_CODES)}
        return [(name, 0.0 if name in codes else self._scores.get(name, self._lowest)) for name in self.all]

    def _name_of(self, token: str) -> str:
        return self.codes.get(token) or (token if token in self._scores else _UNMATCHED + token)


def _add_language_codes(made: Tokenizer, codes: dict[str, str]) -> None:
    """Read a language code such as Marian's >>fr<< at the very beginning as one token."""
    first: list[Any] = [normalizers.Replace(Regex(_PRIVATE), _OTHER)]
    if codes or made.token_to_id(_SPACE + chr(_CODES)) is not None or made.token_to_id(chr(_CODES)) is not None:
        first += [normalizers.Replace(Regex(rf"\A{re.escape(code)}"), name[-1]) for code, name in codes.items()]
        first += [normalizers.Replace(Regex(r"\A>>[\s\S]*?<<"), chr(_CODES))]
        split = pre_tokenizers.Split(Regex(_PRIVATE), "isolated")
        before = [made.pre_tokenizer] if made.pre_tokenizer else []
        made.pre_tokenizer = pre_tokenizers.Sequence([split, *before])
    made.normalizer = normalizers.Sequence([*first, *([made.normalizer] if made.normalizer else [])])


def _set_decoder(made: Tokenizer, tokenizer: Any, codes: dict[str, str]) -> None:
    """Decode the parts between special tokens one by one, as the Python tokenizer does, and strip the whole."""
    special = dict.fromkeys(tokenizer.all_special_tokens)
    first = [decoders.Replace(_UNMATCHED + _SPACE, _KEPT), decoders.Replace(_UNMATCHED, "")]
    first += [decoders.Replace(name, code) for code, name in codes.items()]
    first += [decoders.Replace(token, token + _ENDED) for token in special]
    end = tokenizer.convert_tokens_to_string([tokenizer.eos_token, "x"]).removeprefix(tokenizer.eos_token)
    between = end.removesuffix("x") if end.endswith("x") else ""
    last = [
        decoders.Fuse(), decoders.Replace(Regex(_ENDED + " ?"), between), decoders.Replace(_KEPT, " "),
        decoders.Replace(Regex(r"\A\s+|\s+\z"), ""),
    ]  # fmt: skip
    made.decoder = decoders.Sequence([*first, made.decoder, *last])


def _add_special_tokens(made: Tokenizer, tokenizer: Any) -> None:
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    for content in tokenizer.all_special_tokens:
        added.setdefault(content, AddedToken(content, special=True, normalized=False))
    for token in added.values():
        is_special = token.special or token.content in tokenizer.all_special_tokens
        made.add_tokens([AddedToken(
            token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False,
            special=is_special,
        )])  # fmt: skip
    one, two = tokenizer.build_inputs_with_special_tokens([-1]), tokenizer.build_inputs_with_special_tokens([-1], [-2])
    used = sorted({each for each in two if each >= 0})
    words = {-1: "$A:0", -2: "$B:0", **{each: f"{tokenizer.convert_ids_to_tokens(each)}:0" for each in used}}
    made.post_processor = processors.TemplateProcessing(
        single=[words[each] for each in one], pair=[words[each] for each in two],
        special_tokens=[(tokenizer.convert_ids_to_tokens(each), each) for each in used],
    )  # fmt: skip


def _answers_alike(found: ConvertedTokenizer, tokenizer: Any, pieces: Sequence[str]) -> bool:
    """Whether both tokenizers agree on ids of texts and pairs, and on texts of ids, with special tokens and without."""
    texts = [*_TEXTS, *_texts_of_pieces(pieces)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        if found.encode(text) != ids or any(_decodes_otherwise(found, tokenizer, ids, skip) for skip in (True, False)):
            return False
    return bool(found.encode(texts[2], texts[4]) == tokenizer(texts[2], texts[4])["input_ids"])


def _decodes_otherwise(found: ConvertedTokenizer, tokenizer: Any, ids: list[int], skip: bool) -> bool:
    wanted = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    return bool(found.tokenizer.decode(ids, skip_special_tokens=skip) != wanted)


def _texts_of_pieces(pieces: Sequence[str]) -> Iterator[str]:
    """Texts of pieces from all over the vocabulary."""
    step = max(1, len(pieces) // 300)
    for start in range(0, len(pieces), step):
        yield "".join(pieces[start : start + 7]).replace(_SPACE, " ")
