"""The advice for a request that is larger than compiled for: a command to paste, where one would do."""

from __future__ import annotations

from .artifact import Artifact
from .terminal import quoted

__all__ = ["suggest_larger"]

_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
"""Model types whose first rows of the position table are never used."""


def suggest_larger(artifact: Artifact, flags: str, length: int = 0) -> str:
    """A sentence with the command that compiles the artifact's model for more; where the model was not made for
    sequences of that length, a sentence that says so.

    Of a local checkpoint an artifact holds the name and not the path, for which CHECKPOINT stands.
    """
    most = _position_limit(artifact)
    if most is not None and length > most:
        return f"None for so many can be compiled: the model was made for {most} tokens."
    source = artifact.contract.source
    is_on_hub = source.revision is not None or "/" in source.model
    model, where = (source.model, "") if is_on_hub else ("CHECKPOINT", f", where CHECKPOINT is {source.model}")
    merged = "".join(f" --lora {quoted(f'{each.name}:{each.weight:g}')}" for each in source.adapters)
    prefix = " --prefix-tuning PREFIX" if artifact.contract.prefix else ""
    lora = artifact.contract.lora
    slots = f" --lora-slots {lora.slots} --lora-rank {lora.rank}" if lora else ""
    flags = f"--task {quoted(artifact.contract.task)}{merged} {flags}{prefix}{slots}"
    return f"Compile a larger one{where}: precast export {quoted(model)} {flags} -o OUT"


def _position_limit(artifact: Artifact) -> int | None:
    found = artifact.config.get("max_position_embeddings")
    is_plain = artifact.config.get("model_type") not in _OFFSET_POSITIONS
    return found if type(found) is int and found > 0 and is_plain else None
