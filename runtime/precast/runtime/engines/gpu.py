"""A GPU as the backend of a Device: PyTorch's runner for native code, a stream of its own, and CUDA graphs."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..errors import PrecastWarning
from ..terminal import first_line
from .device import Compute

__all__ = ["Gpu"]


class Gpu:
    """The GPU that is PyTorch's current one: see Place."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        # Kernels can be recorded on any stream but the default one. One for all, so that they run in order.
        self._stream = torch.cuda.Stream(self.device)
        # Recorded runs never overlap, so all use the same memory for what they need in between.
        self._pool = torch.cuda.graph_pool_handle()
        self._is_refused = False

    def open(self, path: str) -> Any:
        """See DeviceBackend."""
        # The last argument is `run_single_threaded`: otherwise the library asks events of its own whether the last run
        # is through, which must not be asked of a recorded one. Those who run it here take turns anyway.
        runner: Any = torch._C._aoti.AOTIModelContainerRunnerCuda
        return runner(path, 1, str(self.device), "", True)

    def stream(self) -> AbstractContextManager[Any]:
        """See DeviceBackend."""
        return torch.cuda.stream(self._stream)

    def record(self, compute: Compute) -> Compute:
        """See DeviceBackend. A RuntimeWarning says, once, where that cannot be done."""
        if self._is_refused:
            return compute
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate meanwhile, which only the strictest mode forbids.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                found = compute()
        except RuntimeError as error:
            self._warn_once(error)
            return compute

        def replay() -> list[torch.Tensor]:
            graph.replay()
            return found

        return replay

    def _warn_once(self, error: RuntimeError) -> None:
        self._is_refused = True
        warnings.warn(
            f"This GPU cannot record the model's kernels as a CUDA graph, so each is started on its own: answers are "
            f"the same, and come later. {first_line(error)}",
            PrecastWarning,
            stacklevel=2,
        )
