"""Layers that are equal but for their weights and caches: compiled once, and called for each.

Inductor spends seconds on each layer, also where it writes the same code again. So the longest run of nodes that
repeats in a program becomes a program of its own, whose weights and caches are inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .layer_call import can_be_given
from .mutation import memory_of, mutated_arguments

__all__ = ["Layer", "extract_layers"]

MIN_NODES_SAVED = 200
"""Fewer take less time than two more C++ files."""

MAX_PERIODS = 8
"""How many are tried, by what they save."""


@dataclass(frozen=True)
class Layer:
    """A program that another calls several times. Its inputs are what the call before returned, what all calls share,
    and the weights and caches of this call; it returns one tensor."""

    name: str
    module: fx.GraphModule

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Fake tensors like its inputs."""
        return tuple(node.meta["val"] for node in self.module.graph.nodes if node.op == "placeholder")


def extract_layers(module: fx.GraphModule, prefix: str) -> list[Layer]:
    """Replace what repeats in a program by calls, in place, and so on in what is called. Returns the layers, each
    before its callers; their names begin with `prefix`."""
    _compute_once(module.graph)
    return _extract(module, prefix)


def _extract(module: fx.GraphModule, prefix: str) -> list[Layer]:
    layers: list[Layer] = []
    while run := _longest_run(module.graph):
        name = f"{prefix}_{len(layers)}"
        extracted = Layer(name, _make_module(module, run))
        _replace_by_calls(module, run, name)
        layers += [*_extract(extracted.module, name), extracted]
    return layers


def _compute_once(graph: fx.Graph) -> None:
    """Compute what follows from inputs alone (positions, masks) before everything else, and once for all layers."""
    written = {memory_of(target) for node in graph.nodes for target in mutated_arguments(node)}
    known: set[fx.Node] = {node for node in graph.nodes if node.op == "placeholder" and node not in written}
    same: dict[str, fx.Node] = {}
    rest: fx.Node | None = None
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        if node in written or not _is_pure(node) or not known.issuperset(node.all_input_nodes):
            rest = rest or node
            continue
        known.add(node)
        before = same.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
        if before is not node:
            node.replace_all_uses_with(before)
            graph.erase_node(node)
        elif rest:
            rest.prepend(node)


def _is_pure(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return not node.is_impure() and torch.Tag.nondeterministic_seeded not in tags


@dataclass
class _Run:
    """Nodes that are the same operators in the same order, several times.

    Attributes:
        bodies: the nodes of each copy.
        places: the copy and the place in it of each of these nodes.
        carried: what a copy takes from the one before: its place in that one, and where the first copy has it from.
        shared: sources outside that are the same for all copies.
        own: weights and inputs of the program, one for each copy.
    """

    bodies: Sequence[Sequence[fx.Node]]
    places: dict[fx.Node, tuple[int, int]]
    carried: dict[int, fx.Node] = field(default_factory=dict)
    shared: list[fx.Node] = field(default_factory=list)
    own: list[tuple[fx.Node, ...]] = field(default_factory=list)

    @property
    def inputs(self) -> list[fx.Node]:
        """What the second copy is given, or has as its own: tensors."""
        shared: dict[fx.Node, None] = {}
        for node in self.shared:
            shared.update(dict.fromkeys(_dense_sources(node)))
        return [self.result(0), *shared, *(mine[1] for mine in self.own)]

    def result(self, copy: int) -> fx.Node:
        """The node of a copy that the next one takes."""
        return self.bodies[copy][next(iter(self.carried))]


def _longest_run(graph: fx.Graph) -> _Run | None:
    """The run that saves most nodes, if it is enough of them."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    for start, period, copies in _repetitions(_numbered_texts(nodes)):
        bodies = [nodes[start + i * period : start + (i + 1) * period] for i in range(copies)]
        if (run := _connect(bodies)) and _is_callable(run):
            return run
    return None


def _numbered_texts(nodes: Sequence[fx.Node]) -> np.ndarray[Any, Any]:
    """A number for each node, the same for those that differ at most in where their arguments come from."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(_text(node), len(numbers)) for node in nodes])


def _text(node: fx.Node) -> str:
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda _: "%")
    values = fx.node.map_aggregate(_value(node), _text_of_value)
    return f"{node.target} {arguments} {values}"


def _text_of_value(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)} {value.stride()}" if isinstance(value, Tensor) else str(value)


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _repetitions(numbers: np.ndarray[Any, Any]) -> Iterator[tuple[int, int, int]]:
    """Start, period and copies of what repeats in a sequence, for the periods that save most, if that is enough: all
    copies, and one less, since the first or the last may be connected otherwise."""
    found = [(period, *_longest_true(numbers[:-period] == numbers[period:])) for period in range(1, len(numbers) // 2)]
    found.sort(key=lambda each: (-(each[2] // each[0] * each[0]), each[0]))
    for period, start, length in found[:MAX_PERIODS]:
        most = length // period + 1
        for copies in (most, most - 1):
            if (copies - 1) * period >= MIN_NODES_SAVED:
                for offset in range(length - (copies - 1) * period + 1):
                    yield start + offset, period, copies


def _longest_true(flags: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Start and length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    longest = int(np.argmax(ends - starts))
    return int(starts[longest]), int(ends[longest] - starts[longest])


def _connect(bodies: Sequence[Sequence[fx.Node]]) -> _Run | None:
    """What goes in and out of each copy, or None where it is not the same for all."""
    run = _Run(bodies, {node: (i, j) for i, body in enumerate(bodies) for j, node in enumerate(body)})
    for nodes in zip(*bodies, strict=True):
        for sources in zip(*map(_sources, nodes), strict=True):
            if not _add_sources(run, sources):
                return None
    return run


def _sources(node: fx.Node) -> list[fx.Node]:
    """The nodes among its arguments, each as often as it is there."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _add_sources(run: _Run, sources: Sequence[fx.Node]) -> bool:
    """Take in where one argument comes from in each copy; False where that is not the same."""
    places = [run.places.get(source) for source in sources]
    first, second = places[:2]
    if all(place is None for place in places):
        return _add_outside(run, sources)
    if first is None:
        return (
            second is not None
            and places[1:] == [(i, second[1]) for i in range(len(places) - 1)]
            and run.carried.setdefault(second[1], sources[0]) is sources[0]
        )
    return places == [(i, first[1]) for i in range(len(places))]


def _add_outside(run: _Run, sources: Sequence[fx.Node]) -> bool:
    if len(set(sources)) == 1:
        if sources[0] not in run.shared:
            run.shared.append(sources[0])
        return True
    if tuple(sources) not in run.own:
        run.own.append(tuple(sources))
    return all(source.op in ("get_attr", "placeholder") for source in sources)


def _is_callable(run: _Run) -> bool:
    """Whether each copy can be a call that takes dense tensors and returns one."""
    if len(run.carried) != 1 or not _returns_one(run) or not _writes_its_own(run):
        return False
    inputs = run.inputs
    return (
        all(_is_dense(node) for node in [*run.carried.values(), *inputs])
        and len({*inputs}) == len(inputs)
        and all(_is_derivable(node, inputs) for node in run.shared)
    )


def _returns_one(run: _Run) -> bool:
    """Whether nothing but the last copy's result is used by what is outside."""
    last = len(run.bodies) - 1
    outside = [node for node in run.places if any(user not in run.places for user in node.users)]
    return all(run.places[node] == (last, place) for node in outside for place in run.carried)


def _writes_its_own(run: _Run) -> bool:
    """Whether copies write to nothing but what they made, and to inputs of their own that nothing outside reads."""
    for node in run.bodies[1]:
        for target in map(memory_of, mutated_arguments(node)):
            mine = [sources for sources in run.own if sources[1] is target]
            if run.places.get(target, (None,))[0] == 1:
                continue
            if not mine or any(user not in run.places for source in mine[0] for user in source.users):
                return False
    return True


def _is_dense(node: fx.Node) -> bool:
    value = _value(node)
    return isinstance(value, Tensor) and can_be_given(value) and value.is_contiguous()


def _dense_sources(node: fx.Node) -> list[fx.Node]:
    """The dense tensors that a node is a view of, or itself; none for what follows from sizes alone."""
    if not _is_computed_from_tensors(node):
        return []
    if _is_dense(node) or node.op != "call_function":
        return [node]
    return [source for each in node.all_input_nodes for source in _dense_sources(each)]


def _is_computed_from_tensors(node: fx.Node) -> bool:
    return isinstance(_value(node), Tensor) and (
        node.op != "call_function" or any(map(_is_computed_from_tensors, node.all_input_nodes))
    )


def _is_derivable(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    """Whether a node is one of these inputs, the size of one, or follows from such."""
    if node in inputs or _dimension_of(node, inputs):
        return True
    return (
        node.op == "call_function"
        and _is_pure(node)
        and all(_is_derivable(each, inputs) for each in node.all_input_nodes)
    )


def _dimension_of(node: fx.Node, inputs: Sequence[fx.Node]) -> tuple[fx.Node, int] | None:
    """The input and the dimension that a node's number is the size of."""
    value = _value(node)
    if not isinstance(value, torch.SymInt):
        return None
    wanted = value.node.expr
    for source in inputs:
        sizes: list[Any] = list(_value(source).shape)
        for dimension, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and size.node.expr == wanted:
                return source, dimension
    return None


def _make_module(root: fx.GraphModule, run: _Run) -> fx.GraphModule:
    """The program of one copy, made of the second: in the first what is carried may be what is shared, too."""
    graph, inputs = fx.Graph(), run.inputs
    made = {node: _add_input(graph, f"x{i}", _value(node)) for i, node in enumerate(inputs)}

    def derive(node: fx.Node) -> fx.Node:
        if node not in made:
            if found := _dimension_of(node, inputs):
                made[node] = graph.call_function(torch.ops.aten.sym_size.int, (made[found[0]], found[1]))
                made[node].meta["val"] = _value(node)
            else:
                made[node] = graph.node_copy(node, derive)
        return made[node]

    for node in run.bodies[1]:
        derive(node)
    graph.output((made[run.result(1)],))
    return fx.GraphModule(root, graph)


def _add_input(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def _replace_by_calls(module: fx.GraphModule, run: _Run, name: str) -> None:
    (result,) = run.carried.values()
    _, *rest = run.inputs
    for i, body in enumerate(run.bodies):
        own = {mine[1]: mine[i] for mine in run.own}
        inputs = [result, *(own.get(node, node) for node in rest)]
        with module.graph.inserting_after(body[-1]):
            result = module.graph.call_function(torch.ops.precast.layer.default, (inputs, name))
        result.meta["val"] = _value(run.result(i))
    run.result(-1).replace_all_uses_with(result)
    for node in reversed([node for body in run.bodies for node in body]):
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
