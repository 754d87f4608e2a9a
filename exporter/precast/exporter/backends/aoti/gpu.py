"""Native code for a GPU: the tools that it needs, Inductor's options, and the facts that are recorded."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch.export.passes import move_to_device_pass
from torch.utils._triton import has_triton

from precast.runtime.errors import ExportError
from precast.runtime.hosts.cuda import cuda_host

__all__ = ["GPU_OPTIONS", "check_gpu", "check_kernels_embedded", "free_gpu_memory", "gpu_facts", "move_to_device"]

GPU_OPTIONS: dict[str, Any] = {
    # Otherwise the library loads each kernel from the path at which it was compiled.
    "aot_inductor.embed_kernel_binary": True,
    # PTX beside each kernel would let other GPUs compile it as they load it; it is tuned for this one.
    "aot_inductor.emit_multi_arch_kernel": False,
}
"""Inductor's options for kernels of a GPU."""

_KERNEL_SUFFIXES = (".cubin", ".fatbin", ".hsaco")


def check_gpu() -> None:
    """Raise ExportError, with what to install, where this machine cannot compile for a GPU."""
    host = cuda_host()
    if host.reason:
        raise ExportError(
            f"device='cuda' compiles on the GPU that it compiles for, and there is none to be used here: "
            f"{host.reason}. For this machine's CPU leave device= out."
        )
    if not has_triton():
        raise ExportError(
            f"device='cuda' needs Triton, which compiles kernels for GPUs, and PyTorch {torch.__version__} here finds "
            f"none that it can use: pip install triton. For this machine's CPU leave device= out."
        )


def gpu_facts() -> dict[str, str | int | float | bool]:
    """The facts that the runtime checks before it opens a library: see `precast.runtime.hosts.cuda.gpu_blockers`."""
    host = cuda_host()
    return {"compute_capability": host.capability, "cuda": host.release}


def move_to_device(exported: torch.export.ExportedProgram, device: str) -> torch.export.ExportedProgram:
    """Move a program and its weights to another device; `exported` itself is changed."""
    return move_to_device_pass(exported, device)


def free_gpu_memory() -> None:
    """Empty PyTorch's cache of GPU memory: the artifact is validated in another process, which needs it."""
    gc.collect()
    torch.cuda.empty_cache()


def check_kernels_embedded(files: Iterable[Any]) -> None:
    """Raise ExportError where Inductor left kernels beside the library rather than within it."""
    apart = [name for name in files if isinstance(name, str) and name.endswith(_KERNEL_SUFFIXES)]
    if apart:
        raise ExportError(
            f"AOTInductor of PyTorch {torch.__version__} left {len(apart)} kernels beside the library instead of "
            f"within it, the first as {apart[0].rpartition('/')[2]}. precast was made with PyTorch 2.13: install that."
        )
