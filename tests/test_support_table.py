"""The support table is current, and says no less than was promised."""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import version

import pytest
import support_table
from corpus import needs_corpus
from test_pins import PINS
from zoo.configurations import published_for

from precast.exporter.support import table
from precast.runtime.artifact.tasks import TASKS, get_task

RAW = json.loads(support_table.TABLE.read_text("utf-8"))
PAIRS = [pair for zoo in support_table.ZOOS for pair in support_table.pairs(zoo)]
REFUSED = [pair for pair in PAIRS if support_table.expected_reason(pair)]
FIRST = list({pair[1]: pair for pair in reversed(PAIRS) if pair not in REFUSED}.values())
"""Of each type the first task: others have another head on the same body."""
FAMILIES = {"t5", "bart", "marian", "pegasus", "whisper"}


def test_the_table_is_of_the_pinned_transformers():
    """If not: python tools/support_table.py."""
    assert RAW["transformers"] == PINS["transformers"]


@pytest.mark.skipif(RAW["transformers"] != version("transformers"), reason="the table is of another transformers")
def test_the_table_has_every_pair():
    assert {(line.model_type, line.task) for line in table()} == {pair[1:] for pair in PAIRS}
    assert {line.task for line in table()} <= set(TASKS)


def test_the_page_is_the_table():
    assert support_table.PAGE.read_text("utf-8") == support_table.page(RAW)


def test_the_page_names_the_configuration_of_every_line():
    lines = [line for line in RAW["lines"] if "configuration" in line]
    page = support_table.PAGE.read_text("utf-8")
    passed = sum(line.passes for line in table())
    assert f"Of the {passed} lines that pass, {len(lines)} are measured on a published configuration" in page
    for line in lines:
        assert f"| {line['model_type']} | {line['configuration']} | {line['way']} |" in page


@needs_corpus
def test_a_line_is_measured_on_what_is_published_of_its_type():
    by_pair = {pair[1:]: pair for pair in PAIRS}
    for line in table():
        folder = support_table.configuration(by_pair[line.model_type, line.task]) if line.passes else None
        assert line.configuration == (folder.name if folder else ""), (line.model_type, line.task)
        if folder:
            assert json.loads((folder / "config.json").read_bytes())["model_type"] == line.model_type


@pytest.fixture
def corpus(tmp_path):
    """`corpus("name", "BertForMaskedLM")`: a published configuration of BERT, and the folder of all."""

    def publish(name, architecture, **more):
        config = {"model_type": "bert", "architectures": [architecture], **more}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config), "utf-8")
        return tmp_path

    return publish


def test_the_first_published_configuration_of_a_pair_is_chosen(corpus):
    corpus("a-tagger", "BertForTokenClassification")
    corpus("b-broken", "BertForMaskedLM", hidden_size="wide")
    corpus("ipex-bert", "BertForMaskedLM")
    folder = corpus("z-bert", "BertForMaskedLM")
    chosen = {task: published_for("bert", get_task(task), folder) for task in ("fill-mask", "multiple-choice")}
    assert {task: found.name for task, found in chosen.items()} == {
        "fill-mask": "z-bert",
        "multiple-choice": "a-tagger",
    }
    assert published_for("bert", get_task("text-generation", "decoder"), folder) is None
    assert published_for("roberta", get_task("fill-mask"), folder) is None


def test_a_line_is_not_made_of_defaults_where_it_was_of_a_published_configuration(monkeypatch, tmp_path):
    pair = ("decoders", "llama", "text-generation")
    found = {"way": "operator", "difference": 1e-6, "kl_int8": None}
    kept = {"model_type": "llama", "task": "text-generation", "configuration": "a-llama", "way": "operator"}
    monkeypatch.setattr(support_table, "PUBLISHED", tmp_path / "nowhere")
    assert support_table.made_of(pair, found, kept) == kept
    assert "configuration" not in support_table.made_of(pair, found, {})
    monkeypatch.setattr(support_table, "PUBLISHED", tmp_path)
    assert "configuration" not in support_table.made_of(pair, found, kept)
    assert support_table.made_of(pair, {"configuration": "b-llama", **found}, kept)["configuration"] == "b-llama"


def test_refusals_are_those_of_the_zoo():
    by_pair = {pair[1:]: pair for pair in PAIRS}
    for line in table():
        assert line.reason == (support_table.expected_reason(by_pair[line.model_type, line.task]) or "")


def test_what_passes_is_within_the_bound():
    assert all(0 <= line.difference <= 1e-4 for line in table())


def test_as_much_passes_as_was_promised():
    zoos = {pair[1:]: pair[0] for pair in PAIRS}
    count = Counter(zoos[line.model_type, line.task] for line in table() if line.passes)
    assert count["decoders"] >= 130
    assert count["encoders"] >= 35
    assert {line.model_type for line in table() if line.passes} >= FAMILIES
    assert sum(bool(line.configuration) for line in table()) >= 100


@pytest.mark.slow
# What a model's own code warns of is not what the table says.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pair", [*FIRST[::3], *REFUSED], ids=lambda pair: "-".join(pair[1:]))
def test_the_table_is_so_for_every_third_type(pair):
    """Made anew, their lines pass, and what the zoo says is refused; `python tools/support_table.py` makes
    all lines. (What 8 bits cost is a figure, and no line is wrong by it: quantized models have tests of their own.)"""
    assert support_table.surprise(pair, support_table.attempt(pair, quantized=False)) is None
