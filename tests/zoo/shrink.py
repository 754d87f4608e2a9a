"""Tiny configurations of any model type, made from its default one: every known size is replaced by a small number.

Layers that come in kinds (sliding and full attention, sparse and dense feed-forward) keep one of each.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["changes_to", "tiny_config"]

VOCABULARY = 320
LAYERS = 2


def _sizes(small: int, *names: str) -> dict[str, int]:
    return dict.fromkeys(names, small)


SIZES = {
    **_sizes(64, "hidden_size", "d_model", "n_embd", "embedding_size", "dim_model", "emb_dim", "embedding_dim"),
    **_sizes(64, "word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width"),
    **_sizes(64, "attention_hidden_size", "out_hidden_size", "backbone_hidden_size", "projection_dim"),
    **_sizes(64, "vision_output_dim", "projector_input_dim", "projector_output_dim", "input_size"),
    **_sizes(96, "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dim_ff", "dff"),
    **_sizes(96, "ffn_hidden_size", "d_ff", "d_inner", "feed_forward_size", "intermediate_size_mlp", "mlp_dim"),
    **_sizes(96, "dense_intermediate_size"),
    **_sizes(32, "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    **_sizes(32, "shared_intermediate_size", "moe_shared_expert_intermediate_size", "router_hidden_size"),
    **_sizes(32, "hidden_size_per_layer_input", "pronunciation_embed_dim", "shape_embed_dim", "codebook_dim"),
    **_sizes(4, "num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "n_head", "n_heads"),
    **_sizes(4, "num_heads", "attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"),
    **_sizes(
        4,
        "swa_num_attention_heads",
        "linear_num_value_heads",
        "linear_num_heads",
        "conf_num_attention_heads",
        "index_n_heads",
    ),
    **_sizes(2, "num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"),
    **_sizes(2, "num_global_key_value_heads", "linear_num_key_heads", "n_groups", "mamba_n_groups", "mamba_ngroups"),
    **_sizes(16, "head_dim", "kv_channels", "qk_nope_head_dim", "v_head_dim", "attention_head_dim", "dim_head", "d_kv"),
    **_sizes(16, "d_head", "attention_head_size", "swa_head_dim", "global_head_dim", "index_head_dim"),
    **_sizes(
        16, "linear_key_head_dim", "linear_head_dim", "linear_value_head_dim", "query_pre_attn_scalar", "swa_v_head_dim"
    ),
    **_sizes(8, "qk_rope_head_dim", "rotary_dim", "swa_qk_rope_head_dim"),
    **_sizes(24, "qk_head_dim"),
    **_sizes(32, "kv_lora_rank", "q_lora_rank", "o_lora_rank"),
    **_sizes(VOCABULARY, "vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "shape_vocab_size"),
    **_sizes(VOCABULARY, "pronunciation_vocab_size", "audio_vocab_size", "unpadded_vocab_size"),
    **_sizes(64, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"),
    **_sizes(64, "max_target_positions", "max_source_positions"),
    **_sizes(32, "original_max_position_embeddings"),
    **_sizes(8, "sliding_window", "sliding_window_size", "attention_window_size", "window_size", "local_attention"),
    **_sizes(
        8, "attention_chunk_size", "floor_scale", "block_size", "local_attn_chunk_length", "lsh_attn_chunk_length"
    ),
    **_sizes(16, "mamba_chunk_size", "chunk_size"),
    **_sizes(4, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    **_sizes(2, "num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token", "top_k_experts"),
    **_sizes(2, "n_group", "num_expert_group", "zero_expert_num", "cross_attn_k", "num_codebooks", "num_quantizers"),
    **_sizes(1, "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    **_sizes(1, "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_nextn_predict_layers"),
    **_sizes(8, "mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank"),
    **_sizes(8, "mamba_num_heads", "mamba_n_heads", "n_mamba_heads"),
    **_sizes(16, "mamba_d_head", "mamba_head_dim", "mamba_headdim"),
    **_sizes(LAYERS, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    **_sizes(LAYERS, "num_decoder_layers", "num_encoder_layers", "depth", "num_blocks", "conf_num_hidden_layers"),
    **_sizes(LAYERS, "num_layers_per_stack", "max_window_layers"),
    **_sizes(32, "image_size", "crop_size", "block_multiple_of", "nemo_conv_channels", "ext_pw_out_channel"),
    **_sizes(32, "depthwise_separable_out_channel", "output_channels"),
}
"""What the sizes of a model are called, and how large they are here."""

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_config(model_type: str, changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The default configuration of `model_type` with small sizes; `changes`, nested as the config is, have the
    last word. Raises whatever the configuration does where small sizes do not fit together."""
    default = CONFIG_MAPPING[model_type]()
    return AutoConfig.for_model(model_type, **_merged({**changes_to(default), **SPECIAL}, changes or {}))


def changes_to(config: PreTrainedConfig, kept: Collection[str] = ()) -> dict[str, Any]:
    """The arguments that make `config` small: known sizes, lists with an entry per layer, and sub-configurations.
    Names that are `kept` are left as they are."""
    values = {name: value for name, value in config.to_dict().items() if name not in kept}
    small = _small(values) | _fewer_layers(values)
    small |= {name: SPECIAL[name] for name in SPECIAL if "vocab_size" in values and values.get(name) is not None}
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            small[name] = {"model_type": inner.model_type, **changes_to(inner, kept)}
    return small


def _small(values: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
            small[name] = min(SIZES[name], value) if name in COUNTS else SIZES[name]
        elif name in NEVER_NONE and value is None:
            small[name] = SIZES[name]
        elif name.startswith("rope") and isinstance(value, dict):
            small[name] = _merged(value, _small_rope(value))
    if "qk_rope_head_dim" in small:
        # Of latent attention, heads as rotary positions know them; and every query has a key of its own.
        small["head_dim"] = SIZES["qk_rope_head_dim"]
        small["num_key_value_heads"] = SIZES["num_attention_heads"]
    return small


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    inner = {name: _small(value) for name, value in rope.items() if isinstance(value, dict)}
    return _small(rope) | inner


COUNTS = {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_group", "num_expert_group", "topk_group", "n_groups"}
COUNTS |= {"mamba_n_groups", "mamba_ngroups", "num_experts_per_tok"}
"""Where the default is smaller, it stays."""
NEVER_NONE = {"num_key_value_heads", "head_dim"}


def _fewer_layers(values: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry per layer, cut to layers that between them have every entry that occurs."""
    depth = next((values[name] for name in DEPTHS if isinstance(values.get(name), int)), None)
    lists = {name: value for name, value in values.items() if _is_per_layer(value, depth)}
    if not lists:
        return {}
    kept = _representatives(list(zip(*lists.values(), strict=True)))
    cut = {name: [value[index] for index in kept] for name, value in lists.items()}
    return cut | {name: len(kept) for name in DEPTHS if name in values}


def _is_per_layer(value: Any, depth: int | None) -> bool:
    """Lists of as many different entries as there are layers are numbers of layers, made anew for fewer."""
    if not isinstance(value, (list, tuple)) or depth is None or len(value) != depth:
        return False
    return len({repr(each) for each in value}) < depth


def _representatives(layers: list[tuple[Any, ...]]) -> list[int]:
    """Indexes, at least two, of layers that add a kind that none before has."""
    seen: set[tuple[int, Any]] = set()
    kept = []
    for index, layer in enumerate(layers):
        kinds = {(place, repr(kind)) for place, kind in enumerate(layer)}
        if not kinds <= seen:
            kept.append(index)
            seen |= kinds
    return kept if len(kept) >= LAYERS else [*kept, *range(kept[-1] + 1, kept[-1] + 1 + LAYERS - len(kept))]


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        held = merged.get(name)
        merged[name] = _merged(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return merged
