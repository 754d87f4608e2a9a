"""Stop strings end a row where transformers' StopStringCriteria ends it, however the tokenizer spells its tokens."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from precast.runtime import CompiledModelForCausalLM
from precast.runtime.generation.stop_strings import StopStrings
from precast.runtime.inputs.tokenizer import Tokenizer

# transformers needs a tokenizer that can spell "abcdef".
TEXTS = [*tiny.TEXTS, *["abcdef"] * 9]
SPECIAL = ["<unk>", "<|im_end|>", "<|with space|> "]


def pieces():
    inner = Inner(models.WordPiece(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    inner.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    )
    return inner


def fallback():
    """As Llama 2: words begin with a mark, and what is no token is bytes."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    inner = Inner(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    inner.train_from_iterator(["▁" + text.replace(" ", "▁") for text in tiny.TEXTS[:3]], trainer)
    return inner


def suffixes():
    """As CLIP: words end with a mark."""
    inner = Inner(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    return inner


def byte_level():
    return tiny.tokenizer().backend_tokenizer


def bare():
    """Whole words, and no decoder."""
    inner = Inner(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return inner


@pytest.fixture(scope="module", params=[byte_level, pieces, fallback, suffixes, bare], ids=lambda make: make.__name__)
def both(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    theirs = PreTrainedTokenizerFast(tokenizer_object=request.param(), additional_special_tokens=SPECIAL[1:])
    theirs.save_pretrained(path)
    return Tokenizer(path), theirs


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_stop_string_ends_where_transformers_ends_it(both, data):
    """Stop strings cut from anywhere in a row's text, special tokens and halves of characters included."""
    ours, theirs = both
    ids = st.integers(0, len(theirs) + 1)
    row = np.array(data.draw(st.lists(ids, min_size=1, max_size=24)))
    text = b"".join(piece or b"" for piece in ours.pieces(row)).decode(errors="ignore") or "a"
    start = data.draw(st.integers(0, len(text) - 1))
    cut = text[start : start + data.draw(st.integers(1, 9))]
    stops = [cut, data.draw(st.sampled_from(["is", "\n", "今", " of", "Zürich"]))]
    expected = StopStringCriteria(theirs, stops)
    found = StopStrings(ours, stops)
    for length in range(1, len(row) + 1):
        assert found(row[:length]) == bool(expected(torch.tensor(row[None, :length]), None)), (stops, row[:length])


def test_special_tokens_and_what_begins_in_the_prompt_stop_a_row(decoder):
    model = CompiledModelForCausalLM.from_pretrained(decoder)
    row = [5, 9, 30]
    asked = {
        "max_new_tokens": 12,
        "eos_token_id": [],
        "bad_words_ids": [[token] for token in range(4, tiny.VOCABULARY)],
    }
    whole = model.generate([row], **asked)[0].tolist()
    special = model.tokenizer.token(whole[-1])
    stopped = whole[: whole.index(whole[-1], 3) + 1]
    assert model.generate([row], stop_strings=special, **asked)[0].tolist() == stopped
    across = model.tokenizer.token(30)[-1] + model.tokenizer.token(whole[3])
    assert model.generate([row], stop_strings=across, **asked)[0].tolist() == whole[:4]


def test_the_pieces_of_a_vocabulary_are_read_at_once(both, monkeypatch):
    """What takes longer than a piece is done once for all: there are tokenizers of 262,144."""
    ours, theirs = both
    size = len(theirs) + 2
    alone = [ours.piece(index) for index in range(size)]
    asked, real = [], Tokenizer._library_errors
    monkeypatch.setattr(Tokenizer, "_library_errors", lambda self, what: (asked.append(what), real(self, what))[1])
    assert ours.pieces(range(size)) == alone
    assert len(asked) == 1
