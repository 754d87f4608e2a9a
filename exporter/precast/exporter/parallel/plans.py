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
EMBEDDING, EXPERTS = "embedding_rowwise", "moe_tp_experts"
PACKED, PACKED_ROWWISE = "packed_colwise", "packed_rowwise"
BY_EXPERT = "ep_dispatch_experts"
"""transformers' word for experts that ranks have whole, in its plans of expert parallelism. Which ones have experts is
read off the plan for tensor parallelism."""
ONCE = "added_once"
"""Ours: a bias of experts that all ranks have and that one adds, as what they make is summed up."""
WHOLE = ("local_params", "mla_kv_a_proj", "replicated_with_grad_allreduce", "replicate")
"""What says how gradients are summed up, or that a module's own parameters are divided by rules of their own."""
STYLES = (COLWISE, COLWISE_GATHERED, ROWWISE, ROWWISE_SPLIT, EMBEDDING, EXPERTS, PACKED, PACKED_ROWWISE, ONCE, *WHOLE)

_GATE_AND_UP = ("gate", "up")
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
    # transformers' plan leaves its attention whole, unlike that of deepseek_v2.
    "deepseek_v3": {
        "model.embed_tokens": EMBEDDING,
        **{f"model.layers.*.self_attn.{name}_proj": COLWISE for name in ("q", "q_b", "kv_b")},
        "model.layers.*.self_attn.o_proj": ROWWISE,
        "model.layers.*.mlp.experts.gate_up_proj": PACKED,
        "model.layers.*.mlp.experts.down_proj": ROWWISE,
        "model.layers.*.mlp.experts": EXPERTS,
        **{f"model.layers.*.mlp.{part}_proj": COLWISE for part in _GATE_AND_UP},
        "model.layers.*.mlp.down_proj": ROWWISE,
        **{f"model.layers.*.mlp.shared_experts.{part}_proj": COLWISE for part in _GATE_AND_UP},
        "model.layers.*.mlp.shared_experts.down_proj": ROWWISE,
        **_HEAD,
    },
    "gpt2": {"transformer.wte": EMBEDDING, **_GPT2_BLOCK, **_HEAD},
    "gpt_neo": {
        "transformer.wte": EMBEDDING,
        **{f"transformer.h.*.attn.attention.{name}_proj": COLWISE for name in "qkv"},
        "transformer.h.*.attn.attention.out_proj": ROWWISE,
        "transformer.h.*.mlp.c_fc": COLWISE,
        "transformer.h.*.mlp.c_proj": ROWWISE,
        **_HEAD,
    },
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
    # transformers' plan has the experts alone.
    "granitemoe": {
        "model.embed_tokens": EMBEDDING,
        **{f"model.layers.*.self_attn.{name}_proj": COLWISE for name in "qkv"},
        "model.layers.*.self_attn.o_proj": ROWWISE,
        "model.layers.*.block_sparse_moe.experts.gate_up_proj": PACKED,
        "model.layers.*.block_sparse_moe.experts.down_proj": ROWWISE,
        "model.layers.*.block_sparse_moe.experts": EXPERTS,
        **_HEAD,
    },
    "mpt": {
        "transformer.wte": EMBEDDING,
        "transformer.blocks.*.attn.Wqkv": PACKED,
        "transformer.blocks.*.attn.out_proj": ROWWISE,
        "transformer.blocks.*.ffn.up_proj": COLWISE,
        "transformer.blocks.*.ffn.down_proj": ROWWISE,
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
    kind, names = model.config.model_type, {pattern_of(name) for name in _names(model)}
    found = OWN_PLANS.get(kind) or model._tp_plan or {}
    # Llama 4's has every pattern twice, with and without the prefix of the whole model.
    plan = {pattern: style for pattern, style in found.items() if f"model.{pattern}" not in found}
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


_QUERIES = ("q_proj", "q_b_proj")
"""Of queries that are computed in one step, and in two."""


def _is_alternative(pattern: str, plan: Mapping[str, str], names: set[str]) -> bool:
    """Whether a pattern without a match is of what other models or layers of its family have: a dense block beside
    experts, shared experts, of which there may be none, or queries computed in another way."""
    owner, _, last = pattern.rpartition(".")
    if last in _QUERIES:
        return any(f"{owner}.{other}" in names for other in _QUERIES)
    for block in (".mlp.", ".feed_forward."):
        before, found, _ = pattern.partition(block)
        if found and any(other.startswith(f"{before}{block}") and other in names for other in plan):
            return True
    return False
