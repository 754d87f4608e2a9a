"""Every decoder-only model type of transformers, and what its tiny configuration needs beyond small sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo.shrink import tiny_config

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model types with a causal-LM class, among them encoders and encoder-decoders that can be used as decoders."""

_DECODER = {"is_decoder": True}
# What their configurations ask of generation by default is for answers of encoder-decoders.
_FREE = {
    "forced_eos_token_id": None,
    "encoder_no_repeat_ngram_size": 0,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
}
_WINDOWED = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
}
_CONVOLUTIONS = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GLOBAL_HEADS = {"per_layer_config": {1: {"head_dim": 32}}}
_SPARSE_GEMMA = {"activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], "intermediate_size": [96] * 4, "laurel_rank": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_INDEXED = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}

CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ],
        _DECODER,
    ),
    **dict.fromkeys(["qwen2", "qwen2_moe", "qwen3"], _WINDOWED),
    **dict.fromkeys(
        [
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
            "whisper",
        ],
        _FREE,
    ),
    "dots1": _WINDOWED
    | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "qwen3_moe": _WINDOWED | {"layer_types": ["sliding_attention"] * 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "moshi": {"sliding_window": 64},
    "phimoe": {"sliding_window": 8},
    "starcoder2": {"sliding_window": 8},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "reformer": _DECODER | {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": _SHARED_KEYS | _SPARSE_GEMMA,
    "gemma4_text": _SHARED_KEYS | {"per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}},
    "gemma4": {"text_config": _GLOBAL_HEADS},
    "gemma4_unified": {"text_config": _GLOBAL_HEADS},
    "gemma4_unified_text": _GLOBAL_HEADS,
    "gemma4_unified_assistant": {"text_config": _GLOBAL_HEADS | {"num_kv_shared_layers": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "mamba2": {"num_heads": 8},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": _DECODER | {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 8},
}
"""Changes to the machine-made tiny configuration, by model type."""

REPRESENTATIVES = ["bart", "bloom", "falcon", "gemma3n_text", "gpt_oss", "llama4_text"]
"""One type of each way into the operator that helpers/tiny.py lacks: positions counted by the model, ALiBi, written-out
attention, shared keys, sinks and experts, chunks. RoBERTa's kind is not among them: what transformers' own generate()
tells it as positions is not what it counts itself."""

_INDEX = "it chooses the keys it attends to by an index that has a cache of its own"
_CODEBOOKS = "it predicts several codebooks of sound at a time, from text that it is given as states"
_NO_CACHE = "it has no cache: every token is computed from the whole text before it"
_OWN_CACHE = "it keeps its states in a form of its own instead of one of transformers' caches"
_DRAFTS = "it drafts for another model, from whose states it continues"

REFUSED: dict[str, str] = {
    "axk2": _INDEX,
    "blt": "it predicts bytes in patches whose ends its input decides",
    "cpmant": "it puts a prompt of its own before every text, in its caches too",
    "deepseek_v32": _INDEX,
    "deepseek_v4": "it compresses its caches by weights of their own",
    "dots3_note": _INDEX,
    "dots3_note_text": _INDEX,
    "emu3": "transformers' class for its text does not find its weights among those of the whole model",
    "gemma3n": "its image tower needs the timm library; its text model is gemma3n_text",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "git": "it expects an image at the beginning of its caches",
    "glm_moe_dsa": _INDEX,
    "hy_v4": _INDEX,
    "minimax": _OWN_CACHE,
    "mllama": "its layers that attend to an image have caches that a text leaves empty",
    "musicgen": _CODEBOOKS,
    "musicgen_melody": _CODEBOOKS,
    "openai-gpt": _NO_CACHE,
    "prophetnet": "it predicts several tokens at a time, each from a stream of states of its own",
    "qwen4_exp": _INDEX,
    "qwen4_exp_text": _INDEX,
    "recurrent_gemma": "it keeps its recurrent states in its layers instead of in a cache",
    "reformer": "it caches hidden states and their hashes instead of keys and values",
    "rwkv": _OWN_CACHE,
    "xlm": _NO_CACHE,
    "xlnet": "it caches hidden states instead of keys and values",
    "xlstm": _OWN_CACHE,
    "zamba2": "its own answers differ by more than 1e-4 between reading a prompt at once and token by token",
}
"""Model types that cannot be exported, each with the reason in one line for users."""


def pairs() -> list[tuple[str, str]]:
    """Every type with the one task."""
    return [(model_type, "text-generation") for model_type in TYPES]


def make(path: Path, model_type: str, task: str = "text-generation") -> Path:
    """A tiny random checkpoint at `path`."""
    return tiny.save_checkpoint(path, tiny_config(model_type, CONFIGS.get(model_type)))


def options(model_type: str, task: str) -> dict[str, Any]:
    """The sizes to compile it for."""
    return {"batch_size": 2, "sequence_length": (48,), "dynamic_batch_size": True}
