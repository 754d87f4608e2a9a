"""Words of optimum-neuron, MindFormers and transformers: read as ours, or refused with what to write instead."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import oracle
import pytest
import tiny
import torch
import transformers
from compare import assert_same

from precast.exporter import ExportOptions, export, option_names
from precast.runtime import CompiledModel, CompiledModelForCausalLM, pipeline, pipelines
from precast.runtime.artifact.tasks import find_tasks
from precast.runtime.errors import CheckpointError, PrecastWarning, UsageError

BITS_8 = transformers.BitsAndBytesConfig(load_in_8bit=True)


def read(**keywords):
    """What `export()` makes of keywords: the options that are not as by default."""
    options, defaults = ExportOptions.of(keywords).as_keywords(), ExportOptions.defaults()
    return {name: value for name, value in options.items() if value != defaults[name]}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"backend": "neuron", "num_cores": 2}, {"backend": "neuron", "tensor_parallel": 2}),
        ({"backend": "neuron", "tensor_parallel_size": 2}, {"backend": "neuron", "tensor_parallel": 2}),
        ({"num_cores": 1}, {}),
        ({"backend": "neuron", "inline_weights_to_neff": True, "optlevel": "2"},
         {"backend": "neuron", "inline_weights": True, "optlevel": 2}),
        ({"backend": "aoti", "auto_cast_type": "bf16"}, {"backend": "aoti", "dtype": "bfloat16"}),
        ({"backend": "aoti", "auto_cast_type": "fp16", "auto_cast": None}, {"backend": "aoti", "dtype": "float16"}),
        ({"auto_cast_type": "fp32"}, {}),
        ({"backend": "neuron", "auto_cast_type": "bf16"}, {"backend": "neuron", "auto_cast_type": "bf16"}),
        ({"backend": "aoti", "torch_dtype": torch.float16}, {"backend": "aoti", "dtype": "float16"}),
        ({"backend": "aoti", "dtype": torch.bfloat16}, {"backend": "aoti", "dtype": "bfloat16"}),
        ({"torch_dtype": None, "device_map": None, "load_in_8bit": False, "quantization_config": None}, {}),
        ({"input_shapes": {"batch_size": 1, "sequence_length": 64}}, {"batch_size": 1, "sequence_length": (64,)}),
        ({"backend": "export", "compiler_args": {"auto_cast": "matmul", "auto_cast_type": "bf16"}},
         {"backend": "export", "auto_cast": "matmul", "auto_cast_type": "bf16"}),
        ({"backend": "neuron", "compiler_args": ["--verbose=info"]},
         {"backend": "neuron", "compiler_args": ["--verbose=info"]}),
        ({"use_past": True, "use_cache": True, "use_auth_token": True}, {}),
        ({"use_auth_token": "hf_x"}, {"token": "hf_x"}),
        ({"checkpoint_name_or_path": "weights.bin"}, {"weights": "weights.bin"}),
    ],
    ids=str,
)  # fmt: skip
def test_what_others_say_is_what_we_say(theirs, ours):
    assert read(**theirs) == ours


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"num_cores": 2}, "num_cores=2 is not for backend='onnx'.* Write backend='neuron', .*tensor_parallel=2"),
        ({"auto_cast_type": "bf16"}, "without auto_cast is not for backend='onnx'.* backend='aoti', dtype='bfloat16'"),
        ({"backend": "aoti", "auto_cast_type": "bf16", "dtype": "float16"}, "say the same; pass dtype alone"),
        ({"auto_cast_type": "bf8", "backend": "aoti"}, "^$"),
        ({"num_cores": 2, "tensor_parallel": 4, "backend": "neuron"}, "names of the same; pass tensor_parallel alone"),
        ({"batch_size": 2, "input_shapes": {"batch_size": 1}}, "given batch_size=2 and in input_shapes 1"),
        ({"load_in_8bit": True}, r"load_in_8bit=True .*export\(MODEL, OUT, quantize='int8'\)"),
        ({"load_in_4bit": True}, r"export\(MODEL, OUT, quantize='int4'\)"),
        ({"quantization_config": BITS_8}, r"quantization_config=BitsAndBytesConfig\(…\) .* quantize='int8'\)"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantize='int4', quantize_method='awq'"),
        ({"quantization_config": transformers.GPTQConfig(bits=4)}, "quantize='int4', quantize_method='gptq'"),
        ({"quantization_config": object()}, "quantize='int8' or quantize='int4'"),
        ({"device_map": "auto"}, "device_map='auto' .* write device='cpu'"),
        ({"device_map": "cuda:0"}, "write device='cuda'"),
        ({"use_past": False}, "use_past=False cannot be had: .* Leave it out"),
        ({"input_shape": {}}, r"export\(\) does not know input_shape\."),
        ({"input_shapes": {"batchsize": 1}}, r"does not know batchsize\. Did you mean batch_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_had_says_what_to_write(keywords, words):
    if words == "^$":
        with pytest.raises(UsageError, match="auto_cast_type"):
            ExportOptions.of(keywords).check()
        return
    with pytest.raises(UsageError, match=words):
        ExportOptions.of(keywords)


def test_every_name_that_is_read_is_known_as_one_of_an_export():
    assert {"num_cores", "load_in_8bit", "input_shapes", "batch_size"} <= set(option_names())


@pytest.mark.parametrize("asked", [{"load_in_8bit": True}, {"device_map": "auto"}, {"quantization_config": BITS_8}])
def test_an_artifact_is_opened_without_them_too(decoder, asked):
    with pytest.raises(UsageError, match=next(iter(asked))):
        CompiledModel.from_pretrained(decoder, **asked)
    with pytest.raises(UsageError, match=r"pipeline\(TASK, MODEL, export=True, quantize|write device="):
        pipeline("text-generation", decoder, **asked)


def test_an_artifact_is_opened_with_the_old_name_of_the_token(decoder):
    assert CompiledModel.from_pretrained(decoder, use_auth_token=True, prepack=False).batch_size == 1
    with pytest.raises(UsageError, match="token and use_auth_token, which are names of the same"):
        CompiledModel.from_pretrained(decoder, token="a", use_auth_token="b")


def test_the_guide_of_optimum_neuron_word_by_word(checkpoint):
    """Its first example, on another backend: shapes and arguments in dictionaries that are spread."""
    path = checkpoint("bert", "AutoModelForSequenceClassification")
    compiler_args = {"auto_cast": "matmul", "auto_cast_type": "bf16"}
    input_shapes = {"batch_size": 1, "sequence_length": 16}
    asked = {"export": True, "backend": "export", "accept_loss": True, "validate": False, "prepack": False}
    spread = CompiledModel.from_pretrained(path, **asked, **compiler_args, **input_shapes)
    given = CompiledModel.from_pretrained(path, **asked, compiler_args=compiler_args, input_shapes=input_shapes)
    assert spread.artifact.path == given.artifact.path
    assert spread.variant.compiler.options["auto_cast"] == "matmul"
    assert spread.lengths == [16]


# ------------------------------------------------------------ weights apart from the configuration


@pytest.mark.parametrize("kind", ["folder", "file", "bin"])
def test_weights_may_lie_elsewhere(checkpoint, tmp_path, kind):
    """MindFormers' checkpoint_name_or_path: here the configuration and tokenizer, there the weights."""
    source = checkpoint("llama")
    there = tmp_path / "there"
    there.mkdir()
    other = transformers.AutoModelForCausalLM.from_config(oracle.eager(source).config)
    name = "mine.bin" if kind == "bin" else "mine.safetensors"
    if kind == "bin":
        torch.save(other.state_dict(), there / name)
    else:
        other.save_pretrained(there)
        (there / "model.safetensors").rename(there / name)
        (there / "config.json").unlink()
    here = shutil.copytree(source, tmp_path / "here", ignore=shutil.ignore_patterns("*.safetensors"))
    given = there if kind == "folder" else there / name
    made = export(str(here), tmp_path / "out", sequence_length=48, checkpoint_name_or_path=given)
    assert made.contract.variants[0].accuracy.status == "passed"
    ids = [[5, 6, 7]]
    with torch.no_grad():
        expected = other.eval()(torch.tensor(ids)).logits.numpy()
    found = CompiledModelForCausalLM.from_pretrained(tmp_path / "out", prepack=False)(ids).logits
    assert np.abs(found - expected).max() < 1e-4


def test_weights_that_are_none_are_refused(checkpoint, tmp_path):
    source = str(checkpoint("llama"))
    (tmp_path / "llama2_7b.ckpt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for given, words in (
        ("llama2_7b.ckpt", r"is no file of weights that can be read; those are: \.safetensors, \.bin\. .*MindSpore"),
        ("nothing", "There is no file or folder .*nothing with weights"),
        ("empty", "empty has no weights"),
    ):
        with pytest.raises(CheckpointError, match=words):
            export(source, tmp_path / "out", sequence_length=48, checkpoint_name_or_path=str(tmp_path / given))


# ------------------------------------------------------------ pipelines


def test_every_pipeline_has_its_name_with_underscores():
    for name in [*pipelines.PIPELINES, "sentiment-analysis", "image-feature-extraction"]:
        assert pipelines.pipeline_class(name.replace("-", "_")) is pipelines.pipeline_class(name)
    assert pipelines.pipeline_class("translation_en_to_de").task == "translation_en_to_de"
    with pytest.raises(UsageError, match=r"no pipeline for 'text_genration'\. Did you mean 'text-generation'"):
        pipelines.pipeline_class("text_genration")


def test_a_checkpoint_is_exported_and_run_in_one_call(checkpoint):
    path = checkpoint("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    asked = {"export": True, "sequence_length": 48, "validate": False, "prepack": False, "tokenizer": tokenizer}
    ours = pipeline("text_generation", str(path), batch_size=2, **asked, max_new_tokens=5)
    theirs = transformers.pipeline("text-generation", model=oracle.eager(path), tokenizer=tokenizer)
    assert_same(ours(tiny.TEXTS[0]), theirs(tiny.TEXTS[0], do_sample=False, max_new_tokens=5))
    assert ours.model.batch_size == 2
    again = pipeline("text_generation", str(path), batch_size=2, **asked)
    assert again.model.artifact.path == ours.model.artifact.path
    with pytest.raises(UsageError, match=r"does not know max_new_token\. Did you mean max_new_tokens"):
        pipeline("text_generation", str(path), batch_size=2, **asked, max_new_token=5)


def test_what_a_pipeline_exports_for_is_a_task():
    for name, (_, runs) in pipelines.PIPELINES.items():
        assert pipelines._export_task(name) in runs
        assert find_tasks(pipelines._export_task(name))


def test_sentiment_has_the_model_that_transformers_takes(checkpoint, monkeypatch):
    named = transformers.pipelines.SUPPORTED_TASKS["text-classification"]["default"]["model"]
    model, revision = pipelines._DEFAULT_MODELS["text-classification"]
    assert (model, revision[: len(named[1])]) == named
    asked = []

    def from_pretrained(model, **options):
        asked.append((model, options))
        raise UsageError("asked")

    monkeypatch.setattr(CompiledModel, "from_pretrained", from_pretrained)
    for task in ("sentiment-analysis", "text_classification"):
        with (
            pytest.warns(PrecastWarning, match=rf"{re.escape(model)} is used"),
            pytest.raises(UsageError, match="asked"),
        ):
            pipeline(task)
    assert asked[0] == asked[1]
    assert asked[0][0] == model
    assert asked[0][1].items() >= {"revision": revision, "export": True, "task": "text-classification"}.items()


def test_the_default_model_is_exported_once(checkpoint, monkeypatch):
    path, opened = str(checkpoint("bert", "AutoModelForSequenceClassification")), CompiledModel.from_pretrained
    monkeypatch.setattr(CompiledModel, "from_pretrained", lambda model, revision, **options: opened(path, **options))
    monkeypatch.setattr(pipelines, "_DEFAULT_SHAPES", {"batch_size": 1, "sequence_length": 16, "validate": False})
    with pytest.warns(PrecastWarning):
        first, second = pipeline("sentiment-analysis"), pipeline("sentiment-analysis")
    assert first.model.artifact.path == second.model.artifact.path
    eager = transformers.pipeline("text-classification", model=path)
    assert_same(first("今天天气"), eager("今天天气"))


@pytest.mark.parametrize("task", [None, "fill-mask", "text_generation"])
def test_other_tasks_ask_for_a_model(task):
    with pytest.raises(UsageError, match=r"Name the model: pipeline\(.*model='out'\)"):
        pipeline(task)


@pytest.mark.parametrize(
    ("task", "taken"),
    [
        *[(task, {"tokenizer"}) for task in ("text-generation", "fill-mask", "question-answering", "summarization")],
        ("image-classification", {"image_processor"}),
        ("zero-shot-image-classification", {"image_processor", "tokenizer"}),
        ("audio-classification", {"feature_extractor"}),
        ("automatic-speech-recognition", {"feature_extractor", "tokenizer"}),
    ],
)
def test_a_part_that_has_no_place_is_refused_by_name(task, taken, decoder, tmp_path):
    kind, model = pipelines.pipeline_class(task), CompiledModel.from_pretrained(decoder, prepack=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for part in ("tokenizer", "feature_extractor", "image_processor"):
        if part in taken:
            kind(model, **{part: tmp_path})
            continue
        with pytest.raises(UsageError, match=rf"has no use for {part}: what it can be given is .*Leave it out"):
            kind(model, **{part: tmp_path})
        # The artifact itself is always meant well.
        kind(model, **{part: decoder})


# ------------------------------------------------------------ a streamer for each row


class Streamer:
    def __init__(self):
        self.prompt, self.tokens, self.ends = None, [], 0

    def put(self, tokens):
        assert not self.ends
        if self.prompt is None:
            self.prompt = tokens.tolist()
        else:
            assert tokens.shape == (1,)
            self.tokens.append(int(tokens[0]))

    def end(self):
        self.ends += 1


@pytest.fixture(scope="module")
def rows_of_two(checkpoint, artifact):
    made = artifact(checkpoint("llama"), batch_size=2, dynamic_batch_size=True)
    return CompiledModelForCausalLM.from_pretrained(made, prepack=False)


@pytest.mark.parametrize("several", [1, 2])
def test_each_row_has_its_streamer(rows_of_two, several):
    """Of three prompts in slices of two, one of which ends early; each is told what generate() alone would tell."""
    rows = [[5, 9, 30, 7], [8], [9, 9]]
    ids, mask = oracle.padded(rows, "left")
    sampled = {"do_sample": True, "seed": 3, "num_return_sequences": 2} if several == 2 else {}
    asked = {"max_new_tokens": 12, "pad_token_id": 0, **sampled}
    found = rows_of_two.generate(ids, mask, eos_token_id=[], **asked)[:, ids.shape[1] :]
    end = int(found[0, 3])
    found = rows_of_two.generate(ids, mask, eos_token_id=end, **asked)[:, ids.shape[1] :]
    streamers = [Streamer() for _ in range(3 * several)]
    told = rows_of_two.generate(ids, mask, eos_token_id=end, streamer=streamers, **asked)[:, ids.shape[1] :]
    assert np.array_equal(told, found)
    for index, (streamer, row) in enumerate(zip(streamers, found.tolist(), strict=True)):
        own = row[: row.index(end) + 1] if end in row else row
        assert (streamer.prompt, streamer.tokens, streamer.ends) == ([rows[index // several]], own, 1)
    assert len({len(streamer.tokens) for streamer in streamers}) > 1


def test_streamers_are_as_many_as_rows(rows_of_two):
    for call in (
        lambda streamers: rows_of_two.generate([[5], [6], [7]], streamer=streamers),
        lambda streamers: pipeline("text-generation", rows_of_two)(["a", "b", "c"], streamer=streamers),
    ):
        with pytest.raises(UsageError, match="streamer lists 2 streamers, and there are 3 rows"):
            call([Streamer(), Streamer()])
    with pytest.raises(UsageError, match=r"A streamer follows one row; this batch has 2\. Give a list"):
        rows_of_two.generate([[5], [6]], streamer=Streamer())
    with pytest.raises(UsageError, match=r"no end\(\)|no put\(\)"):
        rows_of_two.generate([[5], [6]], streamer=[Streamer(), object()])
    with pytest.raises(UsageError, match="how many inputs will come is not known"):
        list(pipeline("text-generation", rows_of_two)((each for each in "ab"), streamer=[Streamer(), Streamer()]))


def test_a_pipeline_streams_each_input(rows_of_two):
    pipe = pipeline("text-generation", rows_of_two)
    streamers = [Streamer() for _ in range(3)]
    asked = {"max_new_tokens": 6, "return_full_text": False}
    found = pipe(tiny.TEXTS[:3], batch_size=3, streamer=streamers, **asked)
    assert found == pipe(tiny.TEXTS[:3], batch_size=3, **asked)
    for streamer, answer in zip(streamers, found, strict=True):
        assert pipe.tokenizer.decode(streamer.tokens) == answer[0]["generated_text"]
    alone = Streamer()
    pipe(tiny.TEXTS[0], streamer=[alone], **asked)
    assert alone.tokens == streamers[0].tokens
