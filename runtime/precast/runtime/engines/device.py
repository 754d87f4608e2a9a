"""Graphs on a device with memory of its own, over arrays that lie in the host's.

Every input has a twin on the device. What a step brings is copied there before it, its outputs back after it. Caches,
which graphs change in place, are on the device only: the host's arrays say whose they are, and hold nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..artifact import DECODER_INPUTS, is_cache_positions
from ..artifact.schema import Graph
from . import Arrays, Step
from .fork import Process
from .torch_views import bound_tensors

__all__ = ["Compute", "Device", "Place"]

Array = np.ndarray[Any, Any]
Compute: TypeAlias = Callable[[], list[Tensor]]
"""Runs a graph over inputs that stay where they are, and returns its outputs, which the next run may overwrite."""

_PAST = DECODER_INPUTS[1]
_WARM_UPS = 2
"""Runs before one is recorded: the first load kernels and make workspaces, which cannot be recorded."""


class Place(Protocol):
    """What differs from device to device."""

    device: torch.device

    def open(self, path: str) -> Any:
        """The runner of a library. Raises RuntimeError or TypeError where it cannot be opened."""
        ...

    def stream(self) -> AbstractContextManager[Any]:
        """Within it, what is asked of the device is done in order."""
        ...

    def record(self, compute: Compute) -> Compute:
        """`compute`, or what does the same over the same memory for less."""
        ...


class Device:
    """One place, the weights and caches in it, and whose turn it is: graphs run one at a time."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._process = Process(f"its connection to {place.device}")
        self._lock = threading.RLock()
        self._twins: dict[int, Tensor] = {}
        self._weights: dict[Any, Tensor] = {}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Whatever touches the device is done within its turn. Raises UsageError in a fork."""
        self._process.check()
        with self._lock, self.place.stream():
            yield

    def weight(self, tensor: Tensor) -> Tensor:
        """The copy of a weight. What is the same memory is copied once; a copy lies as evenly as kernels expect, which
        a place in a file need not."""
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        with self.turn():
            if key not in self._weights:
                self._weights[key] = tensor.to(self.place.device, copy=True)
            return self._weights[key]

    def bind(self, run: Callable[[list[Tensor]], list[Tensor]], graph: Graph, inputs: Arrays, outputs: Arrays) -> Step:
        """A graph tied to arrays; `run` is its library's. Raises ArtifactError as `bound_tensors` does."""
        given, targets = bound_tensors(graph, inputs, outputs)
        names = [spec.name for spec in graph.inputs]
        with self.turn():
            twins = [self._twin(inputs[name], host) for name, host in zip(names, given, strict=True)]
        pairs = dict(zip(names, zip(twins, given, strict=True), strict=True))
        return _Bound(self, graph, pairs, targets, lambda: run(twins))

    def move_rows(self, caches: Arrays, to: Sequence[int], parents: Sequence[int], live: int) -> None:
        """See KeepsCaches."""
        with self.turn():
            for cache in caches.values():
                twin = self._twins.get(cache.ctypes.data)
                # Without one no graph has written anything yet.
                if twin is not None:
                    twin[list(to), :, :live] = twin[list(parents), :, :live]

    def _twin(self, array: Array, host: Tensor) -> Tensor:
        """The copy of an array, the same one for all graphs that are bound to it; it goes with the array."""
        at = array.ctypes.data
        if at not in self._twins:
            self._twins[at] = host.to(self.place.device, copy=True)
            weakref.finalize(array, self._twins.pop, at, None).atexit = False
        return self._twins[at]


class _Bound:
    """A graph tied to arrays."""

    def __init__(
        self, device: Device, graph: Graph, pairs: dict[str, tuple[Tensor, Tensor]], targets: list[Tensor],
        compute: Compute,
    ) -> None:  # fmt: skip
        self._device, self._targets, self._compute, self._runs = device, targets, compute, 0
        # Recorded kernels know inputs by where they lie.
        self._pairs = pairs
        caches, context = _cache_names(graph), _context_names(graph)
        self._brought = [pair for name, pair in pairs.items() if name not in caches | context]
        self._context = [pairs[name] for name in context]
        self._past = pairs[_PAST][1] if context else None

    def __call__(self) -> None:
        with self._device.turn():
            for twin, host in self._changed():
                # From memory like this a copy returns once the host's may change again.
                twin.copy_(host, non_blocking=True)
            for target, found in zip(self._targets, self._results(), strict=True):
                target.copy_(found)

    def _changed(self) -> list[tuple[Tensor, Tensor]]:
        """Whoever changes the context of a session makes it forget all tokens, so that the next step has no past."""
        is_new = self._past is not None and not self._past.any()
        return [*self._brought, *self._context] if is_new else self._brought

    def _results(self) -> list[Tensor]:
        self._runs += 1
        if self._runs == _WARM_UPS + 1:
            self._compute = self._device.place.record(self._compute)
        return self._compute()


def _cache_names(graph: Graph) -> set[str]:
    return {name for layer in graph.cache for name in (layer.key_in, layer.value_in)}


def _context_names(graph: Graph) -> set[str]:
    """The inputs that stay from step to step and are the session's to change: what an encoder made of its input."""
    if graph.role == "encode":
        return set()
    others = {spec.name for spec in graph.inputs[len(DECODER_INPUTS) :] if not is_cache_positions(spec)}
    return others - _cache_names(graph) - {state.name_in for state in graph.states}
