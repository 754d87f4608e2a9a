"""Graphs for AWS Neuron: TorchScript with compiled code in it, opened on the NeuronCores that were asked for.

Inputs and outputs are copied at every step; caches stay on the device, where a graph changes them in place. They are
copied only where that cannot be helped: from the graph that read a prompt to the one that goes on from it, when
`torch_neuronx.trace` made them, since each has caches of its own then; and when sessions take turns.

Of a model of several ranks each core is one, with its part of the weights and caches of its own heads: one step runs on
all of them. What a session's arrays hold of its caches is the first rank's; those of the others are kept beside them.

Opening follows the Neuron documentation, frameworks/torch/torch-neuronx/api-reference-guide/inference: a file is put on
a core as it is loaded (core placement), weights that lie beside it are put in (replace_weights) and moved there
(move_trace_to_device), and caches are the parameters of the loaded module (the T5 tutorial writes to them).
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..artifact import Artifact
from ..artifact.schema import Graph, Input, Variant
from ..errors import ArtifactError, FormatError, HostError, UsageError
from ..hosts.neuron import neuron_host
from ..hosts.neuron_sdk import parameter_path, without_sdk
from ..terminal import quoted
from . import Arrays, Settings, Step, move_rows
from .fork import ForkGuard
from .rank_weights import own_parts
from .torch_views import bind_tensor, bind_tensors, view_weights
from .verified_files import VerifiedFiles

__all__ = ["NeuronEngine"]


class NeuronEngine:
    """The graphs of a variant, once for each group of cores. A file is opened when a graph of it is first bound."""

    def __init__(self, artifact: Artifact, variant: Variant, settings: Settings) -> None:
        self._graphs = {graph.name: graph for graph in variant.graphs}
        groups = _group_cores(settings.cores, _cores_per_graph(variant))
        files = _Files(artifact, variant)
        kind = _NxdReplica if variant.compiler.options.get("strategy") == "model-builder" else _TracedReplica
        if kind is _NxdReplica and groups != [tuple(range(_cores_per_graph(variant)))]:
            raise UsageError(
                f"cores={','.join(map(str, settings.cores))}: a model of strategy='model-builder' takes the first "
                f"{_cores_per_graph(variant)} cores that its process sees. Leave cores out, and choose them by the "
                f"environment variable NEURON_RT_VISIBLE_CORES, for example NEURON_RT_VISIBLE_CORES=2-3."
            )
        self._replicas = [kind(files, group) for group in groups]
        self._turns = itertools.cycle(self._replicas)
        self._process = ForkGuard("its connection to the Neuron device")
        self._held: dict[int, _SessionCaches] = {}
        self._lock = threading.Lock()

    @property
    def replicas(self) -> int:
        """How many steps run at a time."""
        return len(self._replicas)

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """See Engine."""
        described = self._graphs[graph]
        given, targets = bind_tensors(described, inputs, outputs)
        names = _cache_names(described)
        named = dict(zip((spec.name for spec in described.inputs), given, strict=True))
        with self._lock:
            held = self._track_caches(described, inputs) if names else None
            replica = held.replica if held else next(self._turns)
        opened = replica.open(described)
        rest = [named[name] for name in named if name not in names]
        return _Bound(opened, replica.lock, rest, targets, named, held, self._process)

    def move_rows(self, caches: Arrays, to: Sequence[int], parents: Sequence[int], live: int) -> None:
        """See OwnsCaches. It is done on the host; from there the next step brings them back."""
        with self._lock:
            held = self._held.get(_address_of(next(iter(caches.values()))))
        if held is not None:
            with held.replica.lock:
                held.fetch()
                held.move_others(to, parents, live)
        move_rows(caches, to, parents, live)

    def _track_caches(self, graph: Graph, inputs: Arrays) -> _SessionCaches:
        """The record of these caches, by the address of the session's first array; made at their first use."""
        specs = {spec.name: spec for spec in graph.inputs}
        arrays = {name: inputs[name] for name in _cache_names(graph)}
        first = next(iter(arrays.values()))
        if _address_of(first) not in self._held:
            replica = next(self._turns)
            self._held[_address_of(first)] = _SessionCaches(
                [(specs[name], each) for name, each in arrays.items()], replica
            )
            weakref.finalize(first, self._held.pop, _address_of(first), None)
        return self._held[_address_of(first)]


def _cores_per_graph(variant: Variant) -> int:
    """How many NeuronCores a graph runs on."""
    return variant.ranks.count if variant.ranks else int(variant.compiler.options.get("cores", 1))


def _group_cores(cores: Sequence[int], width: int) -> list[tuple[int, ...]]:
    """The cores of each replica, by default of one. Raises UsageError, HostError."""
    cores = tuple(cores) or tuple(range(width))
    if len(cores) % width:
        raise UsageError(f"This model runs on {width} NeuronCores at a time, of which {len(cores)} is no multiple.")
    host = neuron_host()
    if host is not None and max(cores) >= host.cores:
        raise HostError(
            f"There is no NeuronCore {max(cores)}: this process sees {host.cores}, counted from 0 "
            f"(NEURON_RT_VISIBLE_CORES says which)."
        )
    return [tuple(cores[start : start + width]) for start in range(0, len(cores), width)]


def _cache_names(graph: Graph) -> list[str]:
    return [name for layer in graph.cache for name in (layer.key_in, layer.value_in)]


def _address_of(array: np.ndarray[Any, Any]) -> int:
    return int(array.ctypes.data)


class _Files(VerifiedFiles):
    """A variant's files, and whether the weights are inlined in the graphs."""

    def __init__(self, artifact: Artifact, variant: Variant) -> None:
        super().__init__(artifact, variant)
        self.inlined = bool(variant.compiler.options.get("inline_weights", False))
        self._artifact, self._variant = artifact, variant

    def weights_of_core(self, core: int, cores: int) -> dict[str, Tensor]:
        """The weights of one of several cores, by their paths in the module that NxD compiled."""
        weights, ranks = VerifiedFiles(self._artifact, self._variant, core).weights(), self._variant.ranks
        if ranks and ranks.stored == 1:
            weights = own_parts(weights, ranks, core)
        found = {parameter_path(name): each for name, each in view_weights(weights).items()}
        return found if ranks else _sharded_by_name(found, core, cores)


def _sharded_by_name(weights: Mapping[str, Tensor], core: int, cores: int) -> dict[str, Tensor]:
    """The weights of one core in an artifact of precast 0.1, where a name says whether rows are divided."""
    return {name: each.chunk(cores)[core] if name.startswith("sharded.") else each for name, each in weights.items()}


def _import_sdk(module: str) -> Any:
    """A module of the SDK. Raises HostError where it cannot be imported."""
    try:
        return import_module(module)
    except ImportError as error:
        raise HostError(without_sdk(module, str(error))) from error


class _DeviceCaches(Protocol):
    """Caches on the device; `holder` is the session whose values they hold."""

    holder: _SessionCaches | None

    def read(self) -> Sequence[Tensor]: ...

    def write(self, values: Sequence[Tensor]) -> None: ...


class _OpenGraph(Protocol):
    """A loaded graph, and its caches on the device, if it has any."""

    graph: Graph
    place: _DeviceCaches | None

    def run(self, given: Sequence[Tensor]) -> Any: ...


class _Replica(Protocol):
    """The graphs on one group of cores, on each of which is a rank; whoever runs one holds the lock."""

    lock: threading.Lock
    ranks: int

    def open(self, graph: Graph) -> _OpenGraph: ...


class _TracedReplica:
    """A file per graph, each with weights and caches of its own on the device."""

    ranks = 1

    def __init__(self, files: _Files, cores: Sequence[int]) -> None:
        self.lock = threading.Lock()
        self._files, self._core = files, cores[0]
        self._opened: dict[str, _Module] = {}

    def open(self, graph: Graph) -> _OpenGraph:
        with self.lock:
            if graph.name not in self._opened:
                self._opened[graph.name] = self._load_file(graph)
            return self._opened[graph.name]

    def _load_file(self, graph: Graph) -> _Module:
        sdk, path = _import_sdk("torch_neuronx"), self._files.path(graph.name)
        try:
            cores = sdk.neuron_cores_context(start_nc=self._core, nc_count=1)
            with self._files.by_path(graph.name) as file, _exclusive_loading(), cores:
                module = torch.jit.load(str(file))
            own = {name.partition(":")[2]: each for name, each in self._own_weights(graph.name)}
            if own:
                sdk.replace_weights(module, own)
            if not self._files.inlined:
                sdk.move_trace_to_device(module, self._core)
        except (RuntimeError, ValueError, KeyError) as error:
            raise _cannot_open(path, error) from error
        return _Module(graph, module, path)

    def _own_weights(self, graph: str) -> Iterator[tuple[str, Tensor]]:
        return (item for item in view_weights(self._files.weights()).items() if item[0].startswith(f"{graph}:"))


_PLACING = threading.Lock()
"""The core on which a file is loaded is a setting of the process, not of the thread."""


@contextmanager
def _exclusive_loading() -> Iterator[None]:
    with _PLACING, warnings.catch_warnings():
        # PyTorch gives TorchScript up, which is what the SDK writes; from 2.14 on it says so by a FutureWarning.
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", r"`?torch\.jit\.", category)
        yield


class _Module:
    """A loaded graph of torch_neuronx.trace; its caches are the module's parameters, in the order of the layers."""

    def __init__(self, graph: Graph, module: Any, path: Path) -> None:
        self.graph, self.run_module, self.holder = graph, module, None
        self.place: _DeviceCaches | None = self if graph.cache else None
        shapes = {spec.name: spec.shape for spec in graph.inputs}
        wanted = [shapes[name] for name in _cache_names(graph)]
        self._caches = [each for name, each in module.named_parameters() if not name.startswith("weights.")]
        if graph.cache and [list(each.shape) for each in self._caches] != wanted:
            found = [list(each.shape) for each in self._caches[:2]]
            raise FormatError(f"{path} holds other caches than the artifact says: {len(self._caches)} of {found}.")

    holder: _SessionCaches | None

    def run(self, given: Sequence[Tensor]) -> Any:
        return self.run_module(*given)

    def read(self) -> Sequence[Tensor]:
        return self._caches

    def write(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for cache, value in zip(self._caches, values, strict=True):
                cache.copy_(value)


class _NxdReplica:
    """One NxDModel with all graphs, over one set of weights and caches on each of the first cores."""

    def __init__(self, files: _Files, cores: Sequence[int]) -> None:
        self.lock = threading.Lock()
        self._files, self.ranks = files, len(cores)
        self._place: _Buffers | None = None

    def open(self, graph: Graph) -> _OpenGraph:
        with self.lock:
            if self._place is None:
                self._place = _Buffers(self._load_file(graph), graph, self.ranks)
            return _NxdGraph(graph, self._place)

    def _load_file(self, graph: Graph) -> Any:
        _import_sdk("torch_neuronx")
        path = self._files.path(graph.name)
        weights = [self._files.weights_of_core(core, self.ranks) for core in range(self.ranks)]
        try:
            with self._files.by_path(graph.name) as file, _exclusive_loading():
                model = _import_sdk("neuronx_distributed").NxDModel.load(str(file))
            model.set_weights(weights)
            model.to_neuron()
        except (RuntimeError, ValueError, KeyError, AssertionError) as error:
            raise _cannot_open(path, error) from error
        return model


class _Buffers:
    """The caches of an NxDModel: those of one core after those of another."""

    def __init__(self, model: Any, graph: Graph, cores: int) -> None:
        self.model, self.holder = model, None
        names = [f"cache_{index}" for index in range(len(_cache_names(graph)))]
        self._places = [(name, core) for core in range(cores) for name in names]

    holder: _SessionCaches | None

    def read(self) -> Sequence[Tensor]:
        return [self.model.read_from_neuron_buffer(name, core) for name, core in self._places]

    def write(self, values: Sequence[Tensor]) -> None:
        for (name, core), value in zip(self._places, values, strict=True):
            self.model.write_to_neuron_buffer(value, name, core)


class _NxdGraph:
    """One graph of an NxDModel, which picks it by the shapes of its inputs."""

    def __init__(self, graph: Graph, buffers: _Buffers) -> None:
        self.graph, self._buffers = graph, buffers
        self.place: _DeviceCaches | None = buffers if graph.cache else None

    def run(self, given: Sequence[Tensor]) -> Any:
        return self._buffers.model(*given)


class _SessionCaches:
    """A session's caches: its arrays on the host, which are the first rank's, beside them those of the other ranks, and
    the device caches that hold the newest values, if any do."""

    def __init__(self, arrays: Sequence[tuple[Input, np.ndarray[Any, Any]]], replica: _Replica) -> None:
        # Weak references: the caches end with their session.
        self._arrays = [(spec, weakref.ref(array)) for spec, array in arrays]
        self.replica = replica
        self._place: _DeviceCaches | None = None
        self._others: list[Tensor] = []

    def bring(self, place: _DeviceCaches, *, is_needed: bool) -> None:
        """Move the caches to `place`, with their values if these are needed."""
        if place is self._place:
            return
        if place.holder is not None:
            place.holder.fetch()
        if is_needed:
            place.write(self._place.read() if self._place else self._on_host())
        if self._place:
            self._place.holder = None
        self._place, place.holder = place, self

    def fetch(self) -> None:
        """Copy the caches back to the host's arrays, if their session still exists."""
        place, self._place = self._place, None
        if place is None:
            return
        place.holder = None
        if targets := self._on_host():
            for target, value in zip(targets, place.read(), strict=True):
                target.copy_(value)

    def move_others(self, to: Sequence[int], parents: Sequence[int], live: int) -> None:
        """Copy rows, as OwnsCaches says, in what other ranks than the first have on the host."""
        for cache in self._others:
            cache[list(to), :, :live] = cache[list(parents), :, :live]

    def _on_host(self) -> list[Tensor]:
        """The host's arrays as tensors, those of all ranks; none where their session is gone."""
        found = [(spec, array) for spec, reference in self._arrays if (array := reference()) is not None]
        if len(found) < len(self._arrays):
            return []
        own = [bind_tensor(spec, array) for spec, array in found]
        self._others = self._others or [torch.zeros_like(each) for _ in range(1, self.replica.ranks) for each in own]
        return [*own, *self._others]


class _Bound:
    """A graph bound to arrays."""

    def __init__(
        self,
        opened: _OpenGraph,
        lock: threading.Lock,
        given: list[Tensor],
        targets: list[Tensor],
        named: Mapping[str, Tensor],
        held: _SessionCaches | None,
        process: ForkGuard,
    ) -> None:
        self._process = process
        self._opened, self._lock, self._given, self._targets, self._held = opened, lock, given, targets, held
        self._past = named.get("past_lengths")

    def __call__(self) -> None:
        self._process.check()
        with self._lock:
            if self._held is not None and self._opened.place is not None:
                # Without a past attention reads nothing from the caches.
                has_past = self._past is None or bool(self._past.any())
                self._held.bring(self._opened.place, is_needed=has_past)
            for target, value in zip(self._targets, self._run_graph(), strict=True):
                target.copy_(value)

    def _run_graph(self) -> list[Tensor]:
        graph = self._opened.graph
        try:
            found = self._opened.run(self._given)
        except RuntimeError as error:
            raise ArtifactError(f"The graph {graph.name} failed on the Neuron device. {_last_line(error)}") from error
        values = [found] if isinstance(found, Tensor) else list(found.values() if isinstance(found, dict) else found)
        shapes = [list(value.shape) for value in values]
        wanted = [list(target.shape) for target in self._targets]
        if shapes != wanted:
            raise ArtifactError(f"The graph {graph.name} gave outputs {shapes}; the artifact says {wanted}.")
        return values


def _cannot_open(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path} cannot be opened on a Neuron device: {_last_line(error)} `precast inspect "
        f"{quoted(path.parent)}` says what it was compiled for and what is here."
    )


def _last_line(error: Exception) -> str:
    """The last line of a runtime's message, which is where its reason is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1].rstrip('.')}." if lines else f"{type(error).__name__}."
