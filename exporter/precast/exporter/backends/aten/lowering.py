"""Program -> program of ATen operators that updates its caches in place.

The traced graph is run once more, node by node, with our own operators replaced by ATen, and traced again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_map_only

from precast.runtime.artifact import CACHE_POSITIONS, DECODER_INPUTS
from precast.runtime.artifact.schema import Dim, Graph, Input

from ...kinds.trace import Program, export_program, functional
from ...operators import attention  # noqa: F401  (registers operators that are lowered here)
from ...operators.lora import add_adapters
from ...precision import MATMULS
from ...quantize import int8_linear
from ...quantize import linear as quantized
from . import linear
from .attention import AttentionContext, cached_attention, cross_attention
from .lowered import Lowered, LoweringOptions

__all__ = ["lower", "products_of"]


def lower(program: Program, options: LoweringOptions) -> Lowered:
    """Replace our operators and update caches in place. Raises ExportError."""
    attends = _contains(program.exported, torch.ops.precast.cached_attention.default)
    graph = _add_positions_input(program.graph) if attends and not options.static_cache_view else program.graph
    if not attends and not graph.cache and not _needs_lowering(program.exported, options):
        return Lowered(graph, _functionalize(program.exported, options))
    module = _LoweredModule(program, graph, options)
    exported = export_program(module, _make_example(graph), _dynamic_shapes(graph))
    return Lowered(graph, _functionalize(exported, options))


def _functionalize(exported: torch.export.ExportedProgram, options: LoweringOptions) -> torch.export.ExportedProgram:
    return functional(exported) if options.functional else exported


def _needs_lowering(exported: torch.export.ExportedProgram, options: LoweringOptions) -> bool:
    return _has_own_operators(exported) or _has_float32_matmul(exported, options)


def _has_own_operators(exported: torch.export.ExportedProgram) -> bool:
    return any(str(node.target).startswith("precast.") for node in exported.graph.nodes)


def _has_float32_matmul(exported: torch.export.ExportedProgram, options: LoweringOptions) -> bool:
    return any(node.meta["val"].dtype in options.float32_matmuls for node in products_of(exported))


def products_of(exported: torch.export.ExportedProgram) -> Iterator[fx.Node]:
    """The nodes that multiply matrices, convolutions included."""
    return (node for node in exported.graph.nodes if _is_matmul(node.target))


def _is_matmul(target: Any) -> bool:
    return getattr(target, "overloadpacket", None) in MATMULS


def _contains(exported: torch.export.ExportedProgram, target: Any) -> bool:
    return any(node.target is target for node in exported.graph.nodes)


def _add_positions_input(graph: Graph) -> Graph:
    """Add an input that says how many cache positions to read, and a spare position to every cache: the part that is
    read is then never the whole, whose strides would need another program."""
    caches = {name for layer in graph.cache for name in (layer.key_in, layer.value_in, layer.key_out, layer.value_out)}
    rows = Input(name=CACHE_POSITIONS, dtype="int64", shape=[Dim(min=2, max=graph.capacity)], pad=0)
    return replace(
        graph,
        inputs=[*(_add_spare_position(spec, caches) for spec in graph.inputs), rows],
        outputs=[_add_spare_position(spec, caches) for spec in graph.outputs],
    )


def _add_spare_position(spec: Any, caches: set[str]) -> Any:
    """A cache with one position more; any other tensor unchanged."""
    if spec.name not in caches:
        return spec
    batch, heads, capacity, width = spec.shape
    return replace(spec, shape=[batch, heads, capacity + 1, width])


_INT8 = torch.ops.precast.int8_linear.default
_LINEAR = (torch.ops.aten.linear.default, torch.ops.precast.quantized_linear.default, _INT8)
_CODES = {torch.uint8, torch.int8}
_TYPICAL = {"input_ids": 8, "logit_positions": 3, CACHE_POSITIONS: 512}
"""Sizes of free dimensions to trace with, no two alike. A compiler takes them as hints of the usual size."""


def _make_example(graph: Graph) -> tuple[Tensor, ...]:
    return tuple(_example_input(spec) for spec in graph.inputs)


def _example_input(spec: Input) -> Tensor:
    typical = _TYPICAL.get(_source_of_sizes(spec), 5)
    shape = [min(size.max, typical) if isinstance(size, Dim) else size for size in spec.shape]
    if spec.name == CACHE_POSITIONS:
        return torch.arange(shape[0])
    return torch.ones(shape, dtype=getattr(torch, spec.dtype))


def _dynamic_shapes(graph: Graph) -> tuple[Any, ...] | None:
    """Free dimensions, one symbol for each pair of bounds and name."""
    free = [
        {index: _make_symbol(spec, size) for index, size in enumerate(spec.shape) if isinstance(size, Dim)} or None
        for spec in graph.inputs
    ]
    return (tuple(free),) if any(free) else None


def _make_symbol(spec: Input, size: Dim) -> Any:
    return torch.export.Dim(_source_of_sizes(spec), min=size.min, max=size.max)


def _source_of_sizes(spec: Input) -> str:
    """The input whose free size this one has: what stages pass to each other is as long as the tokens."""
    return DECODER_INPUTS[0] if "length" in spec.axes else spec.name


class _LoweredModule(nn.Module):
    """A traced program as a module: its weights under their own names, its nodes run one by one."""

    def __init__(self, program: Program, graph: Graph, options: LoweringOptions) -> None:
        super().__init__()
        self.graph, self.options, self.caches = graph, options, _cache_pairs(program.graph)
        # In a tuple, so that it is no submodule, whose name would come before those of the weights.
        self.traced, self.lifted = (program.exported.graph_module,), list(_lifted_tensors(program.exported, options))
        for name, tensor in self.lifted:
            _register_buffer(self, name, tensor)

    def train(self, mode: bool = True) -> _LoweredModule:
        """Do nothing: a traced program has no training mode."""
        return self

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip((spec.name for spec in self.graph.inputs), inputs, strict=True))
        is_static = self.options.static_cache_view
        positions = torch.arange(self.graph.capacity) if is_static else given.pop(CACHE_POSITIONS, None)
        context = None if positions is None else self._attention_context(positions)
        weights = [self.get_parameter_or_buffer(name) for name, _ in self.lifted]
        logit_rows = given["logit_positions"].shape[1] if "logit_positions" in given else None
        results = _LoweringInterpreter(self.traced[0], self.options, context, logit_rows).run(*weights, *given.values())
        outputs = dict(zip((spec.name for spec in self.graph.outputs), results, strict=True))
        for before, after in self.caches:
            if (result := outputs.pop(after)) is not given[before]:
                given[before].copy_(result)
        return tuple(outputs.values())

    def _attention_context(self, positions: Tensor) -> AttentionContext:
        options, dtype = self.options, _attention_matmul_dtype(self.traced[0].graph, self.options)
        return AttentionContext(positions, options.materialize, options.static_cache_view, options.kernels, dtype)

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        found: Tensor = getattr(self.get_submodule(path), last)
        return found


def _attention_matmul_dtype(graph: fx.Graph, options: LoweringOptions) -> torch.dtype:
    """The dtype of attention's matrix products in prefill: it needs no more precision than the layers around it."""
    dtypes = {_as_node(node.args[1]).meta["val"].dtype for node in graph.nodes if node.target in _LINEAR}
    if dtypes & _CODES:
        return options.matmul_dtype
    return torch.bfloat16 if torch.bfloat16 in dtypes - options.float32_matmuls else torch.float32


def _cache_pairs(graph: Graph) -> list[tuple[str, str]]:
    return [
        pair for layer in graph.cache for pair in ((layer.key_in, layer.key_out), (layer.value_in, layer.value_out))
    ]


def _lifted_tensors(exported: torch.export.ExportedProgram, options: LoweringOptions) -> Iterator[tuple[str, Tensor]]:
    """Weights and constants by name, in the order in which the graph takes them; codes that only the backend's kernel
    reads as it has them."""
    packed = {node.name for node in exported.graph.find_nodes(op="placeholder") if options.kernels and _is_codes(node)}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            name = str(spec.target)
            held: Mapping[str, Any] = exported.state_dict if name in exported.state_dict else exported.constants
            tensor = held[name].detach()
            yield name, options.kernels.pack_int8(tensor) if options.kernels and spec.arg.name in packed else tensor


def _is_codes(node: fx.Node) -> bool:
    """Whether this is nothing but the codes of products of 8 bits."""
    return bool(node.users) and all(user.target is _INT8 and user.args[1] is node for user in node.users)


def _register_buffer(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a buffer under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_buffer(last, tensor)


class _LoweringInterpreter(fx.Interpreter):
    """Runs a graph with our operators replaced by ATen. `logit_rows` is the number of positions whose logits are asked
    for, if it is free."""

    def __init__(
        self, module: fx.GraphModule, options: LoweringOptions, context: AttentionContext | None, logit_rows: Any = None
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.options, self.context, self.logit_rows = options, context, logit_rows
        self.siblings = _group_linear_layers(module.graph) if options.kernels else {}

    def run_node(self, node: fx.Node) -> Any:
        """Run a node; a linear layer of few rows together with all that have the same input."""
        together = self.siblings.get(node, ())
        if not together or not self._has_few_rows(self.env[_as_node(node.args[0])]):
            return super().run_node(node)
        assert self.options.kernels, "siblings are looked for only where there are kernels"
        layers = [self._fetch_layer(each) for each in together]
        self.env.update(zip(together, linear.compute_together(layers, self.options.kernels.gemv), strict=True))
        return self.env[node]

    def _fetch_layer(self, node: fx.Node) -> linear.Layer:
        for each in node.all_input_nodes:
            self._ensure_run(each)
        args, _ = self.fetch_args_kwargs_from_env(node)
        return _as_layer(node.target, *args)

    def _ensure_run(self, node: fx.Node) -> None:
        """Run a node, and those that it depends on, if that has not happened yet."""
        if node not in self.env:
            for each in node.all_input_nodes:
                self._ensure_run(each)
            self.env[node] = self.run_node(node)

    def _has_few_rows(self, x: Tensor) -> bool:
        return linear.has_few_rows(x) or self._is_logit_input(x)

    def _is_logit_input(self, x: Tensor) -> bool:
        """Whether x has the rows whose logits are asked for: one of a prompt as a rule, whatever the bounds allow."""
        return isinstance(self.logit_rows, torch.SymInt) and str(x.shape[-2]) == str(self.logit_rows)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if lowering := _LOWERINGS.get(target):
            return lowering(self, *args, **kwargs)
        if _is_matmul(target):
            return self.multiply(target, *args, **kwargs)
        return super().call_function(target, args, kwargs)

    def multiply(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """A matrix product in its own dtype, or in float32 where the processor has no instructions for that."""
        narrow = {each.dtype for each in tree_leaves(args) if isinstance(each, Tensor)} & self.options.float32_matmuls
        if not narrow:
            return target(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.dtype in narrow else x, (args, kwargs))
        return target(*args, **kwargs).to(narrow.pop())


def _attention(
    run: _LoweringInterpreter, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any
) -> Any:
    assert run.context is not None, "a program with cached attention has one"
    return cached_attention(run.context, q, k, v, k_cache, v_cache, *rest), k_cache, v_cache


def _cross_attention(run: _LoweringInterpreter, *args: Any) -> Tensor:
    assert run.context is not None, "a decoder that attends to an encoder has caches of its own"
    return cross_attention(run.context, *args)


def _linear(run: _LoweringInterpreter, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if run.options.reduce_small_matmul and linear.has_few_rows(x):
        return linear.gemv(x, weight, bias, run.options.materialize)
    product: Tensor = run.multiply(torch.ops.aten.linear.default, x, weight, bias)
    return product


def _quantized_linear(
    run: _LoweringInterpreter, x: Tensor, codes: Tensor, scales: Tensor, zeros: Any, bias: Any, *rest: int
) -> Tensor:
    options = run.options
    if not options.reduce_small_matmul:
        return quantized.multiply(x, codes, scales, zeros, bias, *rest)
    weight = linear.PackedWeight(codes, scales, zeros, *rest)
    return linear.quantized_linear(
        x, weight, bias, options.materialize, options.matmul_dtype, options.kernels, run._has_few_rows(x)
    )


def _int8_linear(run: _LoweringInterpreter, x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    kernels = run.options.kernels
    if kernels is None or codes.ndim == CODES_DIMENSIONS:
        return int8_linear.multiply_int8(x, codes, *rest)
    rows = kernels.int8_gemm(x.float().flatten(0, -2), codes, *rest)
    return rows.view(*x.shape[:-1], -1).to(x.dtype)


CODES_DIMENSIONS = 2
"""Of the operator's own codes; those that a kernel reads have more."""


def _quantized_embedding(run: _LoweringInterpreter, *args: Any) -> Tensor:
    return quantized.look_up(*args)


def _lora(run: _LoweringInterpreter, y: Tensor, x: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    kernels = run.options.kernels
    return (kernels.lora if kernels else add_adapters)(y, x, weights, slots)


def _view(run: _LoweringInterpreter, x: Tensor, shape: Any) -> Tensor:
    """A reshape: what replaces an operator may have other strides than its result had."""
    return x.reshape(shape)


def _materialize_result(compute: Callable[[Tensor], Tensor]) -> Callable[[_LoweringInterpreter, Tensor], Tensor]:
    """Compute once for all layers what takes long: sines and cosines of positions."""
    return lambda run, x: run.options.materialize(compute(x))


_LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.cos.default: _materialize_result(torch.cos),
    torch.ops.aten.sin.default: _materialize_result(torch.sin),
    torch.ops.aten.view.default: _view,
    torch.ops.precast.cached_attention.default: _attention,
    torch.ops.precast.cross_attention.default: _cross_attention,
    torch.ops.precast.quantized_linear.default: _quantized_linear,
    torch.ops.precast.quantized_embedding.default: _quantized_embedding,
    _INT8: _int8_linear,
    torch.ops.precast.lora.default: _lora,
    torch.ops.aten.linear.default: _linear,
}


def _group_linear_layers(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Each linear layer's node with those, itself included and in their order, that can be computed together."""
    alike: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if layer_format := _layer_format(node):
            alike.setdefault((_shared_input(_as_node(node.args[0])), *layer_format), []).append(node)
    return {node: tuple(nodes) for nodes in alike.values() for node in nodes}


def _layer_format(node: fx.Node) -> tuple[Any, ...]:
    """A key that is equal for layers that one call of a kernel can compute; empty for a node that is no such layer."""
    if node.target is torch.ops.aten.linear.default:
        weight: Tensor = _as_node(node.args[1]).meta["val"]
        fits = weight.is_contiguous() and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return (weight.dtype, weight.shape[1]) if fits else ()
    if node.target is torch.ops.precast.quantized_linear.default:
        _, _, _, zeros, _, *sizes = node.args
        return (zeros is None, *sizes)
    return ()


def _shared_input(node: fx.Node) -> fx.Node:
    """A layer's input before it is multiplied with the layer's own balance."""
    while node.target is torch.ops.aten.mul.Tensor and _is_weight(node.args[1]):
        node = _as_node(node.args[0])
    return node


def _is_weight(argument: Any) -> bool:
    """Whether this is a weight, possibly converted to another dtype."""
    while isinstance(argument, fx.Node) and argument.target is torch.ops.aten.to.dtype:
        argument = argument.args[0]
    return isinstance(argument, fx.Node) and argument.op == "placeholder"


def _as_node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node), "an argument that is a tensor"
    return argument


def _as_layer(target: Any, x: Tensor, weight: Tensor, *rest: Any) -> linear.Layer:
    if target is torch.ops.aten.linear.default:
        return linear.Layer(x, weight, rest[0] if rest else None)
    scales, zeros, bias, *sizes = rest
    return linear.Layer(x, linear.PackedWeight(weight, scales, zeros, *sizes), bias)
