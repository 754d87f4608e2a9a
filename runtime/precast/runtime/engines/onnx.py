"""ONNX Runtime, on the CPU, with every buffer bound once."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import onnxruntime

from ..artifact.integrity import identity
from ..artifact.machine import usable_cores
from ..artifact.schema import Variant
from ..errors import ArtifactError, IntegrityError
from . import Arrays, Step

__all__ = ["OnnxEngine"]


class OnnxEngine:
    """One session per graph, opened when first bound and shared by all who bind it."""

    def __init__(self, root: Path, variant: Variant, threads: int) -> None:
        self._paths = {graph.name: root / graph.file for graph in variant.graphs}
        self._verified = {path: identity(path) for path in self._paths.values()}
        self._threads = threads or usable_cores()
        self._lock = threading.Lock()
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """See Engine."""
        return _BoundGraph(self._session(graph), inputs, outputs)

    def _session(self, graph: str) -> onnxruntime.InferenceSession:
        with self._lock:
            if graph not in self._sessions:
                self._sessions[graph] = self._open(self._paths[graph])
            return self._sessions[graph]

    def _open(self, path: Path) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # ONNX Runtime raises a dozen types of its own without a common base.
            reason = str(error).strip().splitlines()[0]
            raise ArtifactError(f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {reason}") from error
        if identity(path) != self._verified[path]:
            raise IntegrityError(f"{path} was replaced after it was verified. Open the artifact again.")
        return session


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
