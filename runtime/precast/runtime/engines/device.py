"""Graphs on a device with memory of its own, over arrays that lie in the host's.

Every input has a copy on the device. A step's own inputs are copied there before it, its outputs back after it. Caches,
which graphs change in place, are on the device only: the host's arrays identify them, and hold nothing.
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
from .fork import ForkGuard
from .torch_views import bind_tensors

__all__ = ["Compute", "Device", "DeviceBackend"]

Array = np.ndarray[Any, Any]
Compute: TypeAlias = Callable[[], list[Tensor]]
"""Runs a graph over inputs at fixed addresses and returns its outputs, which the next run may overwrite."""

_PAST = DECODER_INPUTS[1]
_WARM_UPS = 2
"""Runs before one is recorded: the first load kernels and make workspaces, which cannot be recorded."""


class DeviceBackend(Protocol):
    """The operations that differ from device to device."""

    device: torch.device

    def open(self, path: str) -> Any:
        """The runner of a library. Raises RuntimeError or TypeError where it cannot be opened."""
        ...

    def stream(self) -> AbstractContextManager[Any]:
        """A context in which operations on the device run in order."""
        ...

    def record(self, compute: Compute) -> Compute:
        """`compute` recorded as one launch over the same memory, or `compute` itself."""
        ...


class Device:
    """One device, the weights and caches on it, and the lock by which graphs run one at a time."""

    def __init__(self, backend: DeviceBackend) -> None:
        self.backend = backend
        self._process = ForkGuard(f"its connection to {backend.device}")
        self._lock = threading.RLock()
        self._device_copies: dict[int, Tensor] = {}
        self._weights: dict[Any, Tensor] = {}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the device: everything that touches it happens within. Raises UsageError in a forked child."""
        self._process.check()
        with self._lock, self.backend.stream():
            yield

    def copy_weight(self, tensor: Tensor) -> Tensor:
        """Copy a weight to the device, tensors over the same memory once. The copy is aligned as kernels expect, which
        an offset in a file need not be."""
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        with self.turn():
            if key not in self._weights:
                self._weights[key] = tensor.to(self.backend.device, copy=True)
            return self._weights[key]

    def bind(self, run: Callable[[list[Tensor]], list[Tensor]], graph: Graph, inputs: Arrays, outputs: Arrays) -> Step:
        """Bind a graph to arrays; `run` is its library's. Raises ArtifactError as `bind_tensors` does."""
        given, targets = bind_tensors(graph, inputs, outputs)
        names = [spec.name for spec in graph.inputs]
        with self.turn():
            copies = [self._device_copy(inputs[name], host) for name, host in zip(names, given, strict=True)]
        pairs = dict(zip(names, zip(copies, given, strict=True), strict=True))
        return _Bound(self, graph, pairs, targets, lambda: run(copies))

    def move_rows(self, caches: Arrays, to: Sequence[int], parents: Sequence[int], live: int) -> None:
        """See OwnsCaches."""
        with self.turn():
            for cache in caches.values():
                copy = self._device_copies.get(cache.ctypes.data)
                # Without one no graph has written anything yet.
                if copy is not None:
                    copy[list(to), :, :live] = copy[list(parents), :, :live]

    def _device_copy(self, array: Array, host: Tensor) -> Tensor:
        """The device's copy of an array, shared by all graphs that are bound to it; it is freed with the array."""
        at = array.ctypes.data
        if at not in self._device_copies:
            self._device_copies[at] = host.to(self.backend.device, copy=True)
            weakref.finalize(array, self._device_copies.pop, at, None).atexit = False
        return self._device_copies[at]


class _Bound:
    """A graph bound to arrays."""

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
            for copy, host in self._inputs_to_copy():
                # From memory like this a copy returns once the host's may change again.
                copy.copy_(host, non_blocking=True)
            for target, found in zip(self._targets, self._run_compute(), strict=True):
                target.copy_(found)

    def _inputs_to_copy(self) -> list[tuple[Tensor, Tensor]]:
        """The step's own inputs, and the context where it may have changed: a session whose context changes is reset,
        so its next step has no past."""
        is_new = self._past is not None and not self._past.any()
        return [*self._brought, *self._context] if is_new else self._brought

    def _run_compute(self) -> list[Tensor]:
        self._runs += 1
        if self._runs == _WARM_UPS + 1:
            self._compute = self._device.backend.record(self._compute)
        return self._compute()


def _cache_names(graph: Graph) -> set[str]:
    return {name for layer in graph.cache for name in (layer.key_in, layer.value_in)}


def _context_names(graph: Graph) -> set[str]:
    """The inputs that stay from step to step until the session changes them: the outputs of an encoder."""
    if graph.role == "encode":
        return set()
    others = {spec.name for spec in graph.inputs[len(DECODER_INPUTS) :] if not is_cache_positions(spec)}
    return others - _cache_names(graph) - {state.name_in for state in graph.states}
