"""The hash of programs without their weights: programs of the same hash compute the same of any weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

__all__ = ["hash_programs"]


def hash_programs(programs: Iterable[torch.export.ExportedProgram], *, with_numbers: bool = False) -> str:
    """sha256, in hexadecimal, of the programs' operators, the constants in them, and what their weights look like.

    With `with_numbers` the values of tensors without dimensions count, too: for a compiler that writes them into its
    code.
    """
    digest = hashlib.sha256()
    for program in programs:
        for line in (*_weight_lines(program, with_numbers), *_graph_lines(program)):
            digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _weight_lines(program: torch.export.ExportedProgram, with_numbers: bool) -> Iterator[str]:
    """A line for each tensor that the program holds: a compiler reads those that share memory once."""
    first: dict[Any, str] = {}
    for spec in program.graph_signature.input_specs:
        name = str(spec.target)
        held = program.state_dict.get(name, program.constants.get(name))
        line = f"{spec.kind} {spec.arg} {name}"
        if isinstance(held, Tensor):
            alike = first.setdefault((_describe(held), held.data_ptr()), name)
            number = held.item() if with_numbers and held.ndim == 0 else None
            line += f" {_describe(held)} {alike} {number!r}"
        yield line
    for spec in program.graph_signature.output_specs:
        yield f"{spec.kind} {spec.arg} {spec.target}"
    yield from sorted(f"{symbol} {bounds}" for symbol, bounds in program.range_constraints.items())


def _graph_lines(program: torch.export.ExportedProgram) -> Iterator[str]:
    for path, module in program.graph_module.named_modules():
        if isinstance(module, fx.GraphModule):
            yield f"graph {path}"
            for node in module.graph.nodes:
                made = [_describe(each) for each in tree_leaves(node.meta.get("val"))]
                yield f"{node.name} = {node.op} {_name_of(node.target)} {node.args} {node.kwargs} {made}"


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)} {value.stride()}" if isinstance(value, Tensor) else str(value)


def _name_of(target: Any) -> str:
    """The name of what a node calls; how a function of Python prints has its address in it."""
    is_function = callable(target) and not isinstance(target, torch._ops.OpOverload)
    return f"{target.__module__}.{target.__name__}" if is_function else str(target)
