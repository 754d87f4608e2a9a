"""ONNX Runtime: on the CPU with every buffer bound once, or with another of its providers.

On the CPU a step computes in the arrays that it was bound to. Elsewhere every step copies its inputs to the device and
its outputs back, a decoder's caches among them: right with every provider, and what a decoder pays for one.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import weakref
from contextlib import redirect_stdout
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnxruntime

from ..artifact import Artifact
from ..artifact.onnx_graph import external_files
from ..artifact.schema import Graph, Variant
from ..errors import ArtifactError, FormatError, HostError
from ..hosts.machine import usable_cores, version_numbers
from . import Arrays, Settings, Step
from .fork import ForkGuard
from .onnx_prepack import DATA, GRAPH, Entry, is_wanted
from .providers import ProviderChoice, choose_provider

__all__ = ["OnnxEngine"]

SHARED_BYTES = 64 * 2**10
"""Smaller constants are saved inside the graph: they differ from graph to graph, whose big ones are shared."""

_BUILD = f"{onnxruntime.__version__} {onnxruntime.get_build_info()}"
_log = logging.getLogger(__name__)


class OnnxEngine:
    """One session per graph, opened when first bound and shared by all who bind it.

    On the CPU, the first to open a graph on a machine saves its packed weights, which those after it map
    (`.onnx_prepack`). Raises HostError where this build of ONNX Runtime lacks the provider that is asked for.
    """

    def __init__(self, artifact: Artifact, variant: Variant, settings: Settings) -> None:
        self._artifact, self._variant, self._settings = artifact, variant, settings
        self._threads = settings.threads or usable_cores()
        self._choice = choose_provider(
            settings.device, settings.provider, onnxruntime.get_available_providers(), onnxruntime.__version__
        )
        self._graphs = {graph.name: graph for graph in variant.graphs}
        self._lock = threading.Lock()
        _load_libraries(self._choice)
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        is_cpu_provider = self._choice.is_cpu_provider
        self._process = (
            ForkGuard.of_threads(self._threads) if is_cpu_provider else ForkGuard(f"its connection to {self._choice}")
        )
        _engines.add(self)

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """See Engine."""
        session = self._get_session(graph)
        if self._choice.is_cpu_provider:
            return _BoundGraph(session, inputs, outputs, self._choice, self._process)
        return _CopyingGraph(session, inputs, outputs, self._choice, self._process)

    def keep(self) -> None:
        """Never close the sessions: that would wait for their threads to end."""
        for session in self._sessions.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))

    def _get_session(self, graph: str) -> onnxruntime.InferenceSession:
        with self._lock:
            if graph not in self._sessions:
                self._sessions[graph] = self._open_graph(self._graphs[graph])
            return self._sessions[graph]

    def _open_graph(self, graph: Graph) -> onnxruntime.InferenceSession:
        external = self._external_files(graph)
        wanted = self._settings.prepack and is_wanted() and self._choice.is_cpu_provider
        if not wanted or (self._variant.quantization is not None and not _opens_packed_codes(onnxruntime.__version__)):
            return self._open_verified(graph, external, self._session_options())
        entry = Entry(self._artifact, self._variant, graph, _BUILD)
        return (
            self._open_packed(entry)
            or self._pack_weights(entry, graph, external)
            or self._open_verified(graph, external, self._session_options())
        )

    def _external_files(self, graph: Graph) -> list[str]:
        """The files with weights that the graph opens. Raises FormatError where one is not among those of its variant:
        nobody would have verified it."""
        path, folder = self._artifact.path / graph.file, PurePosixPath(graph.file).parent
        spelled = external_files(self._artifact.contents.read(graph.file), str(path))
        names = {each: str(folder / each) for each in sorted(spelled)}
        for each, name in names.items():
            if "/" in each or name not in self._variant.weights:
                raise FormatError(
                    f"{path} is refused: it takes weights from {each[:80]!r}, which is not among the weights that "
                    f"config.json lists: {', '.join(self._variant.weights) or 'none'}."
                )
        return list(names.values())

    def _open_packed(self, entry: Entry) -> onnxruntime.InferenceSession | None:
        path = entry.find(force=self._settings.verify)
        if path is None:
            return None
        options = self._session_options()
        # The saved graph is the optimized one: as it is, it computes what it computed when it was saved.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = _start_session(path, options, self._choice, self._threads)
        except ArtifactError as error:
            entry.drop(str(error))
            return None
        return session if entry.find() else None

    def _pack_weights(self, entry: Entry, graph: Graph, external: list[str]) -> onnxruntime.InferenceSession | None:
        packing = entry.pack()
        if packing is None:
            return None
        try:
            session = self._open_verified(graph, external, _with_saving(self._session_options(), packing.path))
        except ArtifactError as error:
            # A full disk, or there is something wrong with the artifact, which the caller then finds out.
            packing.discard()
            _log.info("The weights of %s were not packed: %s", self._artifact.path / graph.file, error)
            return None
        except BaseException:
            packing.discard()
            raise
        packing.keep()
        return session

    def _open_verified(
        self, graph: Graph, external: list[str], options: onnxruntime.SessionOptions
    ) -> onnxruntime.InferenceSession:
        # Other providers name what they cache by where the graph lies.
        with self._artifact.contents.path(graph.file, *external, is_pinned=self._choice.is_cpu_provider) as path:
            return _start_session(self._artifact.path / graph.file, options, self._choice, self._threads, path)

    def _session_options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        # Whatever a file is called: its other format is not what was looked through for external data.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.intra_op_num_threads = self._threads
        if self._settings.shares_cores:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        return options


_engines: weakref.WeakSet[OnnxEngine] = weakref.WeakSet()


def _keep_all() -> None:
    for engine in list(_engines):
        engine.keep()


# In a child that was forked their threads are not there.
os.register_at_fork(after_in_child=_keep_all)


def _opens_packed_codes(version: str) -> bool:
    """Whether this release opens what it saved of MatMulNBits' weights. Before 1.32 it gave NaN or zeros in some
    graphs, without an error: a session did not learn the size of weights that it was given packed
    (https://github.com/microsoft/onnxruntime/pull/29654)."""
    return version_numbers(version) >= (1, 32)


def _with_saving(options: onnxruntime.SessionOptions, folder: Path) -> onnxruntime.SessionOptions:
    """Make a session save its optimized graph and packed weights in `folder`."""
    options.optimized_model_filepath = os.fspath(folder / GRAPH)
    for key, value in {
        "optimized_model_external_initializers_file_name": DATA,
        "optimized_model_external_initializers_min_size_in_bytes": str(SHARED_BYTES),
        "save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(f"session.{key}", value)
    return options


def _load_libraries(choice: ProviderChoice) -> None:
    """Load CUDA and cuDNN as pip installs them, which lie where the system's loader does not look."""
    if choice.device == "cuda":
        # It prints which libraries it does not find, and standard output is the caller's.
        with redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls()


def _start_session(
    path: Path, options: onnxruntime.SessionOptions, choice: ProviderChoice, threads: int, source: Path | None = None
) -> onnxruntime.InferenceSession:
    """Open the graph at `path`; `source` is another path to the same file. Raises ArtifactError, HostError."""
    source = source or path
    try:
        # Its fallback would open the graph on the CPU, and say so on standard output only.
        session = onnxruntime.InferenceSession(
            os.fspath(source), options, providers=choice.arguments(threads), enable_fallback=0
        )
    except Exception as error:
        # ONNX Runtime raises a dozen types of its own without a common base.
        reason = _message_of(error).replace(os.fspath(source.parent), os.fspath(path.parent))
        raise ArtifactError(_describe_failure(f"open {path}", choice, reason)) from error
    _check_taken(session, choice)
    return session


def _check_taken(session: onnxruntime.InferenceSession, choice: ProviderChoice) -> None:
    """Raise HostError where ONNX Runtime left the provider out, as it does where its driver is missing."""
    taken = session.get_providers()
    if taken[0] != choice.provider.full_name:
        raise HostError(
            f"ONNX Runtime {onnxruntime.__version__} has {choice.provider.full_name} and could not start it on "
            f"{choice.device}; it would have run on {taken[0]} instead. It needs {choice.provider.needs}: standard "
            f"error says what was missing. Leave device and provider out to run on the CPU."
        )


def _message_of(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _describe_failure(what: str, choice: ProviderChoice, said: str) -> str:
    cause = f"ONNX Runtime {onnxruntime.__version__} cannot {what}"
    if choice.is_cpu_provider:
        return f"{cause}: {said.splitlines()[0]}"
    reason = " ".join(said.split())
    return f"{cause} with {choice}: {reason}. Leave device and provider out to run it on the CPU."


class _Graph:
    """Base of graphs that run: failures become ArtifactErrors, use in a forked child is refused."""

    def __init__(self, choice: ProviderChoice, process: ForkGuard) -> None:
        self._choice, self._process = choice, process

    def _run_checked(self, what: str, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            # ONNX Runtime raises a dozen types of its own without a common base; some providers compile, and fail, only
            # when they run.
            raise ArtifactError(_describe_failure(what, self._choice, _message_of(error))) from error


class _BoundGraph(_Graph):
    """A graph bound to arrays, which it reads and writes in place and keeps alive."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Arrays,
        outputs: Arrays,
        choice: ProviderChoice,
        process: ForkGuard,
    ) -> None:
        super().__init__(choice, process)
        self._binding, self._run = session.io_binding(), session.run_with_iobinding
        self._kept = [
            *(self._bind_array(self._binding.bind_ortvalue_input, name, array) for name, array in inputs.items()),
            *(self._bind_array(self._binding.bind_ortvalue_output, name, array) for name, array in outputs.items()),
        ]

    def __call__(self) -> None:
        self._process.check()
        self._run_checked("run the graph", self._run, self._binding)

    def _bind_array(self, bind: Any, name: str, array: Any) -> Any:
        """Bind an array. Its OrtValue shares the memory but does not keep the array alive, so both are returned."""
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        assert value.data_ptr() == array.ctypes.data, f"{name} was copied instead of shared"
        self._run_checked(f"bind {name}", bind, name, value)
        return array, value


class _CopyingGraph(_Graph):
    """A graph on a device, or with a provider, that has memory of its own: inputs and outputs are copied.

    Nothing is bound: a device's copy of an input is made when that is bound and not again, and a provider that knows
    nothing of caches which are both input and output may read what it has just overwritten.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Arrays,
        outputs: Arrays,
        choice: ProviderChoice,
        process: ForkGuard,
    ) -> None:
        super().__init__(choice, process)
        self._get_session, self._inputs, self._outputs = session, dict(inputs), dict(outputs)

    def __call__(self) -> None:
        self._process.check()
        found = self._run_checked("run the graph", self._get_session.run, list(self._outputs), self._inputs)
        for array, result in zip(self._outputs.values(), found, strict=True):
            np.copyto(array, result, casting="no")
