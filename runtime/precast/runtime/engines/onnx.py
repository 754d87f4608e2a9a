"""ONNX Runtime, on the CPU, with every buffer bound once."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import onnxruntime

from ..artifact import Artifact
from ..artifact.integrity import identity
from ..artifact.machine import usable_cores
from ..artifact.schema import Graph, Variant
from ..errors import ArtifactError, IntegrityError
from ..prepacked import DATA, GRAPH, Entry, is_wanted
from . import Arrays, Settings, Step

__all__ = ["OnnxEngine"]

SHARED_BYTES = 64 * 2**10
"""Smaller constants are saved inside the graph: they differ from graph to graph, whose big ones are shared."""

_BUILD = f"{onnxruntime.__version__} {onnxruntime.get_build_info()}"
_log = logging.getLogger(__name__)


class OnnxEngine:
    """One session per graph, opened when first bound and shared by all who bind it.

    The first to open a graph on a machine saves its packed weights, which those after it map (`..prepacked`).
    """

    def __init__(self, artifact: Artifact, variant: Variant, settings: Settings) -> None:
        self._artifact, self._variant, self._settings = artifact, variant, settings
        self._graphs = {graph.name: graph for graph in variant.graphs}
        paths = [artifact.path / graph.file for graph in variant.graphs]
        self._verified = {path: identity(path) for path in paths}
        self._lock = threading.Lock()
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """See Engine."""
        return _BoundGraph(self._session(graph), inputs, outputs)

    def _session(self, graph: str) -> onnxruntime.InferenceSession:
        with self._lock:
            if graph not in self._sessions:
                self._sessions[graph] = self._open(self._graphs[graph])
            return self._sessions[graph]

    def _open(self, graph: Graph) -> onnxruntime.InferenceSession:
        path = self._artifact.path / graph.file
        # Saved and opened again, packed MatMulNBits weights gave NaN or zeros with ONNX Runtime 1.31, in some graphs
        # and without an error. Quantized weights are small and packed quickly; they do without.
        if self._variant.quantization is not None or not (self._settings.prepack and is_wanted()):
            return self._open_verified(path, self._options())
        entry = Entry(self._artifact, self._variant, graph, _BUILD)
        return self._open_packed(entry) or self._pack(entry, path) or self._open_verified(path, self._options())

    def _open_packed(self, entry: Entry) -> onnxruntime.InferenceSession | None:
        path = entry.find(force=self._settings.verify)
        if path is None:
            return None
        options = self._options()
        # The saved graph is the optimized one: as it is, it computes what it computed when it was saved.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = _start(path, options)
        except ArtifactError as error:
            entry.drop(str(error))
            return None
        return session if entry.find() else None

    def _pack(self, entry: Entry, path: Path) -> onnxruntime.InferenceSession | None:
        packing = entry.pack()
        if packing is None:
            return None
        try:
            session = self._open_verified(path, _saving(self._options(), packing.path))
        except ArtifactError as error:
            # A full disk, or there is something wrong with the artifact, which the caller then finds out.
            packing.discard()
            _log.info("The weights of %s were not packed: %s", path, error)
            return None
        except BaseException:
            packing.discard()
            raise
        packing.keep()
        return session

    def _open_verified(self, path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        session = _start(path, options)
        if identity(path) != self._verified[path]:
            raise IntegrityError(f"{path} was replaced after it was verified. Open the artifact again.")
        return session

    def _options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._settings.threads or usable_cores()
        options.log_severity_level = 3
        return options


def _saving(options: onnxruntime.SessionOptions, folder: Path) -> onnxruntime.SessionOptions:
    """Let a session save what it has made of its graph and weights."""
    options.optimized_model_filepath = os.fspath(folder / GRAPH)
    for key, value in {
        "optimized_model_external_initializers_file_name": DATA,
        "optimized_model_external_initializers_min_size_in_bytes": str(SHARED_BYTES),
        "save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(f"session.{key}", value)
    return options


def _start(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # ONNX Runtime raises a dozen types of its own without a common base.
        reason = str(error).strip().splitlines()[0]
        raise ArtifactError(f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {reason}") from error


class _BoundGraph:
    """A session with a binding to arrays that it keeps alive."""

    def __init__(self, session: onnxruntime.InferenceSession, inputs: Arrays, outputs: Arrays) -> None:
        self._binding = session.io_binding()
        self._run = session.run_with_iobinding
        self._kept = [
            *(self._bind(self._binding.bind_ortvalue_input, name, array) for name, array in inputs.items()),
            *(self._bind(self._binding.bind_ortvalue_output, name, array) for name, array in outputs.items()),
        ]

    def __call__(self) -> None:
        self._run(self._binding)

    @staticmethod
    def _bind(bind: Any, name: str, array: Any) -> Any:
        """An OrtValue made from an array shares its memory but does not keep it."""
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        assert value.data_ptr() == array.ctypes.data, f"{name} was copied instead of shared"
        bind(name, value)
        return array, value
