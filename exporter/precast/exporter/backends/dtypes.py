"""`dtype="auto"`: the dtype of the checkpoint's weights, where the backend computes in it."""

from __future__ import annotations

import torch

from precast.runtime.artifact.backends import get_backend
from precast.runtime.artifact.schema import Dtype

from ..checkpoint.checkpoint import Checkpoint
from ..options import ExportOptions
from .aoti.isa import matmul_dtypes

__all__ = ["choose_dtype"]

NARROW: tuple[Dtype, ...] = ("bfloat16", "float16")


def choose_dtype(options: ExportOptions, checkpoint: Checkpoint) -> ExportOptions:
    """The options with what `dtype="auto"` means for this checkpoint and backend: float32 where the weights are in
    float32, and where there are no instructions for what they are in. Raises UsageError for bounds that do not go with
    that dtype."""
    if not options.precision.is_automatic:
        return options
    chosen = options.replace(dtype=_infer_dtype(options, checkpoint))
    chosen.check()
    return chosen


def _infer_dtype(options: ExportOptions, checkpoint: Checkpoint) -> Dtype:
    stored = getattr(checkpoint.text_config, "dtype", None) or getattr(checkpoint.config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    usable = {getattr(torch, name): name for name in NARROW} if stored in _computed_in(options) else {}
    return usable.get(stored, "float32")


def _computed_in(options: ExportOptions) -> frozenset[torch.dtype]:
    """The dtypes below float32 that the backend has instructions for."""
    row = get_backend(options.backend)
    if "dtype" not in row.takes:
        return frozenset()
    if row.owns_caches or options.device != "cpu":
        return frozenset(getattr(torch, name) for name in NARROW)
    return matmul_dtypes(options.isa if row.name == "aoti" else "native")
