"""A decoder in the shape of Baichuan's published code: one packed projection, rotary tables, tuples for caches, and an
output layer that normalizes its own weights when first called."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_baichuan import BaichuanConfig


def expanded_mask(attention_mask, length, past):
    """[B, past + length] of 0 and 1 -> [B, 1, length, past + length] to be added to scores."""
    lowest = torch.finfo(torch.float32).min
    causal = torch.full((length, length), lowest).triu(1)
    if past > 0:
        causal = torch.cat([torch.zeros(length, past), causal], dim=-1)
    hidden = (1.0 - attention_mask[:, None, None, :].float()).bool()
    return causal[None, None].masked_fill(hidden, lowest)


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.epsilon)


class RotaryEmbedding(nn.Module):
    # On the CPU, since transformers 5 makes models on the meta device and fills in parameters and buffers only.
    def __init__(self, dim, max_position_embeddings):
        super().__init__()
        self.dim = dim
        self._extend(max_position_embeddings)

    def _extend(self, length):
        self.max_seq_len_cached = length
        inverse = 1.0 / (10000 ** (torch.arange(0, self.dim, 2, device="cpu").float() / self.dim))
        angles = torch.outer(torch.arange(length, device="cpu").float(), inverse)
        angles = torch.cat((angles, angles), dim=-1)
        self.cos_cached, self.sin_cached = angles.cos()[None, None], angles.sin()[None, None]

    def forward(self, x, seq_len):
        if seq_len > self.max_seq_len_cached:
            self._extend(seq_len)
        return self.cos_cached[:, :, :seq_len].to(x.device), self.sin_cached[:, :, :seq_len].to(x.device)


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin, position_ids):
    cos, sin = (table.squeeze(1).squeeze(0)[position_ids].unsqueeze(1) for table in (cos, sin))
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotary_emb = RotaryEmbedding(self.head_dim, config.max_position_embeddings)

    def forward(self, hidden_states, attention_mask, position_ids, past_key_value, use_cache):
        batch, length, hidden = hidden_states.shape
        proj = self.W_pack(hidden_states).unflatten(-1, (3, hidden)).unsqueeze(0).transpose(0, -2).squeeze(-2)
        query, key, value = (each.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2) for each in proj)
        kv_seq_len = key.shape[-2]
        if past_key_value is not None:
            kv_seq_len += past_key_value[0].shape[-2]
        query, key = apply_rotary_pos_emb(query, key, *self.rotary_emb(value, seq_len=kv_seq_len), position_ids)
        if past_key_value is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past_key_value, (key, value), strict=True))
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        attended = attended.transpose(1, 2).reshape(batch, length, hidden)
        return self.o_proj(attended), (key, value) if use_cache else None


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, *attention):
        attended, present = self.self_attn(self.input_layernorm(hidden_states), *attention)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), present


class BaichuanPreTrainedModel(PreTrainedModel):
    config_class = BaichuanConfig
    base_model_prefix = "model"


class BaichuanModel(BaichuanPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache):
        batch, length = input_ids.shape
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if position_ids is None:
            position_ids = torch.arange(past, length + past, device=input_ids.device).unsqueeze(0).view(-1, length)
        if attention_mask is None:
            attention_mask = torch.ones((batch, length + past), device=input_ids.device)
        mask, hidden_states, presents = expanded_mask(attention_mask, length, past), self.embed_tokens(input_ids), ()
        for index, layer in enumerate(self.layers):
            given = past_key_values[index] if past_key_values is not None else None
            hidden_states, present = layer(hidden_states, mask, position_ids, given, use_cache)
            presents += (present,)
        return self.norm(hidden_states), presents if use_cache else None


class NormHead(nn.Module):
    def __init__(self, hidden_size, vocab_size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty((vocab_size, hidden_size)))
        self.first_flag = True

    def forward(self, hidden_states):
        if self.first_flag:
            self.first_flag = False
            self.weight.data = nn.functional.normalize(self.weight)
        return nn.functional.linear(hidden_states, self.weight)


class BaichuanForCausalLM(BaichuanPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = BaichuanModel(config)
        plain = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size) if config.has_norm_head else plain
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        return_dict=None,
    ):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        hidden_states, presents = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states), past_key_values=presents)
