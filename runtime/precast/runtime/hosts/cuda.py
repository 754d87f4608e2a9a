"""The GPU that this process would use, and why code compiled for another does not run on it.

PyTorch is asked, and imported for that: only where a variant was compiled for a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["CudaHost", "cuda_host", "gpu_blockers"]


@dataclass(frozen=True)
class CudaHost:
    """Attributes:
    release: of CUDA, that PyTorch was built with, as "12.8"; empty where it was built without.
    capability: the compute capability of the GPU, as "9.0"; empty where there is none.
    reason: why there is none, and what to do.
    """

    release: str
    capability: str
    reason: str = ""


def cuda_host() -> CudaHost:
    """The GPU of this process: the first that CUDA_VISIBLE_DEVICES lets it see."""
    try:
        torch = import_module("torch")
    except ImportError:
        return CudaHost("", "", "PyTorch is not installed: pip install torch")
    release = torch.version.cuda or ""
    if not release:
        return CudaHost(
            "", "", f"PyTorch {torch.__version__} here is built without CUDA (torch.version.cuda is None): install a "
            f"build that has it, as https://pytorch.org/get-started/locally/ says",
        )  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        is_there = torch.cuda.is_available()
    return (
        CudaHost(release, _compute_capability(torch))
        if is_there
        else CudaHost(release, "", _explain_no_gpu(torch, told))
    )


def gpu_blockers(options: Mapping[str, object], host: CudaHost) -> Iterator[str]:
    """Why code compiled with `options` (those of the variant's `compiler`) does not run on `host`: every reason, each
    in words.

    A kernel is machine code of one compute capability. NVIDIA's compiler guide, "GPU compilation", lets it run within
    a major version on higher minor ones; those have other amounts of shared memory, for which a kernel was tuned, and
    from 9.0 on kernels use what is one version's alone. So it is the same or none.
    """
    wanted, release = options.get("compute_capability"), str(options.get("cuda", ""))
    if wanted is not None and wanted != host.capability:
        yield (
            f"it was compiled for GPUs of compute capability {wanted}; the one here has {host.capability} (export it "
            f"here, or choose another GPU by CUDA_VISIBLE_DEVICES)"
        )
    if release and _major_of(release) != _major_of(host.release):
        yield f"it was compiled with CUDA {release}; PyTorch here is built for CUDA {host.release} (export it here)"


def _major_of(release: str) -> str:
    return release.partition(".")[0]


def _compute_capability(torch: Any) -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def _explain_no_gpu(torch: Any, told: list[warnings.WarningMessage]) -> str:
    said = f" ({' '.join(str(told[0].message).split())})" if told else ""
    return (
        f"PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no GPU{said}: nvidia-smi says whether "
        f"there is a driver, and CUDA_VISIBLE_DEVICES which GPUs a process sees"
    )
