"""Program -> program of ATen operators that updates its caches in place.

What was traced is run once more, node by node, with our own operators replaced by what they mean, and traced again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_map_only

from precast.runtime.artifact import CACHE_POSITIONS
from precast.runtime.artifact.schema import Dim, Graph, Input

from ...kinds.trace import Program, export_program, functional
from ...operators import attention  # noqa: F401  (registers operators that are written out here)
from ...precision import MATMULS
from ...quantize import linear as quantized
from . import linear
from .attention import Step, cached_attention, cross_attention
from .kernel_set import Kernels

__all__ = ["Forms", "Lowered", "lower"]


@dataclass(frozen=True)
class Lowered:
    """A program that returns `graph.outputs` without the caches, which it changes in place, and `graph` as it is."""

    graph: Graph
    exported: torch.export.ExportedProgram


@dataclass(frozen=True)
class Forms:
    """How a backend wants things written.

    Attributes:
        materialize: marks what is to be computed once and not inside every loop that reads it.
        sums: linear layers of few rows as products and sums rather than as products of matrices.
        kernels: what computes these sums, and attention, where that is more than operators of ATen.
        product: the dtype of products of matrices with codes.
        widened: dtypes whose products of matrices and convolutions are computed in float32, since the processor has no
            instructions for them.
        functional: see `precast.exporter.kinds.trace.functional`; a compiler that does that itself goes without.
        whole: attention looks at all rows of the caches rather than at as many as the input `rows` says, and multiplies
            matrices for one token as well: for hardware that wants every dimension fixed.
    """

    materialize: Callable[[Tensor], Tensor] = lambda x: x
    sums: bool = False
    kernels: Kernels | None = None
    product: torch.dtype = torch.float32
    widened: frozenset[torch.dtype] = frozenset()
    functional: bool = True
    whole: bool = False


def lower(program: Program, forms: Forms) -> Lowered:
    """Replace our operators and update caches in place. Raises ExportError."""
    attends = _uses(program.exported, torch.ops.precast.cached_attention.default)
    graph = _with_rows(program.graph) if attends and not forms.whole else program.graph
    if not attends and not graph.cache and not _ours(program.exported) and not _widens(program.exported, forms):
        return Lowered(graph, _finished(program.exported, forms))
    module = _Replayed(program, graph, forms)
    example, shapes = _example(graph), _shapes(graph)
    exported = export_program(module, example, shapes)
    return Lowered(graph, _finished(exported, forms))


def _finished(exported: torch.export.ExportedProgram, forms: Forms) -> torch.export.ExportedProgram:
    return functional(exported) if forms.functional else exported


def _ours(exported: torch.export.ExportedProgram) -> bool:
    return any(str(node.target).startswith("precast.") for node in exported.graph.nodes)


def _widens(exported: torch.export.ExportedProgram, forms: Forms) -> bool:
    return any(_multiplies(node.target) and node.meta["val"].dtype in forms.widened for node in exported.graph.nodes)


def _multiplies(target: Any) -> bool:
    return getattr(target, "overloadpacket", None) in MATMULS


def _uses(exported: torch.export.ExportedProgram, target: Any) -> bool:
    return any(node.target is target for node in exported.graph.nodes)


def _with_rows(graph: Graph) -> Graph:
    """The graph with an input that says how many cache rows to look at, and caches with a row to spare: a part of them
    is then never the whole, which would be laid out otherwise and so need another program."""
    caches = {name for layer in graph.cache for name in (layer.key_in, layer.value_in, layer.key_out, layer.value_out)}
    rows = Input(name=CACHE_POSITIONS, dtype="int64", shape=[Dim(min=2, max=graph.capacity)], pad=0)
    return replace(
        graph,
        inputs=[*(_longer(spec, caches) for spec in graph.inputs), rows],
        outputs=[_longer(spec, caches) for spec in graph.outputs],
    )


def _longer(spec: Any, caches: set[str]) -> Any:
    """A cache with one row more; any other tensor as it is."""
    if spec.name not in caches:
        return spec
    batch, heads, capacity, width = spec.shape
    return replace(spec, shape=[batch, heads, capacity + 1, width])


_LINEAR = (torch.ops.aten.linear.default, torch.ops.precast.quantized_linear.default)
_TYPICAL = {"input_ids": 8, "logit_positions": 3, CACHE_POSITIONS: 512}
"""Sizes of free dimensions to trace with, no two alike. They are also what a compiler takes for usual."""


def _example(graph: Graph) -> tuple[Tensor, ...]:
    return tuple(_tensor(spec) for spec in graph.inputs)


def _tensor(spec: Input) -> Tensor:
    typical = _TYPICAL.get(spec.name, 5)
    shape = [min(size.max, typical) if isinstance(size, Dim) else size for size in spec.shape]
    if spec.name == CACHE_POSITIONS:
        return torch.arange(shape[0])
    return torch.ones(shape, dtype=getattr(torch, spec.dtype))


def _shapes(graph: Graph) -> tuple[Any, ...] | None:
    """Free dimensions, one symbol for each pair of bounds and name."""
    free = [
        {index: _symbol(spec, size) for index, size in enumerate(spec.shape) if isinstance(size, Dim)} or None
        for spec in graph.inputs
    ]
    return (tuple(free),) if any(free) else None


def _symbol(spec: Input, size: Dim) -> Any:
    return torch.export.Dim(spec.name, min=size.min, max=size.max)


class _Replayed(nn.Module):
    """A traced program with its weights under their own names, whose nodes are run one by one."""

    def __init__(self, program: Program, graph: Graph, forms: Forms) -> None:
        super().__init__()
        self.graph, self.forms, self.caches = graph, forms, _cache_pairs(program.graph)
        # In a tuple, so that it is no submodule, whose name would come before those of the weights.
        self.traced, self.lifted = (program.exported.graph_module,), list(_lifted(program.exported))
        for name, tensor in self.lifted:
            _place(self, name, tensor)

    def train(self, mode: bool = True) -> _Replayed:
        """As it is: a traced program cannot be trained."""
        return self

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip((spec.name for spec in self.graph.inputs), inputs, strict=True))
        rows = torch.arange(self.graph.capacity) if self.forms.whole else given.pop(CACHE_POSITIONS, None)
        step = None if rows is None else self._step(rows)
        weights = [self.get_parameter_or_buffer(name) for name, _ in self.lifted]
        positions = given["logit_positions"].shape[1] if "logit_positions" in given else None
        results = _Replacing(self.traced[0], self.forms, step, positions).run(*weights, *given.values())
        outputs = dict(zip((spec.name for spec in self.graph.outputs), results, strict=True))
        for before, after in self.caches:
            if (result := outputs.pop(after)) is not given[before]:
                given[before].copy_(result)
        return tuple(outputs.values())

    def _step(self, rows: Tensor) -> Step:
        forms = self.forms
        return Step(rows, forms.materialize, forms.whole, forms.kernels, _product(self.traced[0].graph, forms))

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        found: Tensor = getattr(self.get_submodule(path), last)
        return found


def _product(graph: fx.Graph, forms: Forms) -> torch.dtype:
    """What a prompt's attention is multiplied in: it needs no more digits than the layers around it."""
    dtypes = {_node(node.args[1]).meta["val"].dtype for node in graph.nodes if node.target in _LINEAR}
    if torch.uint8 in dtypes:
        return forms.product
    return torch.bfloat16 if torch.bfloat16 in dtypes - forms.widened else torch.float32


def _cache_pairs(graph: Graph) -> list[tuple[str, str]]:
    return [
        pair for layer in graph.cache for pair in ((layer.key_in, layer.key_out), (layer.value_in, layer.value_out))
    ]


def _lifted(exported: torch.export.ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    """Weights and constants by name, in the order in which the graph takes them."""
    for spec in exported.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            name = str(spec.target)
            held: Mapping[str, Any] = exported.state_dict if name in exported.state_dict else exported.constants
            yield name, held[name].detach()


def _place(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a buffer under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_buffer(last, tensor)


class _Replacing(fx.Interpreter):
    """Runs a graph with our operators written out in ATen."""

    def __init__(self, module: fx.GraphModule, forms: Forms, step: Step | None, positions: Any = None) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.forms, self.step, self.positions = forms, step, positions
        self.beside = _linear_layers(module.graph) if forms.kernels else {}

    def run_node(self, node: fx.Node) -> Any:
        """A linear layer for few rows is computed together with all that take the same input."""
        together = self.beside.get(node, ())
        if not together or not self._is_few(self.env[_node(node.args[0])]):
            return super().run_node(node)
        assert self.forms.kernels, "layers are looked for only where there is one"
        layers = [self._layer(each) for each in together]
        self.env.update(zip(together, linear.side_by_side(layers, self.forms.kernels.rows), strict=True))
        return self.env[node]

    def _layer(self, node: fx.Node) -> linear.Layer:
        for each in node.all_input_nodes:
            self._need(each)
        args, _ = self.fetch_args_kwargs_from_env(node)
        return _as_layer(node.target, *args)

    def _need(self, node: fx.Node) -> None:
        """Run a node, and what it needs, before its turn."""
        if node not in self.env:
            for each in node.all_input_nodes:
                self._need(each)
            self.env[node] = self.run_node(node)

    def _is_few(self, x: Tensor) -> bool:
        return linear.is_few(x) or _is_last(self, x)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if written := _WRITTEN.get(target):
            return written(self, *args, **kwargs)
        if _multiplies(target):
            return self.multiply(target, *args, **kwargs)
        return super().call_function(target, args, kwargs)

    def multiply(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """A product of matrices in its own dtype, or in float32 where the processor has no instructions for that."""
        narrow = {each.dtype for each in tree_leaves(args) if isinstance(each, Tensor)} & self.forms.widened
        if not narrow:
            return target(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.dtype in narrow else x, (args, kwargs))
        return target(*args, **kwargs).to(narrow.pop())


def _attention(run: _Replacing, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Any:
    assert run.step is not None, "a program with cached attention knows which rows to look at"
    return cached_attention(run.step, q, k, v, k_cache, v_cache, *rest), k_cache, v_cache


def _cross_attention(run: _Replacing, *args: Any) -> Tensor:
    return cross_attention(*args)


def _linear(run: _Replacing, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if run.forms.sums and linear.is_few(x):
        return linear.linear(x, weight, bias, run.forms.materialize)
    product: Tensor = run.multiply(torch.ops.aten.linear.default, x, weight, bias)
    return product


def _quantized_linear(
    run: _Replacing, x: Tensor, codes: Tensor, scales: Tensor, zeros: Any, bias: Any, *rest: int
) -> Tensor:
    if not run.forms.sums:
        return quantized.multiply(x, codes, scales, zeros, bias, *rest)
    weight = linear.Codes(codes, scales, zeros, *rest)
    forms = run.forms
    return linear.quantized_linear(x, weight, bias, forms.materialize, forms.product, forms.kernels, run._is_few(x))


def _is_last(run: _Replacing, x: Tensor) -> bool:
    """Whether these are the rows whose logits were asked for: of a prompt one as a rule, whatever may be allowed."""
    return isinstance(run.positions, torch.SymInt) and str(x.shape[-2]) == str(run.positions)


def _quantized_embedding(run: _Replacing, *args: Any) -> Tensor:
    return quantized.look_up(*args)


def _view(run: _Replacing, x: Tensor, shape: Any) -> Tensor:
    """What is written here may lie in memory otherwise than what it stands for."""
    return x.reshape(shape)


def _once(compute: Callable[[Tensor], Tensor]) -> Callable[[_Replacing, Tensor], Tensor]:
    """What takes long and is the same for all layers: a position's sines and cosines."""
    return lambda run, x: run.forms.materialize(compute(x))


_WRITTEN: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.cos.default: _once(torch.cos),
    torch.ops.aten.sin.default: _once(torch.sin),
    torch.ops.aten.view.default: _view,
    torch.ops.precast.cached_attention.default: _attention,
    torch.ops.precast.cross_attention.default: _cross_attention,
    torch.ops.precast.quantized_linear.default: _quantized_linear,
    torch.ops.precast.quantized_embedding.default: _quantized_embedding,
    torch.ops.aten.linear.default: _linear,
}


def _linear_layers(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Each linear layer's node with those, in their order, that can be computed together with it."""
    alike: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if kind := _kind(node):
            alike.setdefault((_source(_node(node.args[0])), *kind), []).append(node)
    return {node: tuple(nodes) for nodes in alike.values() for node in nodes}


def _kind(node: fx.Node) -> tuple[Any, ...]:
    """What is equal for layers that one kernel can compute; nothing for what is none."""
    if node.target is torch.ops.aten.linear.default:
        weight: Tensor = _node(node.args[1]).meta["val"]
        fits = weight.is_contiguous() and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return (weight.dtype, weight.shape[1]) if fits else ()
    if node.target is torch.ops.precast.quantized_linear.default:
        _, _, _, zeros, _, *sizes = node.args
        return (zeros is None, *sizes)
    return ()


def _source(node: fx.Node) -> fx.Node:
    """What a layer's input is a multiple of: its own balance for each is multiplied in on the way."""
    while node.target is torch.ops.aten.mul.Tensor and _is_held(node.args[1]):
        node = _node(node.args[0])
    return node


def _is_held(argument: Any) -> bool:
    """Whether this is a weight, or one in another dtype."""
    while isinstance(argument, fx.Node) and argument.target is torch.ops.aten.to.dtype:
        argument = argument.args[0]
    return isinstance(argument, fx.Node) and argument.op == "placeholder"


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node), "a tensor"
    return argument


def _as_layer(target: Any, x: Tensor, weight: Tensor, *rest: Any) -> linear.Layer:
    if target is torch.ops.aten.linear.default:
        return linear.Layer(x, weight, rest[0] if rest else None)
    scales, zeros, bias, *sizes = rest
    return linear.Layer(x, linear.Codes(weight, scales, zeros, *sizes), bias)
