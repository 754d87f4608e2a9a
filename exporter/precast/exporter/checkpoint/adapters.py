"""Find the adapters that `lora=` names, on this machine or the Hub, and check that they go with the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from precast.runtime.artifact.peft_files import CONFIG, WEIGHT_FILES
from precast.runtime.errors import CheckpointError
from precast.runtime.terminal import quoted

from ..adapters.adapter import Adapter, check_base, read_adapter
from ..options import AdapterOptions
from ..options.adapters import LoraRequest
from .download import download
from .files import check_files

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

__all__ = ["find_adapters", "read_local"]


def find_adapters(checkpoint: Checkpoint, options: AdapterOptions, token: str | None) -> tuple[Adapter, ...]:
    """The adapters that the options ask for, in their order. Raises CheckpointError for one that is not there, cannot
    be merged, or is not for this checkpoint."""
    requests = options.requests
    if requests:
        _check_full_precision(checkpoint)
    found = tuple(_find(request, options, token) for request in requests)
    if not options.force_base:
        for adapter in found:
            check_base(adapter, checkpoint.name if checkpoint.revision else None)
    return found


def read_local(options: AdapterOptions) -> None:
    """Read the settings of the adapters on this machine, before anything heavy is imported. Raises CheckpointError."""
    for request in options.requests:
        if Path(request.name).expanduser().exists():
            _find(request, options, None)


def _check_full_precision(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a checkpoint of quantized weights, to which an adapter cannot be added exactly."""
    is_gguf = checkpoint.gguf_file is not None
    if is_gguf or checkpoint.is_quantized:
        how = "a .gguf file, whose weights are rounded" if is_gguf else "quantized"
        raise CheckpointError(
            f"{checkpoint.given} is {how}, and adapters are merged into weights of full precision. Export the "
            f"checkpoint that it was made from, with quantize='int8' or 'int4' if it is to be small: weights are "
            f"quantized after the merge."
        )


def _find(request: LoraRequest, options: AdapterOptions, token: str | None) -> Adapter:
    path = Path(request.name).expanduser()
    if path.is_file():
        raise CheckpointError(
            f"lora={request.name!r} is a file; an adapter is a directory with {CONFIG} and its weights: give "
            f"lora={quoted(path.parent)!r}."
        )
    revision = None
    if not path.exists():
        weights = WEIGHT_FILES if options.trust_pickle else WEIGHT_FILES[:1]
        path = download(request.name, request.revision, token, [CONFIG, *weights])
        revision = path.name
    directory = path.resolve()
    check_files(directory, request.name)
    name = request.name if revision else directory.name
    return read_adapter(
        directory, request.name, name, revision=revision, weight=request.weight, trust_pickle=options.trust_pickle
    )
