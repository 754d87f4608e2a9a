"""Configurations of other toolchains as ours: MindFormers' run_mindformer and cann-recipes-infer's, of both its forms.

Each key is mapped, or refused or named with the reason why it means nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .run_config import SECTIONS, RunConfig, Setting

__all__ = ["CANN_RECIPES", "MINDFORMERS", "translate"]

Path = tuple[str, ...]


class Idle:
    """A key without effect here: the reason, and the values that ask for nothing; any other is refused."""

    def __init__(self, reason: str, *harmless: Any, is_any: bool = False) -> None:
        self.reason, self.harmless, self.is_any = reason, harmless, is_any


def _dtype(value: Any) -> Any:
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(value, value)


def _mode(value: Any) -> Any:
    """As docs/runner.md has it for ModelRunner: whole graphs are what is compiled."""
    return "compiled" if value in ("ge_graph", "acl_graph", "npugraph_ex") else value


_ON_EXPORT = "weights are divided between ranks at the export"
_ONE_MACHINE = "ranks are processes of one machine"
_TRAINING = "it is of training"
_ALWAYS = "it always is"

_OF_RANKS = ("tensor_parallel", "online_split", "attn_tp", "moe_tp", "moe_ep", "embed_tp", "lmhead_tp",
             "o_proj_tp", "mlp_tp")  # fmt: skip
"""Options of an export that mean something where there are several ranks."""

To = tuple[Path, Callable[[Any], Any]]
Rule = To | Idle


def _to(*path: str, value: Callable[[Any], Any] = lambda value: value) -> To:
    return path, value


CANN_RECIPES: dict[str, Rule] = {
    "model_path": _to("model"),
    "model_config.model_path": _to("model"),
    "model_name": Idle("the checkpoint's configuration says what it is", is_any=True),
    "model_config.model_name": Idle("the checkpoint's configuration says what it is", is_any=True),
    "exe_mode": _to("generate", "mode", value=_mode),
    "model_config.exe_mode": _to("generate", "mode", value=_mode),
    "model_config.dtype": _to("export", "dtype", value=_dtype),
    "model_config.with_ckpt": Idle("weights are always the checkpoint's", True, 1),
    "model_config.next_n": Idle("the model guesses no tokens of its own", 0),
    "model_config.enable_cache_compile": Idle("exports are kept anyway", is_any=True),
    "model_config.enable_profiler": Idle("precast bench measures", False),
    "model_config.enable_online_split_weight": _to("export", "online_split"),
    "model_config.output_path": _to("generate", "output_file", value=lambda folder: f"{folder}/output.jsonl"),
    "data_config.dataset": Idle("the prompts are those of dataset_path", is_any=True),
    "data_config.dataset_path": _to("generate", "input_file"),
    "data_config.input_max_len": _to("generate", "max_input_tokens"),
    "data_config.input_truncated_len": _to("generate", "max_input_tokens"),
    "data_config.max_new_tokens": _to("generate", "max_new_tokens"),
    "data_config.batch_size": _to("export", "batch_size"),
    "data_config.temperature": _to("generate", "temperature"),
    "data_config.top_p": _to("generate", "top_p"),
    "data_config.top_k": _to("generate", "top_k"),
    "data_config.seed": _to("generate", "seed"),
    "scheduler_config.batch_size": _to("export", "batch_size"),
    "scheduler_config.max_new_tokens": _to("generate", "max_new_tokens"),
    "scheduler_config.block_size": Idle("a row's cache is one block", is_any=True),
    "world_size": _to("export", "tensor_parallel"),
    "parallel_config.world_size": _to("export", "tensor_parallel"),
    **{
        f"parallel_config.{kind}_tp_size": _to("export", f"{kind}_tp")
        for kind in ("attn", "moe", "embed", "lmhead", "o_proj")
    },
    "parallel_config.dense_tp_size": _to("export", "mlp_tp"),
    "parallel_config.moe_ep_size": _to("export", "moe_ep"),
    "parallel_config.shared_tp_size": Idle("shared experts are dense blocks", 1),
    "parallel_config.cp_size": Idle("a sequence is not divided between ranks", 1),
}  # fmt: skip

MINDFORMERS: dict[str, Rule] = {
    "load_checkpoint": _to("model"),
    "model.model_config.checkpoint_name_or_path": _to("model"),
    "run_mode": Idle("a configuration predicts", "predict"),
    "predict_data": _to("generate", "prompt"),
    "predict_batch_size": _to("export", "batch_size"),
    "model.model_config.batch_size": _to("export", "batch_size"),
    "model.model_config.seq_length": _to("export", "sequence_length"),
    "model.model_config.max_decode_length": _to("generate", "option", "max_length"),
    "model.model_config.compute_dtype": _to("export", "dtype", value=_dtype),
    "model.model_config.do_sample": _to("generate", "option", "do_sample"),
    "model.model_config.top_k": _to("generate", "option", "top_k"),
    "model.model_config.top_p": _to("generate", "option", "top_p"),
    "model.model_config.temperature": _to("generate", "option", "temperature"),
    "model.model_config.repetition_penalty": _to("generate", "repetition_penalty"),
    "model.model_config.use_past": Idle(f"the cache is used: {_ALWAYS}", True),
    "seed": _to("generate", "option", "seed"),
    "use_parallel": Idle("parallel_config.model_parallel says it", is_any=True),
    "parallel_config.model_parallel": _to("export", "tensor_parallel"),
    "parallel_config.data_parallel": Idle(_ONE_MACHINE, 1),
    "parallel_config.pipeline_stage": _to("export", "pipeline_parallel"),
    "auto_trans_ckpt": Idle(_ON_EXPORT, is_any=True),
    "only_save_strategy": Idle(_ON_EXPORT, False),
    "src_strategy_path_or_dir": Idle(_ON_EXPORT, "", None),
    "context.mode": Idle("what is exported is a graph", 0),
    "context.device_target": Idle("the backend says the device", is_any=True),
    "context.device_id": Idle("the backend says the device", 0),
    "context.max_device_memory": Idle("memory is as the sizes say", is_any=True),
    "context.save_graphs": Idle("the artifact is the graph", False),
    "output_dir": _to("generate", "output_file", value=lambda folder: f"{folder}/text_generation_result.txt"),
    "profile": Idle("precast bench measures", False),
}  # fmt: skip
_IDLE_BELOW = {
    "trainer": _TRAINING, "runner_config": _TRAINING, "optimizer": _TRAINING, "lr_schedule": _TRAINING,
    "callbacks": _TRAINING, "train_dataset": _TRAINING, "train_dataset_task": _TRAINING, "eval_dataset": _TRAINING,
    "runner_wrapper": _TRAINING, "metric": _TRAINING, "eval_callbacks": _TRAINING, "recompute_config": _TRAINING,
    "parallel": _ON_EXPORT, "parallel_config": _ON_EXPORT, "moe_config": "the checkpoint's configuration says it",
    "processor": "the tokenizer is the checkpoint's", "model": "the checkpoint's configuration says it",
    "data_config": "it is of a dataset that precast does not know", "context": "it is of Ascend's graphs",
    "model_config": "it is of that framework's own model code",
    "profile_start_step": "precast bench measures", "profile_stop_step": "precast bench measures",
}  # fmt: skip


def translate(config: RunConfig) -> RunConfig:
    """A configuration of another toolchain as ours; ours as it is. Raises click.UsageError for a key that asks for what
    precast does not do."""
    tops = {path[0] for path in config.settings}
    if tops & {"model_path", "data_config", "model_config", "scheduler_config"}:
        return _with_ranks(_with_capacity(_translate(config, CANN_RECIPES)))
    if tops & {"load_checkpoint", "run_mode", "trainer"} or any(
        path[:2] == ("model", "model_config") for path in config.settings
    ):
        return _with_ranks(_with_lines(_translate(config, MINDFORMERS)))
    return config


def _translate(config: RunConfig, rules: Mapping[str, Rule]) -> RunConfig:
    """What a table maps, and all of ours that overrides it."""
    found = RunConfig(config.name, {}, list(config.notes))
    own = {path: setting for path, setting in config.settings.items() if path[0] in SECTIONS or path == ("model",)}
    for path, setting in config.settings.items():
        if path in own or setting.value in ({}, None):
            continue
        name = ".".join(path)
        rule = rules.get(name) or Idle(_IDLE_BELOW.get(path[0], ""), is_any=True)
        if not isinstance(rule, Idle):
            target, convert = rule
            found.settings[target] = Setting(convert(setting.value), setting.line)
        elif not rule.reason:
            raise config.error(path, f"this key has no meaning here. Known are: {', '.join(rules)}.")
        elif rule.is_any or setting.value in rule.harmless:
            found.notes.append(f"{config.name}: {name} has no effect: {rule.reason}.")
        else:
            raise config.error(path, f"{setting.value!r} asks for what precast does not do: {rule.reason}.")
    found.settings |= own
    found.settings.setdefault(("generate",), Setting({}))
    if found.get("generate", "mode") in (None, "compiled"):
        found.settings.setdefault(("export",), Setting({}))
        return found
    # Nothing is exported, so nothing can be asked of it.
    for path in [path for path in found.settings if path[0] == "export"]:
        if len(path) > 1:
            found.notes.append(f"{config.name}: {'.'.join(path)} has no effect in a mode that exports nothing.")
        del found.settings[path]
    return found


def _with_capacity(config: RunConfig) -> RunConfig:
    """cann-recipes-infer makes caches as long as prompt and answer together."""
    prompt, new = config.get("generate", "max_input_tokens"), config.get("generate", "max_new_tokens")
    if config.section("export") is not None and isinstance(prompt, int) and isinstance(new, int):
        config.settings.setdefault(("export", "sequence_length"), Setting(prompt + new))
    return config


def _with_ranks(config: RunConfig) -> RunConfig:
    """Several ranks are native code; with one, no module has fewer parts than there are ranks."""
    if config.get("export", "tensor_parallel") not in (None, 1):
        config.settings.setdefault(("export", "backend"), Setting("aoti"))
        return config
    for path in [path for path in config.settings if path[0] == "export" and path[-1] in _OF_RANKS]:
        if path[-1].endswith(("_tp", "_ep")) and config.settings[path].value != 1:
            raise config.error(path, f"one rank has no {config.settings[path].value} parts; give world_size, too.")
        del config.settings[path]
    return config


def _with_lines(config: RunConfig) -> RunConfig:
    """MindFormers' predict_data is a text, several, or a file of texts, in which \\n is a line break."""
    from pathlib import Path as FilePath

    setting = config.settings.get(("generate", "prompt"))
    if setting is None:
        return config
    if isinstance(setting.value, str) and FilePath(setting.value).is_file():
        del config.settings["generate", "prompt"]
        config.settings["generate", "input_file"] = setting
        config.settings["generate", "line_breaks"] = Setting(True)
    else:
        texts = setting.value if isinstance(setting.value, list) else [setting.value]
        value = [str(text).replace("\\n", "\n") for text in texts]
        config.settings["generate", "prompt"] = Setting(value, setting.line)
    return config
