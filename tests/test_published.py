"""The page of published checkpoints is what its program writes, and says no less than was promised."""

from __future__ import annotations

import published_page
import pytest
from corpus import needs_corpus
from transformers import AutoConfig
from zoo.published import narrow

TEXT = published_page.PAGE.read_text("utf-8") if published_page.PAGE.is_file() else ""
ROWS = published_page.kept_rows(TEXT)

on_the_page = pytest.mark.skipif(not TEXT, reason="python tools/published_page.py makes docs/published.md")


def test_the_page_keeps_the_rows_of_what_is_not_tried_again():
    rows = [
        {"checkpoint": "a", "type": "bert", "task": "fill-mask", "verdict": published_page.SAME, "why": ""},
        {"checkpoint": "b", "type": "–", "task": "", "verdict": published_page.REFUSED, "why": "x / y, `z`; and why"},
    ]
    text = published_page.page(rows)
    assert list(published_page.kept_rows(text).values()) == rows
    assert "Of the 1 whose type and task [support.md](support.md) lists, 1 are the same (100.0%)." in text


@on_the_page
def test_the_page_is_what_its_program_writes_of_its_rows():
    assert published_page.page(ROWS.values()) == TEXT


@on_the_page
def test_every_row_that_is_not_the_same_says_why():
    assert all(row["why"] for row in ROWS.values() if row["verdict"] != published_page.SAME)


@on_the_page
def test_as_much_is_the_same_as_was_promised():
    listed = [row for row in ROWS.values() if published_page.is_listed(row)]
    assert sum(row["verdict"] == published_page.SAME for row in listed) >= 0.95 * len(listed) > 100
    assert not [row["checkpoint"] for row in ROWS.values() if row["verdict"] == published_page.FAILS]


@on_the_page
@needs_corpus
def test_no_folder_leaves_the_count():
    assert sorted(ROWS) == published_page.names()


def test_a_narrow_configuration_keeps_what_is_neither_width_nor_depth():
    raw = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "sliding_window": 4096, "eos_token_id": 151645, "use_cache": False,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    }  # fmt: skip
    small = narrow(raw, AutoConfig.for_model(**raw))
    changed = {name for name in raw if small[name] != raw[name]}
    assert changed == {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (4, 2)
