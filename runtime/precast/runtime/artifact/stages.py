"""The stages of a pipeline: runs of layers, each with graphs and weights of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from .graphs import DECODER_INPUTS, is_cache_positions, tensor_problems
from .schema import Graph, Output, Variant

__all__ = ["compiled_graphs", "rank_count", "stage_folder", "stages_problem"]


def stage_folder(stage: int) -> str:
    """The folder of a stage's files, in that of its variant."""
    return f"stage_{stage}"


def rank_count(variant: Variant) -> int:
    """How many processes run a variant."""
    return variant.ranks.count if variant.ranks else len(variant.stages) or 1


def compiled_graphs(variant: Variant) -> list[Graph]:
    """The graphs that there are files of: those of the stages, where a variant has some."""
    return [graph for stage in variant.stages for graph in stage.graphs] or list(variant.graphs)


def stages_problem(variant: Variant) -> str | None:
    """The first problem of a variant's stages, as the end of a sentence."""
    return next(_stages_problems(variant), None) if variant.stages else None


def _stages_problems(variant: Variant) -> Iterator[str]:
    if any(graph.role == "stage" for graph in variant.graphs):
        yield "has a stage among its graphs"
    if len(variant.stages) < 2 or variant.ranks:
        yield f"has {len(variant.stages)} stages{', and ranks' if variant.ranks else ''}"
    weights = [name for stage in variant.stages for name in stage.weights]
    if len(set(weights)) != len(weights) or set(weights) != set(variant.weights):
        yield "has weights that are not those of one stage each"
    for number, stage in enumerate(variant.stages):
        if [graph.name for graph in stage.graphs] != [graph.name for graph in variant.graphs]:
            yield f"has other graphs in stage {number} than all together"
            return
        if any(PurePosixPath(graph.file).parent.name != stage_folder(number) for graph in stage.graphs):
            yield f"has files of stage {number} outside {stage_folder(number)}"
    for index, whole in enumerate(variant.graphs):
        yield from _graph_problems(whole, [stage.graphs[index] for stage in variant.stages])


def _graph_problems(whole: Graph, parts: list[Graph]) -> Iterator[str]:
    """What is wrong with the parts of a graph: each reads what the caller gives, what stages before it have made, and
    caches of its own; together they have all caches, and the last makes the logits."""
    given = {spec.name: spec for spec in whole.inputs}
    made: dict[str, Output] = {}
    layers = [layer for part in parts for layer in part.cache]
    if layers != whole.cache or whole.states or whole.outputs[0] not in parts[-1].outputs:
        yield f"shares out the caches or the logits of graph {whole.name!r} in another way than once"
    for part in parts:
        for tensors in (part.inputs, part.outputs):
            yield from (problem for spec in tensors for problem in tensor_problems(spec))
            if len({spec.name for spec in tensors}) != len(tensors):
                yield f"has a stage of graph {whole.name!r} with two tensors of one name"
        caches = {name for layer in part.cache for name in (layer.key_in, layer.value_in)}
        if (part.role, part.batch, part.length, part.capacity) != ("stage", whole.batch, whole.length, whole.capacity):
            yield f"has a stage of graph {whole.name!r} that is of other sizes"
        for spec in part.inputs:
            is_known = spec.name in DECODER_INPUTS or spec.name in caches or is_cache_positions(spec)
            is_own = is_known and spec == given.get(spec.name)
            passed = made.get(spec.name)
            if not is_own and (
                passed is None or (passed.dtype, passed.shape, passed.slice) != (spec.dtype, spec.shape, spec.axes)
            ):
                yield f"has a stage of graph {whole.name!r} that reads {spec.name}, which it is not given"
        missing = {*DECODER_INPUTS, *caches} - {spec.name for spec in part.inputs}
        results = {name for layer in part.cache for name in (layer.key_out, layer.value_out)}
        missing |= results - {spec.name for spec in part.outputs}
        if missing:
            yield f"has a stage of graph {whole.name!r} that lacks {min(missing)}"
        results |= {whole.outputs[0].name} if part is parts[-1] else set()
        for output in (spec for spec in part.outputs if spec not in whole.outputs or spec.name not in results):
            if output.name in made or output.name in {spec.name for spec in whole.outputs}:
                yield f"has two stages of graph {whole.name!r} that make {output.name}"
            if not _is_passed(output, whole):
                yield f"has a stage of graph {whole.name!r} that makes {output.name} of another length than the tokens'"
            made[output.name] = output


def _is_passed(made: Output, whole: Graph) -> bool:
    """Whether the free sizes of what a stage makes are that of the step's tokens."""
    sizes = zip(made.shape, made.slice, strict=True)
    return all(isinstance(size, int) or (axis == "length" and size == whole.length) for size, axis in sizes)
