"""Which options cannot be given together, and which backends and devices do not take them: one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from precast.runtime.artifact.backends import BACKENDS, Backend, get_backend

from .declaration import keyword_of

__all__ = [
    "BACKEND_RULES",
    "CONFLICTS",
    "FEATURES",
    "NEEDS",
    "BackendRule",
    "Conflict",
    "Need",
    "backend_rule_problems",
    "conflict_problems",
    "need_problems",
]


def _unless(name: str, *plain: object) -> Callable[[Any], str | None]:
    """Whether an option is none of the values `plain`, the first of which it has where no backend declares it, and then
    how it was given."""
    return lambda options: None if (value := getattr(options, name, plain[0])) in plain else f"{name}={value!r}"


def _if(name: str, value: object) -> Callable[[Any], str | None]:
    return lambda options: f"{name}={value!r}" if getattr(options, name) == value else None


FEATURES: Mapping[str, Callable[[Any], str | None]] = {
    "lora": _unless("lora", ()),
    "lora_slots": _unless("lora_slots", 0),
    "prefix_tuning": _unless("prefix_tuning", None),
    "quantize": _unless("quantize", "none"),
    "kv_cache='int8'": _if("kv_cache", "int8"),
    "kv_cache='float16'": _if("kv_cache", "float16"),
    "dtype": _unless("dtype", "float32", "auto"),
    "auto_cast": _unless("auto_cast", "none"),
    "device": _unless("device", "cpu"),
    "tensor_parallel": _unless("tensor_parallel", 1),
    "pipeline_parallel": _unless("pipeline_parallel", 1),
    "format": _unless("format", "kernels"),
}
"""What options can ask for, by name: a function of them that says how it was given, or None."""


@dataclass(frozen=True)
class Conflict:
    """Two of FEATURES that cannot be had together. `because` ends the sentence that says so, `instead` what may be
    given for the second."""

    first: str
    second: str
    because: str
    instead: str = ""


CONFLICTS = (
    Conflict("lora_slots", "dtype", "as adapters are float32", "quantize= makes the base smaller"),
    Conflict("lora_slots", "auto_cast", "as adapters are float32", "quantize= makes the base smaller"),
    Conflict("lora_slots", "prefix_tuning", "whose keys and values were computed without an adapter"),
    Conflict("lora_slots", "device", "as adapters lie in the memory of the CPU", "lora= merges one for every device"),
    Conflict("device", "tensor_parallel", "whose ranks are processes on a CPU"),
    Conflict("lora_slots", "tensor_parallel", "as adapters are whole", "lora= merges one before weights are divided"),
    Conflict("prefix_tuning", "tensor_parallel", "as every rank has caches of its own heads"),
    Conflict(
        "tensor_parallel", "kv_cache='int8'", "whose scales are those of all heads", "kv_cache='float16' halves caches"
    ),
    Conflict("tensor_parallel", "pipeline_parallel", "as one process has a part of every layer or whole layers"),
    Conflict("lora_slots", "pipeline_parallel", "as adapters are whole", "lora= merges one before layers are divided"),
    Conflict("prefix_tuning", "pipeline_parallel", "as every stage has caches of its own layers"),
    Conflict("lora_slots", "format", "as only our runtime hands adapters to a graph", "lora= merges one"),
    Conflict("prefix_tuning", "kv_cache='int8'", "whose scales are those of texts", "kv_cache='float16' halves caches"),
    Conflict("prefix_tuning", "device", "as caches lie in the memory of the device"),
    Conflict(
        "dtype", "kv_cache='float16'", "as caches are of the dtype that is computed in", "or give kv_cache='int8'"
    ),
    Conflict("dtype", "auto_cast", "which casts what is in float32, and nothing is left in it"),
)


@dataclass(frozen=True)
class Need:
    """One of FEATURES that means nothing without another; see Conflict."""

    feature: str
    other: str
    because: str


NEEDS = (Need("format", "quantize", "as it says how quantized weights are written"),)


@dataclass(frozen=True)
class BackendRule:
    """One of FEATURES that takes a property of a backend's row; see Conflict."""

    feature: str
    is_taken: Callable[[Backend], bool]
    because: str
    instead: str = ""


BACKEND_RULES = (
    BackendRule(
        "lora_slots", lambda row: row.has_adapter_slots, "which keeps no weights apart",
        "lora= merges an adapter for every backend",
    ),
    BackendRule("prefix_tuning", lambda row: not row.owns_caches, "where caches lie in the memory of a device"),
    BackendRule(
        "kv_cache='float16'", lambda row: row.halves_caches, "whose attention computes in what its caches hold",
        "kv_cache='int8' is for all",
    ),
)  # fmt: skip


def conflict_problems(options: Any) -> Iterator[str]:
    """Say of every conflict of CONFLICTS that both are asked for."""
    given = _find_given(options)
    for each in CONFLICTS:
        if each.first in given and each.second in given:
            yield (
                f"{given[each.first]} cannot be combined with {given[each.second]}, {each.because}; leave one of them "
                f"out{_advise(each.instead)}."
            )


def need_problems(options: Any) -> Iterator[str]:
    """Say of every feature of NEEDS that what it needs is not asked for."""
    given = _find_given(options)
    for each in NEEDS:
        if each.feature in given and each.other not in given:
            yield f"{given[each.feature]} needs {keyword_of(each.other)}, {each.because}; give both, or neither."


def backend_rule_problems(options: Any) -> Iterator[str]:
    """Say of every feature of BACKEND_RULES that the options' backend does not take it. Raises UsageError for a name
    that is none."""
    given, row = _find_given(options), get_backend(options.backend)
    for rule in BACKEND_RULES:
        if rule.feature in given and not rule.is_taken(row):
            others = ", ".join(each.name for each in BACKENDS.values() if rule.is_taken(each))
            yield (
                f"{given[rule.feature]} is not for backend={row.name!r}, {rule.because}. Backends that take it: "
                f"{others}{_advise(rule.instead)}."
            )


def _find_given(options: Any) -> dict[str, str]:
    """The features that are asked for, each as it was given."""
    return {name: words for name, find in FEATURES.items() if (words := find(options))}


def _advise(instead: str) -> str:
    return f"; {instead}" if instead else ""
