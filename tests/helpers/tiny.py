"""Tiny random checkpoints of many architectures, made from configurations; tokenizers made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 320
TEXTS = [
    "The capital of France is Paris.",
    "A compiler translates a program once.",
    "Water boils at 100 degrees Celsius at sea level.",
    "今天天气很好，我们去公园散步吧。",
    "Größe, naïve, façade — and a 🦊.",
]

_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SMALL_WINDOW = {"sliding_window": 8}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _SMALL_WINDOW,
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 2, **_SMALL_WINDOW},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gemma": {"head_dim": 16},
    "gemma2": {"num_hidden_layers": 2, "head_dim": 16, "query_pre_attn_scalar": 16, **_SMALL_WINDOW},
    "gemma3_text": {"num_hidden_layers": 2, "head_dim": 16, "query_pre_attn_scalar": 16, **_SMALL_WINDOW},
    "gptj": {"n_embd": 64, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
}
ODD_HEADS = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_heads": 4},
    "electra": {"embedding_size": 48},
}


def config_for(model_type: str, **changes: Any) -> Any:
    """The tiny configuration of a model type."""
    known = {**DECODERS, **ENCODERS}[model_type]
    return AutoConfig.for_model(model_type, **{**_SHARED, **known, **changes})


def save_checkpoint(path: Path, config: Any, auto: Any = AutoModelForCausalLM, *, seed: int = 0) -> Path:
    """Random weights, large enough that attention and positions matter, saved as transformers would."""
    torch.manual_seed(seed)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few lines."""
    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )
    wrapped.chat_template = (
        "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    return wrapped
