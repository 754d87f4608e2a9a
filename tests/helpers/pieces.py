"""Tiny tokenizers of sentencepiece, as transformers has them in Python: trained on the spot."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import sentencepiece
import tiny
import transformers

GERMAN = [
    "Die Hauptstadt von Frankreich ist Paris.",
    "Guten Morgen, liebe Leute!",
    "Wasser kocht bei 100 Grad Celsius.",
]


def trained(texts: list[str], kind: str, size: int) -> Any:
    """A model of sentencepiece."""
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=data, vocab_size=size, model_type=kind, character_coverage=1.0,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=data.getvalue())


def _pieces(model: Any) -> list[str]:
    return [model.id_to_piece(index) for index in range(3, model.get_piece_size())]


def marian(folder: Path, *codes: str, leave_out: int = 0) -> Any:
    """A Marian tokenizer of two models, whose vocabulary has both models' pieces but for some of the source's."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = trained(GERMAN * 3, "unigram", 120), trained(tiny.TEXTS * 3, "unigram", 150)
    (folder / "source.spm").write_bytes(source.serialized_model_proto())
    (folder / "target.spm").write_bytes(target.serialized_model_proto())
    lost = set(_pieces(source)[5 : 5 + leave_out])
    known = sorted({*_pieces(source), *_pieces(target)} - lost)
    names = ["</s>", "<unk>", *codes, *known, "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "MarianTokenizer", "source_lang": "de"})
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")
        return transformers.AutoTokenizer.from_pretrained(folder)


def m2m(folder: Path, source: str) -> Any:
    """An M2M100 tokenizer: byte pairs, and a token for each language behind the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    model = trained((GERMAN + tiny.TEXTS) * 3, "bpe", 260)
    (folder / "sentencepiece.bpe.model").write_bytes(model.serialized_model_proto())
    names = ["<s>", "<pad>", "</s>", "<unk>", *_pieces(model)[:-9]]
    (folder / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    settings = {"tokenizer_class": "M2M100Tokenizer", "src_lang": source}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return transformers.AutoTokenizer.from_pretrained(folder)
