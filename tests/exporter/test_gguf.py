"""GGUF files, written here from tiny checkpoints."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from precast.exporter import ExportOptions
from precast.exporter.checkpoint.gguf import SharedReader, check_not_truncated
from precast.exporter.checkpoint.resolve import resolve
from precast.runtime.artifact.tasks import get_task
from precast.runtime.errors import CheckpointError


def write_gguf(source: Path, target: Path, kind: gguf.GGMLQuantizationType | None = None) -> None:
    """A Llama checkpoint as GGUF, in float32, or with matrices of the `kind` of codes."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _write_tokenizer(writer, json.loads((source / "tokenizer.json").read_text())["model"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(source / "model.safetensors").items():
        place, values = names.get_name(name.removesuffix(".weight")) + ".weight", tensor.float().numpy()
        if kind is None or values.ndim < 2:
            writer.add_tensor(place, values)
        else:
            writer.add_tensor(place, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: gguf.GGUFWriter, model: dict) -> None:
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def test_a_file_is_parsed_once(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(checkpoint("llama"), tmp_path / "tiny.gguf")
    parsed = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    found = resolve(str(tmp_path / "tiny.gguf"), ExportOptions())
    tokenizer, model = found.tokenizer, found.load(get_task("text-generation"), "float32")
    assert parsed == [str(tmp_path / "tiny.gguf")]
    assert gguf.GGUFReader is Counted
    assert tokenizer("Water")["input_ids"]
    expected = load_file(checkpoint("llama") / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.get_parameter("model.layers.0.mlp.up_proj.weight"), expected.float())


def test_a_download_that_broke_off_is_called_truncated(tmp_path, checkpoint):
    whole, cut = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    write_gguf(checkpoint("llama"), whole)
    check_not_truncated(whole)
    data = whole.read_bytes()
    end = len(data.rstrip(b"\0"))
    for size in (end - 1, len(data) // 2):
        cut.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=rf"cut.gguf is truncated: its tensors end at byte .* {size:,} bytes"):
            resolve(str(cut), ExportOptions())
    for size in range(4, 2000, 97):
        cut.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="truncated: it ends within its header"):
            check_not_truncated(cut)


@pytest.mark.parametrize("kind", [99, 9])
def test_an_odd_header_is_for_whoever_parses_it(tmp_path, kind):
    """Lists of nothing known, as long as can be; nobody counts them."""
    path = tmp_path / "odd.gguf"
    entry = struct.pack("<QIIQ", 0, 9, kind, 2**63)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    check_not_truncated(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<QI", 0, 2**32 - 1))
    check_not_truncated(path)


def test_weights_are_loaded_one_by_one(checkpoint, tmp_path):
    """Numpy tells tracemalloc what it allocates, and gguf dequantizes into numpy's arrays."""
    source = checkpoint("llama", hidden_size=512, intermediate_size=1024)
    write_gguf(source, tmp_path / "wide.gguf", gguf.GGMLQuantizationType.Q8_0)
    found = resolve(str(tmp_path / "wide.gguf"), ExportOptions())
    assert found.tokenizer
    tracemalloc.start()
    try:
        model = found.load(get_task("text-generation"), "float32")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = [parameter.nbytes for parameter in model.parameters()]
    assert peak < 1.25 * sum(held) + 2 * max(held)


def test_a_vocabulary_is_held_as_plain_arrays(checkpoint, tmp_path):
    """An `np.memmap` of each token takes twice the memory."""
    write_gguf(checkpoint("llama"), tmp_path / "tiny.gguf")
    with SharedReader():
        reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert {type(part) for field in reader.fields.values() for part in field.parts} == {np.ndarray}
    assert {type(tensor.data) for tensor in reader.tensors} == {np.ndarray}
