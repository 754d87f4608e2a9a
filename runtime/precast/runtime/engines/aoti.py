"""Native code of AOTInductor that stands alone: a shared library per graph, called by ctypes over numpy arrays.

Such a library has PyTorch's part in it (`precast.exporter.backends.aoti.standalone`): memory, threads, functions. It
maps the same weights as every other, is opened in place, and copies only outputs. Compiled code checks none of its
inputs, so that is done here, when they are bound. Libraries that call more than that are PyTorch's to run.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import Artifact
from ..artifact.schema import STANDALONE_ABI, Graph, Input, Output, Variant
from ..errors import ArtifactError, FormatError
from ..hosts.machine import usable_cores
from . import Arrays, Engine, Settings, Step
from .binding import order_arrays
from .elf import check_imports, check_library
from .rank_weights import own_parts
from .safetensors_map import Weight, weight_of
from .verified_files import VerifiedFiles

__all__ = ["Member", "StandaloneEngine", "open_aoti"]

_MAX_DIMS = 8


def open_aoti(artifact: Artifact, variant: Variant, settings: Settings) -> Engine:
    """The engine of a variant: the one below where its libraries stand alone, else PyTorch's, imported now."""
    if variant.abi:
        return StandaloneEngine(artifact, variant, settings)
    engine: Engine = import_module(f"{__package__}.aoti_torch").TorchAotiEngine(artifact, variant, settings)
    return engine


@dataclass(frozen=True)
class Member:
    """One of several ranks that run the same libraries: its number, the address of the memory that they share, which
    `owner` keeps mapped, and how many seconds it waits for others."""

    address: int
    rank: int
    seconds: float
    owner: object


class StandaloneEngine:
    """One library per graph, opened when first bound and shared by all who bind it; as a `member`, with its part of the
    weights."""

    def __init__(self, artifact: Artifact, variant: Variant, settings: Settings, member: Member | None = None) -> None:
        if variant.abi != STANDALONE_ABI:
            raise ArtifactError(
                f"The libraries of {artifact.path} have version {variant.abi} of the interface to this runtime, which "
                f"has version {STANDALONE_ABI}. Export the model again with this release of precast."
            )
        self.graphs: Mapping[str, Graph] = {graph.name: graph for graph in variant.graphs}
        self._ranks, self._member = variant.ranks, member
        self._files = VerifiedFiles(artifact, variant, member.rank if member else 0)
        self._lock = threading.Lock()
        self._opened: dict[str, _Library] = {}
        self._weights: Mapping[str, Weight] | None = None
        self._threads = settings.threads or usable_cores()

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """See Engine."""
        return _Bound(self._get_library(graph), self.graphs[graph], inputs, outputs, self._threads)

    def _get_library(self, name: str) -> _Library:
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._open_library(name)
            return self._opened[name]

    def _open_library(self, name: str) -> _Library:
        path = self._files.path(name)
        if self._weights is None:
            self._weights = self._open_weights()
        with self._files.library_path(name) as library_path:
            check_library(path, library_path)
            check_imports(path, library_path)
            library = _Library(path, library_path, name)
        library.set_weights(self._weights)
        if self._member:
            library.join(self._member)
        return library

    def _open_weights(self) -> Mapping[str, Weight]:
        weights = self._files.weights()
        if self._member and self._ranks and self._ranks.stored == 1:
            return own_parts(weights, self._ranks, self._member.rank)
        return weights


class _CArray(ctypes.Structure):
    """`PrecastArray`: where elements are, and how they lie."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("dims", c_int32),
        ("sizes", c_int64 * _MAX_DIMS),
        ("strides", c_int64 * _MAX_DIMS),
    ]


class _CConstant(ctypes.Structure):
    """`PrecastConstant`: a weight that a library needs, by its own name for it and by the model's."""

    _fields_ = [("name", c_char_p), ("model_name", c_char_p), ("dtype", c_int32)]


_ORDER = ["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
_NUMBERS = {**{dtype: number for number, dtype in enumerate(_ORDER)}, "complex64": 9, "bool": 11, "bfloat16": 15}
"""PyTorch's own numbers of dtypes (c10/core/ScalarType.h)."""


class _Library:
    """An opened library with its one graph."""

    def __init__(self, path: Path, library_path: str, graph: str) -> None:
        self._path, self._graph = path, graph
        self._functions = self._load(library_path)
        self._opened = c_void_p()
        self._check(self._functions.precast_open(byref(self._opened)))
        weakref.finalize(self, self._functions.precast_close, self._opened).atexit = False
        self._held: list[Any] = []
        """What the library was given the addresses of."""

    def _load(self, library_path: str) -> ctypes.CDLL:
        try:
            functions = ctypes.CDLL(library_path)
            version = functions.precast_abi()
        except (OSError, AttributeError) as error:
            reason = str(error).replace(library_path, str(self._path))
            raise ArtifactError(f"{self._path} cannot be opened: {reason}. Export the model again.") from error
        if version != STANDALONE_ABI:
            raise FormatError(
                f"{self._path} has version {version} of the interface, where config.json says {STANDALONE_ABI}."
            )
        functions.precast_failure.restype = c_char_p
        functions.precast_constants.argtypes = [c_void_p, POINTER(_CConstant), c_size_t]
        functions.precast_constants.restype = c_size_t
        functions.precast_set_constants.argtypes = [c_void_p, POINTER(c_char_p), POINTER(_CArray), c_size_t]
        arrays = POINTER(_CArray)
        functions.precast_run.argtypes = [c_void_p, arrays, c_size_t, arrays, c_size_t, c_int32]
        return functions

    def _check(self, status: int) -> None:
        if status:
            reason = self._functions.precast_failure().decode("utf-8", "replace")
            raise ArtifactError(f"The graph {self._graph} failed: {reason}")

    def join(self, member: Member) -> None:
        """Let the library exchange with other ranks."""
        self._held.append(member.owner)
        self._functions.precast_join_ranks.argtypes = [c_void_p, c_int32, c_double]
        self._functions.precast_join_ranks(member.address, member.rank, member.seconds)

    def set_weights(self, weights: Mapping[str, Weight]) -> None:
        """Hand over the addresses of the weights that the graph uses. Raises FormatError where one does not fit."""
        found = [(each.name, self._select_weight(each, weights)) for each in self._list_constants()]
        if not found:
            return
        names = (c_char_p * len(found))(*(name for name, _ in found))
        arrays = (_CArray * len(found))(*(self._weight_array(weight) for _, weight in found))
        self._check(self._functions.precast_set_constants(self._opened, names, arrays, len(found)))

    def _list_constants(self) -> Iterable[_CConstant]:
        count = self._functions.precast_constants(self._opened, None, 0)
        constants: Any = (_CConstant * count)()
        self._functions.precast_constants(self._opened, constants, count)
        yield from constants

    def _select_weight(self, constant: _CConstant, weights: Mapping[str, Weight]) -> Weight:
        name = constant.model_name.decode("utf-8", "replace")
        weight = weight_of(weights, self._graph, name)
        if weight is None:
            raise FormatError(f"{self._path} needs the weight {name}, which the artifact's weight files lack.")
        if _NUMBERS[weight.dtype] != constant.dtype:
            raise FormatError(f"{self._path} needs the weight {name} in another dtype than {weight.dtype}.")
        return weight

    def _weight_array(self, weight: Weight) -> _CArray:
        address = None
        if weight.held:
            first = ctypes.c_char.from_buffer(weight.memory, weight.start)
            self._held.append(first)
            address = ctypes.addressof(first)
        return _c_array(address, weight.dtype, weight.shape, weight.strides)

    def bind(self, inputs: Sequence[_CArray], outputs: Sequence[_CArray], threads: int) -> Step:
        """A step over these arrays, which lie where they are for as long as it is called."""
        run, opened, check = self._functions.precast_run, self._opened, self._check
        given, made = (_CArray * len(inputs))(*inputs), (_CArray * len(outputs))(*outputs)

        def step() -> None:
            if status := run(opened, given, len(given), made, len(made), threads):
                check(status)

        return step


def _c_array(address: int | None, dtype: str, shape: Sequence[int], strides: Sequence[int]) -> _CArray:
    if len(shape) > _MAX_DIMS:
        raise FormatError(f"A tensor has {len(shape)} dimensions, more than the {_MAX_DIMS} of compiled code.")
    sizes = c_int64 * _MAX_DIMS
    return _CArray(address, _NUMBERS[dtype], len(shape), sizes(*shape), sizes(*strides))


def _session_array(spec: Input | Output, array: np.ndarray[Any, Any]) -> _CArray:
    strides = [step // array.itemsize for step in array.strides]
    return _c_array(array.ctypes.data, spec.dtype, array.shape, strides)


class _Bound:
    """A graph bound to arrays, which it holds: a step reads and writes them in place."""

    def __init__(self, library: _Library, graph: Graph, inputs: Arrays, outputs: Arrays, threads: int) -> None:
        given, made = order_arrays(graph, inputs, outputs)
        self._held = [array for _, array in [*given, *made]]
        self._step = library.bind(
            [_session_array(*each) for each in given], [_session_array(*each) for each in made], threads
        )

    def __call__(self) -> None:
        self._step()
