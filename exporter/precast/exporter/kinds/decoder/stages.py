"""Traced decoders cut between their layers: one program per stage, each of which takes what the ones before have made.

A node belongs to the last layer that it needs anything of. What needs tokens or weights alone (positions, rotary
tables, masks) belongs to none, and each stage computes it for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, fx, nn
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils._pytree import tree_structure

from precast.runtime.artifact import DECODER_INPUTS
from precast.runtime.artifact.schema import Axis, CacheLayer, Dim, Graph, Input, Output
from precast.runtime.errors import ExportError, UsageError

from ..trace import Program, functional

__all__ = ["cut_programs", "find_layers", "share_layers"]

_Node = fx.Node


def find_layers(model: Any) -> str:
    """The name of the list of a decoder's layers: the one that transformers' plan for pipelines names, or else the only
    one that is as long as the model has layers. Raises UsageError where there is none."""
    lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList)}
    plan = getattr(model.config.get_text_config(), "base_model_pp_plan", None) or {}
    count = model.config.get_text_config().num_hidden_layers
    fitting = [str(name) for name, each in lists.items() if len(each) == count]
    planned = [name for name in fitting if name.rpartition(".")[2] in plan or name in plan]
    found = planned or fitting
    if len(found) != 1:
        raise UsageError(
            f"pipeline_parallel= cuts a model between its layers, and {type(model).__name__} has "
            f"{len(found) or 'no'} lists of {count} modules{': ' if found else ''}{', '.join(found)}. Leave it out."
        )
    return found[0]


def cut_programs(programs: Sequence[Program], layers: str, stages: int) -> list[list[Program]]:
    """For each stage its part of every program. `layers` is the name of the list of layers.

    The stages' weights are as even in size as layers allow, those before and after the layers included. Raises
    UsageError for more stages than layers, ExportError where layers share more than what passes from one to the next.
    """
    found = [_Program.read(program, layers) for program in programs]
    last = share_layers(found[0].layer_bytes(), stages)
    return [list(parts) for parts in zip(*(each.cut(last) for each in found), strict=True)]


def share_layers(sizes: Sequence[int], stages: int) -> list[int]:
    """The last place of each run, of as many runs as there are stages, into which a list of sizes is divided so that
    they are as even as can be. The first size, of what comes before all layers, is none of a run by itself.

    Raises UsageError where there are more stages than layers.
    """
    layers = len(sizes) - 1
    if not 1 <= stages <= layers:
        raise UsageError(f"pipeline_parallel={stages}: this model has {layers} layers to share out.")
    sums = [sum(sizes[: end + 1]) for end in range(layers + 1)]
    # The least sum of squares for the first `end` layers in so many runs, and where the run before ends.
    best: list[dict[int, tuple[int, list[int]]]] = [{end: (sums[end] ** 2, [end]) for end in range(1, layers + 1)}]
    for stage in range(1, stages):
        best.append({
            end: min(
                (cost + (sums[end] - sums[before]) ** 2, [*ends, end])
                for before, (cost, ends) in best[-1].items() if before < end
            )
            for end in range(stage + 1, layers + 1)
        })  # fmt: skip
    return best[-1][layers][1]


@dataclass
class _Program:
    """A traced program, and what each of its nodes needs.

    Attributes:
        program: of which no operator writes to its inputs.
        count: of the layers.
        places: of the nodes that belong somewhere: 0 before all layers, n + 1 in layer n.
        weights: placeholders of weights, and the tensors.
        given: placeholders of the caller's inputs, and their names in the contract.
    """

    program: Program
    count: int
    places: dict[_Node, int]
    weights: dict[_Node, Tensor]
    given: dict[_Node, str]

    @classmethod
    def read(cls, program: Program, layers: str) -> _Program:
        """Find out where each node belongs."""
        if any(map(_writes, program.exported.graph.nodes)):
            # What an operator writes into is no result of its own, by which nodes are found here.
            program = Program(program.graph, functional(program.exported))
        exported, signature = program.exported, program.exported.graph_signature
        if any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
            raise ExportError("This model changes its own weights as it runs: it cannot be divided into stages.")
        held = {**exported.constants, **exported.state_dict}
        nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
        named = {spec.arg.name: spec for spec in signature.input_specs}
        weights = {
            node: held[str(named[name].target)]
            for name, node in nodes.items()
            if named[name].kind is not InputKind.USER_INPUT
        }
        users = [node for name, node in nodes.items() if named[name].kind is InputKind.USER_INPUT]
        given = dict(zip(users, (spec.name for spec in program.graph.inputs), strict=True))
        # What is made anew when a model is made, such as a table of angles, is none that a checkpoint holds.
        tables = {node for node, held in weights.items() if held.ndim > 1 and named[node.name].persistent is not False
                  and named[node.name].kind is not InputKind.CONSTANT_TENSOR}  # fmt: skip
        marks = {node: mark for node in exported.graph.nodes if (mark := _layer_of(node, layers)) is not None}
        return cls(program, max(marks.values(), default=-1) + 1, _places(program, tables, given, marks), weights, given)

    @property
    def output(self) -> _Node:
        """The node of the results."""
        found: _Node = next(node for node in self.program.exported.graph.nodes if node.op == "output")
        return found

    @property
    def results(self) -> dict[_Node, str]:
        """The nodes that are results, and their names in the contract."""
        return dict(zip(self.output.args[0], (spec.name for spec in self.program.graph.outputs), strict=True))  # type: ignore[arg-type]

    def layer_bytes(self) -> list[int]:
        """The bytes of the weights that are read before all layers, and in each; after them counts as in the last."""
        found: list[dict[Any, int]] = [{} for _ in range(self.count + 1)]
        for node, tensor in self.weights.items():
            for place in self._read_in(node):
                found[place][_storage_of(tensor)] = tensor.nbytes
        return [sum(each.values()) for each in found]

    def _read_in(self, node: _Node) -> set[int]:
        """The places that need what a node gives."""
        found: set[int] = set()
        for user in node.users:
            found |= {self.places[user]} if user in self.places else self._read_in(user)
        return found

    def cut(self, last: Sequence[int]) -> Iterator[Program]:
        """The program of each stage; `last` are the places that stages end with."""
        stage_of = {node: next(s for s, end in enumerate(last) if place <= end) for node, place in self.places.items()}
        results = self.results
        needed = [_Needs(stage_of, stage) for stage in range(len(last))]
        for stage, needs in enumerate(needed):
            needs.collect(node for node in results if stage_of.get(node, len(last) - 1) == stage)
        for stage in reversed(range(len(last))):
            # What a later stage asks for may need more of the ones before it.
            asked = {node for later in needed[stage + 1 :] for node in later.taken}
            needed[stage].collect(node for node in asked if stage_of[node] == stage)
        crossing = sorted({node for needs in needed for node in needs.taken}, key=_order(self.program))
        names = {node: f"activations.{index}" for index, node in enumerate(crossing)}
        self._check_caches(stage_of, crossing)
        for stage, needs in enumerate(needed):
            own = {node: name for node, name in results.items() if node in needs.nodes}
            made = {node: name for node, name in names.items() if stage_of[node] == stage}
            taken = {node: names[node] for node in crossing if node in needs.taken}
            yield _Stage(self, needs.nodes, taken, {**own, **made}).build()

    def _check_caches(self, stage_of: Mapping[_Node, int], crossing: Sequence[_Node]) -> None:
        """Raise ExportError where a cache is read or written in another stage than the one that has it."""
        results = {name: node for node, name in self.results.items()}
        given = {name: node for node, name in self.given.items()}
        for layer in self.program.graph.cache:
            for before, after in ((layer.key_in, layer.key_out), (layer.value_in, layer.value_out)):
                node = results.get(after)
                if node is None or node in crossing or stage_of[node] != stage_of[given[before]]:
                    raise ExportError(
                        f"Layers of this model share the cache of layer {layer.layer}, and would be in two of "
                        f"{max(stage_of.values()) + 1} stages. Give a smaller pipeline_parallel, or leave it out."
                    )


def _writes(node: _Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _layer_of(node: _Node, layers: str) -> int | None:
    """The layer that a node was traced in: `layers.3`, or `layers.slice(2, 4, None).1` of a part of the list."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        pattern = rf"(?:^|\.){re.escape(layers)}\.(?:slice\((\w+), \w+, None\)\.)?(\d+)(?:\.|$)"
        if found := re.search(pattern, str(path)):
            begin = found[1] or ""
            return int(found[2]) + (int(begin) if begin.isdecimal() else 0)
    return None


def _places(
    program: Program, tables: Set[_Node], given: Mapping[_Node, str], marks: Mapping[_Node, int]
) -> dict[_Node, int]:
    """Where each node belongs that needs caches, or both tokens and a table of weights; others belong nowhere."""
    caches = {name for layer in program.graph.cache for name in (layer.key_in, layer.value_in)}
    places = {node: _first_mark(node, marks) for node, name in given.items() if name in caches}
    reads_tokens, reads_table = set(given), set(tables)
    for node in program.exported.graph.nodes:
        if node.op in ("placeholder", "output") or not _is_computed(node):
            continue
        needs = node.all_input_nodes
        if any(each in reads_tokens for each in needs):
            reads_tokens.add(node)
        if any(each in reads_table for each in needs):
            reads_table.add(node)
        placed = [places[each] for each in needs if each in places]
        if placed or (node in reads_tokens and node in reads_table):
            places[node] = max([marks.get(node, -1) + 1, *placed])
    return places


def _is_computed(node: _Node) -> bool:
    """Whether a node makes a tensor, or several: sizes are known wherever the inputs are."""
    value = node.meta.get("val")
    return isinstance(value, Tensor | tuple | list)


def _first_mark(node: _Node, marks: Mapping[_Node, int]) -> int:
    """The place of a cache: the first layer that reads it."""
    seen, waiting, found = {node}, [node], []
    while waiting:
        for user in waiting.pop().users:
            if user in marks:
                found.append(marks[user] + 1)
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
    return min(found, default=0)


def _storage_of(tensor: Tensor) -> Any:
    """What tells tied weights from others."""
    return tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else id(tensor)


def _order(program: Program) -> Any:
    positions = {node: index for index, node in enumerate(program.exported.graph.nodes)}
    return positions.__getitem__


@dataclass
class _Needs:
    """What a stage computes (`nodes`), and what it takes from stages before it."""

    stage_of: Mapping[_Node, int]
    stage: int
    nodes: set[_Node] = field(default_factory=set)
    taken: set[_Node] = field(default_factory=set)

    def collect(self, wanted: Iterator[_Node]) -> None:
        """Add nodes, and whatever they need."""
        waiting = list(wanted)
        while waiting:
            node = waiting.pop()
            if node in self.nodes or node in self.taken:
                continue
            if self.stage_of.get(node, self.stage) < self.stage:
                self.taken.add(node)
                continue
            self.nodes.add(node)
            waiting += node.all_input_nodes


@dataclass
class _Stage:
    """One stage's part of a program: the nodes that it computes, what it takes, and what it makes, by name."""

    whole: _Program
    nodes: set[_Node]
    taken: Mapping[_Node, str]
    made: Mapping[_Node, str]

    def build(self) -> Program:
        """The program of this stage alone."""
        exported, graph = self.whole.program.exported, fx.Graph()
        copies: dict[_Node, _Node] = {}
        description = self._describe()
        weights = [node for node in self.whole.weights if node in self.nodes]
        by_name = {name: node for node, name in [*self.whole.given.items(), *self.taken.items()]}
        users = [by_name[spec.name] for spec in description.inputs]
        for node in [*weights, *users]:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        for node in exported.graph.nodes:
            if node in self.nodes and node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        results = [copies[node] for node in self._results(description)]
        graph.output(tuple(results)).meta = {"val": tuple(each.meta["val"] for each in results)}
        graph.lint()
        return Program(description, self._as_exported(graph, weights, [copies[node] for node in users], results))

    def _results(self, description: Graph) -> list[_Node]:
        by_name = {name: node for node, name in self.made.items()}
        return [by_name[spec.name] for spec in description.outputs]

    def _as_exported(
        self, graph: fx.Graph, weights: Sequence[_Node], users: Sequence[_Node], results: Sequence[_Node]
    ) -> torch.export.ExportedProgram:
        whole = self.whole.program.exported
        specs = {spec.arg.name: spec for spec in whole.graph_signature.input_specs}
        kept = [specs[node.name] for node in weights]
        targets = {str(spec.target) for spec in kept}
        inputs = [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in users]
        outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
        numbers = tuple(range(len(users)))
        call = ModuleCallSignature(
            inputs=[], outputs=[], in_spec=tree_structure((numbers, {})), out_spec=tree_structure(tuple(results))
        )
        return torch.export.ExportedProgram(
            root=whole.graph_module,
            graph=graph,
            graph_signature=ExportGraphSignature([*kept, *inputs], outputs),
            state_dict={name: value for name, value in whole.state_dict.items() if name in targets},
            range_constraints=whole.range_constraints,
            module_call_graph=[ModuleCallEntry("", call)],
            constants={name: value for name, value in whole.constants.items() if name in targets},
        )

    def _describe(self) -> Graph:
        """What the contract says of the stage: it begins with the inputs of every step."""
        whole = self.whole.program.graph
        given = {name for node, name in self.whole.given.items() if node in self.nodes}
        cache = [layer for layer in whole.cache if given & {layer.key_in, layer.value_in}]
        caches = {name for layer in cache for name in _cache_names(layer)}
        made, graph_inputs = set(self.made.values()), whole.inputs
        return replace(
            whole,
            role="stage",
            inputs=[
                *graph_inputs[: len(DECODER_INPUTS)],
                *(self._activation(node, name, Input) for node, name in self.taken.items()),
                *(spec for spec in graph_inputs if spec.name in caches),
            ],
            outputs=[
                *(spec for spec in whole.outputs[:1] if spec.name in made),
                *(self._activation(node, name, Output) for node, name in self.made.items() if name not in caches
                  and name != whole.outputs[0].name),
                *(spec for spec in whole.outputs if spec.name in caches),
            ],
            cache=cache,
        )  # fmt: skip

    def _activation(self, node: _Node, name: str, kind: Any) -> Any:
        """The description of what passes between stages."""
        graph, tensor = self.whole.program.graph, node.meta["val"]
        axes: list[Axis | None] = []
        shape: list[int | Dim] = []
        for size in tensor.shape:
            is_free = not isinstance(size, int)
            if is_free and (not isinstance(graph.length, Dim) or str(size) != str(self._length())):
                raise ExportError(
                    f"What passes between layers of this model has the size {size} where its tokens are "
                    f"{self._length()}: pipeline_parallel= cannot cut between them. Leave it out."
                )
            axes.append("length" if is_free else None)
            shape.append(graph.length if is_free else int(size))
        dtype = str(tensor.dtype).removeprefix("torch.")
        if kind is Input:
            return Input(name=name, dtype=dtype, shape=shape, pad=0, axes=axes)  # type: ignore[arg-type]
        return Output(name=name, dtype=dtype, shape=shape, slice=axes)  # type: ignore[arg-type]

    def _length(self) -> Any:
        tokens = next(node for node, name in self.whole.given.items() if name == DECODER_INPUTS[0])
        return tokens.meta["val"].shape[1]


def _cache_names(layer: CacheLayer) -> tuple[str, str, str, str]:
    return layer.key_in, layer.value_in, layer.key_out, layer.value_out
