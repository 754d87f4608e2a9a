"""How a model's modules are divided: transformers' own plan, or one of ours where it has none.

A plan is data: patterns of module names (`*` for the number of a layer) and styles, which are transformers' words
(`base_model_tp_plan`, transformers.integrations.tensor_parallel).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from precast.runtime.artifact.ranks import pattern_of
from precast.runtime.errors import CheckpointError, UsageError

__all__ = ["find_plan"]

COLWISE, COLWISE_GATHERED = "colwise", "colwise_gather_output"
ROWWISE, ROWWISE_SPLIT = "rowwise", "rowwise_split_input"
EMBEDDING, EXPERTS, PACKED = "embedding_rowwise", "moe_tp_experts", "packed_colwise"
BY_EXPERT = "ep_dispatch_experts"
"""transformers' word for experts that ranks have whole, in its plans of expert parallelism. Which ones have experts is
read off the plan for tensor parallelism."""
ONCE = "added_once"
"""Ours: a bias of experts that all ranks have and that one adds, as what they make is summed up."""
WHOLE = ("replicated_with_grad_allreduce", "replicate")
STYLES = (COLWISE, COLWISE_GATHERED, ROWWISE, ROWWISE_SPLIT, EMBEDDING, EXPERTS, PACKED, ONCE, *WHOLE)

_HEAD = {"lm_head": COLWISE_GATHERED}
_GPT2_BLOCK = {
    "transformer.h.*.attn.c_attn": PACKED,
    "transformer.h.*.attn.c_proj": ROWWISE,
    "transformer.h.*.mlp.c_fc": COLWISE,
    "transformer.h.*.mlp.c_proj": ROWWISE,
}
OWN_PLANS: Mapping[str, Mapping[str, str]] = {
    "bloom": {
        "transformer.word_embeddings": EMBEDDING,
        "transformer.h.*.self_attention.query_key_value": COLWISE,
        "transformer.h.*.self_attention.dense": ROWWISE,
        "transformer.h.*.mlp.dense_h_to_4h": COLWISE,
        "transformer.h.*.mlp.dense_4h_to_h": ROWWISE,
        **_HEAD,
    },
    "gpt2": {"transformer.wte": EMBEDDING, **_GPT2_BLOCK, **_HEAD},
    "gpt_oss": {
        "model.embed_tokens": EMBEDDING,
        **{f"model.layers.*.self_attn.{name}_proj": COLWISE for name in "qkv"},
        "model.layers.*.self_attn.o_proj": ROWWISE,
        "model.layers.*.self_attn.sinks": COLWISE,
        # Gate and up alternate, so that any even run of columns has pairs of both.
        "model.layers.*.mlp.experts.gate_up_proj": ROWWISE,
        "model.layers.*.mlp.experts.gate_up_proj_bias": ROWWISE,
        "model.layers.*.mlp.experts.down_proj": COLWISE,
        "model.layers.*.mlp.experts.down_proj_bias": ONCE,
        "model.layers.*.mlp.experts": EXPERTS,
        **_HEAD,
    },
    "opt": {
        "model.decoder.embed_tokens": EMBEDDING,
        **{f"model.decoder.layers.*.self_attn.{name}_proj": COLWISE for name in "qkv"},
        "model.decoder.layers.*.self_attn.out_proj": ROWWISE,
        "model.decoder.layers.*.fc1": COLWISE,
        "model.decoder.layers.*.fc2": ROWWISE,
        **_HEAD,
    },
    "stablelm": {
        "model.embed_tokens": EMBEDDING,
        **{f"model.layers.*.self_attn.{name}_proj": COLWISE for name in "qkv"},
        "model.layers.*.self_attn.o_proj": ROWWISE,
        "model.layers.*.mlp.gate_proj": COLWISE,
        "model.layers.*.mlp.up_proj": COLWISE,
        "model.layers.*.mlp.down_proj": ROWWISE,
        **_HEAD,
    },
}
"""By model type; names are those of the whole model."""


def find_plan(model: Any) -> dict[str, str]:
    """The plan of a model for generating text. Raises UsageError where there is none, or where it asks for what precast
    does not do; CheckpointError where the model lacks what it names."""
    kind = model.config.model_type
    plan = dict(OWN_PLANS.get(kind) or model._tp_plan or {})
    if not plan:
        raise UsageError(
            f"tensor_parallel= divides models by a plan, and neither transformers nor precast has one for models of "
            f"type {kind!r}. Ours are for {', '.join(sorted(OWN_PLANS))}, transformers' for most of the newer ones; "
            f"CONTRIBUTING.md says how to add one."
        )
    if unknown := sorted(set(plan.values()) - set(STYLES)):
        raise UsageError(
            f"tensor_parallel= does not divide models of type {kind!r}: transformers' plan for them asks for "
            f"{', '.join(unknown)}, and precast has {', '.join(STYLES)}."
        )
    names = {pattern_of(name) for name in _names(model)}
    if lost := [pattern for pattern in plan if pattern not in names and not _is_alternative(pattern, plan, names)]:
        raise CheckpointError(
            f"The plan that divides models of type {kind!r} names {', '.join(lost[:4])}, which this model does not "
            f"have: its weights would stay whole. Leave tensor_parallel out."
        )
    return plan


def _names(model: nn.Module) -> Iterator[str]:
    """The names of all modules and parameters that a plan can name."""
    for name, _ in model.named_modules():
        yield name
    for name, _ in model.named_parameters(remove_duplicate=False):
        yield name


def _is_alternative(pattern: str, plan: Mapping[str, str], names: set[str]) -> bool:
    """Whether a pattern without a match is of what other layers of its family have: a dense block beside experts, or
    shared experts, of which there may be none."""
    block = pattern.partition(".mlp.")[0]
    return ".mlp." in pattern and any(
        other.startswith(f"{block}.mlp.") and other in names for other in plan if other != pattern
    )
