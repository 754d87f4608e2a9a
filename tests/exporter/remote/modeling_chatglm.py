"""A decoder in the shape of ChatGLM2's published code: the length is the first dimension, of caches too; half of each
head is rotated, in interleaved pairs; several query heads share a key; a mask is drawn only where one is needed."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_chatglm import ChatGLMConfig


class RotaryEmbedding(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim)))

    def forward(self, max_seq_len):
        angles = torch.outer(torch.arange(max_seq_len, device=self.inv_freq.device).float(), self.inv_freq)
        return torch.stack([angles.cos(), angles.sin()], dim=-1)


def apply_rotary_pos_emb(x, rope_cache):
    length, heads = x.size(0), x.size(2)
    rot_dim = rope_cache.shape[-2] * 2
    x, x_pass = x[..., :rot_dim], x[..., rot_dim:]
    rope_cache = rope_cache[:length]
    pairs = x.reshape(length, -1, heads, rot_dim // 2, 2)
    rope_cache = rope_cache.view(length, -1, 1, pairs.size(3), 2)
    turned = torch.stack(
        [
            pairs[..., 0] * rope_cache[..., 0] - pairs[..., 1] * rope_cache[..., 1],
            pairs[..., 1] * rope_cache[..., 0] + pairs[..., 0] * rope_cache[..., 1],
        ],
        -1,
    )
    return torch.cat((turned.flatten(3), x_pass), dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.groups, self.width = (
            config.num_attention_heads,
            config.multi_query_group_num,
            config.kv_channels,
        )
        self.projection_size = self.width * self.heads
        sizes = self.projection_size + 2 * self.width * self.groups
        self.query_key_value = nn.Linear(config.hidden_size, sizes, bias=True)
        self.dense = nn.Linear(self.projection_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, kv_cache, use_cache):
        sizes = [self.width * count for count in (self.heads, self.groups, self.groups)]
        query, key, value = self.query_key_value(hidden_states).split(sizes, dim=-1)
        query = query.view(*query.size()[:-1], self.heads, self.width)
        key, value = (each.view(*each.size()[:-1], self.groups, self.width) for each in (key, value))
        query, key = (apply_rotary_pos_emb(each, rotary_pos_emb) for each in (query, key))
        if kv_cache is not None:
            key, value = (torch.cat(pair, dim=0) for pair in zip(kv_cache, (key, value), strict=True))
        kept = (key, value) if use_cache else None
        key, value = (self._for_all_heads(each) for each in (key, value))
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        if attention_mask is None and query.shape[2] == key.shape[2]:
            attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mask = None if attention_mask is None else ~attention_mask
            attended = nn.functional.scaled_dot_product_attention(query, key, value, mask)
        attended = attended.permute(2, 0, 1, 3)
        return self.dense(attended.reshape(*attended.shape[:-2], self.projection_size)), kept

    def _for_all_heads(self, x):
        x = x.unsqueeze(-2).expand(-1, -1, -1, self.heads // self.groups, -1)
        return x.contiguous().view(*x.size()[:2], self.heads, self.width)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.ffn_hidden_size * 2, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        gate, value = torch.chunk(self.dense_h_to_4h(hidden_states), 2, dim=-1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * value)


class GLMBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden_states, *attention):
        attended, kept = self.self_attention(self.input_layernorm(hidden_states), *attention)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), kept


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"

    def get_masks(self, input_ids, past_key_values, padding_mask):
        batch, length = input_ids.shape
        mask = torch.ones(batch, length, length, device=input_ids.device).tril()
        past = past_key_values[0][0].shape[0] if past_key_values else 0
        if past:
            mask = torch.cat((torch.ones(batch, length, past, device=input_ids.device), mask), dim=-1)
        if padding_mask is not None:
            mask = mask * padding_mask.unsqueeze(1)
        if not past and padding_mask is not None:
            mask = mask - (padding_mask.unsqueeze(-1) - 1)
        return (mask < 0.5).bool().unsqueeze(1)


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.rotary_pos_emb = RotaryEmbedding(config.kv_channels // 2)
        self.layers = nn.ModuleList([GLMBlock(config) for _ in range(config.num_layers)])
        self.final_layernorm = nn.RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, position_ids, attention_mask, past_key_values, use_cache):
        length = input_ids.shape[1]
        mask = None
        if (attention_mask is not None and not attention_mask.all()) or (past_key_values and length != 1):
            mask = self.get_masks(input_ids, past_key_values, padding_mask=attention_mask)
        rotary = self.rotary_pos_emb(self.config.seq_length)
        rotary = rotary[position_ids] if position_ids is not None else rotary[None, :length]
        rotary = rotary.transpose(0, 1).contiguous()
        hidden_states, presents = self.embedding(input_ids).transpose(0, 1).contiguous(), ()
        for index, layer in enumerate(self.layers):
            given = past_key_values[index] if past_key_values else None
            hidden_states, kept = layer(hidden_states, mask, rotary, given, use_cache)
            presents += (kept,)
        return self.final_layernorm(hidden_states), presents if use_cache else None


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        return_dict=None,
    ):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if position_ids is None:
            past = past_key_values[0][0].shape[0] if past_key_values else 0
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
        hidden_states, presents = self.transformer(input_ids, position_ids, attention_mask, past_key_values, use_cache)
        logits = self.transformer.output_layer(hidden_states).transpose(0, 1).contiguous()
        return CausalLMOutputWithPast(logits=logits, past_key_values=presents)
