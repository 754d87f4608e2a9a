"""Modules as native code that PyTorch's own runner calls, for tests of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from precast.exporter.backends.aoti import library, workspace

Compiled = Callable[..., list[Tensor]]


def compiled(
    module: nn.Module, arguments: tuple[Tensor, ...], folder: Path, isa: str = "native", free: Any = None
) -> Compiled:
    """The module's native code as a function. `free`: dimensions that are, as torch.export takes them."""
    exported = torch.export.export(module, arguments, dynamic_shapes=free)
    with workspace.compiler_workspace():
        library.build_library(exported, folder / "compiled.so", isa)
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / "compiled.so"), 1)
    return lambda *given: runner.run(list(given))


@contextmanager
def threads_set_to(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
