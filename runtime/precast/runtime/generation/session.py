"""One set of key/value caches over an engine's graphs: tokens in, logits out.

Inside, rows are right-padded and each has its own length, so the padding that the caller used never reaches the model.

ONNX Runtime's GroupQueryAttention sets the limits: several new tokens after a past only at batch 1 and without padding,
since it writes the keys of padding into the cache once there is a past.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from ..artifact import DECODER_INPUTS, is_cache_positions
from ..artifact.lora import SLOTS
from ..artifact.schema import Dim, Graph, Input
from ..engines import Engine, OwnsCaches, Step, move_rows, owns_caches
from ..errors import HostError, InputError
from ..inputs.tensors import allocate, allocate_together
from .adapters import AdapterSlots, LoadedAdapter
from .prefix import Prefix, as_dtype

__all__ = ["Session"]

Array = np.ndarray[Any, Any]

_TOKENS_PER_READ = 8
"""Reading all weights once, as each step does, takes about as long as computing so many tokens. Measured on two cores
with SmolLM2-135M in float32; of one order of magnitude for all decoders, and nothing but speed depends on it."""


_POSITIONS_STEP = 64
"""Attention reads a multiple of so many cache positions: each multiple is bound once."""


class Session:
    """The caches of up to `batch` rows.

    `context` holds the other inputs that stay from step to step, by name: the outputs of an encoder. Whoever changes
    them calls `reset`.

    `tokens` holds, per row, the ids whose keys and values are in the cache. It grows only after a completed step and
    shrinks before a step that overwrites, so it holds true whatever fails or is interrupted.

    With `slots` a row may have an adapter, which `use_adapters` gives it: `adapters` holds those of all rows.

    A `prefix` lies in the first cache positions of every row, before its tokens, and is never written to again;
    `capacity` are the positions after it. `prefix_sha256` is its hash where it is not the artifact's own.
    """

    def __init__(
        self,
        engine: Engine,
        graphs: Sequence[Graph],
        prefix: Prefix | None = None,
        slots: AdapterSlots | None = None,
    ) -> None:
        self._engine, self._slots = engine, slots
        first = graphs[0]
        self._start = prefix.length if prefix else 0
        self.prefix_sha256 = prefix.sha256 if prefix else None
        self.batch, self.capacity = first.slots, first.capacity - self._start
        self.tokens: list[list[int]] = [[] for _ in range(self.batch)]
        self._step_graph = next((graph for graph in graphs if graph.role == "decode"), first)
        self._prefill_graphs = {
            _longest_length(graph): graph
            for graph in graphs
            if graph is not self._step_graph or _has_free_length(graph)
        }
        self._caches = _allocate_caches(first)
        if prefix is not None:
            self._load_prefix(prefix, first)
        self._states = _RecurrentStates(first)
        self.adapters: list[LoadedAdapter | None] = [None] * self.batch
        self._chosen = np.zeros(self.batch, np.int64)
        self._of_adapters = {SLOTS: self._chosen, **slots.arrays} if slots else {}
        self.context = _allocate_context(first, self._caches | self._states.before | self._of_adapters)
        self._bound: dict[tuple[str, int, int], _Call] = {}
        self._appending: dict[int, _Call] = {}

    @property
    def vocabulary(self) -> int:
        """The vocabulary's size: logits per token."""
        return int(self._step_graph.outputs[0].shape[-1])  # type: ignore[arg-type]

    @property
    def is_flexible(self) -> bool:
        """Whether `append` takes several tokens at once."""
        return self.batch == 1 and any(map(_has_free_length, self._prefill_graphs.values()))

    def reset(self) -> None:
        """Forget all tokens."""
        for held in self.tokens:
            held.clear()

    def use_adapters(self, adapters: Sequence[LoadedAdapter | None]) -> None:
        """Give each row an adapter, or none, which rows beyond these get, too. A row forgets what it has read with
        other weights."""
        for row, (before, adapter) in enumerate(zip_longest(self.adapters, adapters)):
            if (before and before.sha256) != (adapter and adapter.sha256):
                self.tokens[row].clear()
            self.adapters[row], self._chosen[row] = adapter, adapter.slot if adapter else 0

    def find_adapter(self, sha256: str) -> LoadedAdapter | None:
        """The adapter of this hash, if it is loaded."""
        return self._slots.find_content(sha256) if self._slots else None

    def snapshot(self) -> dict[str, Array]:
        """What caches and states hold of the tokens so far, by name: views, overwritten by the next call. Raises
        InputError where an engine keeps them elsewhere."""
        self._check_caches()
        live = self._start + max(map(len, self.tokens))
        held = {name: cache[:, :, self._start : live] for name, cache in self._caches.items()}
        return {**held, **self._states.before}

    def _load_prefix(self, prefix: Prefix, graph: Graph) -> None:
        if owns_caches(self._engine):
            raise HostError(
                "This model begins every row with a prefix, which lies in caches, and here these are in the memory of "
                "a device. Open it on the CPU: device='cpu'."
            )
        dtypes = {spec.name: spec.dtype for spec in graph.inputs}
        for name, values in prefix.tensors.items():
            heads, length, width = values.shape
            # What a cache has beyond the model's own heads and width stays zero.
            self._caches[name][:, :heads, :length, :width] = as_dtype(values, dtypes[name])

    def _check_caches(self) -> None:
        if owns_caches(self._engine):
            raise InputError("This model's caches are in the memory of a device; sessions of such are not kept.")

    def shapes_of(self, live: int) -> dict[str, tuple[str, list[int]]]:
        """The dtype and the shape of each array of a snapshot with rows of up to `live` tokens, by name."""
        cut = {name: (cache.dtype, [*cache.shape[:2], live, *cache.shape[3:]]) for name, cache in self._caches.items()}
        whole = {name: (state.dtype, list(state.shape)) for name, state in self._states.before.items()}
        return {name: (str(dtype), shape) for name, (dtype, shape) in (cut | whole).items()}

    def restore(
        self, tokens: Sequence[Sequence[int]], held: Mapping[str, Array], adapters: Sequence[LoadedAdapter | None] = ()
    ) -> None:
        """Hold what a snapshot held of these tokens, one list per row, which were read with these adapters. Raises
        InputError as `snapshot` does."""
        self._check_caches()
        self.reset()
        self.use_adapters(adapters)
        for name, values in held.items():
            if name in self._caches:
                self._caches[name][:, :, self._start : self._start + values.shape[2]] = values
            else:
                self._states.before[name][:] = values
        for row, taken in zip(self.tokens, tokens, strict=True):
            row.extend(taken)

    def prefill(self, rows: Sequence[Array]) -> Array:
        """Take one prompt per row; returns the logits after each row's last token, [batch, vocabulary].

        Tokens of a prompt that the caches hold are not computed again where that is quicker; with several rows, only
        where every row lacks no more than its last token. The array is overwritten by the next call.
        """
        kept = [self._count_reusable(held, row[:-1]) for held, row in zip(self.tokens, rows, strict=False)]
        if self.batch == 1:
            del self.tokens[0][self._count_worth_keeping(kept[0], len(rows[0])) :]
            return self._feed_row(rows[0][len(self.tokens[0]) :])
        if all(count == len(row) - 1 for count, row in zip(kept, rows, strict=True)):
            for held, count in zip(self.tokens, kept, strict=False):
                del held[count:]
            return self.decode([int(row[-1]) for row in rows])
        self.reset()
        return self._feed_rows(rows)

    def decode(self, tokens: Sequence[int | None]) -> Array:
        """Append one token to each row that is given one; the others, and those beyond `tokens`, are idle.

        Returns logits [batch, vocabulary], overwritten by the next call.
        """
        call = self._bind_call(self._step_graph, 1, 1)
        pairs = list(zip_longest(self.tokens, tokens))
        for index, (held, token) in enumerate(pairs):
            # Steps are batched, so idle rows rewrite their last token at its own position. Nobody reads their logits.
            call.ids[index, 0] = token if token is not None else held[-1] if held else call.pad
            call.past[index] = self._start + (len(held) if token is not None else self._idle_position(held))
        self._run_call(call, [index for index, (_, token) in enumerate(pairs) if token is not None])
        for held, token in pairs:
            if token is not None:
                held.append(token)
        return call.logits[:, 0]

    def append(self, tokens: list[int]) -> Array:
        """At batch 1: append tokens; returns the logits after each, [len(tokens), vocabulary], overwritten by the next
        call. More than one at a time only if `is_flexible`."""
        call = self._appending.get(len(tokens)) or self._bind_appending(len(tokens))
        held = self.tokens[0]
        call.ids[0] = tokens
        call.past[0] = self._start + len(held)
        self._run_call(call, [0])
        held.extend(tokens)
        logits: Array = call.logits[0]
        return logits

    def drop(self, count: int) -> None:
        """At batch 1: forget the last `count` tokens."""
        held = self.tokens[0]
        del held[len(held) - count :]

    def reorder(self, parents: Sequence[int]) -> None:
        """Copy the caches of row `parents[i]` into row `i`; rows beyond `parents` stay."""
        moved = {index: parent for index, parent in enumerate(parents) if index != parent}
        if not moved:
            return
        held = [list(self.tokens[parent]) for parent in moved.values()]
        for index in moved:
            self.tokens[index] = []
        live = self._start + max(map(len, held))
        move = self._engine.move_rows if isinstance(self._engine, OwnsCaches) else move_rows
        move(self._caches, list(moved), list(moved.values()), live)
        for state in self._states.before.values():
            state[list(moved)] = state[list(moved.values())]
        adapters = list(self.adapters)
        self.use_adapters([adapters[moved.get(index, index)] for index in range(self.batch)])
        for index, tokens in zip(moved, held, strict=True):
            self.tokens[index] = tokens

    def logits_at(
        self,
        rows: Sequence[Array],
        positions: Sequence[Sequence[int]],
        adapters: Sequence[LoadedAdapter | None] = (),
    ) -> list[Array]:
        """Logits after each of a row's `positions` (ascending), per row [len(positions), vocabulary], in new memory."""
        self.reset()
        self.use_adapters(adapters)
        graph = self._free_graph(rows)
        if graph is not None:
            length = max(_shortest_length(graph), *map(len, rows))
            call = self._bind_call(graph, length, max(map(len, positions)), keep=False)
            self._append_rows(call, rows, positions)
            return [call.logits[index, : len(asked)].copy() for index, asked in enumerate(positions)]
        if self.context or (self._start and self.batch > 1):
            return self._logits_in_place(rows, positions)
        own = [*adapters, *[None] * (len(rows) - len(adapters))]
        return [self._logits_one_by_one(*each) for each in zip(rows, positions, own, strict=True)]

    def _free_graph(self, rows: Sequence[Array]) -> Graph | None:
        """The graph of a free length that takes `rows` whole, padding included; None where there is none. After a
        prefix there is one for a single row without padding only."""
        longest = max(self._prefill_graphs, default=0)
        graph = self._prefill_graphs.get(longest)
        if graph is None or not _has_free_length(graph):
            return None
        fits = not self._start or (self.batch == 1 and len(rows[0]) >= _shortest_length(graph))
        return graph if fits else None

    def _logits_in_place(self, rows: Sequence[Array], positions: Sequence[Sequence[int]]) -> list[Array]:
        """Where one call does not take the rows, and they have a context or a prefix: all together, token by token,
        each in its own slot."""
        found: list[list[Array]] = [[] for _ in rows]
        for step in range(max(map(len, rows))):
            logits = self.decode([int(row[step]) if step < len(row) else None for row in rows])
            for index, asked in enumerate(positions):
                if step in asked:
                    found[index].append(logits[index].copy())
        return [np.stack(each) for each in found]

    def _logits_one_by_one(self, row: Array, positions: Sequence[int], adapter: LoadedAdapter | None) -> Array:
        """With static graphs: feed the row up to its first position, then from one position to the next."""
        self.reset()
        self.use_adapters([adapter])
        found, done = [], 0
        for position in positions:
            part = row[done : position + 1]
            logits = self._feed_row(part) if self.batch == 1 else self._feed_rows([part])
            found.append(logits[0].copy())
            done = position + 1
        return np.stack(found)

    def _count_worth_keeping(self, shared: int, length: int) -> int:
        """How many of the `shared` first tokens of a prompt to keep. With static graphs one call over the whole prompt
        can be quicker than its new tokens one by one."""
        return min((shared, 0), key=lambda past: self._estimate_cost(past, length))

    def _estimate_cost(self, past: int, length: int) -> float:
        """The time to get from `past` to `length` tokens, in reads of the weights."""
        return sum(1 + size / _TOKENS_PER_READ for _, size in self._plan_chunks(past, length))

    def _plan_chunks(self, past: int, length: int) -> Iterator[tuple[Graph, int]]:
        """The calls, by graph and compiled size, that take one row from `past` to `length` tokens."""
        while past < length:
            has_past = bool(past or self._start)
            graph, size = self._next_chunk(length - past) if has_past else self._first_chunk(length)
            yield graph, size
            past += size

    def _first_chunk(self, wanted: int) -> tuple[Graph, int]:
        """The smallest graph that holds `wanted` tokens, or the largest of all. Without a past it may be padded."""
        if not self._prefill_graphs or (wanted == 1 and not _has_free_length(self._step_graph)):
            return self._step_graph, 1
        limit = min((size for size in self._prefill_graphs if size >= wanted), default=max(self._prefill_graphs))
        graph = self._prefill_graphs[limit]
        return graph, min(wanted, limit) if _has_free_length(graph) else limit

    def _next_chunk(self, left: int) -> tuple[Graph, int]:
        """The largest graph that `left` tokens fill without padding."""
        sizes = {
            min(size, left) if _has_free_length(graph) else size: graph for size, graph in self._prefill_graphs.items()
        }
        size = max((size for size, graph in sizes.items() if _shortest_length(graph) <= size <= left), default=0)
        return (sizes[size], size) if size else (self._step_graph, 1)

    def _feed_row(self, row: Array) -> Array:
        """At batch 1: append tokens in as few calls as the graphs allow; returns the last one's logits."""
        past, done = len(self.tokens[0]), 0
        for graph, size in self._plan_chunks(past, past + len(row)):
            call = self._bind_call(graph, size, 1, keep=size == 1 or not _has_free_length(graph))
            self._append_rows(call, [row[done : done + size]])
            done += size
        return call.logits[:, 0]

    def _feed_rows(self, rows: Sequence[Array]) -> Array:
        """Append tokens to several rows: as many as one call takes where there is no past, then one token per row and
        step. A row that has no more keeps its last logits."""
        last: Array | None = None
        done = 0
        if not any(self.tokens) and not self._start:
            graph, done = self._first_chunk(max(map(len, rows)))
            call = self._bind_call(graph, done, 1, keep=not _has_free_length(graph))
            self._append_rows(call, [row[:done] for row in rows])
            last = call.logits[:, 0].copy()
        for step in range(done, max(map(len, rows))):
            is_active = np.array([step < len(row) for row in rows] + [False] * (self.batch - len(rows)))
            logits = self.decode([int(row[step]) if step < len(row) else None for row in rows])
            last = logits.copy() if last is None else np.where(is_active[:, None], logits, last)
        assert last is not None, "a prompt has at least one token"
        return last

    def _append_rows(
        self, call: _Call, rows: Sequence[Array], positions: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Append `rows`, right-padded, with logits at `positions` or at the last token of each. Rows that nobody uses
        hold one padding token."""
        call.ids[:], call.new[:], call.positions[:] = call.pad, 1, 0
        call.past[:] = [self._start + len(held) for held in self.tokens]
        for index, row in enumerate(rows):
            call.ids[index, : len(row)] = row
            call.new[index] = len(row)
            asked = [len(row) - 1] if positions is None else positions[index]
            call.positions[index, : len(asked)] = asked
        self._run_call(call, list(range(len(rows))))
        for held, row in zip(self.tokens, rows, strict=False):
            held.extend(row.tolist())

    def _run_call(self, call: _Call, rows: list[int]) -> None:
        """Run a call that brings new tokens to these rows."""
        self._check_adapters()
        self._states.begin([row for row in rows if not call.past[row]])
        call.run()
        # Another thread may have written over the weights meanwhile.
        self._check_adapters()
        self._states.keep(rows)

    def _check_adapters(self) -> None:
        for adapter in self.adapters:
            if adapter is not None and self._slots is not None:
                self._slots.check_held(adapter)

    def _idle_position(self, held: list[int]) -> int:
        """The position, counted after a prefix, where an idle row rewrites its last token. Recurrent states have moved
        on, so the keys would differ: they go to the first free position, or to the last of a full cache, which no
        further token reads."""
        return min(len(held), self.capacity - 1) if self._states.before else max(len(held) - 1, 0)

    def _count_reusable(self, held: list[int], row: Array) -> int:
        """How many of the tokens held can stay for a prompt that begins with `row`; states cannot be taken back."""
        count = _count_common_prefix(held, row)
        return count if count == len(held) or not self._states.before else 0

    @property
    def _held(self) -> dict[str, Array]:
        return self._caches | self.context | self._of_adapters

    def _bind_appending(self, count: int) -> _Call:
        graph = self._step_graph if count == 1 else self._prefill_graphs[max(self._prefill_graphs)]
        call = _Call(self._engine, graph, count, count, self._held, self._states)
        call.new[0], call.positions[0] = count, np.arange(count)
        self._appending[count] = call
        return call

    def _bind_call(self, graph: Graph, length: int, positions: int, *, keep: bool = True) -> _Call:
        key = (graph.name, length, positions)
        if key in self._bound:
            return self._bound[key]
        call = _Call(self._engine, graph, length, positions, self._held, self._states)
        if keep:
            self._bound[key] = call
        return call


class _Call:
    """One graph bound to its input arrays, its logits, and the session's caches, context, adapters and states."""

    def __init__(
        self,
        engine: Engine,
        graph: Graph,
        length: int,
        positions: int,
        held: dict[str, Array],
        states: _RecurrentStates,
    ) -> None:
        batch, output = graph.slots, graph.outputs[0]
        self.ids = np.zeros((batch, length), np.int64)
        self.past, self.new = np.zeros(batch, np.int32), np.ones(batch, np.int32)
        self.positions = np.zeros((batch, positions), np.int64)
        vocabulary = output.shape[-1]
        assert isinstance(vocabulary, int), "the vocabulary is static"
        self.logits = allocate((batch, positions, vocabulary), output.dtype)
        self.pad = graph.inputs[0].pad
        inputs: dict[str, Array] = dict(
            zip((spec.name for spec in graph.inputs), (self.ids, self.past, self.new, self.positions), strict=False)
        )
        held = held | states.before
        inputs |= {spec.name: held[spec.name] for spec in graph.inputs[len(inputs) :] if not is_cache_positions(spec)}
        outputs = {output.name: self.logits, **states.after}
        for layer in graph.cache:
            for name_in, name_out in ((layer.key_in, layer.key_out), (layer.value_in, layer.value_out)):
                outputs[name_out] = held[name_in]
        if is_cache_positions(graph.inputs[-1]):
            self.run: Step = _PositionsCall(engine, graph, inputs, outputs, length)
        else:
            self.run = engine.bind(graph.name, inputs, outputs)


class _PositionsCall:
    """A graph bound once per number of cache positions, so that attention costs no more than a call's tokens need."""

    def __init__(
        self, engine: Engine, graph: Graph, inputs: dict[str, Array], outputs: dict[str, Array], length: int
    ) -> None:
        self._engine, self._graph, self._inputs, self._outputs = engine, graph, inputs, outputs
        self._past, self._length = inputs[DECODER_INPUTS[1]], length
        self._steps: dict[int, Step] = {}

    def __call__(self) -> None:
        needed = int(self._past.max()) + self._length
        count = min(self._graph.capacity, -(-needed // _POSITIONS_STEP) * _POSITIONS_STEP)
        if count not in self._steps:
            positions = {self._graph.inputs[-1].name: np.arange(count)}
            self._steps[count] = self._engine.bind(self._graph.name, self._inputs | positions, self._outputs)
        self._steps[count]()


class _RecurrentStates:
    """The recurrent states of all rows, by the names of the graph's inputs and outputs.

    A step reads them in one array and writes them to another; they are copied back only for rows that were given a
    token, and only once the step has completed.
    """

    def __init__(self, graph: Graph) -> None:
        self.before = {state.name_in: allocate(state.shape, state.dtype) for state in graph.states}
        self.after = {state.name_out: allocate(state.shape, state.dtype) for state in graph.states}

    def begin(self, rows: list[int]) -> None:
        """Clear the states of rows that have no past."""
        for state in self.before.values():
            state[rows] = 0

    def keep(self, rows: list[int]) -> None:
        """Copy the computed states back for these rows."""
        for state, computed in zip(self.before.values(), self.after.values(), strict=True):
            state[rows] = computed[rows]


def _allocate_caches(graph: Graph) -> dict[str, Array]:
    """The caches, zeroed, by the names of the graph's inputs; all graphs of a variant use the same names."""
    names = {name for layer in graph.cache for name in (layer.key_in, layer.value_in)}
    return allocate_together(
        {spec.name: (_static_sizes(spec), spec.dtype) for spec in graph.inputs if spec.name in names}
    )


def _static_sizes(spec: Input) -> list[int]:
    return [size for size in spec.shape if isinstance(size, int)]


def _allocate_context(graph: Graph, caches: dict[str, Array]) -> dict[str, Array]:
    """The inputs that are neither a step's own nor caches nor states, by name."""
    others = [spec for spec in graph.inputs[len(DECODER_INPUTS) :] if spec.name not in caches]
    return {spec.name: allocate(_static_sizes(spec), spec.dtype) for spec in others if not is_cache_positions(spec)}


def _count_common_prefix(held: list[int], row: Array) -> int:
    """How many tokens two rows begin with alike."""
    count = min(len(held), len(row))
    differ = np.flatnonzero(np.array(held[:count], np.int64) != row[:count])
    return int(differ[0]) if differ.size else count


def _longest_length(graph: Graph) -> int:
    return graph.length.max if isinstance(graph.length, Dim) else graph.length


def _shortest_length(graph: Graph) -> int:
    return graph.length.min if isinstance(graph.length, Dim) else graph.length


def _has_free_length(graph: Graph) -> bool:
    return isinstance(graph.length, Dim)
