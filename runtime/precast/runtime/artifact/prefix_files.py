"""The files of what was tuned to stand before every prompt, as an export and a session find and judge them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError, FormatError
from .peft_files import CONFIG, WEIGHT_FILES, read_settings

__all__ = ["KEY", "METHODS", "PRE_CACHES", "check_length", "check_shape", "find_file", "read_method"]

METHODS: dict[str, Literal["prefix-tuning", "prompt-tuning", "p-tuning"]] = {
    "PREFIX_TUNING": "prefix-tuning",
    "PROMPT_TUNING": "prompt-tuning",
    "P_TUNING": "p-tuning",
}
"""Values of `peft_type` for what stands before every prompt, and how they are called here."""
PRE_CACHES = "pre_caches.npy"
KEY = "prompt_embeddings"
"""peft's name of the only tensor: a prefix after its projection, virtual tokens after their encoder."""
_TENSORS, _PICKLED = WEIGHT_FILES


def find_file(given: str | Path) -> Path:
    """The file with the tensors of a prefix, for the file or the folder that the user named. Raises CheckpointError."""
    path = Path(given).expanduser()
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".bin" or (path.is_dir() and _is_pickled(path)):
        raise CheckpointError(
            f"{folder / _PICKLED if path.is_dir() else path} is a pickle, which can run code as it is read. Save the "
            f"adapter as safetensors where it was trained: model.save_pretrained(DIR)."
        )
    candidates = [folder / _TENSORS, folder / PRE_CACHES] if path.is_dir() or path.name == CONFIG else [path]
    found = next((each for each in candidates if each.is_file()), None)
    if found is None:
        raise CheckpointError(
            f"There is no prefix at {given}. It takes the folder of a PEFT adapter ({CONFIG} and {_TENSORS}), or "
            f"PaddleNLP's {PRE_CACHES}."
        )
    return found


def _is_pickled(folder: Path) -> bool:
    return (folder / _PICKLED).is_file() and not (folder / _TENSORS).is_file()


def read_method(given: str | Path, folder: Path) -> Literal["prefix-tuning", "prompt-tuning", "p-tuning"]:
    """How a PEFT adapter was tuned. Raises CheckpointError for one that is no prefix of a decoder's prompt."""
    try:
        settings = read_settings(folder, str(folder))
    except (OSError, FormatError) as error:
        raise CheckpointError(f"{given} is no PEFT adapter: its {CONFIG} cannot be read ({error}).") from error
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if not isinstance(kind, str) or kind not in METHODS:
        merged = " A LoRA adapter goes into a model's slots by load_adapter(), or is merged by an export with lora=."
        raise CheckpointError(
            f"{given} is a PEFT adapter of type {str(kind)[:80]}, and what can stand before every prompt is: "
            f"{', '.join(METHODS)}.{merged if kind == 'LORA' else ''}"
        )
    if task not in (None, "CAUSAL_LM"):
        raise CheckpointError(f"{given} was tuned for {task}, and prefixes are of decoders (CAUSAL_LM) only.")
    return METHODS[kind]


def check_length(given: str | Path, length: int) -> None:
    """Raise CheckpointError for a prefix of no positions."""
    if not length:
        raise CheckpointError(f"{given} holds a prefix of 0 positions, which changes nothing. Leave it out.")


def check_shape(given: str | Path, held: Sequence[int], name: str, needed: Sequence[int], axes: str) -> None:
    """Raise CheckpointError where what a file holds is not of the sizes that the model `name` needs."""
    if list(held) != list(needed):
        raise CheckpointError(
            f"{given} was tuned for another model: it holds {list(held)}, and {name} needs {list(needed)} ({axes})."
        )
