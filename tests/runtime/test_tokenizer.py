"""Text and ids without transformers, compared with transformers."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.runtime import CompiledModel, TextStream, Tokenizer
from precast.runtime.errors import ArtifactError, FormatError, InputError, UsageError

TEXTS = [
    *tiny.TEXTS,
    "",
    " ",
    "\n\ttabs\n",
    "e\u0301 combining",
    "👩\u200d👩\u200d👧 family",
    "مرحبا",
    "<s>not special?</s>",
    "a" * 300,
]


@pytest.fixture(scope="module")
def pair(decoder):
    """Ours and theirs over the same files."""
    return CompiledModel.from_pretrained(decoder).tokenizer, transformers.AutoTokenizer.from_pretrained(decoder)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_transformers_own(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, tiny.VOCABULARY - 1), min_size=3, max_size=3), max_size=4), st.booleans())
def test_rows_are_decoded_as_by_transformers(pair, rows, skip):
    ours, theirs = pair
    expected = theirs.batch_decode(rows, skip_special_tokens=skip)
    for given_ in (rows, np.array(rows, np.int64), torch.tensor(rows, dtype=torch.int64)):
        assert ours.batch_decode(given_, skip_special_tokens=skip) == expected
    assert ours.batch_decode(rows) == [ours.decode(row) for row in rows]


def test_batches_are_tensors_of_the_kind_that_is_asked_for(pair, monkeypatch):
    ours, theirs = pair
    expected = theirs(TEXTS[:3], return_tensors="pt", padding=True)
    found = ours(TEXTS[:3], return_tensors="pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for kind in (None, "np"):
        assert all(
            np.array_equal(array, expected[name]) for name, array in ours(TEXTS[:3], return_tensors=kind).items()
        )
    with pytest.raises(UsageError, match="return_tensors='tf' is not known; choose one of: np, pt"):
        ours("x", return_tensors="tf")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"pip install 'precast\[torch\]'"):
        ours("x", return_tensors="pt")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, tiny.VOCABULARY - 1), max_size=40))
def test_a_stream_says_what_decode_says_and_never_half_a_character(pair, ids):
    ours, _ = pair
    stream = TextStream(ours)
    pieces = [stream.put(token) for token in ids]
    whole = ours.decode(ids)
    assert "".join(pieces) + stream.end() == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_of_real_text_shows_no_replacement_characters(pair, text):
    ours, _ = pair
    stream = TextStream(ours)
    assert not any("\ufffd" in stream.put(token) for token in ours.encode(text))


def test_batches_are_padded_on_the_tokenizers_side(decoder, tmp_path):
    import json
    import shutil

    path = shutil.copytree(decoder, tmp_path / "copy", ignore=shutil.ignore_patterns("config.json"))
    for side in ("left", "right"):
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": side}))
        theirs = transformers.AutoTokenizer.from_pretrained(path, padding_side=side)(
            tiny.TEXTS, padding=True, return_tensors="np"
        )
        ours = Tokenizer(path)(tiny.TEXTS)
        for name in ("input_ids", "attention_mask"):
            assert np.array_equal(ours[name], theirs[name])


def test_the_chat_template_is_rendered_as_transformers_does(pair):
    ours, theirs = pair
    talk = [{"role": "user", "content": "Hi {{ there }} 你好"}, {"role": "assistant", "content": "Yes?"}]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(talk, add_generation_prompt=prompt, tokenize=False)
        assert ours.apply_chat_template(talk, add_generation_prompt=prompt) == expected


def test_a_template_is_sandboxed_and_its_refusal_explained(decoder, tmp_path):
    import shutil

    path = shutil.copytree(decoder, tmp_path / "copy", ignore=shutil.ignore_patterns("config.json"))
    (path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="refused"):
        Tokenizer(path).apply_chat_template([{"role": "user", "content": "Hi"}])
    (path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="roles must alternate"):
        Tokenizer(path).apply_chat_template([{"role": "user", "content": "Hi"}])
    (path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(path).apply_chat_template([{"role": "user", "content": "Hi"}])


def test_no_tokenizer_is_explained(tmp_path):
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json.*Give token ids"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("token", ["\ud800", {"content": "a\udfff"}])
def test_a_special_token_that_is_half_a_character_is_refused_by_its_name(decoder, tmp_path, token):
    (tmp_path / "tokenizer.json").write_bytes((decoder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"sep_token": token}))
    with pytest.raises(FormatError, match=r"sep_token.* (half a character|surrogates not allowed)"):
        Tokenizer(tmp_path)
