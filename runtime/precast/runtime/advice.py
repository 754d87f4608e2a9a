"""What to do about a request that is larger than compiled for: a command to paste, where it can be compiled."""

from __future__ import annotations

from .artifact import Artifact
from .terminal import quoted

__all__ = ["larger"]

_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
"""Model types whose tables of positions hold some that no token has."""


def larger(artifact: Artifact, flags: str, length: int = 0) -> str:
    """A sentence with the command that compiles the artifact's model for more; where the model was not made for
    sequences of that length, a sentence that says so.

    Of a checkpoint that came from no Hub an artifact holds the name and not the place, for which CHECKPOINT stands.
    """
    most = _longest(artifact)
    if most is not None and length > most:
        return f"None for so many can be compiled: the model was made for {most} tokens."
    source = artifact.contract.source
    is_on_hub = source.revision is not None or "/" in source.model
    model, where = (source.model, "") if is_on_hub else ("CHECKPOINT", f", where CHECKPOINT is {source.model}")
    flags = f"--task {quoted(artifact.contract.task)} {flags}"
    return f"Compile a larger one{where}: precast export {quoted(model)} {flags} -o OUT"


def _longest(artifact: Artifact) -> int | None:
    found = artifact.config.get("max_position_embeddings")
    is_plain = artifact.config.get("model_type") not in _OFFSET_POSITIONS
    return found if type(found) is int and found > 0 and is_plain else None
