"""Find the local checkpoint that MODEL names: a directory or a .gguf file. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from precast.runtime.artifact import is_artifact
from precast.runtime.errors import CheckpointError, UsageError
from precast.runtime.terminal import quoted

from .files import WEIGHT_SUFFIXES, check_files
from .gguf import check_not_truncated
from .peft_adapters import check_no_adapter

__all__ = ["Local", "check_is_checkpoint", "find_local", "find_weights", "compiled_error", "not_found_error"]


@dataclass(frozen=True)
class Local:
    """A checkpoint on this machine.

    Attributes:
        name: the base name of the directory or file.
        directory: where its files lie, absolute.
        gguf_file: the file's name within `directory` for a GGUF checkpoint.
    """

    name: str
    directory: Path
    gguf_file: str | None = None


def find_local(model: str, revision: str | None = None) -> Local | None:
    """The directory or `.gguf` file of that name; None for a name that the Hub may know.

    Raises CheckpointError for what is neither, UsageError where a revision is asked for of what is here.
    """
    found = _find(model)
    if found is not None and revision is not None:
        raise UsageError(f"revision= is for a checkpoint on the Hub, and {model} is one on this machine; leave it out.")
    return found


def find_weights(weights: str, checkpoint: Local | None) -> Path:
    """The absolute path of a file or folder of weights that lie apart from their configuration, that of `checkpoint`,
    or for None one on the Hub.

    Raises CheckpointError for what holds none, UsageError for a .gguf file, which has both.
    """
    if checkpoint is not None and checkpoint.gguf_file is not None:
        raise UsageError(f"weights={weights!r} are those of another file, and {checkpoint.gguf_file} has its own.")
    path = Path(weights).expanduser()
    if path.is_dir():
        check_files(path.resolve(), path.resolve().name)
    elif not path.is_file():
        raise CheckpointError(f"There is no file or folder {weights} with weights.")
    elif path.suffix not in WEIGHT_SUFFIXES:
        raise CheckpointError(
            f"{weights} is no file of weights that can be read; those are: {', '.join(WEIGHT_SUFFIXES)}. A checkpoint "
            f"of MindSpore (.ckpt) has to be saved as .safetensors first."
        )
    return path.resolve()


def _find(model: str) -> Local | None:
    path = Path(model).expanduser()
    try:
        if path.is_file():
            return _from_file(path)
        if path.is_dir():
            check_is_checkpoint(path, model)
            return Local(path.resolve().name, path.resolve())
    except OSError as error:
        raise CheckpointError(f"{model} cannot be read: {error.strerror}.") from error
    if path.exists():
        raise CheckpointError(f"{model} is not a regular file or directory.")
    if _looks_like_path(model):
        raise CheckpointError(f"There is no file or directory {model}.")
    return None


def not_found_error(model: str, reason: str) -> CheckpointError:
    """The error for a name under which neither this machine nor the Hub has a checkpoint."""
    return CheckpointError(
        f"{model} is neither a local path nor a checkpoint that the Hub would give: {reason.rstrip('.')}."
    )


def compiled_error(model: str) -> CheckpointError:
    """The error for an artifact where a checkpoint is meant."""
    return CheckpointError(
        f"{model} is an artifact, compiled already, and this takes the checkpoint that it came from. What it is and "
        f"whether it runs here: precast inspect {quoted(model)}"
    )


def check_is_checkpoint(path: Path, given: str) -> None:
    """Raise CheckpointError for a directory that is no checkpoint: an artifact, which has a command of its own, one
    without a configuration, with files from elsewhere, or with an adapter."""
    # Checked first: opening a pipe would block.
    is_there = (path / "config.json").is_file()
    if is_there and is_artifact(path):
        raise compiled_error(given)
    check_no_adapter(path.resolve(), given)
    if not is_there:
        ggufs = sorted(found.name for found in path.glob("*.gguf"))
        hint = f" To export a GGUF file, name it: precast export {quoted(path / ggufs[0])} -o OUT" if ggufs else ""
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json.{hint}")
    check_files(path.resolve(), path.resolve().name)


def _looks_like_path(model: str) -> bool:
    return (
        model.startswith((".", "/", "~")) or model.endswith(".gguf") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)
    )


def _from_file(path: Path) -> Local:
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path} is a file; MODEL is a Hub id, a checkpoint directory, or a .gguf file.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it does not start with 'GGUF'.")
    check_not_truncated(path)
    path = path.resolve()
    check_no_adapter(path.parent, str(path.parent))
    return Local(path.stem, path.parent, path.name)
