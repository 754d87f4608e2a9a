"""Files of rows: read in every form, formed into batches, kept through kills, faults and other processes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.runtime import CompiledModel, pipeline
from precast.runtime.errors import InputError, PublishError, UsageError
from precast.runtime.runner import journal as journals
from precast.runtime.runner.batches import Prepared, answer_rows, plan_batches
from precast.runtime.runner.files import answer_file
from precast.runtime.runner.rows import Column, Row, as_conversation, parse_rows, read_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=12)


class Shouts:
    """Answers a text in capitals; refuses texts with an x."""

    batch_size = 3

    def __init__(self, stop_after=None):
        self.asked, self._left = Counter(), stop_after

    def prepare(self, index, row):
        if row.problem or "x" in row.given:
            raise InputError(row.problem or f"{row.given!r} has an x.")
        return Prepared(index, row, row.given, len(row.given))

    def answer(self, batch):
        if self._left == 0:
            raise KeyboardInterrupt
        self._left = self._left and self._left - 1
        self.asked.update(each.index for each in batch)
        # Which rows stand together is part of the answer, as rounding may be.
        together = sorted(each.index for each in batch)
        return [{"input": each.value, "output": each.value.upper(), "together": together} for each in batch]


def run(target, texts, worker=None, **options):
    rows = [Row(text) for text in texts]
    return answer_file(rows, target, {"model": "m"}, lambda seed: worker or Shouts(), **options)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=12), cut=st.integers(0, 2000), stop=st.integers(0, 4))
def test_whatever_a_kill_leaves_becomes_the_undisturbed_file(tmp_path_factory, texts, cut, stop):
    folder = tmp_path_factory.mktemp("rows")
    run(folder / "whole.jsonl", texts)
    with pytest.raises(KeyboardInterrupt) if stop * 3 < sum("x" not in each for each in texts) else _nothing():
        run(folder / "out.jsonl", texts, Shouts(stop))
    partial = folder / "out.jsonl.partial"
    if partial.exists():
        os.truncate(partial, min(cut, partial.stat().st_size))
    worker = Shouts()
    run(folder / "out.jsonl", texts, worker, resume=True)
    assert (folder / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert max(worker.asked.values(), default=0) <= 1
    assert sorted(path.name for path in folder.iterdir()) == ["out.jsonl", "whole.jsonl"]


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *details):
        return None


def test_finished_batches_are_not_asked_again(tmp_path):
    texts = ["a", "bb", "x", "cc", "d", "ee", "f", "gg"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out.jsonl", texts, Shouts(2))
    worker = Shouts()
    summary = run(tmp_path / "out.jsonl", texts, worker, resume=True)
    assert len(worker.asked) == 1, "seven rows, of which two batches of three were done"
    assert (summary.rows, summary.computed, summary.failed) == (8, 1, 1)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["input"] for row in found] == texts
    assert found[2]["error"] == {"type": "InputError", "message": "'x' has an x."}
    again = run(tmp_path / "out.jsonl", texts, worker, resume=True)
    assert (again.rows, again.computed, again.failed) == (8, 0, 1), "there is nothing left to do"


def test_other_work_is_not_mixed_in(tmp_path):
    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(target, ["a", "b", "c", "d"], Shouts(1))
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(UsageError, match=r"left 3 rows in .*out.jsonl.partial. Pass resume=True to go on"):
        run(target, ["a", "b", "c", "d"])
    with pytest.raises(UsageError, match="begun with another input"):
        run(target, ["a", "b", "c", "e"], resume=True)
    with pytest.raises(UsageError, match="begun with another model"):
        answer_file([Row(each) for each in "abcd"], target, {"model": "n"}, lambda seed: Shouts(), resume=True)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    run(target, ["a", "b", "c", "e"], force=True)
    with pytest.raises(UsageError, match=r"exists already\. Pass force=True"):
        run(target, ["a", "b", "c", "e"])
    with pytest.raises(UsageError, match="does not answer these 4 rows"):
        run(target, ["a", "b", "c", "d"], resume=True)
    with pytest.raises(UsageError, match="pass one of them"):
        run(target, ["a"], resume=True, force=True)
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_work_that_is_refused_leaves_nothing_and_takes_nothing_away(tmp_path):
    class Refuses(Shouts):
        def prepare(self, index, row):
            raise UsageError("it cannot be")

    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(UsageError, match="it cannot be"):
        run(out, ["a"], Refuses())
    assert not partial.exists()
    with pytest.raises(KeyboardInterrupt):
        run(out, ["a", "b", "c", "d"], Shouts(1))
    kept = partial.read_bytes()
    with pytest.raises(UsageError, match="it cannot be"):
        run(out, ["a", "b", "c", "d"], Refuses(), resume=True)
    with pytest.raises(UsageError, match="An interrupted run left"):
        run(out, ["a", "b", "c", "d"], Shouts())
    assert partial.read_bytes() == kept


def test_a_seed_is_that_of_the_first_run(tmp_path):
    seeds = []

    def worker(seed):
        seeds.append(seed)
        return Shouts(1 if len(seeds) == 1 else None)

    rows = [Row(each) for each in "abcd"]
    with pytest.raises(KeyboardInterrupt):
        answer_file(rows, tmp_path / "o.jsonl", {"seed": 1}, worker)
    assert answer_file(rows, tmp_path / "o.jsonl", {"seed": 2}, worker, resume=True).seed == 1
    assert seeds == [1, 1]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    target, real, room = tmp_path / "out.jsonl", os.pwrite, [400]

    def pwrite(file, data, place):
        if place + len(data) > room[0]:
            written = real(file, data[: max(0, room[0] - place)], place)
            if written:
                return written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, place)

    monkeypatch.setattr(journals.os, "pwrite", pwrite)
    texts = [chr(97 + n) * (n + 1) for n in range(9)]
    with pytest.raises(PublishError, match=r"No space left on device. 3 rows are kept; resume=True goes on"):
        run(target, texts, Shouts())
    room[0] = 10**6
    # The last step may fail, too: the file's own name is then not there, and nothing else is left of it.
    with monkeypatch.context() as patch:
        patch.setattr(journals.os, "fsync", _raise_full)
        with pytest.raises(PublishError, match="9 rows are kept"):
            run(target, texts, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.partial"]
    worker = Shouts()
    run(target, texts, worker, resume=True)
    assert not worker.asked
    run(tmp_path / "whole.jsonl", texts)
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def _raise_full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _try_to_write(target, found):
    try:
        run(target, ["a"])
        found.put("wrote")
    except UsageError as error:
        found.put(str(error))


def test_two_processes_do_not_write_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    found = context.Queue()

    class Waits(Shouts):
        def answer(self, batch):
            other = context.Process(target=_try_to_write, args=(tmp_path / "out.jsonl", found))
            other.start()
            assert "Another process is writing" in found.get(timeout=60)
            other.join()
            return super().answer(batch)

    run(tmp_path / "out.jsonl", ["a"], Waits())
    assert (tmp_path / "out.jsonl").exists()


def test_every_form_of_output(tmp_path):
    rows = [Row({"src": "á", "tgt": "t"}), Row({"src": "b"})]

    class Answers(Shouts):
        def prepare(self, index, row):
            return Prepared(index, row, row.given)

        def answer(self, batch):
            return [{**each.value, "output": each.value["src"] * 2} for each in batch]

    def text_of(name):
        answer_file(rows, tmp_path / name, {}, lambda seed: Answers())
        return (tmp_path / name).read_text("utf-8")

    lines = '{"src": "á", "tgt": "t", "output": "áá"}\n{"src": "b", "output": "bb"}\n'
    assert text_of("o.jsonl") == text_of("o.json") == lines, "PaddleNLP's output.json has lines"
    assert text_of("o.txt") == "[{'text_generation_text': ['áá']},\n {'text_generation_text': ['bb']}]\n"
    run(tmp_path / "a.json", ["a", "x"])
    found = json.loads((tmp_path / "a.json").read_text())
    assert [each["input"] for each in found] == ["a", "x"]
    with pytest.raises(UsageError, match="no suffix that tells its form"):
        run(tmp_path / "out.xlsx", ["a"])
    with pytest.raises(UsageError, match="is a directory"):
        run(tmp_path, ["a"])
    with pytest.raises(PublishError, match=r"none/o.jsonl cannot be written: No such file"):
        run(tmp_path / "none" / "o.jsonl", ["a"])


def test_one_bad_row_is_not_its_neighbours_end():
    class Falls(Shouts):
        def answer(self, batch):
            if any(each.value == "b" for each in batch):
                raise InputError("b is too much.")
            return super().answer(batch)

    found = {}
    answer_rows([Row(each) for each in "abcd"], Falls(), found.update)
    assert found[1]["error"]["message"] == "b is too much."
    assert [found[index]["output"] for index in (0, 2, 3)] == ["A", "C", "D"]
    with pytest.raises(InputError, match="Row 2: b is too much"):
        answer_rows([Row(each) for each in "abcd"], Falls(), found.update, fail_fast=True)


@settings(deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=30), size=st.integers(1, 5))
def test_batches_have_each_row_once_and_like_lengths(lengths, size):
    prepared = [Prepared(index, Row(""), None, *each) for index, each in enumerate(lengths)]
    batches = plan_batches(prepared, size)
    assert sorted(each.index for batch in batches for each in batch) == list(range(len(lengths)))
    assert all(len(batch) <= size and len({each.group for each in batch}) == 1 for batch in batches)
    for group in range(3):
        own = [each.length for batch in batches for each in batch if each.group == group]
        assert own == sorted(own)


@settings(deadline=None)
@given(texts=st.lists(TEXT, min_size=1))
def test_texts_come_back_from_every_format(texts):
    rows = [{"id": index, "text": text} for index, text in enumerate(texts)]
    lines = "\n".join(json.dumps(row, ensure_ascii=bool(index % 2)) for index, row in enumerate(rows))
    for data, form in ((lines, "jsonl"), (json.dumps(rows), "json"), (f"\ufeff{lines}\r\n", "json")):
        assert [row.given for row in parse_rows(data.encode(), "f", form)] == rows
    plain = "\n".join(texts)
    if any(each.strip() for each in texts):
        kept = [row.given for row in parse_rows(plain.encode(), "f", "txt", keep_blank=True)]
        assert kept[: len(texts)] == (texts if plain.split("\n")[-1] else texts[:-1])


def test_tables(tmp_path):
    data = 'name,text\n1,"a, ""b""\nc"\n\n2,d,e\n3,"d\u2028f"\n'.encode()
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + data)
    rows = read_rows(tmp_path / "t.csv")
    assert [row.given for row in rows] == [{"name": "1", "text": 'a, "b"\nc'}, None, {"name": "3", "text": "d\u2028f"}]
    assert rows[1].problem == "Line 5 has 3 values, and there are 2 columns."
    assert [row.given for row in parse_rows(b"a\tb\n1\t2\n", "f", "tsv")] == [{"a": "1", "b": "2"}]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "é"], "n": [1, 2]}), tmp_path / "t.parquet")
    assert [row.given for row in read_rows(tmp_path / "t.parquet")] == [{"text": "a", "n": 1}, {"text": "é", "n": 2}]


@pytest.mark.parametrize(
    ("data", "form", "message"),
    [
        (b"", "txt", "f holds no rows"),
        (b"\n \n", "txt", "f holds no rows"),
        (b"[]", "json", "f holds no rows"),
        (b"a,b\n", "csv", "f holds no rows"),
        (b"good\nbad \xff", "txt", "line 2 has the byte 0xff"),
        (b'[\n{"a": }]', "json", "f is not JSON: Expecting value in line 2"),
        (b"[" * 200_000, "json", "f is not JSON that can be read"),
        (b'a,b\n"1', "csv", "no table that can be read: unexpected end of data"),
        (b"a,a\n1,2\n", "csv", "f has two columns 'a'"),
        (b"PAR1", "parquet", "f is no Parquet file that can be read"),
        (b"x", "xlsx", "There is no format 'xlsx'; there are: txt, jsonl"),
    ],
)
def test_files_that_are_none(data, form, message):
    with pytest.raises(UsageError, match=message):
        parse_rows(data, "f", form)


def test_lines_that_are_no_json_are_rows_with_a_reason():
    data = b'{"text": "a"}\n{"text": }\n\n{"text": "\xff"}\n' + b"[" * 200_000 + b"\n7\n"
    rows = parse_rows(data, "f", "jsonl")
    assert [row.given for row in rows] == [{"text": "a"}, None, None, None, 7]
    assert [row.problem and row.problem.split(":")[0] for row in rows] == [
        None, "Line 2 is not JSON", "Line 4 is not UTF-8 text", "Line 5 is not JSON that can be read", None,
    ]  # fmt: skip


def test_columns():
    rows = [Row({"id": 1, "text": "a"}), Row({"id": 2, "prompt": "b"}), Row({"id": 3}), Row("c"), Row(None, "Line 5.")]
    column = Column(rows, None, ("prompt", "text"))
    assert [column.value(row) for row in (rows[0], rows[1], rows[3])] == ["a", "b", "c"]
    for row, message in ((rows[2], "no column prompt or text; it has: id"), (rows[4], "Line 5.")):
        with pytest.raises(InputError, match=message):
            column.value(row)
    with pytest.raises(UsageError, match=r"no column 'txt'. Did you mean text\? The columns are: id, text, prompt"):
        Column(rows, "txt", ())
    with pytest.raises(UsageError, match=r"none of the columns prompt; theirs are: id\. Choose one by column=NAME"):
        Column(rows[2:3], None, ("prompt",))
    with pytest.raises(UsageError, match="column='a' is for rows with columns; these are texts"):
        Column(rows[3:], "a", ())


def test_conversations():
    messages = [{"role": "user", "content": "a"}]
    assert as_conversation(messages, messages) == messages
    assert as_conversation("a", "a") is None
    rounds = {"src": ["a", "b"], "tgt": ["A", "B"]}
    assert [(each["role"], each["content"]) for each in as_conversation(rounds, rounds["src"])] == [
        ("user", "a"), ("assistant", "A"), ("user", "b"),
    ]  # fmt: skip
    for given_, value, message in (
        ({"src": ["a", "b", "c"], "tgt": ["A"]}, ["a", "b", "c"], "3 rounds of a chat and 1 answers"),
        ({}, 7, "a text, or messages"),
        ({}, [], "a text, or messages"),
    ):
        with pytest.raises(InputError, match=message):
            as_conversation(given_, value)


def test_a_list_of_seeds_has_one_for_each_prompt(decoder):
    model, row = CompiledModel.from_pretrained(decoder), [5, 9, 30]
    asked = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 8, "eos_token_id": []}
    alone = [model.generate([row], seed=seed, **asked)[0].tolist() for seed in (4, 5)]
    assert alone[0] != alone[1]
    assert model.generate([row], seed=[4], **asked)[0].tolist() == alone[0]
    several = model.generate([row], seed=[4], num_return_sequences=1, **asked)
    assert several[0].tolist() == alone[0]
    for seeds in ([], [4, 5], [-1]):
        with pytest.raises(InputError, match="seed"):
            model.generate([row], seed=seeds, **asked)
    with pytest.raises(InputError, match="seed is a list of 2, and there are 1 prompts"):
        model.stream([row], seed=[4, 5], **asked)
    prompts = ["Paris", "A", "Water"]
    pipe = pipeline("text-generation", model)
    found = pipe(prompts, seed=[1, 2, 3], batch_size=2, **asked)
    assert found == [pipe(text, seed=seed, **asked) for text, seed in zip(prompts, (1, 2, 3), strict=True)]
