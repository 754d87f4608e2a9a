"""`precast predict` and `precast buckets`."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
import tiny

from precast.runtime import CompiledModel, pipeline

SHAPES = {"batch_size": 3, "sequence_length": (16, 48), "dynamic_batch_size": True}


def test_each_text_gets_a_line_or_all_one_document(run, encoder, tmp_path, monkeypatch):
    vectors = CompiledModel.from_pretrained(encoder).embed(["Water boils.", "你好"])
    code, out, err = run("predict", encoder, "--text", "Water boils.", "--text", "你好", "-q")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [line["input"] for line in lines] == ["Water boils.", "你好"]
    for line, vector in zip(lines, vectors, strict=True):
        assert line["answer"] == pytest.approx(vector.tolist(), abs=1e-5)
    assert "你好" in out, "as it was written"
    (tmp_path / "texts").write_text("Water boils.\n你好\n", "utf-8")
    assert json.loads(run("predict", encoder, "--file", tmp_path / "texts", "--json")[1]) == lines
    for words in ((), ("--file", "-")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Water boils.\n你好\n".encode())))
        assert json.loads(run("predict", encoder, *words, "--json")[1]) == lines


def test_every_task_answers_as_its_pipeline(run, checkpoint, artifact, decoder):
    labels = artifact(checkpoint("bert", "AutoModelForSequenceClassification"), **SHAPES)
    answer = json.loads(run("predict", labels, "--text", "Water", "--top", "1", "--json")[1])[0]["answer"]
    assert answer == pipeline(model=labels)("Water", top_k=1)
    tagger = artifact(checkpoint("bert", "AutoModelForTokenClassification"), **SHAPES)
    _, out, _ = run("predict", tagger, "--text", "天气 here", "--option", "aggregation_strategy=simple", "--json")
    expected = pipeline(model=tagger)("天气 here", aggregation_strategy="simple")
    assert json.loads(out)[0]["answer"] == expected
    reader = artifact(checkpoint("bert", "AutoModelForQuestionAnswering"), **SHAPES)
    _, out, _ = run("predict", reader, "--text", tiny.TEXTS[2], "--question", "When?", "--json")
    assert json.loads(out)[0]["answer"]["answer"] in tiny.TEXTS[2]
    _, out, _ = run("predict", decoder, "--text", "Water", "--option", "max_new_tokens=3", "--json")
    assert json.loads(out)[0]["answer"][0]["generated_text"].startswith("Water")
    names = {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}
    inference = artifact(checkpoint("bert", "AutoModelForSequenceClassification", **names), **SHAPES)
    words = ("--task", "zero-shot-classification", "--labels", "天气,water", "--option", "multi_label=true")
    answer = json.loads(run("predict", inference, "--text", "Paris", *words, "--json")[1])[0]["answer"]
    assert set(answer["labels"]) == {"天气", "water"}
    assert sum(answer["scores"]) != pytest.approx(1)


def test_masks_are_told_in_figures(run, tmp_path, artifact):
    import transformers
    from PIL import Image

    config = transformers.SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[2], hidden_sizes=[16], patch_sizes=[7], strides=[4],
        num_attention_heads=[1], mlp_ratios=[2], decoder_hidden_size=16,
    )  # fmt: skip
    path = tiny.save_checkpoint(tmp_path / "segformer", config, transformers.AutoModelForSemanticSegmentation)
    transformers.SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    compiled = artifact(path, batch_size=1, image_size=(32,), sequence_length=())
    answer = json.loads(run("predict", compiled, "--text", tmp_path / "red.png", "--json")[1])[0]["answer"]
    assert sum(each["mask"]["pixels"] for each in answer) == 800
    assert all(each["mask"]["size"] == [40, 20] for each in answer)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--question", "y"), "--question is for question-answering; this model does feature-extraction"),
        (("--top", "0"), "x>=1"),
        (("--top", "3"), "--top is not for this task"),
        (("--labels", "a"), "--labels is not for this task"),
        (("--option", "pooling"), "not NAME=VALUE"),
        (
            ("--option", "pool=mean"),
            r"does not know pool\. Did you mean pooling\? Its options are: .*pooling",
        ),
        (("--task", "ner"), "compiled for feature-extraction.*Ask it for: feature-extraction"),
    ],
)
def test_mistakes_get_one_line(run, encoder, words, message):
    code, out, err = run("predict", encoder, "--text", "x", *words)
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert len(err.splitlines()) == 1


def test_buckets_from_lengths(run, tmp_path):
    file = tmp_path / "lengths"
    file.write_text("\n".join(map(str, [5, 6, 7, 30, 31, 60, 61, 500])))
    code, out, _ = run("buckets", file, "--count", 3, "--max", 128)
    assert code == 0
    assert out.splitlines()[0] == "--sequence-length 8,32,64"
    assert "longer         1" in out
    assert "with 64 alone 55.4%" in out
    plan = json.loads(run("buckets", file, "--count", 3, "--max", 128, "--json")[1])
    assert plan["lengths"] == [8, 32, 64]
    assert plan["rows"] == [3, 2, 2]
    assert plan["padding"] == pytest.approx(1 - 200 / (3 * 8 + 2 * 32 + 2 * 64))


def test_buckets_from_texts(run, tmp_path, encoder):
    file = tmp_path / "texts"
    file.write_text("\n".join(tiny.TEXTS), "utf-8")
    plan = json.loads(run("buckets", file, "--model", encoder, "--multiple", 1, "--count", 9, "--json")[1])
    tokenizer = CompiledModel.from_pretrained(encoder).tokenizer
    assert plan["lengths"] == sorted({len(tokenizer.encode(text)) for text in tiny.TEXTS})
    assert plan["padding"] == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("{file}",), 2, "Line 1 of .* is 'Water boils', which is no length; .* give --model"),
        (("{file}", "--model", "./none"), 1, "There is no directory ./none"),
        (("{file}", "--model", "{encoder}", "--count", "0"), 2, "count must be at least 1"),
        (("missing",), 2, "cannot be read"),
    ],
)
def test_buckets_mistakes(run, tmp_path, encoder, words, code, message):
    file = tmp_path / "texts"
    file.write_text("Water boils\n")
    found, out, err = run("buckets", *(word.format(file=file, encoder=encoder) for word in words))
    assert (found, out) == (code, "")
    assert re.search(message, err)


def test_blank_lines_are_left_out_and_said(run, encoder, tmp_path, monkeypatch):
    # A line ends where "\n" is: what else str.splitlines() takes for an end may stand in a text.
    lines = "one\u2028more\n\n  \r\ntwo\r\n\n"
    (tmp_path / "texts").write_bytes(lines.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    for words, name in ((("--file", tmp_path / "texts"), str(tmp_path / "texts")), ((), "Standard input")):
        code, out, err = run("predict", encoder, *words)
        assert code == 0
        assert [json.loads(line)["input"] for line in out.splitlines()] == ["one\u2028more", "two"]
        assert f"Left out as blank: lines 2, 3, 5 of {name}." in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "texts cannot be read: No such file or directory"),
        (b"", "texts holds no rows"),
        (b"\n \n", "texts holds no rows"),
        (b"good\nbad \xff\n", "texts is not UTF-8 text: line 2 has the byte 0xff"),
    ],
)
def test_a_file_without_texts_is_one_line(run, encoder, tmp_path, content, message):
    if content is not None:
        (tmp_path / "texts").write_bytes(content)
    code, out, err = run("predict", encoder, "--file", tmp_path / "texts")
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert "Traceback" not in err
