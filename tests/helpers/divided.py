"""Tiny models to divide between ranks, and ranks as threads."""

from __future__ import annotations

import threading

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from precast.exporter.operators.collectives import as_rank
from precast.exporter.options.parallel import DEGREES, Degrees

SHARED = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {"num_key_value_heads": 8, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GPT2 = {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_positions": 32}
FAMILIES = {
    "llama": {},
    "codegen": {**GPT2, "rotary_dim": 4, "n_head": 8},
    "cohere": {},
    "deepseek_v2": {**EXPERTS, **MLA, "n_routed_experts": 4, "q_lora_rank": None},
    "deepseek_v3": {**EXPERTS, **MLA, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 16},
    "ernie4_5": {},
    "gemma": HEADS,
    "gemma2": HEADS,
    "gemma3_text": HEADS,
    "glm": {},
    "gpt2": GPT2,
    "gpt_neo": {"num_heads": 8, "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_oss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {**GPT2, "rotary_dim": 4},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {"head_dim": 8},
    "llama4_text": {**HEADS, "num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
    "minicpm3": {**MLA, "q_lora_rank": 16},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3": HEADS,
    "qwen3_moe": {**EXPERTS, **HEADS},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}


def model_of(kind: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHARED, **FAMILIES[kind], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        # Biases begin as zeros, which would hide one that is added by every rank.
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model


def degrees(ranks: int, **fewer) -> Degrees:
    return Degrees(ranks=ranks, **{**dict.fromkeys(DEGREES, ranks), **fewer})


class Group:
    """Ranks as threads, which meet in each exchange."""

    def __init__(self, count: int) -> None:
        self.count, self._barrier, self._given = count, threading.Barrier(count, timeout=60), [None] * count

    def exchange(self, rank: int):
        def everybody(x):
            self._given[rank] = x
            self._barrier.wait()
            found = list(self._given)
            self._barrier.wait()
            return found

        everybody.rank = rank
        return everybody

    def run(self, work) -> list:
        found: list = [None] * self.count

        def one(rank: int) -> None:
            try:
                with torch.no_grad(), as_rank(self.exchange(rank)):
                    found[rank] = work(rank)
            except Exception as error:
                found[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for each in found:
            if isinstance(each, Exception) and not isinstance(each, threading.BrokenBarrierError):
                raise each
        return found
