"""`precast run`: a file does what flags do, says where it is wrong, and may be another toolchain's."""

from __future__ import annotations

import json
import re
import shlex

import jsonschema
import pytest
import yaml

from precast.cli.run_config import RunConfig, Setting
from precast.cli.run_foreign import CANN_RECIPES, MINDFORMERS, translate


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Where the tests' files are named without a path."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("llama")


def write(folder, **keys):
    (folder / "job.yaml").write_text(yaml.safe_dump(keys, sort_keys=False, allow_unicode=True), "utf-8")
    return folder / "job.yaml"


def test_a_file_and_flags_give_one_artifact_and_one_answer(run, source, tmp_path, monkeypatch):
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "home"))
    (tmp_path / "in.txt").write_text("Paris\n天气\n", "utf-8")
    job = write(
        tmp_path, model=str(source),
        export={"output": "out", "batch_size": 2, "sequence_length": [48], "no_validate": True},
        generate={"input_file": "in.txt", "max_new_tokens": 5, "output_file": "rows.jsonl", "option": {"seed": 4}},
    )  # fmt: skip
    job = job.rename(tmp_path / "first.yaml")
    code, out, _ = run("run", job, "--json", "--generate.temperature=0.8")
    told = json.loads(out)
    assert code == 0
    assert told["export"]["path"] == "out"
    assert told["generate"]["rows"] == 2
    code, out, _ = run("run", job, "--dry-run", "--generate.temperature", "0.8", "--generate.output_file=flags.jsonl")
    commands = [shlex.split(line)[1:] for line in out.splitlines()]
    assert [words[0] for words in commands] == ["export", "generate"]
    commands[0][-1] = commands[1][1] = "flags"
    for words in commands:
        assert run(*words)[0] == 0
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "flags" / name).read_bytes()
    assert (tmp_path / "rows.jsonl").read_bytes() == (tmp_path / "flags.jsonl").read_bytes()
    # What was exported is there: the second run exports nothing, and flags are `-` or `_` as they like.
    code, out, _ = run("run", job, "--generate.force", "--generate.max-new-tokens", "3", "--generate.temperature=0.8")
    assert code == 0
    assert out.startswith("out: accuracy skipped\nrows.jsonl: 2 rows")
    job = write(tmp_path, model="out", predict={"text": ["Paris"], "option": {"max_new_tokens": 2}})
    assert json.loads(run("run", job)[1])["input"] == "Paris"
    words = ("--export.output", "mine", "--generate.output_file", "other.jsonl")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    assert "exists and is not empty" in run("run", "first.yaml", *words)[2], "what is there is not replaced unasked"


BOMB = "a0: &a0 [x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 5)}]\n" for n in range(1, 7)
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("model: a\ngenerate:\n  seed: 3\n  temprature: 1", (),
         "job.yaml, line 4: generate.temprature: there is no such key. Did you mean temperature?"),
        ("model: a\ngenerate:\n  temperature: -1", (), "line 3: generate.temperature: -1.0 is not in the range"),
        ("model: a\nexport:\n  batch_size: x", (), "line 3: export.batch_size: 'x' is not a whole number"),
        ("model: a\ngenerate:\n  chat: maybe", (), "line 3: generate.chat: this is true or false, not 'maybe'"),
        ("model: a\ngenerate:\n  temperature: [1]", (), "line 3: generate.temperature: it takes one value, not a list"),
        ("model: a\ngenerate:\n  temperature: true", (), "line 3: generate.temperature: true is no value"),
        ("model: a\ngenerate:\n  seed:\n    x: 1", (), "line 4: generate.seed.x: it is nested too deeply"),
        ("model: a\ngenerate: 5", (), "line 2: generate: a section has keys of its own; this is 5"),
        ("model: a\ngenerate:\n  input_file: no.txt", (), "line 3: generate.input_file: there is no file no.txt"),
        ("model: a\ngenerate:\n  resume: true", (),
         "generate.resume and generate.force are of an output file; give generate.output_file"),
        ("modle: a\ngenerate:", (), "line 1: modle: there is no such key. Did you mean model?"),
        ("generate:", (), "model: name a checkpoint or an artifact"),
        ("model: a", (), "has no section to run. There are: export, generate"),
        ("model: a\nmodel: b", (), "line 2: model stands in line 1 already"),
        ("model: [a\nx: b", (), "line 2: expected"),
        ("- a", (), "must consist of keys with values"),
        ("model: !!python/name:os.system x", (), "line 1: could not determine a constructor"),
        ("<<: a", (), "line 1: a key is a word"),
        ("a: " + "[" * 100_000, (), "nested too deeply"),
        (BOMB, (), "its aliases make more than 10,000 values"),
        ("x: " + "a" * 1_000_001, (), "a configuration has at most 1,000,000"),
        ("model: a\ngenerate:", ("extra",), "'extra' is no option"),
        ("model: a\ngenerate:", ("--generate.seed",), "generate.seed: true is no value"),
        ("model: ./none\ngenerate:\n  prompt: x", (), "There is no directory ./none"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key_and_the_line(run, tmp_path, text, words, message):
    (tmp_path / "job.yaml").write_text(text, "utf-8")
    code, out, err = run("run", "job.yaml", *words)
    assert (code, out) in ((2, ""), (1, ""))
    assert message in err
    assert len(err.splitlines()) == 1


def test_the_schema_knows_what_the_command_knows(run, tmp_path):
    schema = json.loads(run("run", "--print-schema")[1])
    jsonschema.Draft202012Validator.check_schema(schema)
    good = {"model": "m", "export": {"batch_size": [1, 2], "validate": None}, "generate": {"seed": 1, "stop": "x"}}
    del good["export"]["validate"]
    jsonschema.validate(good, schema)
    for bad in (
        {**good, "x": 1},
        {"model": "m", "generate": {"seed": -1}},
        {"model": "m", "generate": {"temprature": 1}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
    assert run("run")[0] == 2
    assert "none.yaml cannot be read: No such file or directory." in run("run", "none.yaml")[2]


DECEMBER = """
model_name: "gpt_oss_20b"
model_path: "/models/gpt"
exe_mode: "ge_graph"
world_size: 1
model_config:
  enable_profiler: False
  enable_online_split_weight: True
data_config:
  dataset: "default"
  input_max_len: 32
  max_new_tokens: 100
  batch_size: 4
parallel_config:
  attn_tp_size: 1
  moe_tp_size: 1
"""
MARCH = """
model_config: {model_name: q, model_path: /models/q, dtype: bf16, with_ckpt: true, next_n: 0, exe_mode: npugraph_ex}
data_config: {dataset_path: prompts.json, input_truncated_len: 256, temperature: 0, top_p: 1, top_k: 0, seed: 1}
parallel_config: {world_size: 1}
scheduler_config: {batch_size: 1, max_new_tokens: 32, block_size: 128}
"""
MIND = """
seed: 0
output_dir: './output'
load_checkpoint: '/models/llama'
run_mode: 'predict'
use_parallel: False
trainer: {type: CausalLanguageModelingTrainer, model_name: 'llama2_7b'}
optimizer: {type: FP32StateAdamWeightDecay}
context: {mode: 0, device_target: "Ascend", device_id: 0}
model:
  model_config:
    type: LlamaConfig
    batch_size: 1
    seq_length: 4096
    compute_dtype: "float16"
    use_past: True
    top_k: 3
    do_sample: False
"""


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        (DECEMBER, (), {
            "model": "/models/gpt", "export": ["--batch-size=4", "--sequence-length=132"],
            "generate": ["--mode=compiled", "--max-input-tokens=32", "--max-new-tokens=100"],
        }),
        (DECEMBER.replace("world_size: 1", "world_size: 2"), (), {
            "model": "/models/gpt",
            "export": ["--batch-size=4", "--sequence-length=132", "--backend=aoti", "--tensor-parallel=2",
                       "--attn-tp=1", "--moe-tp=1", "--online-split"],
            "generate": ["--mode=compiled", "--max-input-tokens=32", "--max-new-tokens=100"],
        }),
        (MIND.replace("use_parallel: False", "use_parallel: True\nparallel_config: {model_parallel: 2}"),
         ("--predict_data=Hi",), {
            "model": "/models/llama",
            "export": ["--batch-size=1", "--sequence-length=4096", "--dtype=float16", "--backend=aoti",
                       "--tensor-parallel=2"],
            "generate": ["--output-file=./output/text_generation_result.txt", "--prompt=Hi", "--option=seed=0",
                         "--option=top_k=3", "--option=do_sample=false"],
        }),
        (MIND.replace("use_parallel: False", "parallel_config: {model_parallel: 1, pipeline_stage: 2}"),
         ("--predict_data=Hi",), {
            "model": "/models/llama",
            "export": ["--batch-size=1", "--sequence-length=4096", "--dtype=float16", "--pipeline-parallel=2"],
            "generate": ["--output-file=./output/text_generation_result.txt", "--prompt=Hi", "--option=seed=0",
                         "--option=top_k=3", "--option=do_sample=false"],
        }),
        (MARCH, ("--model_config.dtype=fp16", "--export.quantize=int8"), {
            "model": "/models/q",
            "export": ["--dtype=float16", "--batch-size=1", "--sequence-length=288", "--quantize=int8"],
            "generate": ["--mode=compiled", "--max-input-tokens=256", "--input-file=prompts.json", "--temperature=0",
                         "--top-p=1", "--top-k=0", "--seed=1", "--max-new-tokens=32"],
        }),
        (MIND, ("--predict_data", "I love\\nBeijing", "--predict_batch_size=2", "--model.model_config.top_k=1"), {
            "model": "/models/llama",
            "export": ["--batch-size=2", "--sequence-length=4096", "--dtype=float16"],
            "generate": ["--output-file=./output/text_generation_result.txt", "--prompt=I love\nBeijing",
                         "--option=seed=0", "--option=top_k=1", "--option=do_sample=false"],
        }),
    ],
)  # fmt: skip
def test_files_of_other_toolchains(run, tmp_path, text, words, expected):
    (tmp_path / "job.yaml").write_text(text)
    (tmp_path / "prompts.json").write_text("[]")
    code, out, err = run("run", "job.yaml", "--dry-run", *words)
    assert code == 0
    # A quoted argument may have line breaks.
    commands = {words[1]: words[2:] for words in (shlex.split(each) for each in re.split(r"\n(?=precast)", out))}
    assert commands["export"][0] == expected["model"]
    assert sorted(commands["export"][1:-2]) == sorted(expected["export"])
    assert sorted(commands["generate"][1:]) == sorted(expected["generate"])
    assert "has no effect" in err


def test_what_means_nothing_here_is_named(run, tmp_path):
    for text, message in (
        (MARCH.replace("world_size: 1", "attn_tp_size: 8"), "line 4: export.attn_tp: one rank has no 8 parts"),
        (DECEMBER + "  cp_size: 2\n", "parallel_config.cp_size: 2 asks for what precast does not do"),
        (DECEMBER + "  new_key: 1\n", "parallel_config.new_key has no effect: weights are divided between ranks at"),
        (DECEMBER.replace("ge_graph", "eager"), "export.batch_size has no effect in a mode that exports nothing"),
        (DECEMBER + "odd: 1\n", "odd: this key has no meaning here. Known are: model_path"),
        (MIND.replace("'predict'", "'train'"), "run_mode: 'train' asks for what precast does not do"),
    ):  # fmt: skip
        (tmp_path / "job.yaml").write_text(text)
        assert message in run("run", "job.yaml", "--dry-run")[2]


def test_every_foreign_key_leads_to_an_option_or_a_reason():
    from precast.cli.run_config import section_params

    options = {name: section_params(name) for name in ("export", "generate")}
    for table in (CANN_RECIPES, MINDFORMERS):
        for name, rule in table.items():
            target = rule[0] if isinstance(rule, tuple) else None
            assert target is None or target == ("model",) or target[1] in options[target[0]], name
            assert target or rule.reason


def test_a_file_of_texts_is_one(tmp_path):
    (tmp_path / "in.txt").write_text("a\\nb\n")
    settings = {("run_mode",): Setting("predict"), ("predict_data",): Setting(str(tmp_path / "in.txt"))}
    found = translate(RunConfig("f", settings))
    assert found.get("generate", "input_file") == str(tmp_path / "in.txt")
    assert found.get("generate", "line_breaks") is True
