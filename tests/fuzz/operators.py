"""Calls of the operators that the graph of a `.pt2` may call, one call a case, on tensors of any shape and layout."""

from __future__ import annotations

import ctypes
import json
import math
import random
from pathlib import Path
from typing import Any

import torch

from precast.runtime.artifact.pt2.format import SCALAR_TYPES, Coded, Graph, Node, Ref
from precast.runtime.engines.export import _Interpreter
from precast.runtime.errors import InputError

_MOST = 2**18
_MOST_SEEN = 2**24
"""Elements of a tensor that is given, in memory and with those that are seen several times."""
_DTYPES = tuple(SCALAR_TYPES.values())
_CODES = {name: code for code, name in SCALAR_TYPES.items()}
_SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 64, 100, 1000, 4096)
_NUMBERS = (
    0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 1000, -1, -2, -3, -5, -100, 10**6, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40, 2**62,
    2**63 - 1, -(2**62), -(2**63),
)  # fmt: skip
_REALS = (0.0, 1.0, -1.0, 0.5, 2.0, 1e-30, 1e30, 1e300, -1e30, float("inf"), float("-inf"), float("nan"))


def run(case: bytes) -> None:
    """Call the operator, and read all that it gives."""
    call = json.loads(case)
    weights: dict[str, torch.Tensor] = {}
    args = [_value(each, weights) for each in call["args"]]
    kwargs = {name: _value(each, weights) for name, each in call["kwargs"].items()}
    results = [f"r{index}" for index in range(call.get("results", 1))]
    nodes = [Node(call["target"], args, kwargs, list(results))]
    nodes += [Node("torch.ops.aten.clone.default", [Ref(name)], {}, [None]) for name in results]
    program = _Interpreter(Graph({name: name for name in weights}, [], nodes, [], {}), weights, Path("model.pt2"))
    program.run([], [])


def _value(given: Any, weights: dict[str, torch.Tensor]) -> Any:
    if isinstance(given, list):
        return [_value(each, weights) for each in given]
    if not isinstance(given, dict):
        return given
    if "tensor" in given:
        name = f"w{len(weights)}"
        weights[name] = _tensor(given)
        return Ref(name)
    ((kind, value),) = given.items()
    return float(value) if kind == "float" else Coded(kind, _CODES[value] if kind == "dtype" else value)


def _tensor(given: dict[str, Any]) -> torch.Tensor:
    shape, dtype = given["shape"], getattr(torch, given["tensor"])
    strides = given.get("strides") or _contiguous(shape)
    last = 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if not 0 <= last <= _MOST or math.prod(shape) > _MOST_SEEN:
        raise InputError("This tensor is larger than a case may be.")
    flat = torch.empty(last, dtype=dtype)
    if (values := given.get("values")) and last:
        flat.copy_(torch.tensor([values[index % len(values)] for index in range(last)]))
    else:
        flat.fill_(given.get("fill", 1))
    return flat.as_strided(shape, strides)


def _contiguous(shape: list[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return strides[::-1]


def mutated(chance: random.Random, case: bytes) -> bytes:
    """A call with one to four of its parts changed."""
    call = json.loads(case)
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4))):
        places = list(_places(call["args"])) + list(_places(call["kwargs"]))
        if not places:
            break
        holder, key = chance.choice(places)
        holder[key] = _changed(chance, holder[key], [h[k] for h, k in places])
    if chance.random() < 0.05:
        call["results"] = chance.choice((0, 2, 3))
    return json.dumps(call).encode()


def _places(holder: Any) -> Any:
    """Everything that can be changed, a list and what is in it."""
    for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
        yield holder, key
        if isinstance(value, list):
            yield from _places(value)


def _changed(chance: random.Random, value: Any, others: list[Any]) -> Any:
    kind = chance.random()
    if kind < 0.05:
        return json.loads(json.dumps(chance.choice(others)))
    if kind < 0.07:
        return None
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice((chance.choice(_NUMBERS), value + 1, value - 1, value * 2, -value))
    if isinstance(value, float):
        return chance.choice(_REALS)
    if isinstance(value, list):
        return _list_changed(chance, value)
    if isinstance(value, dict) and "tensor" in value:
        return _tensor_changed(chance, dict(value), [each for each in others if isinstance(each, dict)])
    if isinstance(value, dict) and "dtype" in value:
        return {"dtype": chance.choice(_DTYPES)}
    if isinstance(value, dict) and "memory_format" in value:
        return {"memory_format": chance.randint(1, 4)}
    if value is None:
        return chance.choice((0, 1, -1, 2**40, 0.5, True, [], {"tensor": "float32", "shape": [chance.choice(_SIZES)]}))
    return value


def _list_changed(chance: random.Random, value: list[Any]) -> list[Any]:
    kind = chance.random()
    if value and kind < 0.3:
        return value[:-1]
    if value and kind < 0.6:
        return [*value, chance.choice(value)]
    if value and kind < 0.7:
        return [value[0]] * chance.choice((1, 2, 3, 8))
    if value and kind < 0.8:
        return chance.sample(value, len(value))
    return [*value, chance.choice(_NUMBERS)]


def _tensor_changed(chance: random.Random, value: dict[str, Any], others: list[Any]) -> dict[str, Any]:
    kind, shape = chance.random(), list(value["shape"])
    if kind < 0.15:
        return value | {"tensor": chance.choice(_DTYPES)}
    if kind < 0.25:
        return value | {"values": [chance.choice(_NUMBERS[:20]) for _ in range(chance.randint(1, 4))]}
    if kind < 0.30:
        return value | {"fill": chance.choice((0, 1, -1, 3, 100))}
    if kind < 0.40:
        strides = [chance.choice((0, 1, 2, 3, 8, size)) for size in shape]
        return value | {"strides": strides}
    value.pop("strides", None)
    if kind < 0.5 and others:
        other = chance.choice(others)
        return value | {"shape": list(other.get("shape", shape))}
    place = chance.randrange(len(shape) + 1)
    if kind < 0.6:
        return value | {"shape": [*shape[:place], chance.choice((1, 1, 2, 3)), *shape[place:]]}
    if not shape:
        return value | {"shape": [chance.choice(_SIZES)]}
    place = chance.randrange(len(shape))
    if kind < 0.7:
        return value | {"shape": [*shape[:place], *shape[place + 1 :]]}
    if kind < 0.72:
        return value | {"shape": [2**40, *shape[1:]], "strides": [0] * len(shape)}
    if kind < 0.75:
        return value | {"shape": [chance.choice(_SIZES)]}
    return value | {"shape": [*shape[:place], chance.choice(_SIZES), *shape[place + 1 :]]}


def fence() -> None:
    """In a process that was started with it: from now on memory ends at pages that cannot be touched."""
    on = getattr(ctypes.CDLL(None), "fence_on", None)
    if on is not None:
        on(1)
