"""Check and prepare a model that was just loaded: missing weights, NaN, and its attention."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from precast.runtime.errors import CheckpointError

__all__ = ["attend_fully", "attention_implementation", "check_complete", "check_finite"]


def check_complete(
    model: nn.Module, missing: Collection[str], name: str, task: str, architectures: Sequence[str]
) -> None:
    """Raise CheckpointError for weights that the checkpoint lacks, which would be random. A pooler's are no part of any
    answer."""
    missing = sorted(key for key in missing if "pooler." not in key)
    if missing:
        raise CheckpointError(
            f"{name} has no weights for {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} of "
            f"{type(model).__name__}, so its answers for {task} would be random. Choose the task that it was "
            f"trained for; its config.json names {', '.join(architectures or ['no architecture'])}."
        )


def check_finite(model: nn.Module, name: str) -> None:
    """Raise CheckpointError for weights that hold NaN: validation may never read that row of an embedding table, but
    users' texts will."""
    for key, weight in model.named_parameters():
        # The sum is NaN if any number is, and reads them only once.
        if weight.is_floating_point() and weight.sum().isnan() and (wrong := weight.isnan()).any():
            first = wrong.nonzero()[0].tolist()
            raise CheckpointError(
                f"The weights of {name} hold NaN: {int(wrong.sum()):,} of {weight.numel():,} numbers of "
                f"{key}, the first at {first}. The checkpoint is damaged; fetch it again, or save it from sound "
                f"weights."
            )


def attention_implementation(config: Any) -> str:
    """The attention of the reference and of programs without the fused operator: "eager", which every type has.
    Falcon's adds ALiBi twice; its default, "sdpa", adds it once."""
    return "sdpa" if config.model_type == "falcon" and config.alibi else "eager"


def attend_fully(model: nn.Module) -> None:
    """Let BigBird attend fully, as transformers does to rows that are too short for its blocks; longer ones are not
    compiled for (`kinds.plan.check_blocks`)."""
    if getattr(model.config, "attention_type", None) == "block_sparse":
        # The outermost module that has the setting passes it on; BigBirdPegasus's decoder alone has no blocks.
        chosen: Any = next((module for module in model.modules() if hasattr(module, "set_attention_type")), None)
        if chosen is not None and chosen.attention_type == "block_sparse":
            chosen.set_attention_type("original_full")
