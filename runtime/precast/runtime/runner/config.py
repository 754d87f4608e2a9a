"""`InferenceConfig`: the same settings as dataclasses, by the names that newer runners have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..arguments import refuse_unknown
from ..errors import UsageError
from .execution import find_execution_mode, note_ignored
from .settings import RunnerSettings

__all__ = ["DataConfig", "InferenceConfig", "ModelConfig", "ParallelConfig", "SchedulerConfig"]


@dataclass
class ModelConfig:
    """Which model, and how it is run.

    Attributes:
        model_name: stands in the lines that are logged.
        model_path: an artifact or a checkpoint.
        output_path: where the log file and traces go.
        dtype: of weights and computation; of an artifact it is what it was compiled in.
        with_ckpt: True; False would be random weights.
        next_n: 0; more would be tokens that heads of the model's own guess.
        exe_mode: a name in EXECUTION_MODES.
        enable_cache_compile: keep what was compiled; that is done in any case.
        enable_profiler: write traces.
        custom_params: for hooks of your own.
    """

    model_name: str = "model"
    model_path: str = ""
    output_path: str = ""
    dtype: str = "bfloat16"
    with_ckpt: bool = True
    next_n: int = 0
    exe_mode: str = "eager"
    enable_cache_compile: bool = False
    enable_profiler: bool = False
    custom_params: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """What is given to the model, and how tokens are chosen.

    Attributes:
        dataset, dataset_path: prompts are those that generate() is given.
        input_truncated_len: prompts are cut to so many tokens.
        temperature, top_p, top_k: temperature 0 takes the likeliest token; top_k 0 is all.
        seed: of everything that draws.
    """

    dataset: str = "default"
    dataset_path: str = ""
    input_truncated_len: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 42


@dataclass
class ParallelConfig:
    """How many processes run a model, and between how many of them modules of single kinds are divided: all, where a
    size is 1."""

    world_size: int = 1
    attn_tp_size: int = 1
    moe_tp_size: int = 1
    embed_tp_size: int = 1
    lmhead_tp_size: int = 1
    dense_tp_size: int = 1
    o_proj_tp_size: int = 1
    shared_tp_size: int = 1
    cp_size: int = 1


@dataclass
class SchedulerConfig:
    """How requests run together.

    Attributes:
        batch_size: prompts that run together.
        max_new_tokens: tokens of an answer at most.
        block_size: of paged caches; here each row's cache is one piece.
    """

    batch_size: int = 1
    max_new_tokens: int = 32
    block_size: int = 128


_PARTS = {"model_config": ModelConfig, "data_config": DataConfig, "parallel_config": ParallelConfig,
          "scheduler_config": SchedulerConfig}  # fmt: skip
_NO_EFFECT = {
    "enable_cache_compile": "artifacts are kept, and what torch.compile makes is in PyTorch's own cache.",
    "dataset": "prompts are those that generate() is given.",
    "dataset_path": "prompts are those that generate() is given.",
    "block_size": "each row's cache is one piece of memory.",
}


@dataclass
class InferenceConfig:
    """All settings of an `OfflineInference`, in four parts."""

    model_config: ModelConfig = field(default_factory=ModelConfig)
    data_config: DataConfig = field(default_factory=DataConfig)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> InferenceConfig:
        """Read a mapping of mappings, as a YAML file holds it. Raises UsageError for a name that there is not."""
        refuse_unknown("InferenceConfig", given, _PARTS)
        parts: dict[str, Any] = {}
        for name, held in given.items():
            refuse_unknown(f"{name} of InferenceConfig", held or {}, [each.name for each in fields(_PARTS[name])])
            parts[name] = _PARTS[name](**(held or {}))
        return cls(**parts)

    def runner_settings(self) -> RunnerSettings:
        """The same as settings of a ModelRunner. Raises UsageError for values that it cannot do; what has no effect is
        logged."""
        model, data, scheduler = self.model_config, self.data_config, self.scheduler_config
        find_execution_mode(model.exe_mode)
        sizes = {each.name: getattr(self.parallel_config, each.name) for each in fields(ParallelConfig)}
        world_size = sizes.pop("world_size")
        _check_weights(model)
        note_ignored(self._changed(), _NO_EFFECT)
        return RunnerSettings.of({
            "model_name": model.model_name, "model_path": model.model_path, "exe_mode": model.exe_mode,
            "output_path": model.output_path, "seed": data.seed, "temperature": data.temperature,
            "top_p": data.top_p, "top_k": data.top_k, "world_size": world_size,
            # A size that is left alone is that of all processes.
            "parallel_config": {name: size for name, size in sizes.items() if size != 1},
            "model_config": {"enable_profiler": model.enable_profiler, "dtype": model.dtype,
                             "custom_params": model.custom_params},
            "data_config": {"input_max_len": data.input_truncated_len, "max_new_tokens": scheduler.max_new_tokens,
                            "batch_size": scheduler.batch_size},
        })  # fmt: skip

    def _changed(self) -> dict[str, Any]:
        """The settings that are not as by default, by name."""
        mine = {each.name: getattr(part, each.name) for part in self._parts() for each in fields(part)}
        usual = {each.name: getattr(part, each.name) for part in InferenceConfig()._parts() for each in fields(part)}
        return {name: value for name, value in mine.items() if value != usual[name]}

    def _parts(self) -> tuple[Any, ...]:
        return self.model_config, self.data_config, self.parallel_config, self.scheduler_config


def _check_weights(model: ModelConfig) -> None:
    if not model.with_ckpt:
        raise UsageError("with_ckpt=False asks for random weights, and models run with their own. Pass with_ckpt=True.")
    if model.next_n:
        raise UsageError(
            f"next_n={model.next_n} asks for guesses by heads of the model's own, which are not exported. Pass "
            f"next_n=0; generate() has prompt_lookup_num_tokens and assistant_model."
        )
