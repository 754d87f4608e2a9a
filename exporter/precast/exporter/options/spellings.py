"""Options as optimum-neuron, MindFormers and transformers spell them, read as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from precast.runtime.arguments import REPLACED, read_token, refuse_replaced, rename
from precast.runtime.artifact.backends import BACKENDS, get_backend
from precast.runtime.errors import UsageError

from .backend_options import taken_by, why_not_taken

__all__ = ["THEIR_NAMES", "in_our_words"]

_NAMES = {
    "checkpoint_name_or_path": "weights",
    "inline_weights_to_neff": "inline_weights",
    "num_cores": "tensor_parallel",
    "tensor_parallel_size": "tensor_parallel",
    "torch_dtype": "dtype",
    "use_auth_token": "token",
}
"""Theirs -> ours."""
_GROUPS = ("input_shapes", "compiler_args")
"""Dictionaries of options, which optimum-neuron's guide spreads with ** and its users pass as they are, too."""
_CACHES = ("use_past", "use_cache")
"""Models that generate are compiled with caches always."""
THEIR_NAMES = (*_NAMES, *_GROUPS, *_CACHES, *REPLACED)
"""All that `in_our_words` reads or explains, besides options of ours."""
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_OPENINGS = {"export()": "export(MODEL, OUT", "from_pretrained(export=True)": "from_pretrained(MODEL, export=True"}
"""How a call is named -> how it begins."""


def in_our_words(given: Mapping[str, Any], call: str) -> dict[str, Any]:
    """The options by our names and with our values.

    Raises UsageError for one that is given twice, that has no place here (with what says it instead), or that the
    backend does not take (with one that does).

    Args:
        given: options by name, in our words or in others'.
        call: how errors name the call, one of _OPENINGS.
    """
    refuse_replaced(_OPENINGS[call], given)
    asked = {name: value for name, value in _spread(given, call).items() if not _asks_nothing(name, value)}
    backend = str(asked.get("backend") or "onnx")
    if cores := next((name for name in ("num_cores", "tensor_parallel_size") if name in asked), None):
        # The words of libraries for Neuron alone.
        _check_taken(backend, f"{cores}={asked[cores]!r}", "tensor_parallel", asked[cores], "neuron")
    if "auto_cast_type" in asked and "auto_cast" not in asked:
        asked = _read_lone_type(asked, backend)
    asked = rename(call, asked, _NAMES)
    return {name: _read_value(name, value) for name, value in asked.items()}


def _spread(given: Mapping[str, Any], call: str) -> dict[str, Any]:
    """The options with those of dictionaries among them."""
    groups = {name: given[name] for name in _GROUPS if isinstance(given.get(name), Mapping)}
    options = {name: value for name, value in given.items() if name not in groups}
    for group, values in groups.items():
        if twice := [name for name in values if name in options and options[name] != values[name]]:
            raise UsageError(
                f"{call} was given {twice[0]}={options[twice[0]]!r} and in {group} {values[twice[0]]!r}; pass one."
            )
        options |= values
    return options


def _asks_nothing(name: str, value: Any) -> bool:
    """Whether an option of another library asks for what is so anyway. Raises UsageError where it cannot be had."""
    if name in _CACHES:
        if not value:
            raise UsageError(
                f"{name}={value!r} cannot be had: models that generate are compiled with key/value caches, and answer "
                f"as without. Leave it out."
            )
        return True
    if name in ("num_cores", "tensor_parallel_size"):
        return value in (None, 1)
    if name in ("auto_cast", "torch_dtype", *_GROUPS, *_NAMES):
        return value is None
    return name in REPLACED


def _read_lone_type(asked: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """`auto_cast_type` without `auto_cast`: the dtype of all that is computed, as optimum-neuron means it of decoders.

    Neuron's compiler casts by itself, and has to be told what.
    """
    short = asked["auto_cast_type"]
    others = {name: value for name, value in asked.items() if name != "auto_cast_type"}
    if short in (None, "fp32"):
        return others
    if short not in _SHORT or (backend in BACKENDS and get_backend(backend).casts_itself):
        return dict(asked)
    dtype = _SHORT[short]
    _check_taken(backend, f"auto_cast_type={short!r} without auto_cast", "dtype", dtype)
    if others.get("dtype", dtype) != dtype:
        raise UsageError(f"auto_cast_type={short!r} and dtype={others['dtype']!r} say the same; pass dtype alone.")
    return {**others, "dtype": dtype}


def _check_taken(backend: str, given: str, name: str, value: Any, instead: str | None = None) -> None:
    """Raise UsageError where a backend does not take an option, with the arguments by which one does: `instead`, or
    the first that takes it."""
    able = [row.name for row in BACKENDS.values() if name in taken_by(row)]
    if backend not in BACKENDS or backend in able:
        return
    because = why_not_taken(get_backend(backend), name)
    other = instead or able[0]
    more = ", instance_type='inf2'" if other == "neuron" else ""
    raise UsageError(
        f"{given} is not for backend={backend!r}: {because}. Write backend={other!r}{more}, {name}={value!r}."
    )


def _read_value(name: str, value: Any) -> Any:
    if name == "dtype":
        # torch.float16 is written so.
        spelled = str(value).removeprefix("torch.")
        return _SHORT.get(spelled, spelled)
    if name == "optlevel" and isinstance(value, str) and value.isdigit():
        return int(value)
    if name == "token":
        return read_token(value)
    if name == "prefix_tuning" and value is not None:
        return str(value)
    return str(value) if name == "weights" else value
