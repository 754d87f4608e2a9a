"""ModelRunner: hooks, their order and their defaults; answers are those of eager transformers in every mode."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, fields, replace
from typing import Any, ClassVar

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precast.runtime.errors import InputError, UsageError
from precast.runtime.runner import InferenceConfig, ModelRunner, OfflineInference, SamplingParams, open_model
from precast.runtime.runner.config import _PARTS
from precast.runtime.runner.execution import EXECUTION_MODES
from precast.runtime.runner.modes import MODES
from precast.runtime.runner.settings import RunnerSettings
from precast.runtime.runner.timing import Timing

PROMPTS = ["Water boils at", "The capital of France is Paris. 今天", "x"]
STEPS = ["model_input_prepare", "model_inference", "model_output_process"]


@pytest.fixture
def settings(checkpoint, artifact):
    """`settings("eager")`: of a Llama; two prompts together, cut to 12 tokens, 6 new ones."""

    def make(exe_mode: str, **changes: Any) -> dict[str, Any]:
        source = checkpoint("llama")
        path = artifact(source, batch_size=3) if exe_mode == "ge_graph" else source
        sizes = {"input_max_len": 12, "max_new_tokens": 6, "batch_size": 2}
        return {"model_name": "tiny", "model_path": str(path), "exe_mode": exe_mode,
                "model_config": {"dtype": "float32"}, "data_config": sizes, **changes}  # fmt: skip

    return make


class Spy(ModelRunner):
    """Writes down which hooks are called, in order."""

    def __init__(self, settings: Any) -> None:
        self.called: list[str] = []
        super().__init__(settings)

    def __getattribute__(self, name: str) -> Any:
        if name in (*ModelRunner.HOOKS, "_process_weight_after_loading"):
            object.__getattribute__(self, "called").append(name)
        return object.__getattribute__(self, name)


def _opened(settings: Any, kind: type[ModelRunner] = ModelRunner) -> Any:
    runner = kind(settings)
    runner.init_model()
    return runner


def _expected(checkpoint: Any, count: int = 6) -> list[list[int]]:
    source = checkpoint("llama")
    tokenizer = open_model(source, "eager").tokenizer
    return [oracle.greedy(source, tokenizer.encode(prompt)[:12], max_new_tokens=count) for prompt in PROMPTS]


# ------------------------------------------------------------ answers


@pytest.mark.parametrize("exe_mode", ["eager", "ge_graph", pytest.param("torch-compile", marks=pytest.mark.slow)])
def test_answers_are_those_of_eager_transformers(settings, checkpoint, exe_mode):
    runner = _opened(settings(exe_mode))
    found = runner.model_generate(PROMPTS)
    assert found.tokens == _expected(checkpoint)
    assert found.texts == [runner.tokenizer.decode(row) for row in found.tokens]
    assert len(found.timing.prefill) == 2
    assert runner.model_generate([{"text": PROMPTS[0]}]).tokens == found.tokens[:1]


@pytest.mark.parametrize("exe_mode", ["eager", "ge_graph"])
def test_rows_end_where_the_model_ends_them(settings, checkpoint, exe_mode):
    """A token that comes is made the end of answers."""
    runner = _opened(settings(exe_mode))
    plain = runner.model_generate(PROMPTS[:2]).tokens
    runner.model.generation_config = replace(runner.model.generation_config, eos_token_id=[plain[0][2]])
    found = runner.model_generate(PROMPTS[:2])
    cut = [row[: row.index(plain[0][2]) + 1] if plain[0][2] in row else row for row in plain]
    assert found.tokens == cut
    assert len(cut[0]) == 3
    assert len(found.timing.decode) == max(map(len, cut)) - 1


def test_sampling_gives_the_same_in_every_mode(settings):
    changes = {"temperature": 0.9, "top_p": 0.9, "top_k": 30, "seed": 5}
    found = [_opened(settings(mode, **changes)).model_generate(PROMPTS).tokens for mode in ("eager", "ge_graph")]
    assert found[0] == found[1]
    assert found[0] != _opened(settings("eager", **{**changes, "seed": 6})).model_generate(PROMPTS).tokens


# ------------------------------------------------------------ hooks


@pytest.mark.parametrize("exe_mode", ["eager", "ge_graph"])
def test_hooks_are_called_in_order(settings, exe_mode):
    runner = Spy(settings(exe_mode))
    assert runner.called == ["init_device"]
    runner.called.clear()
    runner.init_model()
    is_offline = exe_mode == "ge_graph"
    assert runner.called == [
        "init_model", "check_model_cfg", "update_model_cfg", "_process_weight_after_loading", "to_device",
        *(["scale_dtype_adapter", "cast_format"] if is_offline else []), "compile_model",
        *(["graph_compile"] if is_offline else []), "init_tokenizer",
    ]  # fmt: skip
    runner.called.clear()
    runner.model_generate(PROMPTS[:2])
    assert runner.called == [
        "model_generate", "define_profiler", "tokenize_prompts", *(["get_jump_flag", *STEPS] * 6), "get_jump_flag",
    ]  # fmt: skip
    runner.called.clear()
    runner.model_generate(PROMPTS[:1], warm_up=True)
    marked = [STEPS[0], STEPS[1], "mark_inputs", STEPS[2]]
    assert runner.called == [
        "model_generate", "define_profiler", "tokenize_prompts", *(["get_jump_flag", *marked] * 2), "get_jump_flag",
    ]  # fmt: skip


def test_the_inputs_of_every_decode_step_have_the_same_shapes(settings):
    shapes: list[dict[str, Any]] = []

    class Shapes(ModelRunner):
        def model_input_prepare(self, input_dict):
            found = super().model_input_prepare(input_dict)
            shapes.append({name: value.shape for name, value in found.items()})
            if not input_dict["is_prefill"]:
                assert found["position_ids"][:, 0].tolist() == found["kv_len"].tolist()
            return found

    _opened(settings("eager"), Shapes).model_generate(PROMPTS[:2])
    assert shapes[0]["input_ids"] == (2, 12)
    assert shapes[1]["input_ids"] == (2, 1)
    assert all(each == shapes[1] for each in shapes[1:])


def test_prompts_are_padded_and_cut_on_the_right(settings, caplog):
    runner = _opened(settings("eager"))
    found = runner.tokenize_prompts(PROMPTS)
    for row, mask, prompt in zip(found["input_ids"], found["attention_mask"], PROMPTS, strict=True):
        ids = runner.tokenizer.encode(prompt)[:12]
        assert row.tolist() == [*ids, *[0] * (12 - len(ids))]
        assert mask.tolist() == [1] * len(ids) + [0] * (12 - len(ids))
    assert "was cut to input_max_len=12" in caplog.text
    runner.padding_side = runner.truncation_side = "left"
    found = runner.tokenize_prompts(PROMPTS)
    assert found["input_ids"][1].tolist() == runner.tokenizer.encode(PROMPTS[1])[-12:]
    assert found["attention_mask"][2, -1] == 1


def test_a_model_of_ones_own_runs(settings):
    """All that it needs is said by init_model."""

    class Session:
        def prefill(self, rows):
            self.last = [len(row) for row in rows]
            return np.eye(320)[self.last]

        def decode(self, tokens):
            return np.eye(320)[[0 if token is None else token + 1 for token in tokens]]

    class Counter:
        config: ClassVar[dict[str, Any]] = {"max_position_embeddings": 64}
        batch_size, capacity = 2, 64

        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def session(self):
            return Session()

        def to(self, device):
            assert device == "cpu"
            return self

    runner = ModelRunner(settings("eager"))
    runner.init_model(Counter(open_model(settings("eager")["model_path"], "eager").tokenizer), {"kind": "counter"})
    assert runner.model_cfg == {"max_position_embeddings": 64, "kind": "counter"}
    length = len(runner.tokenizer.encode(PROMPTS[0]))
    assert runner.model_generate(PROMPTS[:1]).tokens == [list(range(length, length + 6))]


def test_a_saved_model_opens_again(settings, checkpoint, tmp_path):
    for exe_mode in ("eager", "ge_graph"):
        _opened(settings(exe_mode)).save_model(tmp_path / exe_mode)
        again = _opened(settings(exe_mode, model_path=str(tmp_path / exe_mode)))
        assert again.model_generate(PROMPTS).tokens == _expected(checkpoint)


@pytest.mark.parametrize(
    ("hook", "value"),
    [
        ("get_jump_flag", lambda self, cnt: True),
        ("model_inference", lambda self, model_inputs: None),
        ("model_input_prepare", lambda self, input_dict, more: None),
        ("mark_inputs", 3),
    ],
)
def test_a_hook_is_overridden_by_what_can_be_called_as_it_is(hook, value):
    with pytest.raises(UsageError, match=rf"Wrong\.{hook}.*overrides a hook"):
        type("Wrong", (ModelRunner,), {hook: value})
    type("Right", (ModelRunner,), {hook: lambda self, *args, **keywords: None})


def test_hooks_that_leave_out_what_others_need_are_said(settings):
    class NoSeconds(ModelRunner):
        def model_inference(self, model_inputs, is_prefill=False, warm_up=False):
            return super().model_inference(model_inputs, is_prefill, warm_up)[0]

    class NoTokenizer(ModelRunner):
        def init_tokenizer(self):
            pass

    with pytest.raises(UsageError, match=r"must return \(logits, seconds\), not ndarray"):
        _opened(settings("eager"), NoSeconds).model_generate(PROMPTS)
    with pytest.raises(UsageError, match="left `tokenizer` unset"):
        _opened(settings("eager"), NoTokenizer).model_generate(PROMPTS)
    with pytest.raises(UsageError, match=r"call init_model\(\) first"):
        ModelRunner(settings("eager")).model_generate(PROMPTS)


@pytest.mark.parametrize("prompts", [[], [3], [{"txt": "x"}], [""]])
def test_what_is_no_prompt_is_refused(settings, prompts):
    with pytest.raises(InputError, match=r"prompt|Prompt"):
        _opened(settings("eager")).model_generate(prompts)


# ------------------------------------------------------------ settings


def test_defaults_are_those_that_settings_files_leave_out():
    found = RunnerSettings.of({})
    assert (found.dtype, found.input_max_len, found.max_new_tokens, found.batch_size) == ("bfloat16", 1024, 32, 16)
    assert (found.exe_mode, found.seed, found.capacity) == ("ge_graph", 42, 1056)
    config = InferenceConfig()
    assert asdict(config) == {
        "model_config": {
            "model_name": "model", "model_path": "", "output_path": "", "dtype": "bfloat16", "with_ckpt": True,
            "next_n": 0, "exe_mode": "eager", "enable_cache_compile": False, "enable_profiler": False,
            "custom_params": {},
        },
        "data_config": {
            "dataset": "default", "dataset_path": "", "input_truncated_len": 256, "temperature": 0.0, "top_p": 1.0,
            "top_k": 0, "seed": 42,
        },
        "parallel_config": {
            f"{name}_size": 1
            for name in ("world", "attn_tp", "moe_tp", "embed_tp", "lmhead_tp", "dense_tp", "o_proj_tp", "shared_tp",
                         "cp")
        },
        "scheduler_config": {"batch_size": 1, "max_new_tokens": 32, "block_size": 128},
    }  # fmt: skip
    assert InferenceConfig.from_dict(asdict(config)) == config


def test_every_setting_of_a_config_arrives_or_is_said():
    config = InferenceConfig.from_dict({
        "model_config": {"model_name": "a", "model_path": "b", "output_path": "c", "dtype": "float16",
                         "exe_mode": "ge_graph", "enable_profiler": True, "custom_params": {"x": 1}},
        "data_config": {"input_truncated_len": 9, "temperature": 0.5, "top_p": 0.4, "top_k": 3, "seed": 2},
        "scheduler_config": {"batch_size": 4, "max_new_tokens": 7},
    })  # fmt: skip
    assert config.runner_settings() == RunnerSettings(
        model_name="a", model_path="b", output_path="c", dtype="float16", exe_mode="ge_graph", enable_profiler=True,
        custom_params={"x": 1}, input_max_len=9, temperature=0.5, top_p=0.4, top_k=3, seed=2, batch_size=4,
        max_new_tokens=7,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("model_config", "enable_cache_compile", True, "has no effect here: artifacts are kept"),
        ("data_config", "dataset", "LongBench", r"has no effect here: prompts are those that generate\(\) is given"),
        ("data_config", "dataset_path", "x", "has no effect here: prompts"),
        ("scheduler_config", "block_size", 64, "has no effect here: each row's cache is one piece"),
        ("model_config", "exe_mode", "npugraph_ex", "nothing is captured"),
    ],
)
def test_what_means_nothing_here_is_said(part, name, value, said, caplog):
    caplog.set_level(logging.INFO, "precast.runner")
    InferenceConfig.from_dict({part: {name: value}}).runner_settings()
    assert re.search(said, caplog.text)
    caplog.clear()
    InferenceConfig().runner_settings()
    assert caplog.text == ""


BAD = [
    ({"exe_mode": "ge_grph"}, "Did you mean 'ge_graph'.* Choose one of: eager, ge_graph, npugraph_ex, acl_graph"),
    ({"model_nam": "x"}, "does not know model_nam. Did you mean model_name"),
    ({"data_config": {"input_len": 3}}, "data_config of .* does not know input_len. Did you mean input_max_len"),
    ({"data_config": {"batch_size": 0}}, "batch_size must be at least 1, not 0"),
    ({"data_config": {"batch_size": "x"}}, "batch_size='x' is of the wrong type"),
    ({"data_config": {"max_position_embeddings": 8}}, "max_position_embeddings=8 is less than input_max_len=1024"),
    ({"model_config": {"dtype": "int8"}}, "dtype='int8' is not known. Choose one of: bfloat16, float16, float32"),
    ({"world_size": 4, "parallel_config": {"attn_tp_size": 3}}, "world_size=4 is not a multiple of attn_tp_size=3"),
    ({"world_size": 4, "exe_mode": "eager"}, "world_size=4 asks for several processes, which run what is compiled"),
    ({"world_size": 4, "parallel_config": {"cp_size": 4}}, "cp_size=4: weights are divided .* Pass cp_size=1"),
    ({"top_p": 0.0}, "top_p above 0"),
    (["x"], "settings are a mapping"),
]


@pytest.mark.parametrize(("given_settings", "said"), BAD, ids=[said[:30] for _, said in BAD])
def test_bad_settings_are_named_with_what_is_valid(given_settings, said):
    with pytest.raises(UsageError, match=said):
        ModelRunner(given_settings)


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("model_config", {"with_ckpt": False}, "with_ckpt=False asks for random weights"),
        ("model_config", {"next_n": 2}, "next_n=2 asks for guesses"),
        ("model_config", {"exe_mode": "fast"}, "exe_mode='fast' is not known"),
        ("parallel_config", {"cp_size": 2}, "world_size=1 is not a multiple of cp_size=2"),
        ("parallel_config", {"tp": 2}, "parallel_config of InferenceConfig does not know tp"),
        ("scheduler_config", {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_a_config_that_cannot_be_done_is_refused(part, values, said):
    with pytest.raises(UsageError, match=said):
        InferenceConfig.from_dict({part: values}).runner_settings()


def test_loading_asks_for_what_the_path_is(settings, checkpoint):
    def load(exe_mode, **changes):
        ModelRunner(settings(exe_mode, **changes)).init_model()

    with pytest.raises(UsageError, match=r"enable_online_split_weight=False, and .* is a checkpoint.*precast export"):
        load("eager", model_config={"enable_online_split_weight": False})
    with pytest.raises(UsageError, match=r"enable_online_split_weight=True, and .* is no checkpoint"):
        load("ge_graph", model_config={"enable_online_split_weight": True})
    with pytest.raises(UsageError, match="model_path is not set"):
        load("eager", model_path="")
    with pytest.raises(UsageError, match=r"ask for batch_size 8, and .* holds 3. .*--batch-size 8"):
        load("ge_graph", data_config={"batch_size": 8, "input_max_len": 4})
    with pytest.raises(UsageError, match="need 92 positions, and tiny was made for 64"):
        load("eager", data_config={"input_max_len": 60})


def test_the_documents_have_every_hook_and_every_mode():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs/runner.md").read_text("utf-8")
    assert [name for name in (*ModelRunner.HOOKS, *EXECUTION_MODES, *MODES) if f"`{name}`" not in text] == []
    named = {each.name for kind in _PARTS.values() for each in fields(kind)}
    assert [name for name in named if name not in text] == []


# ------------------------------------------------------------ offline


def test_offline_inference_answers_and_samples(settings, checkpoint):
    given = settings("eager")
    config = InferenceConfig.from_dict({
        "model_config": {"model_path": given["model_path"], "dtype": "float32"},
        "data_config": {"input_truncated_len": 12}, "scheduler_config": {"max_new_tokens": 6, "batch_size": 2},
    })  # fmt: skip
    offline = OfflineInference(config)
    offline.warm_up()
    expected = _expected(checkpoint)
    assert offline.generate(PROMPTS).tokens == expected
    sampled = offline.generate(PROMPTS, SamplingParams(temperature=1.0, seed=3))
    assert sampled.tokens == offline.generate(PROMPTS, SamplingParams(temperature=1.0, seed=3)).tokens != expected
    short = offline.generate(PROMPTS, SamplingParams(max_new_tokens=2))
    assert short.tokens == [row[:2] for row in expected]
    assert offline.generate(PROMPTS).tokens == expected
    with pytest.raises(UsageError, match="max_new_tokens=7 is more than the 6"):
        offline.generate(PROMPTS, SamplingParams(max_new_tokens=7))
    with pytest.raises(UsageError, match="top_p above 0"):
        offline.generate(PROMPTS, SamplingParams(top_p=0.0))


# ------------------------------------------------------------ times, lines, traces


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=40))
def test_the_average_leaves_out_the_prefill_and_outliers(seconds):
    timing = Timing()
    timing.add(1e6, is_prefill=True)
    for each in seconds:
        timing.add(each, is_prefill=False)
    low, high = np.quantile(seconds, [0.25, 0.75])
    kept = [each for each in seconds if each <= high + 1.5 * (high - low) + 1e-9]
    assert timing.average_step == pytest.approx(np.mean(kept), rel=1e-6)


def test_there_is_no_average_without_a_step():
    assert Timing().average_step is None
    assert Timing(decode=[1.0] * 9 + [100.0]).average_step == 1.0


def test_lines_are_logged_and_kept(settings, tmp_path):
    found = _opened(settings("ge_graph", output_path=str(tmp_path / "res"))).model_generate(PROMPTS[:1])
    text = (tmp_path / "res/log_0.log").read_text("utf-8")
    assert len(re.findall(r"tiny inference time cost of prefill is \d+\.\d\d ms", text)) == 1
    assert len(re.findall(r"tiny inference time cost of decode is \d+\.\d\d ms", text)) == 5
    assert re.search(r"tiny average inference time cost is \d+\.\d\d ms", text)
    assert f"Inference decode result for batch 0: \n{found.texts[0]}" in text


class Profiled(ModelRunner):
    """Records steps 3 and 4."""

    def define_profiler(self, enable_profiler=False, profile_save_path="prof", active=2, repeat=1, skip_first=2):
        return super().define_profiler(enable_profiler, profile_save_path, active, repeat, skip_first)


@pytest.mark.parametrize("exe_mode", ["eager", "ge_graph"])
def test_traces_are_written_where_they_are_asked_for(settings, tmp_path, exe_mode, caplog):
    asked = {"dtype": "float32", "enable_profiler": True}
    changes = {"output_path": str(tmp_path), "model_config": asked}
    runner = _opened(settings(exe_mode, **changes), Profiled)
    runner.model_generate(PROMPTS[:1], warm_up=True)
    assert not (tmp_path / "prof").exists()
    runner.model_generate(PROMPTS[:1])
    (file,) = (tmp_path / "prof").iterdir()
    events = json.loads(file.read_text())["traceEvents"]
    steps = [event for event in events if event.get("ph") == "X" and re.match("step|ProfilerStep", event["name"])]
    # PyTorch writes each step twice where it knows of a device.
    assert {event["name"] for event in steps} == (
        {"step"} if exe_mode == "ge_graph" else {"ProfilerStep#2", "ProfilerStep#3"}
    )
    if exe_mode == "eager":
        assert any(event["name"] == "aten::mm" or "linear" in event["name"] for event in events)
    assert "There is no trace" not in caplog.text
    off = _opened(settings(exe_mode, output_path=str(tmp_path / "off")), Profiled)
    off.model_generate(PROMPTS[:1])
    assert not (tmp_path / "off/prof").exists()


def test_it_is_said_where_too_few_steps_leave_no_trace(settings, tmp_path, caplog):
    changes = {"output_path": str(tmp_path), "model_config": {"dtype": "float32", "enable_profiler": True}}
    _opened(settings("ge_graph", **changes)).model_generate(PROMPTS[:1])
    assert "There is no trace: of 6 steps the first 10 are left out" in caplog.text
    assert not list((tmp_path / "prof").glob("*.json")) if (tmp_path / "prof").exists() else True
