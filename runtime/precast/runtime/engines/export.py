"""Run graphs of torch.export operator by operator.

A graph is run from its parsed nodes, each bound to an operator out of a fixed list. Nothing in a file becomes code:
torch's own way, which makes Python out of the names in the file and executes it, is not taken.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..artifact import Artifact
from ..artifact.pt2.allowed_operators import PYTHON
from ..artifact.pt2.format import SCALAR_TYPES, Coded, Graph, Meta, Node, Ref, Symbolic, parse_program, unpack
from ..artifact.schema import Graph as Contract
from ..artifact.schema import Input, Output, Variant
from ..errors import ArtifactError, FormatError
from ..hosts.machine import usable_cores
from ..terminal import first_line
from . import Arrays, Settings, Step
from .operator_checks import bound_arithmetic, guard_operator
from .safetensors_map import weight_of
from .torch_views import bind_tensors, guard_threads, view_weights
from .verified_files import VerifiedFiles

__all__ = ["ExportEngine"]

_Weights = Mapping[str, torch.Tensor]


class ExportEngine:
    """One interpreter per graph, made when first bound and shared by all who bind it; one mapping of the weights."""

    def __init__(self, artifact: Artifact, variant: Variant, settings: Settings) -> None:
        self._graphs = {graph.name: graph for graph in variant.graphs}
        self._files = VerifiedFiles(artifact, variant)
        self._lock = threading.Lock()
        self._opened: dict[str, _Interpreter] = {}
        self._weights: _Weights | None = None
        self._threads = settings.threads or usable_cores()

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """See Engine."""
        return _Bound(self._get_interpreter(graph), self._graphs[graph], inputs, outputs, self._threads)

    def _get_interpreter(self, name: str) -> _Interpreter:
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._open_graph(name)
            return self._opened[name]

    def _open_graph(self, name: str) -> _Interpreter:
        path = self._files.path(name)
        if self._weights is None:
            self._weights = view_weights(self._files.weights())
        graph = parse_program(unpack(self._files.read(name), str(path)), str(path))
        _check_contract(graph, self._graphs[name], path)
        graph = _remove_repeats(graph)
        return _Interpreter(graph, _select_weights(graph, self._weights, name, path), path)


def _select_weights(graph: Graph, weights: _Weights, name: str, path: Path) -> dict[str, torch.Tensor]:
    """The weights that the graph uses, by the names of its values, each as the graph describes it."""
    used = {ref.name for node in graph.nodes for ref in _find_refs([node.args, node.kwargs])}
    used |= {ref.name for ref in graph.outputs}
    found = {}
    for value, full in graph.weights.items():
        if value in used:
            tensor, meta = weight_of(weights, name, full), graph.metas[value]
            if tensor is None:
                raise FormatError(f"{path} needs the weight {full}, which the artifact's weight files lack.")
            given = (str(tensor.dtype)[6:], tuple(tensor.shape), tuple(tensor.stride()))
            if given != (meta.dtype, meta.shape, meta.strides) and not (
                0 in meta.shape and given[:2] == (meta.dtype, meta.shape)
            ):
                raise FormatError(
                    f"{path} needs the weight {full} as {meta.dtype} {_show_sizes(meta.shape)} with strides "
                    f"{_show_sizes(meta.strides)}; the weight file has {given[0]} {list(given[1])} with "
                    f"{list(given[2])}."
                )
            found[value] = tensor
    return found


def _show_sizes(sizes: tuple[int | Symbolic, ...]) -> list[int | str]:
    return [size if isinstance(size, int) else "free" for size in sizes]


def _check_contract(graph: Graph, contract: Contract, path: Path) -> None:
    """Raise FormatError where the file's inputs, outputs or caches are not those of config.json."""
    cached = {name for layer in contract.cache for name in (layer.key_out, layer.value_out)}
    outputs = [output for output in contract.outputs if output.name not in cached]
    pairs: list[tuple[str, Sequence[Input | Output], list[str]]] = [
        ("inputs", contract.inputs, graph.inputs),
        ("outputs", outputs, [ref.name for ref in graph.outputs]),
    ]
    for kind, specs, names in pairs:
        if len(specs) != len(names):
            raise FormatError(f"{path} has {len(names)} {kind} where config.json lists {len(specs)}.")
        for spec, name in zip(specs, names, strict=True):
            _check_meta(spec, graph.metas[name], path)
    by_name = dict(zip((spec.name for spec in contract.inputs), graph.inputs, strict=True))
    updated = {by_name.get(name) for layer in contract.cache for name in (layer.key_in, layer.value_in)}
    if updated != set(graph.updates):
        raise FormatError(
            f"{path} changes its inputs {', '.join(sorted(graph.updates)) or '(none)'}, which are not the caches that "
            f"config.json lists."
        )


def _check_meta(spec: Input | Output, meta: Meta, path: Path) -> None:
    is_same = meta.dtype == spec.dtype and len(meta.shape) == len(spec.shape)
    if not is_same or any(
        isinstance(found, int) and found != given for found, given in zip(meta.shape, spec.shape, strict=True)
    ):
        shape = [size if isinstance(size, int) else f"{size.min}–{size.max}" for size in spec.shape]
        raise FormatError(
            f"{path} has {meta.dtype} {_show_sizes(meta.shape)} for {spec.name}, where config.json says {spec.dtype} "
            f"{shape}."
        )


class _Bound:
    """A graph bound to arrays, which a step reads and writes in place."""

    def __init__(
        self, program: _Interpreter, contract: Contract, inputs: Arrays, outputs: Arrays, threads: int
    ) -> None:
        self._program, self._threads, self._process = program, threads, guard_threads(threads)
        self._inputs, self._outputs = bind_tensors(contract, inputs, outputs)

    def __call__(self) -> None:
        self._process.check()
        # A setting of the calling thread, of which a server has several.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            self._program.run(self._inputs, self._outputs)


@dataclass(frozen=True)
class _Call:
    """One call of `function` on the contents of registers. Afterwards the `spent` ones, which no later call reads, are
    emptied."""

    target: str
    function: Callable[..., Any]
    args: tuple[int, ...]
    keywords: tuple[tuple[str, int], ...]
    results: Any
    spent: tuple[int, ...] = ()


class _Interpreter:
    """A graph as a list of calls on numbered registers, which hold its constants and weights to begin with.

    Runs in several threads at once: each has registers of its own.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, torch.Tensor], path: Path) -> None:
        self._path = path
        self._registers: list[Any] = []
        self._numbers: dict[str, int] = {}
        for name, tensor in weights.items():
            self._add_register(name, tensor)
        self._inputs = [self._add_register(name) for name in graph.inputs]
        self._in_place = _find_in_place(graph)
        self._sizes: set[str] = set()
        """Names of values that are numbers."""
        calls = [call for node in graph.nodes for call in self._compile_node(node)]
        self._outputs = [self._numbers[ref.name] for ref in graph.outputs]
        self._updates = [(self._numbers[name], self._numbers[value]) for name, value in graph.updates.items()]
        self._calls = self._free_registers(calls)

    def run(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Compute `outputs` from `inputs`, of which those that the graph updates are changed. Raises ArtifactError."""
        registers = self._registers.copy()
        for number, tensor in zip(self._inputs, inputs, strict=True):
            registers[number] = tensor
        target = ""
        try:
            for call in self._calls:
                target = call.target
                keywords = {name: registers[number] for name, number in call.keywords}
                result = call.function(*[registers[number] for number in call.args], **keywords)
                _store_results(registers, call.results, result)
                for number in call.spent:
                    registers[number] = None
            target = "its outputs"
            for number, tensor in zip(self._outputs, outputs, strict=True):
                _copy_exactly(registers[number], tensor)
            for into, value in self._updates:
                _copy_exactly(registers[value], registers[into])
        except Exception as error:
            # What torch's operators raise has no common base.
            reason = f"{type(error).__name__}: {first_line(error, 'no reason given')}"
            raise ArtifactError(f"{self._path} failed at {target}: {reason}") from error

    def _compile_node(self, node: Node) -> list[_Call]:
        """Compile a node to calls: one for each list of values among its arguments, and its own."""
        before: list[_Call] = []
        args = tuple(self._argument_register(value, before) for value in node.args)
        keywords = tuple((name, self._argument_register(value, before)) for name, value in node.kwargs.items())
        results = tuple(self._result_registers(name) for name in node.outputs)
        if node.target in _SKIPPED:
            return []
        is_in_place = any(name in self._in_place for name in node.outputs if isinstance(name, str))
        function = _IN_PLACE[node.target] if is_in_place else _resolve_operator(node, self._sizes, self._path)
        if node.target in PYTHON or _split_target(node)[0] in _GIVES_NUMBERS:
            self._sizes.update(_result_names(node.outputs))
        return [*before, _Call(node.target, function, args, keywords, results[0] if len(results) == 1 else results)]

    def _result_registers(self, name: str | list[str] | None) -> Any:
        if isinstance(name, list):
            return tuple(self._add_register(each) for each in name)
        return None if name is None else self._add_register(name)

    def _argument_register(self, value: Any, before: list[_Call]) -> int:
        """The register that holds an argument when its call runs."""
        if isinstance(value, Ref):
            return self._numbers[value.name]
        if not any(True for _ in _find_refs(value)):
            return self._add_register(None, _as_torch_argument(value))
        args, number = tuple(self._argument_register(each, before) for each in value), self._add_register(None)
        before.append(_Call("a list of its own values", _as_list, args, (), number))
        return number

    def _add_register(self, name: str | None, value: Any = None) -> int:
        self._registers.append(value)
        if name is not None:
            self._numbers[name] = len(self._registers) - 1
        return len(self._registers) - 1

    def _free_registers(self, calls: list[_Call]) -> list[_Call]:
        """Let each call empty the registers that it is the last to read."""
        kept = {number for number, value in enumerate(self._registers) if value is not None}
        kept |= {*self._outputs, *(number for pair in self._updates for number in pair)}
        done = []
        for call in reversed(calls):
            touched = {*call.args, *(number for _, number in call.keywords), *_flatten(call.results)}
            done.append(replace(call, spent=tuple(sorted(touched - kept))))
            kept |= touched
        return done[::-1]


def _remove_repeats(graph: Graph) -> Graph:
    """Eliminate common subexpressions: every layer computes positions and masks anew."""
    same: dict[str, str] = {}
    made: dict[str, Node] = {}
    nodes = []
    for node in graph.nodes:
        renamed = replace(node, args=_rename_refs(node.args, same), kwargs=_rename_refs(node.kwargs, same))
        results = [len(each) if isinstance(each, list) else each is None for each in node.outputs]
        first = made.setdefault(repr((node.target, renamed.args, renamed.kwargs, results)), renamed)
        if first is renamed:
            nodes.append(renamed)
        same.update(zip(_result_names(node.outputs), _result_names(first.outputs), strict=True))
    outputs: list[Ref] = _rename_refs(graph.outputs, same)
    return replace(
        graph,
        nodes=nodes,
        outputs=outputs,
        updates={name: same.get(value, value) for name, value in graph.updates.items()},
    )


def _rename_refs(value: Any, same: Mapping[str, str]) -> Any:
    if isinstance(value, Ref):
        return Ref(same.get(value.name, value.name))
    if isinstance(value, dict):
        return {key: _rename_refs(each, same) for key, each in value.items()}
    return [_rename_refs(each, same) for each in value] if isinstance(value, list) else value


def _result_names(outputs: Any) -> list[str]:
    """The names of all results of a call, in order."""
    return [outputs] if isinstance(outputs, str) else [name for each in outputs or () for name in _result_names(each)]


def _find_refs(value: Any) -> Iterator[Ref]:
    """The values of the graph within an argument."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list | dict):
        for each in value if isinstance(value, list) else value.values():
            yield from _find_refs(each)


def _flatten(results: Any) -> Iterator[int]:
    if isinstance(results, tuple):
        for each in results:
            yield from _flatten(each)
    elif results is not None:
        yield results


def _as_list(*values: Any) -> list[Any]:
    return list(values)


def _store_results(registers: list[Any], places: Any, result: Any) -> None:
    """Store the results of a call in its registers."""
    if type(places) is int:
        registers[places] = result
    elif places:
        for place, each in zip(places, result, strict=True):
            _store_results(registers, place, each)


def _copy_exactly(value: Any, into: torch.Tensor) -> None:
    """Copy a tensor of the same shape and dtype; `copy_` alone would broadcast and convert."""
    if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (into.shape, into.dtype):
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{found} where {into.dtype} {list(into.shape)} was promised")
    if value.data_ptr() != into.data_ptr():
        into.copy_(value)


def _as_torch_argument(value: Any) -> Any:
    """A constant argument as torch takes it."""
    if isinstance(value, list):
        return [_as_torch_argument(each) for each in value]
    if not isinstance(value, Coded):
        return value
    if value.kind == "device":
        return torch.device(str(value.value))
    return _CODES[value.kind][value.value]


_CODES: dict[str, dict[Any, Any]] = {
    "dtype": {code: getattr(torch, name) for code, name in SCALAR_TYPES.items()},
    "layout": {7: torch.strided},
    "memory_format": {
        1: torch.contiguous_format,
        2: torch.channels_last,
        3: torch.channels_last_3d,
        4: torch.preserve_format,
    },
}


def _split_target(node: Node) -> tuple[str, str]:
    """The names of an operator and its overload."""
    name, _, overload = node.target.removeprefix("torch.ops.aten.").partition(".")
    return name, overload


def _resolve_operator(node: Node, sizes: Set[str], path: Path) -> Callable[..., Any]:
    """The function of a node's operator, behind its checks; `sizes` names the values that are numbers. Operators were
    checked against the allowed ones when the file was parsed."""
    if node.target in PYTHON:
        module, _, name = PYTHON[node.target].partition(":")
        return bound_arithmetic(getattr(import_module(module), name))
    name, overload = _split_target(node)
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or overload not in packet.overloads():
        raise ArtifactError(
            f"{path} calls {node.target}, which torch {torch.__version__} lacks (pip install -U torch)."
        )
    chosen = getattr(packet, overload)
    if problem := _find_problem(name, chosen._schema, node, sizes):
        raise FormatError(f"{path} is refused: it calls {node.target}, {problem}.")
    function = guard_operator(name, chosen, sum(1 for _ in _find_refs([node.args, node.kwargs])))
    return _fill_with_zeros(function) if name in _UNFILLED else function


def _find_problem(name: str, schema: torch.FunctionSchema, node: Node, sizes: Set[str]) -> str | None:
    """Why this overload may not be called, or not with these arguments; None if it may."""
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments):
        return "which changes its arguments"
    if name not in _GIVES_NUMBERS and any(str(each.type) not in _TENSORS for each in schema.returns):
        return "which computes without tensors"
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    for argument in schema.arguments:
        value, type_ = given.get(argument.name), str(argument.real_type)
        # torch accepts None for a tensor, and operators read it all the same.
        if (
            argument.name in given
            and type_ in _TENSORS
            and (value is None or (isinstance(value, list) and None in value))
        ):
            return f"whose {argument.name} is to be a tensor, with nothing"
        # It accepts a tensor of one element for a number, too, which no check of numbers sees.
        if "Tensor" not in type_ and any(ref.name not in sizes for ref in _find_refs(value)):
            return f"whose {argument.name} is no tensor, with one"
        kind = next((_KINDS[each] for each in _KINDS if each in type_), None)
        # torch accepts any number for one of its codes, and aborts the process on an invalid one.
        if kind and value is not None and not (isinstance(value, Coded) and value.kind == kind):
            return f"whose {argument.name} is a {kind}, with something else"
    return None


_GIVES_NUMBERS = frozenset({"item", "sym_size", "sym_numel", "sym_stride", "_assert_scalar", "_assert_tensor_metadata"})
_TENSORS = ("Tensor", "List[Tensor]")
_KINDS = {"ScalarType": "dtype", "Layout": "layout", "Device": "device", "MemoryFormat": "memory_format"}


def _fill_with_zeros(function: Callable[..., Any]) -> Callable[..., Any]:
    """Zero the result of an operator that leaves memory unfilled, which would show its earlier contents."""
    return lambda *args, **keywords: function(*args, **keywords).zero_()


_UNFILLED = frozenset({"empty", "empty_like", "new_empty"})
_SKIPPED = frozenset({"torch.ops.aten._assert_tensor_metadata.default"})
"""Assertions that torch.export inserts about the dtypes of earlier operators."""


def _slice_scatter(
    x: torch.Tensor, source: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> torch.Tensor:
    torch.ops.aten.slice.Tensor(x, dim, start, end, step).copy_(source)
    return x


_IN_PLACE: dict[str, Callable[..., Any]] = {
    "torch.ops.aten.index_put.default": torch.ops.aten.index_put_.default,
    "torch.ops.aten.index_copy.default": torch.ops.aten.index_copy_.default,
    "torch.ops.aten.slice_scatter.default": _slice_scatter,
}
"""Operators that return a changed copy -> the operator that changes the tensor itself."""


def _find_in_place(graph: Graph) -> set[str]:
    """The values that may be computed in place in the input that they update, since nothing else reads its old
    content."""
    readers = Counter(ref.name for node in graph.nodes for ref in _find_refs([node.args, node.kwargs]))
    readers.update([*(ref.name for ref in graph.outputs), *graph.updates.values()])
    changed = {
        node.outputs[0]: node.args[0].name
        for node in graph.nodes
        if node.target in _IN_PLACE and len(node.outputs) == 1 and isinstance(node.outputs[0], str)
        if node.args and isinstance(node.args[0], Ref)
    }
    found: set[str] = set()
    for name, value in graph.updates.items():
        chain: list[str] = []
        reached = value
        while reached in changed and readers[changed[reached]] == 1:
            chain.append(reached)
            reached = changed[reached]
        found.update(chain if reached == name else ())
    return found
