"""A Llama checkpoint of Hugging Face as a GGUF file in float32, and what calibration text says of its columns.

`write_gguf` is what llama.cpp quantizes from; `mean_squares` is its importance matrix, the mean square of every column
of a layer's inputs, by the names of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFReader, GGUFWriter, TokenType, get_tensor_name_map
from torch import Tensor

__all__ = ["mean_squares", "tensor_bytes", "write_gguf"]


def write_gguf(model: Any, folder: Path, target: Path) -> None:
    """Write the weights and the tokenizer of `folder`."""
    config = model.config
    writer = GGUFWriter(target, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder)
    for name, values in _tensors(model):
        writer.add_tensor(name, np.ascontiguousarray(values.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Queries and keys with the two halves of each head interleaved, as the format has them."""
    config, names = model.config, _names(model)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, values in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        count = heads.get(name.split(".")[-2])
        given = values.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2) if count else values
        yield f"{names.get_name(name.removesuffix('.weight'))}.weight", given


def _names(model: Any) -> Any:
    return get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)


def _add_tokenizer(writer: GGUFWriter, folder: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    special = {each["content"] for each in found["added_tokens"]}
    words = found["model"]["vocab"] | {each["content"]: each["id"] for each in found["added_tokens"]}
    tokens = sorted(words, key=words.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if each in special else TokenType.NORMAL for each in tokens])
    merges = found["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])


def mean_squares(model: Any, rows: Sequence[Tensor]) -> dict[str, Any]:
    """Per linear layer of the blocks float32 [K], under the weight's name in the file."""
    names, sums = _names(model), dict[str, Tensor]()
    hooks = []
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            key = f"{names.get_name(f'model.layers.{name}')}.weight"
            hooks.append(module.register_forward_pre_hook(partial(_add_squares, sums, key)))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    tokens = sum(map(len, rows))
    return {name: (total / tokens).numpy() for name, total in sums.items()}


def _add_squares(sums: dict[str, Tensor], name: str, _: Any, inputs: tuple[Tensor, ...]) -> None:
    sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).square().sum(0)


def tensor_bytes(path: Path) -> int:
    """Bytes of all weights, without the vocabulary's words and other notes."""
    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
