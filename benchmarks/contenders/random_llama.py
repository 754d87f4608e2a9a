"""A Llama-shaped checkpoint of half a billion random weights, without a tokenizer: `… DIRECTORY`."""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main(target: str) -> None:
    """Write it. The shape is that of Qwen2.5-0.5B with Llama's vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
