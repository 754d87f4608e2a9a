"""A Llama-shaped checkpoint of random weights, without a tokenizer: `… DIRECTORY [0.5b | 1b | tiny]`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    # That of Qwen2.5-0.5B, and that of Llama-3.2-1B, with the vocabulary of the first Llama.
    "0.5b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8},
    # To try a program with.
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2},
}  # fmt: skip


def main(target: str, size: str = "0.5b") -> None:
    """Write it."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True, **SHAPES[size])
    # Answers of any length: no token ends one.
    config.eos_token_id = None
    LlamaForCausalLM(config).save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
