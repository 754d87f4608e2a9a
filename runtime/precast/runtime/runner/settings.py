"""The settings of a ModelRunner: a mapping as its YAML file holds it, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import msgspec

from ..arguments import refuse_unknown
from ..errors import UsageError
from .execution import ExecutionMode, find_execution_mode, note_ignored, rank_options

__all__ = ["RunnerSettings"]

DTYPES = ("bfloat16", "float16", "float32")
_PARTS = {
    "model_config": ("enable_profiler", "enable_online_split_weight", "dtype", "device", "custom_params"),
    "data_config": ("input_max_len", "max_new_tokens", "batch_size", "max_position_embeddings", "dataset"),
    "parallel_config": (
        "attn_tp_size",
        "moe_tp_size",
        "moe_ep_size",
        "lmhead_tp_size",
        "embed_tp_size",
        "dense_tp_size",
        "o_proj_tp_size",
        "shared_tp_size",
        "cp_size",
    ),
}
"""The parts of the settings, and what each holds."""
_OUTSIDE = (
    "model_name",
    "model_path",
    "exe_mode",
    "world_size",
    "output_path",
    "seed",
    "temperature",
    "top_p",
    "top_k",
)
_NO_EFFECT = {"dataset": "prompts are those that model_generate() is given."}


@dataclass(frozen=True)
class RunnerSettings:
    """What a ModelRunner is told.

    Attributes:
        model_name: stands in the lines that are logged.
        model_path: an artifact or a checkpoint.
        exe_mode: a name in EXECUTION_MODES.
        world_size: how many processes run the model, each with its part of the weights. A checkpoint is compiled for
            so many; an artifact must have been.
        parallel_config: into how many parts modules of single kinds are divided, where these are fewer, by names such
            as attn_tp_size.
        output_path: where the log file and traces go; "" writes no log file, and traces below the current directory.
        seed: of everything that draws.
        temperature, top_p, top_k: how tokens are chosen; temperature 0 takes the likeliest.
        dtype: of weights and computation; of an artifact it is what it was compiled in.
        device: "cpu", or another that the mode knows.
        enable_profiler: whether model_generate() writes traces.
        enable_online_split_weight: True reads a checkpoint when it starts, False an artifact, whose weights were
            prepared at the export; None takes whichever model_path is.
        custom_params: for hooks of your own.
        input_max_len: prompts are padded and cut to so many tokens.
        max_new_tokens: tokens of an answer at most.
        batch_size: prompts that run together.
        max_position_embeddings: tokens that the caches hold; input_max_len and max_new_tokens together if None.
    """

    model_name: str = "model"
    model_path: str = ""
    exe_mode: str = "ge_graph"
    world_size: int = 1
    parallel_config: dict[str, int] = field(default_factory=dict)
    output_path: str = ""
    seed: int = 42
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    dtype: str = "bfloat16"
    device: str = "cpu"
    enable_profiler: bool = False
    enable_online_split_weight: bool | None = None
    custom_params: dict[str, Any] = field(default_factory=dict)
    input_max_len: int = 1024
    max_new_tokens: int = 32
    batch_size: int = 16
    max_position_embeddings: int | None = None

    @classmethod
    def of(cls, given: Any) -> RunnerSettings:
        """The settings in a mapping with `model_config`, `data_config` and `parallel_config` in it.

        Raises UsageError for a name that there is not, with the nearest, and for values of another type or out of
        range; what has no effect here is logged.
        """
        if isinstance(given, cls):
            given.check()
            return given
        if not isinstance(given, Mapping):
            raise UsageError(f"A runner's settings are a mapping, as yaml.safe_load gives one, not {given!r:.80}.")
        refuse_unknown("ModelRunner()", given, [*_OUTSIDE, *_PARTS])
        flat = {name: value for name, value in given.items() if name in _OUTSIDE}
        parallel: dict[str, int] = {}
        for part, known in _PARTS.items():
            held = given.get(part) or {}
            refuse_unknown(f"{part} of ModelRunner()", held, known)
            (parallel if part == "parallel_config" else flat).update(held)
        note_ignored({name: flat.pop(name) for name in _NO_EFFECT if name in flat}, _NO_EFFECT)
        settings = cls(**{name: _convert(cls, name, value) for name, value in flat.items()}, parallel_config=parallel)
        settings.check()
        return settings

    @property
    def mode(self) -> ExecutionMode:
        """How it is run here."""
        return find_execution_mode(self.exe_mode)

    @property
    def rank_options(self) -> dict[str, int]:
        """The options of an export for so many processes; empty for one."""
        return rank_options(self.world_size, self.parallel_config, self.mode)

    @property
    def capacity(self) -> int:
        """Tokens that the caches hold for each row."""
        return self.max_position_embeddings or self.input_max_len + self.max_new_tokens

    def check(self) -> None:
        """Raise UsageError for a value out of range."""
        for name, least in (("input_max_len", 1), ("max_new_tokens", 1), ("batch_size", 1), ("top_k", 0), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise UsageError(f"{name} must be at least {least}, not {value}.")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype={self.dtype!r} is not known. Choose one of: {', '.join(DTYPES)}.")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"temperature must be at least 0 and top_p above 0 and at most 1, not temperature={self.temperature} "
                f"and top_p={self.top_p}."
            )
        if self.capacity < self.input_max_len + self.max_new_tokens:
            raise UsageError(
                f"max_position_embeddings={self.capacity} is less than input_max_len={self.input_max_len} and "
                f"max_new_tokens={self.max_new_tokens} together. Leave it out, or make one of them smaller."
            )
        _ = self.rank_options


def _convert(cls: type, name: str, value: Any) -> Any:
    try:
        return msgspec.convert(value, get_type_hints(cls)[name])
    except msgspec.ValidationError as error:
        raise UsageError(f"{name}={value!r:.80} is of the wrong type: {error}.") from None
