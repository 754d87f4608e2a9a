"""Less than float32 in a traced program: a pass between tracing and compiling.

Programs are traced in float32. The pass decides for every operator whether it computes in the cast type, puts casts
where the two meet, and stores a weight in the cast type when an operator of the cast type reads it. Operators that
only move numbers take them as they come. What callers give and get stays float32; only what graphs hand to each other
(caches, what an encoder made) is of the cast type where everything is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec
import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from precast.runtime.artifact.backends import get_backend
from precast.runtime.artifact.schema import Dtype, Graph

from .kinds.trace import Program, functional
from .options import ExportOptions

__all__ = ["MATMULS", "Cast", "cast", "cast_of"]

Key: TypeAlias = tuple[Any, ...]
aten: Any = torch.ops.aten
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

MATMULS = frozenset(
    {
        aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.einsum,
        aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution,
        aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d, aten.scaled_dot_product_attention,
    }
)  # fmt: skip
"""Products of matrices and convolutions."""
_CARRIERS = frozenset(
    {
        operator.getitem,
        aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze,
        aten.transpose, aten.permute, aten.t, aten.expand, aten.expand_as, aten.select, aten.slice, aten.narrow,
        aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.cat, aten.stack, aten.repeat,
        aten.repeat_interleave, aten.flip, aten.roll, aten.embedding, aten.gather, aten.index, aten.index_select,
        aten.alias, aten.clone, aten.contiguous, aten.detach, aten.dropout, aten.constant_pad_nd, aten.pad,
    }
)  # fmt: skip
_IN_FLOAT32 = frozenset(
    {
        aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.logsumexp,
        aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten.group_norm, aten.batch_norm, aten.instance_norm,
        aten.pow, aten.square, aten.mean, aten.var, aten.var_mean, aten.std, aten.rsqrt, aten.sum, aten.cumsum,
        aten.prod, aten.norm, aten.linalg_vector_norm, aten.exp, aten.log, aten.softplus,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Cast:
    """`products`: only products of matrices and convolutions are computed in `dtype`; `all`: everything but norms,
    softmax and what adds up many numbers; `weights`: all as well, and every parameter is stored in it."""

    what: Literal["products", "all", "weights"]
    dtype: torch.dtype

    @property
    def name(self) -> Dtype:
        found: Dtype = str(self.dtype).removeprefix("torch.")  # type: ignore[assignment]
        return found


def cast_of(options: ExportOptions) -> Cast | None:
    """What the options ask of this pass; None for programs that stay in float32."""
    if options.dtype != "float32":
        return Cast("weights", getattr(torch, options.dtype))
    if options.auto_cast == "none" or get_backend(options.backend).casts_itself:
        return None
    what: Literal["products", "all"] = "products" if options.auto_cast == "matmul" else "all"
    return Cast(what, getattr(torch, options.cast_dtype))


def cast(programs: Sequence[Program], how: Cast) -> list[Program]:
    """The programs with part of their operators in `how.dtype`; their graphs are rewritten in place.

    A weight is cast once for all of them: programs that read one tensor read one tensor afterwards.
    """
    handed = _handed_on([program.graph for program in programs]) if how.what != "products" else frozenset()
    passes = [_Pass(program, how, handed) for program in programs]
    marked = {key for each in passes for key in each.low_weights()}
    stored: dict[Key, Tensor] = {}
    return [each.apply(marked, stored) for each in passes]


def _handed_on(graphs: Sequence[Graph]) -> frozenset[str]:
    """What no caller sees: caches, and outputs of a graph that are inputs of another."""
    made = {output.name for graph in graphs for output in graph.outputs}
    taken = {spec.name for graph in graphs for spec in graph.inputs}
    layers = [layer for graph in graphs for layer in graph.cache if layer.dtype == "float32"]
    caches = {name for it in layers for name in (it.key_in, it.key_out, it.value_in, it.value_out)}
    return frozenset(caches | (made & taken))


class _Pass:
    """One program's pass. A node is `low` when its floating values are of the cast type."""

    def __init__(self, program: Program, how: Cast, handed: frozenset[str]) -> None:
        exported = program.exported
        if any(_is_mutating(node) for node in exported.graph.nodes):
            # A cast copies, and what is written to a copy is lost.
            exported = functional(exported)
        self.exported, self.described, self.how, self.handed = exported, program.graph, how, handed
        self.weights = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs if spec.target}
        self.low: set[Node] = set()
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        self.activations = self._activations()
        self.inclined = self._inclined()

    def _activations(self) -> set[Node]:
        """What depends on a parameter or on numbers that a caller gives. All else (positions, angles, masks) is made
        of whole numbers, which the cast types cannot count."""
        kinds = (InputKind.PARAMETER, InputKind.USER_INPUT)
        names = {each.arg.name for each in self.exported.graph_signature.input_specs if each.kind in kinds}
        found: set[Node] = set()
        for node in self.exported.graph.nodes:
            is_source = node.op == "placeholder" and node.name in names and _is_float(node)
            if is_source or any(each in found and _is_float(each) for each in node.all_input_nodes):
                found.add(node)
        return found

    def _inclined(self) -> set[Node]:
        """Where everything is cast: what depends on a parameter, a product or a cache without float32 in between, so
        that what a model computes in float32 by itself (a norm's variance, say) stays so to its end."""
        names = {*self.exported.graph_signature.inputs_to_parameters, *self._handed_inputs()}
        found: set[Node] = set()
        for node in self.exported.graph.nodes if self.how.what != "products" else ():
            if node.op == "placeholder":
                is_source = node.name in names
            else:
                is_source = _kind(node) in MATMULS or (
                    any(each in found for each in _float_inputs(node)) and not self._is_kept(node)
                )
            if is_source and _is_float(node):
                found.add(node)
        return found

    def _is_kept(self, node: Node) -> bool:
        """Whether it is computed in float32 though its inputs are not: because of what it is, or as it says."""
        if _kind(node) is torch.ops.precast.cached_attention:
            return not _is_float(node.args[3])
        is_told = any(each is torch.float32 for each in tree_leaves((node.args, node.kwargs)))
        return is_told or _kind(node) in _IN_FLOAT32

    def low_weights(self) -> Iterator[Key]:
        """The keys of all weights that an operator of the cast type reads, straight or through carriers."""
        if self.how.what == "weights":
            yield from (_key(self._tensor(name)) for name in self.exported.graph_signature.inputs_to_parameters)
        for node in self.exported.graph.nodes:
            if self._wants(node) == "low":
                for weight in self._weights_behind(_cast_inputs(node)):
                    yield _key(self._tensor(weight.name))

    def _weights_behind(self, nodes: Iterable[Node]) -> Iterator[Node]:
        for node in nodes:
            if node.op == "placeholder" and node in self.activations and node.name in self.weights:
                yield node
            elif self._wants(node) == "any":
                yield from self._weights_behind(_float_inputs(node))

    def _tensor(self, name: str) -> Tensor:
        target = self.weights[name]
        found: Tensor | None = self.exported.state_dict.get(target)
        return self.exported.constants[target] if found is None else found

    def _wants(self, node: Node) -> Literal["low", "float32", "any"]:
        if node.op != "call_function":
            return "float32"
        if _kind(node) in _CARRIERS:
            return "any"
        is_low = _kind(node) in MATMULS if self.how.what == "products" else node in self.inclined
        return "low" if is_low and _is_float(node) else "float32"

    # ---------------------------------------------------------------- rewriting

    def apply(self, marked: set[Key], stored: dict[Key, Tensor]) -> Program:
        """Rewrite the graph. `stored` holds the cast weights, by the keys of those that they were made of."""
        graph, handed = self.exported.graph, self._handed_inputs()
        for node, wants in [(node, self._wants(node)) for node in graph.nodes]:
            if node.op == "placeholder":
                if node.name in handed or self._is_stored_low(node, marked, stored):
                    self._lower(node)
            elif node.target is aten._assert_tensor_metadata.default:
                # It says which type was traced.
                graph.erase_node(node)
            elif node.op != "output":
                self._rewrite(node, wants)
        self._outputs()
        self._example(handed)
        graph.lint()
        self.exported.graph_module.recompile()
        return Program(self._described(), self.exported)

    def _handed_inputs(self) -> set[str]:
        pairs = zip(self.exported.graph_signature.user_inputs, self.described.inputs, strict=True)
        return {str(placeholder) for placeholder, spec in pairs if spec.name in self.handed}

    def _is_stored_low(self, node: Node, marked: set[Key], stored: dict[Key, Tensor]) -> bool:
        """Whether the placeholder's weight is marked; it is then stored in the cast type."""
        target = self.weights.get(node.name)
        key = None if target is None else _key(self._tensor(node.name))
        if target is None or key is None or key not in marked:
            return False
        if key not in stored:
            cast_weight = self._tensor(node.name).detach().to(self.how.dtype)
            stored[key] = torch.nn.Parameter(cast_weight, requires_grad=False)
        place: Any = self.exported.state_dict if target in self.exported.state_dict else self.exported.constants
        place[target] = stored[key]
        return True

    def _rewrite(self, node: Node, wants: str) -> None:
        inputs = _float_inputs(node)
        if wants == "any":
            lows = [each for each in inputs if each in self.low]
            is_low = lows and (len(lows) == len(inputs) or self.how.what != "products")
            wants = "low" if is_low else "float32"
        if wants == "low":
            for each in _cast_inputs(node):
                node.replace_input_with(each, self._down(each, node))
            node.args, node.kwargs = tree_map(self._bounded, (node.args, node.kwargs))
            self._lower(node)
        else:
            for each in inputs:
                node.replace_input_with(each, self._up(each, node))

    def _lower(self, node: Node) -> None:
        self.low.add(node)
        node.meta["val"] = tree_map(lambda value: _retyped(value, self.how.dtype), node.meta["val"])

    def _down(self, node: Node, user: Node) -> Node:
        if node in self.low:
            return node
        if node in self.activations or (node, self.how.dtype) in self.casts:
            return self._to(node, self.how.dtype, user)
        bound = self._bounded(math.inf)
        with user.graph.inserting_before(user):
            clamped = user.graph.call_function(aten.clamp.default, (node, -bound, bound))
        clamped.meta["val"] = node.meta["val"]
        self.casts[node, self.how.dtype] = found = self._to(clamped, self.how.dtype, user)
        return found

    def _bounded(self, value: Any) -> Any:
        """A mask's lowest float32 would be infinite, and infinities that are added up are no numbers any more."""
        bound = torch.finfo(self.how.dtype).max / 2
        return max(-bound, min(bound, value)) if isinstance(value, float) else value

    def _up(self, node: Node, user: Node) -> Node:
        return self._to(node, torch.float32, user) if node in self.low else node

    def _to(self, node: Node, dtype: torch.dtype, user: Node) -> Node:
        if (node, dtype) not in self.casts:
            with user.graph.inserting_before(user):
                made = user.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
            made.meta["val"] = _retyped(node.meta["val"], dtype)
            self.casts[node, dtype] = made
        return self.casts[node, dtype]

    def _outputs(self) -> None:
        """Results go out in float32, what is handed on in the cast type."""
        output = self.exported.graph.output_node()
        specs = self.exported.graph_signature.output_specs
        results = [index for index, spec in enumerate(specs) if spec.kind == OutputKind.USER_OUTPUT]
        found = list(output.args[0])
        for index, spec in zip(results, self.described.outputs, strict=True):
            change = self._down if spec.name in self.handed else self._up
            found[index] = change(found[index], output)
            specs[index].arg = TensorArgument(name=found[index].name)
        output.args = (tuple(found),)

    def _example(self, handed: set[str]) -> None:
        flat, spec = tree_flatten(self.exported.example_inputs)
        names = self.exported.graph_signature.user_inputs
        cast = [each.to(self.how.dtype) if name in handed else each for name, each in zip(names, flat, strict=True)]
        self.exported.example_inputs = tree_unflatten(cast, spec)

    def _described(self) -> Graph:
        changed: dict[str, list[Any]] = {
            "inputs": [self._respecified(each, each.name) for each in self.described.inputs],
            "outputs": [self._respecified(each, each.name) for each in self.described.outputs],
            "cache": [self._respecified(each, each.key_in) for each in self.described.cache],
        }
        return msgspec.structs.replace(self.described, **changed)

    def _respecified(self, spec: Any, name: str) -> Any:
        return msgspec.structs.replace(spec, dtype=self.how.name) if name in self.handed else spec


def _key(tensor: Tensor) -> Key:
    """What tells one weight from another; tied ones are one."""
    return tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _kind(node: Node) -> Any:
    """The operator, whichever of its overloads it is."""
    return getattr(node.target, "overloadpacket", node.target)


def _is_float(node: Any) -> bool:
    values = tree_leaves(node.meta.get("val")) if isinstance(node, Node) else []
    return any(isinstance(value, Tensor) and value.dtype in _FLOATS for value in values)


def _float_inputs(node: Node) -> list[Node]:
    return [each for each in node.all_input_nodes if _is_float(each)]


def _cast_inputs(node: Node) -> list[Node]:
    """What an operator of the cast type must be given in it. Attention's scales, slopes and biases are float32."""
    own = torch.ops.precast.cached_attention.default
    taken = node.args[:5] if node.target is own else None
    return [each for each in _float_inputs(node) if taken is None or each in taken]


def _is_mutating(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _retyped(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or value.dtype not in _FLOATS:
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return value.to(dtype)
