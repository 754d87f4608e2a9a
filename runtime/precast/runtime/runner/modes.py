"""`open_model`: the same model compiled ahead of time, run by transformers, or by torch.compile."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ..artifact import is_artifact
from ..errors import UsageError
from ..models.base import CompiledModel
from ..models.exporting import look_up_exporter
from ..terminal import quoted
from .uncompiled import UncompiledModel

__all__ = ["MODES", "check_mode", "is_checkpoint", "open_model"]

MODES = {
    "compiled": "an artifact, compiled ahead of time",
    "eager": "the checkpoint by transformers in PyTorch, as it is",
    "torch-compile": "the checkpoint by transformers, its decode step compiled by torch.compile at the first one",
}
"""How a model can be run, and what that is."""


def open_model(name: str | Path, mode: str = "compiled", **options: Any) -> Any:
    """Open a model in a mode; whatever the mode, it has `generate`, `tokenizer`, `capacity`, `batch_size`, `session`
    and can be called.

    Args:
        name: an artifact or a checkpoint: a directory, a .gguf file, or a name on the Hub.
        mode: one of MODES. `compiled` opens an artifact, or exports a checkpoint where `sequence_length` says for how
            many tokens. `eager` and `torch-compile` run a decoder's checkpoint, that of an artifact as well, and need
            `pip install 'precast[export]'`.
        options: of `compiled`, as for `CompiledModel.from_pretrained`; of the others the fields of
            `precast.exporter.eager.options.EagerOptions`: checkpoint, batch_size, sequence_length, dtype, device, …

    Returns:
        A CompiledModel, or an UncompiledModel, which has the same interface.

    Raises:
        UsageError: there is no such mode or option, or the mode cannot run what `name` is.
        PrecastError: it cannot be opened.
    """
    check_mode(mode)
    if mode == "compiled":
        return _open_compiled(name, options)
    exporter = look_up_exporter(f"mode={mode!r}", "open_eager")
    return UncompiledModel(exporter.open_eager(name, compiles=mode == "torch-compile", **options), mode)


def check_mode(mode: str) -> None:
    """Raise UsageError for what is no mode."""
    if mode not in MODES:
        guess = "".join(f" Did you mean {close!r}?" for close in difflib.get_close_matches(str(mode), MODES, n=1))
        raise UsageError(f"There is no mode {mode!r:.80}.{guess} Choose one of: {', '.join(MODES)}.")


def is_checkpoint(name: str | Path) -> bool:
    """Whether it is a checkpoint on this machine; a name on the Hub may be one, and may be an artifact."""
    path = Path(name).expanduser()
    return path.is_file() or (path.is_dir() and (path / "config.json").is_file() and not is_artifact(path))


def _open_compiled(name: str | Path, options: dict[str, Any]) -> CompiledModel:
    if "export" in options or not (is_checkpoint(name) or "sequence_length" in options):
        return CompiledModel.from_pretrained(name, **options)
    if "sequence_length" not in options:
        raise UsageError(
            f"{name} is a checkpoint, and the mode compiled runs what was compiled for static shapes. Compile it: "
            f"precast export {quoted(name)} --batch-size 1 --sequence-length 512 -o OUT. "
            f"Without compiling ahead of time: mode='eager'."
        )
    return CompiledModel.from_pretrained(name, export=True, **options)
