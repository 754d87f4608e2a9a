"""One set of key/value caches over an engine's graphs: tokens in, logits out.

Inside, rows are right-padded and each has its own length, so the padding that the caller used never reaches the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .artifact.schema import Dim, Graph
from .engines import Engine, Step

__all__ = ["Session"]

Array = np.ndarray[Any, Any]


class Session:
    """The caches of up to `batch` rows.

    `lengths` int32 [batch] counts the tokens that each row has in the cache; it grows only after a completed step, so
    a step that fails or is interrupted leaves the rows as they were.
    """

    def __init__(self, engine: Engine, graphs: Sequence[Graph]) -> None:
        self._engine = engine
        first = graphs[0]
        self.batch, self.capacity = first.batch, first.capacity
        self.lengths = np.zeros(self.batch, np.int32)
        self._step_graph = next((graph for graph in graphs if graph.role == "decode"), first)
        self._prefill_graphs = {
            _longest(graph): graph for graph in graphs if graph is not self._step_graph or _is_free(graph)
        }
        self._caches = _allocate(first)
        self._bound: dict[tuple[str, int, int], _Call] = {}

    def reset(self) -> None:
        """Forget all tokens."""
        self.lengths[:] = 0

    def prefill(self, rows: Sequence[Array]) -> Array:
        """Start over with one prompt per row; returns the logits after each row's last token, [batch, vocabulary].

        The array is overwritten by the next call.
        """
        self.reset()
        return self._feed(rows)

    def decode(self, tokens: Array, is_active: Array) -> Array:
        """Append one token to every active row; returns logits [batch, vocabulary], overwritten by the next call."""
        call = self._call(self._step_graph, 1, 1)
        call.ids[:, 0] = tokens
        # A row that is done writes again where it wrote last: its neighbours do not see it, and nobody reads it.
        call.past[:] = np.where(is_active, self.lengths, np.maximum(self.lengths - 1, 0))
        call.new[:] = 1
        call.positions[:] = 0
        call.run()
        self.lengths += is_active.astype(np.int32)
        return call.logits[:, 0]

    def logits_at(self, rows: Sequence[Array], positions: Sequence[Sequence[int]]) -> list[Array]:
        """Logits after each of a row's `positions` (ascending), per row [len(positions), vocabulary], in new memory."""
        self.reset()
        longest = max(self._prefill_graphs, default=0)
        if longest and _is_free(graph := self._prefill_graphs[longest]):
            call = self._call(graph, max(map(len, rows)), max(map(len, positions)), keep=False)
            self._prefill(call, rows, positions)
            return [call.logits[index, : len(asked)].copy() for index, asked in enumerate(positions)]
        return [self._logits_one_by_one(row, asked) for row, asked in zip(rows, positions, strict=True)]

    def _logits_one_by_one(self, row: Array, positions: Sequence[int]) -> Array:
        """With static graphs: feed up to the first asked position at once, then from one to the next."""
        self.reset()
        found, done = [], 0
        for position in positions:
            found.append(self._feed([row[done : position + 1]])[0].copy())
            done = position + 1
        return np.stack(found)

    def _feed(self, rows: Sequence[Array]) -> Array:
        """Append several tokens to each row, in as few calls as the graphs allow."""
        if not self.lengths.any():
            done, logits = self._first_chunk(rows)
        else:
            done, logits = np.zeros(len(rows), int), None
        if self.batch == 1:
            return self._feed_chunks(rows[0], int(done[0]), logits)
        return self._feed_tokens(rows, done, logits)

    def _first_chunk(self, rows: Sequence[Array]) -> tuple[Array, Array | None]:
        """As much of every row as the largest fitting prefill graph takes, padded."""
        if not self._prefill_graphs:
            return np.zeros(len(rows), int), None
        wanted = max(len(row) for row in rows)
        limit = min((size for size in self._prefill_graphs if size >= wanted), default=max(self._prefill_graphs))
        graph = self._prefill_graphs[limit]
        size = min(wanted, limit) if _is_free(graph) else limit
        call = self._call(graph, size, 1, keep=not _is_free(graph))
        chunks = [row[:limit] for row in rows]
        self._prefill(call, chunks, None)
        return np.array([len(chunk) for chunk in chunks]), call.logits[:, 0]

    def _prefill(self, call: _Call, rows: Sequence[Array], positions: Sequence[Sequence[int]] | None) -> None:
        """Run a first call: rows right-padded, rows that nobody uses hold one padding token."""
        call.ids[:] = call.pad
        call.new[:] = 1
        call.past[:] = 0
        call.positions[:] = 0
        for index, row in enumerate(rows):
            call.ids[index, : len(row)] = row
            call.new[index] = len(row)
            asked = [len(row) - 1] if positions is None else positions[index]
            call.positions[index, : len(asked)] = asked
        call.run()
        self.lengths[:] = 0
        self.lengths[: len(rows)] = call.new[: len(rows)]

    def _feed_chunks(self, row: Array, done: int, logits: Array | None) -> Array:
        """Batch 1 on top of a past: whole chunks only, never padded, since ONNX Runtime's GroupQueryAttention writes
        padded rows into the cache once there is a past."""
        while done < len(row):
            left = len(row) - done
            graph, size = self._chunk(left)
            call = self._call(graph, size, 1, keep=size == 1)
            call.ids[0] = row[done : done + size]
            call.past[:], call.new[:], call.positions[:] = self.lengths, size, size - 1
            call.run()
            self.lengths += size
            done, logits = done + size, call.logits[:, 0]
        assert logits is not None, "a prompt has at least one token"
        return logits

    def _chunk(self, left: int) -> tuple[Graph, int]:
        """The largest unpadded step towards `left` tokens."""
        sizes = {min(size, left) if _is_free(graph) else size: graph for size, graph in self._prefill_graphs.items()}
        size = max((size for size in sizes if size <= left), default=0)
        return (sizes[size], size) if size else (self._step_graph, 1)

    def _feed_tokens(self, rows: Sequence[Array], done: Array, logits: Array | None) -> Array:
        """A batch on top of a past: one token per row and step; a row that is through keeps its last logits."""
        last: Array | None = None if logits is None else logits.copy()
        while any(count < len(row) for count, row in zip(done, rows, strict=True)):
            is_active = np.zeros(self.batch, bool)
            tokens = np.zeros(self.batch, np.int64)
            for index, row in enumerate(rows):
                is_active[index] = done[index] < len(row)
                tokens[index] = row[min(done[index], len(row) - 1)]
            logits = self.decode(tokens, is_active)
            last = logits.copy() if last is None else np.where(is_active[:, None], logits, last)
            done = done + is_active[: len(rows)]
        assert last is not None, "a prompt has at least one token"
        return last

    def _call(self, graph: Graph, length: int, positions: int, *, keep: bool = True) -> _Call:
        key = (graph.name, length, positions)
        if key in self._bound:
            return self._bound[key]
        call = _Call(self._engine, graph, length, positions, self._caches)
        if keep:
            self._bound[key] = call
        return call


class _Call:
    """One graph bound to its input arrays, its logits and the session's caches."""

    def __init__(self, engine: Engine, graph: Graph, length: int, positions: int, caches: dict[str, Array]) -> None:
        batch, output = graph.batch, graph.outputs[0]
        self.ids = np.zeros((batch, length), np.int64)
        self.past, self.new = np.zeros(batch, np.int32), np.ones(batch, np.int32)
        self.positions = np.zeros((batch, positions), np.int64)
        vocabulary = output.shape[-1]
        assert isinstance(vocabulary, int), "the vocabulary is static"
        self.logits = np.zeros((batch, positions, vocabulary), output.dtype)
        self.pad = graph.inputs[0].pad
        inputs: dict[str, Array] = dict(
            zip((spec.name for spec in graph.inputs), (self.ids, self.past, self.new, self.positions), strict=False)
        )
        outputs = {output.name: self.logits}
        for layer in graph.cache:
            for name_in, name_out in ((layer.key_in, layer.key_out), (layer.value_in, layer.value_out)):
                inputs[name_in] = outputs[name_out] = caches[name_in]
        self.run: Step = engine.bind(graph.name, inputs, outputs)


def _allocate(graph: Graph) -> dict[str, Array]:
    """The caches, by the names of the graph's inputs; all graphs of a variant use the same names."""
    return {
        name: np.zeros((graph.batch, layer.heads, graph.capacity, layer.head_dim), layer.dtype)
        for layer in graph.cache
        for name in (layer.key_in, layer.value_in)
    }


def _longest(graph: Graph) -> int:
    return graph.length.max if isinstance(graph.length, Dim) else graph.length


def _is_free(graph: Graph) -> bool:
    return isinstance(graph.length, Dim)
