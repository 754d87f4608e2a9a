"""Native code of AOTInductor: a shared library per graph, opened in place, and one mapping of the weights for all.

No compiler, no archive, no temporary copy: PyTorch's own runner takes the path of a library and the addresses of the
weights. Compiled code checks none of its inputs, so that is done here, when they are bound. Code for a GPU is given the
GPU's copies of weights and inputs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..artifact import Artifact
from ..artifact.schema import Graph, Variant
from ..errors import ArtifactError, FormatError
from ..hosts.machine import usable_cores
from ..terminal import first_line
from . import Arrays, Settings, Step, move_rows
from .device import Device
from .elf import check_library
from .gpu import Gpu
from .safetensors_map import weight_of
from .torch_views import bind_tensors, guard_threads, view_weights
from .verified_files import VerifiedFiles

__all__ = ["TorchAotiEngine"]


class TorchAotiEngine:
    """One library per graph, opened when first bound and shared by all who bind it. A variant without weight files has
    them in its libraries."""

    def __init__(self, artifact: Artifact, variant: Variant, settings: Settings) -> None:
        self._graphs = {graph.name: graph for graph in variant.graphs}
        self._files, self._has_weights = VerifiedFiles(artifact, variant), bool(variant.weights)
        self._lock = threading.Lock()
        self._opened: dict[str, Any] = {}
        self._weights: Mapping[str, torch.Tensor] | None = None
        self._threads = settings.threads or usable_cores()
        self._device = Device(Gpu()) if variant.host.device == "cuda" else None

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """See Engine."""
        run, described = _report_failures(self._get_runner(graph).run, graph), self._graphs[graph]
        if self._device is not None:
            return self._device.bind(run, described, inputs, outputs)
        return _Bound(run, described, inputs, outputs, self._threads)

    @property
    def has_device(self) -> bool:
        """Whether it runs on a GPU, where its caches are."""
        return self._device is not None

    def move_rows(self, caches: Arrays, to: Sequence[int], parents: Sequence[int], live: int) -> None:
        """See OwnsCaches."""
        move = move_rows if self._device is None else self._device.move_rows
        move(caches, to, parents, live)

    def _get_runner(self, name: str) -> Any:
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._open_library(name)
            return self._opened[name]

    def _open_library(self, name: str) -> Any:
        path = self._files.path(name)
        if self._weights is None:
            self._weights = view_weights(self._files.weights())
        with self._files.library_path(name) as library_path:
            if self._device is None:
                runner = _load_library(path, library_path, _open_on_cpu)
            else:
                with self._device.turn():
                    runner = _load_library(path, library_path, self._device.backend.open)
        if self._has_weights:
            copied = self._device.copy_weight if self._device else None
            _give_weights(runner, self._weights, name, path, copied)
        return runner


def _open_on_cpu(library_path: str) -> Any:
    return torch._C._aoti.AOTIModelContainerRunnerCpu(library_path, 1)


def _load_library(path: Path, library_path: str, opened: Callable[[str], Any]) -> Any:
    """The runner of the library at `path`, opened as `library_path`. Raises ArtifactError where it is none, or one for
    another PyTorch."""
    check_library(path, library_path)
    try:
        return opened(library_path)
    except (RuntimeError, TypeError) as error:
        reason = first_line(error).replace(library_path, str(path))
        raise ArtifactError(
            f"PyTorch {torch.__version__} cannot open {path}: {reason} It may have been compiled for another release: "
            f"export the model again with this one."
        ) from error


def _give_weights(
    runner: Any,
    weights: Mapping[str, torch.Tensor],
    graph: str,
    path: Path,
    copied: Callable[[torch.Tensor], torch.Tensor] | None,
) -> None:
    """Hand the library the addresses of its weights, or of those that `copied` returns; it copies none."""
    names: dict[str, str] = runner.get_constant_names_to_original_fqns()
    dtypes: dict[str, int] = runner.get_constant_names_to_dtypes()
    found = {}
    for inner, name in names.items():
        tensor = weight_of(weights, graph, name)
        if tensor is None:
            raise FormatError(f"{path} needs the weight {name}, which the artifact's weight files lack.")
        if dtypes.get(inner, _NUMBERS[tensor.dtype]) != _NUMBERS[tensor.dtype]:
            raise FormatError(f"{path} needs the weight {name} in another dtype than {tensor.dtype}.")
        # Of its own, to be emptied below; the memory is shared.
        found[inner] = (copied(tensor) if copied else tensor).detach()
    if found:
        runner.update_constant_buffer(found, False, True, True)
        # PyTorch never lets go of tensors that it was given so, and they of the file's mapping.
        weakref.finalize(runner, _empty_tensors, list(found.values())).atexit = False


def _empty_tensors(tensors: Sequence[torch.Tensor]) -> None:
    # Whenever garbage is collected, which may be while somebody traces or makes tensors on another device.
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        for each in tensors:
            each.set_()  # type: ignore[call-overload]


_ORDER = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64]
_NUMBERS = {
    **{dtype: number for number, dtype in enumerate(_ORDER)},
    torch.bool: 11,
    torch.bfloat16: 15,
    torch.complex64: 9,
}
"""PyTorch's own numbers of dtypes (c10/core/ScalarType.h)."""


_Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def _report_failures(run: _Run, graph: str) -> _Run:
    """Turn what a library raises, for lack of memory too, into an ArtifactError."""

    def call(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        try:
            return run(inputs)
        except RuntimeError as error:
            raise ArtifactError(f"The graph {graph} failed: {first_line(error, 'no reason given')}") from error

    return call


class _Bound:
    """A graph bound to arrays: a step reads them in place, and copies its outputs there."""

    def __init__(self, run: _Run, graph: Graph, inputs: Arrays, outputs: Arrays, threads: int) -> None:
        self._run, self._threads, self._process = run, threads, guard_threads(threads)
        self._inputs, self._outputs = bind_tensors(graph, inputs, outputs)

    def __call__(self) -> None:
        self._process.check()
        # A setting of the calling thread, of which a server has several.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        for target, found in zip(self._outputs, self._run(self._inputs), strict=True):
            target.copy_(found)
