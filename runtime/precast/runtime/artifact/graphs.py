"""Check what the runtime assumes of a contract's graphs: names, shapes and axes that fit each other."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from .schema import Axis, Dim, Graph, Input, Output, State, Variant

__all__ = [
    "DECODER_INPUTS", "CACHE_POSITIONS", "OF_TEXT", "graph_problem", "is_cache_positions", "tensor_problems",
    "variant_problem",
]  # fmt: skip

DECODER_INPUTS = ("input_ids", "past_lengths", "new_lengths", "logit_positions")
"""The first inputs of every decoder graph; its caches follow."""

CACHE_POSITIONS = "cache_positions"
"""A decoder's input, int64 [n], 0, 1, …: the positions of its caches that attention looks at."""
_OLD_CACHE_POSITIONS = "rows"
"""Its name in formats 1 and 2."""
OF_TEXT: tuple[Axis | None, ...] = ("batch", "length")
"""The dimensions of an input that names none: format 1 had no names, as all were of text."""
_MAX_NUMBERS = 2**40
"""Elements of one tensor: numpy fails on more in ways of its own. Whether fewer fit shows when it is allocated."""
_MAX_BATCH = 2**16
_RUNNING: frozenset[Axis | None] = frozenset({"length", "samples", "frames"})
_RANGES = {"int64": 2**63, "int32": 2**31, "int8": 2**7, "uint8": 2**8, "bool": 2}


def is_cache_positions(spec: Input) -> bool:
    """Whether this is the input that says at which positions of the caches attention looks."""
    return spec.name in (CACHE_POSITIONS, _OLD_CACHE_POSITIONS)


def graph_problem(graph: Graph, vocabulary: int | None) -> str | None:
    """The first problem of a graph, as the end of a sentence; None for a good one. `vocabulary` is the number of
    tokens."""
    return next(_graph_problems(graph, vocabulary), None)


def variant_problem(variant: Variant) -> str | None:
    """The first problem of a variant's graphs together, as the end of a sentence; None for good ones."""
    names = [graph.name for graph in variant.graphs]
    if len(set(names)) != len(names):
        return f"has two graphs of one name among {', '.join(names[:8])}"
    decoders = [graph for graph in variant.graphs if graph.role != "encode"]
    if len({_decoder_signature(graph) for graph in decoders}) > 1:
        return f"has decoders among {', '.join(names[:8])} that differ in their caches or vocabulary"
    if not decoders and len({_encoder_signature(graph) for graph in variant.graphs}) > 1:
        return f"has encoders among {', '.join(names[:8])} that differ in the names of their inputs or outputs"
    return None


def _decoder_signature(graph: Graph) -> str:
    """What all decoders of a variant must share, since each continues on the caches of the others."""
    others = graph.inputs[len(DECODER_INPUTS) :]
    kept = [(spec.name, spec.dtype, spec.shape) for spec in others if not is_cache_positions(spec)]
    return repr((graph.capacity, graph.outputs[:1] and graph.outputs[0].shape[-1:], sorted(kept, key=repr)))


def _encoder_signature(graph: Graph) -> str:
    """What all encoders of a variant must share, since an input goes to any that is long enough."""
    inputs = [(spec.name, spec.dtype, spec.axes) for spec in graph.inputs]
    return repr((inputs, [(spec.name, spec.dtype, spec.slice) for spec in graph.outputs]))


def _graph_problems(graph: Graph, vocabulary: int | None) -> Iterator[str]:
    if isinstance(graph.batch, Dim):
        yield f"has a free batch, of {graph.batch.min} to {graph.batch.max}, which this precast does not run"
    elif not 1 <= graph.batch <= _MAX_BATCH:
        yield f"has a batch of {graph.batch}, not of 1 to {_MAX_BATCH}"
    tensors: list[Input | Output] = [*graph.inputs, *graph.outputs]
    for spec in tensors:
        yield from tensor_problems(spec)
    for given in graph.inputs:
        yield from _padding_problems(given, vocabulary)
    for names in ([spec.name for spec in graph.inputs], [spec.name for spec in graph.outputs]):
        if len(set(names)) != len(names):
            yield f"has two tensors of one name among {', '.join(names[:8])}"
    if not graph.inputs or not graph.outputs:
        yield "has no inputs or no outputs"
    else:
        yield from _encoder_problems(graph) if graph.role == "encode" else _decoder_problems(graph)


def tensor_problems(spec: Input | Output) -> Iterator[str]:
    """Problems of a tensor's shape that numpy could not allocate."""
    sizes = [size if isinstance(size, int) else size.max for size in spec.shape]
    lows = [size if isinstance(size, int) else size.min for size in spec.shape]
    if not all(1 <= low <= size for low, size in zip(lows, sizes, strict=True)):
        yield f"gives {spec.name} the shape {_show_shape(spec)}, whose sizes are not all 1 or more"
    if len(sizes) > 8 or prod(sizes) > _MAX_NUMBERS:
        yield f"gives {spec.name} the shape {_show_shape(spec)}: more than 8 dimensions, or than {_MAX_NUMBERS} numbers"
    if isinstance(spec, Output) and len(spec.slice) != len(spec.shape):
        yield f"cuts {spec.name} along {len(spec.slice)} dimensions where it has {len(spec.shape)}"


def _show_shape(spec: Input | Output) -> list[int | str]:
    return [size if isinstance(size, int) else f"{size.min} to {size.max}" for size in spec.shape]


def _padding_problems(spec: Input, vocabulary: int | None) -> Iterator[str]:
    limit = _RANGES.get(spec.dtype)
    if limit is not None and not (isinstance(spec.pad, int) and -limit <= spec.pad < limit):
        yield f"pads {spec.name}, {spec.dtype}, with {spec.pad}"
    if spec.name == "input_ids" and not 0 <= spec.pad < (vocabulary or 2**31):
        yield f"pads input_ids with {spec.pad}, which is none of the model's {vocabulary or 2**31} tokens"


def _encoder_problems(graph: Graph) -> Iterator[str]:
    sizes = [graph.length, *(size for spec in graph.inputs for size in spec.shape)]
    sizes += [size for spec in graph.outputs for size in spec.shape]
    if any(isinstance(size, Dim) for size in sizes):
        yield "is an encoder with a free dimension"
    if graph.inputs[0].name == "attention_mask":
        yield "is an encoder that has the mask for its first input"
    if graph.frames is not None and graph.frames.step < 1:
        yield "has frames that do not get on"
    sizes_of: dict[Axis | None, int | Dim] = {}
    for spec in graph.inputs:
        axes = spec.axes or OF_TEXT
        if len(axes) != len(spec.shape):
            yield f"names {len(axes)} dimensions of {spec.name}, which has {len(spec.shape)}"
        for axis, size in zip(axes, spec.shape, strict=False):
            if axis is not None and sizes_of.setdefault(axis, size) != size:
                yield f"has inputs of {size} and of {sizes_of[axis]} along {axis}"
    known = {None, "length", "batch", *sizes_of, *(["frames"] if sizes_of.keys() & _RUNNING else [])}
    for output in graph.outputs:
        if unknown := set(output.slice) - known:
            yield f"cuts {output.name} along {', '.join(map(str, unknown))}, which no input has"


def _decoder_problems(graph: Graph) -> Iterator[str]:
    if [spec.name for spec in graph.inputs[:4]] != list(DECODER_INPUTS) or not (graph.cache or graph.states):
        yield f"is a decoder whose inputs are not {', '.join(DECODER_INPUTS)} and caches"
    yield from _length_problems(graph.length)
    logits = graph.outputs[0]
    if len(logits.shape) != 3 or not isinstance(logits.shape[-1], int) or logits.dtype not in ("float32", "float16"):
        yield "does not give logits [batch, positions, vocabulary] in float32 or float16 first"
    by_rows: list[Input | Output] = [*graph.inputs[:4], logits]
    for spec in by_rows:
        if spec.shape[:1] != [graph.batch]:
            yield f"has the batch {graph.batch}, its {spec.name} the shape {_show_shape(spec)}"
    given = {spec.name: spec for spec in graph.inputs[4:]}
    made = {spec.name: spec for spec in graph.outputs[1:]}
    for layer in graph.cache:
        for name_in, name_out in ((layer.key_in, layer.key_out), (layer.value_in, layer.value_out)):
            if name_in not in given or name_out not in made:
                yield f"lacks the cache tensors of layer {layer.layer}"
            elif not _is_cache(given[name_in], made[name_out], graph):
                yield (
                    f"has the cache {name_in} {_show_shape(given[name_in])}, not [{graph.batch}, heads, "
                    f"{graph.capacity}, head_dim] in and out"
                )
    if graph.states and graph.length != 1:
        yield "carries states through several tokens at once"
    for state in graph.states:
        if state.name_in not in given or state.name_out not in made:
            yield f"lacks {state.name_in}"
        elif not _is_state(state, given[state.name_in], made[state.name_out], graph.slots):
            yield f"has the state {state.name_in} in other shapes than {state.shape}, batch first"


def _length_problems(length: int | Dim) -> Iterator[str]:
    """Problems of a decoder that would not get on with a prompt."""
    few, many = (length.min, length.max) if isinstance(length, Dim) else (length, length)
    if not 1 <= few <= many:
        yield f"takes {few} to {many} tokens at a time, not 1 or more"


def _is_cache(given: Input, made: Output, graph: Graph) -> bool:
    """Whether these are keys or values of every position; some backends add one for idle rows behind the last."""
    sizes = [size for size in given.shape if isinstance(size, int)]
    fits = len(sizes) == len(given.shape) == 4 and sizes[0] == graph.slots and sizes[2] >= graph.capacity
    return fits and _is_same(given, made)


def _is_state(state: State, given: Input, made: Output, batch: int) -> bool:
    return given.shape == state.shape and state.shape[:1] == [batch] and _is_same(given, made)


def _is_same(given: Input, made: Output) -> bool:
    return made.shape == given.shape and made.dtype == given.dtype
