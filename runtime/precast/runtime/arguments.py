"""Keyword arguments: unknown ones are refused with the nearest known, those of other libraries read or explained."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from .errors import UsageError

__all__ = ["REPLACED", "only_known", "read_token", "refuse_replaced", "refuse_unknown", "rename"]

P = ParamSpec("P")
R = TypeVar("R")


def refuse_unknown(call: str, given: Iterable[str], known: Iterable[str], hint: str = "") -> None:
    """Raise UsageError where some of the names `given` are not `known`; `hint` says what else might be meant."""
    names = list(known)
    if unknown := [name for name in given if name not in names]:
        nearest = dict.fromkeys(near for name in unknown for near in difflib.get_close_matches(name, names, n=1))
        guess = f" Did you mean {', '.join(nearest)}?" if nearest else ""
        raise UsageError(
            f"{call} does not know {', '.join(unknown)}.{guess}{hint} Its options are: {', '.join(names) or 'none'}."
        )


def only_known(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function refuse unknown keywords by `refuse_unknown`, where Python would raise a TypeError."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    name = "This call" if function.__name__ == "__call__" else f"{function.__name__}()"

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_unknown(name, kwargs, known)
        return function(*args, **kwargs)

    return checked


def rename(call: str, given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The arguments with those of `names` under our names for them. Raises UsageError where one is given under both."""
    renamed: dict[str, Any] = {}
    for name, value in given.items():
        ours = names.get(name, name)
        if ours in renamed or (ours != name and ours in given):
            others = [other for other in given if names.get(other, other) == ours]
            raise UsageError(
                f"{call} was given {' and '.join(others)}, which are names of the same; pass {ours} alone."
            )
        renamed[ours] = value
    return renamed


def read_token(given: Any) -> Any:
    """A Hub token as it is said by `use_auth_token`, too: True is that of the login, which None is here."""
    return None if given is True else given


def refuse_replaced(call: str, given: Mapping[str, Any]) -> None:
    """Raise UsageError for an argument by which transformers quantizes or spreads a model, with what says it here.

    Args:
        call: how the call that compiles begins, as `export(MODEL, OUT`.
        given: the arguments by name; those that are None or False ask for nothing.
    """
    for name, describe in REPLACED.items():
        value = given.get(name)
        if value is not None and value is not False:
            raise UsageError(describe(call, name, value))


def _describe_bits(call: str, name: str, value: Any) -> str:
    return _describe_scheme(call, f"{name}={value!r:.80}", "quantize='int8'" if "8" in name else "quantize='int4'")


def _describe_config(call: str, name: str, value: Any) -> str:
    """For a configuration of transformers: BitsAndBytesConfig, GPTQConfig, AwqConfig and others, or a dict."""
    names = ("load_in_4bit", "load_in_8bit", "bits", "quant_method")
    read = {key: value.get(key) if isinstance(value, Mapping) else getattr(value, key, None) for key in names}
    bits = 4 if read["load_in_4bit"] else 8 if read["load_in_8bit"] else read["bits"]
    method = str(getattr(read["quant_method"], "value", read["quant_method"]))
    chosen = f"quantize='int{bits}'" if bits in (4, 8) else "quantize='int8' or quantize='int4'"
    chosen += f", quantize_method={method!r}" if method in ("gptq", "awq") else ""
    return _describe_scheme(call, f"{name}={type(value).__name__}(…)", chosen)


def _describe_scheme(call: str, given: str, chosen: str) -> str:
    return (
        f"{given} is said otherwise here, where weights are rounded when a checkpoint is exported: {call}, {chosen}). "
        f"That is for models that generate; of all others backend='aoti', dtype='bfloat16' halves the weights."
    )


def _describe_device_map(call: str, name: str, value: Any) -> str:
    kind = "cuda" if str(value).startswith("cuda") else "cpu"
    return (
        f"{name}={value!r:.80} has no meaning here: a compiled model lies on one device, which is chosen when it is "
        f"compiled or opened. Leave it out, or write device={kind!r}."
    )


REPLACED: dict[str, Callable[[str, str, Any], str]] = {
    "load_in_8bit": _describe_bits,
    "load_in_4bit": _describe_bits,
    "quantization_config": _describe_config,
    "device_map": _describe_device_map,
}
"""Arguments of transformers' from_pretrained() -> the sentence that says how it is done here."""
