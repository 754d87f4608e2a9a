"""Tokenizers that transformers runs in Python: one tokenizer.json with its ids and its texts, whatever the text."""

from __future__ import annotations

import json

import pieces
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.cli import main
from precast.exporter import ExportOptions, export
from precast.exporter.checkpoint.python_tokenizers import convert_tokenizer
from precast.exporter.checkpoint.tokenizer_files import save_tokenizer
from precast.runtime.errors import ArtifactError
from precast.runtime.inputs.tokenizer import Tokenizer

MAKERS = {
    "marian": pieces.marian,
    "of several languages, some pieces lost": lambda path: pieces.marian(path, ">>fr<<", ">>de_Latn<<", leave_out=5),
    "m2m": lambda path: pieces.m2m(path, "de"),
    "bytes": lambda path: transformers.ByT5Tokenizer(),
}
LETTERS = st.text(st.sampled_from("aehn stPGWöß今天🦊é☃\t\n ▁.,>><</sfr\U000f0001"), max_size=24)
AFTER = st.sampled_from(["", "</s>", " </s> ", "</s></s>"])
BEFORE = st.sampled_from(["", ">>fr<<", ">>fr<< ", ">>xx<<", " >>de_Latn<<", "</s>", "<unk> ", "__de__"])


@pytest.fixture(scope="module", params=MAKERS)
def both(request, tmp_path_factory):
    """transformers' own, and ours of what an export writes of it."""
    theirs = MAKERS[request.param](tmp_path_factory.mktemp("tokenizer"))
    out = tmp_path_factory.mktemp("out")
    (out / "tokenizer_config.json").write_text(json.dumps(save_tokenizer(theirs, out)))
    return theirs, Tokenizer(out)


@settings(max_examples=60, deadline=None)
@given(before=BEFORE, letters=LETTERS, after=AFTER)
@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_ids_and_texts_are_transformers(both, before, letters, after):
    theirs, ours = both
    text = before + letters + after
    ids = theirs(text)["input_ids"]
    assert ours.encode(text) == ours.encodings(text, length=len(ids) + 9)[0].ids == ids
    plain = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == plain
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_any_ids_have_transformers_text(both):
    theirs, ours = both
    count = len(theirs.get_vocab())
    for start in range(0, count, 5):
        ids = [*range(start, min(start + 9, count)), theirs.eos_token_id, start]
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), ids


def test_batches_cuts_and_single_tokens(both):
    theirs, ours = both
    texts = ["Guten Morgen, liebe Leute!", "Wasser 🦊"]
    found = {name: values.tolist() for name, values in ours(texts).items()}
    expected = theirs(texts, padding=True)
    assert {name: found[name] for name in expected} == dict(expected)
    assert ours.encodings(texts[0], length=6)[0].ids == theirs(texts[0], truncation=True, max_length=6)["input_ids"]
    for index in set(theirs(texts[0])["input_ids"]):
        # Bytes are spelled in the library's own way.
        token = (
            ours.token(index) if isinstance(theirs, transformers.ByT5Tokenizer) else theirs.convert_ids_to_tokens(index)
        )
        assert (ours.token(index), ours.vocabulary_id(token)) == (token, index)
    assert {role: ours.token_id(role) for role in ("eos", "pad", "unk")} == {
        role: getattr(theirs, f"{role}_token_id") for role in ("eos", "pad", "unk")
    }


def test_one_that_cannot_be_converted_is_left_to_ids(tmp_path):
    theirs = transformers.PerceiverTokenizer()
    assert convert_tokenizer(theirs) is None
    save_tokenizer(theirs, tmp_path / "out")
    with pytest.raises(ArtifactError, match="carries no tokenizer, or one that only transformers runs"):
        Tokenizer(tmp_path / "out")


def test_what_answers_differently_is_not_used(tmp_path, monkeypatch):
    theirs = pieces.marian(tmp_path)
    assert convert_tokenizer(theirs) is not None
    monkeypatch.setattr(type(theirs), "remove_language_code", lambda self, text: ([], text.upper()))
    assert convert_tokenizer(theirs) is None


@pytest.mark.slow
def test_a_translation_is_made_of_texts(tmp_path, monkeypatch, capsys):
    """`precast export Helsinki-NLP/opus-mt-de-en`, then `precast predict`."""
    theirs = pieces.marian(tmp_path / "source")
    count = len(theirs.get_vocab())
    config = transformers.MarianConfig(
        vocab_size=count, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
        pad_token_id=theirs.pad_token_id, eos_token_id=theirs.eos_token_id, bos_token_id=None,
        decoder_start_token_id=theirs.pad_token_id, forced_eos_token_id=theirs.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MarianMTModel(config).eval()
    model.save_pretrained(tmp_path / "source")
    options = ExportOptions(batch_size=4, sequence_length=(24,), decoder_sequence_length=16, validate=False)
    export(str(tmp_path / "source"), tmp_path / "de-en", options)
    text = "Guten Morgen. 🦊"
    words = ["--option", "num_beams=4", "--option", "max_new_tokens=8", "--json", "-q"]
    monkeypatch.setattr("sys.argv", ["precast", "predict", str(tmp_path / "de-en"), "--text", text, *words])
    with pytest.raises(SystemExit, match="0"):
        main()
    ids = model.generate(**theirs(text, return_tensors="pt"), num_beams=4, max_new_tokens=8)
    expected = theirs.decode(ids[0], skip_special_tokens=True)
    assert expected
    assert [*json.loads(capsys.readouterr().out)[0]["answer"][0].values()] == [expected]
