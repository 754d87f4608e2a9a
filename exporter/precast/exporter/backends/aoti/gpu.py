"""Native code for a GPU: what must be at hand to compile it, inductor's options, and what is recorded of it."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch.export.passes import move_to_device_pass
from torch.utils._triton import has_triton

from precast.runtime.errors import ExportError
from precast.runtime.hosts.cuda import cuda_host

__all__ = ["KERNELS_INSIDE", "check_gpu", "check_whole", "facts", "free", "moved"]

KERNELS_INSIDE: dict[str, Any] = {
    # Otherwise a library looks for each kernel's file where that lay when it was compiled.
    "aot_inductor.embed_kernel_binary": True,
    # PTX beside each kernel would let other GPUs compile it as they load it; it is tuned for this one.
    "aot_inductor.emit_multi_arch_kernel": False,
}
"""Inductor's options."""

_KERNELS = (".cubin", ".fatbin", ".hsaco")


def check_gpu() -> None:
    """Raise ExportError, with what to install, where nothing can be compiled for a GPU."""
    host = cuda_host()
    if host.reason:
        raise ExportError(
            f"--device cuda compiles on the GPU that it compiles for, and there is none to be used here: "
            f"{host.reason}. For this machine's CPU leave --device out."
        )
    if not has_triton():
        raise ExportError(
            f"--device cuda needs Triton, which compiles kernels for GPUs, and PyTorch {torch.__version__} here finds "
            f"none that it can use: pip install triton. For this machine's CPU leave --device out."
        )


def facts() -> dict[str, str | int | float | bool]:
    """What is checked before a library is opened: see `precast.runtime.hosts.cuda.gpu_blockers`."""
    host = cuda_host()
    return {"compute_capability": host.capability, "cuda": host.release}


def moved(exported: torch.export.ExportedProgram, device: str) -> torch.export.ExportedProgram:
    """The program for another device, its weights there; `exported` itself is changed."""
    return move_to_device_pass(exported, device)


def free() -> None:
    """Give back what PyTorch keeps of the GPU's memory: what was compiled is validated in another process."""
    gc.collect()
    torch.cuda.empty_cache()


def check_whole(files: Iterable[Any]) -> None:
    """Raise ExportError where inductor left, beside the library, what it needs to run."""
    apart = [name for name in files if isinstance(name, str) and name.endswith(_KERNELS)]
    if apart:
        raise ExportError(
            f"AOTInductor of PyTorch {torch.__version__} left {len(apart)} kernels beside the library instead of "
            f"within it, the first as {apart[0].rpartition('/')[2]}. precast was made with PyTorch 2.13: install that."
        )
