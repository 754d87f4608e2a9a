"""get_memory_footprint(): the bytes of tensors as transformers counts them, from the heads of files."""

from __future__ import annotations

import json
import math
import mmap

import onnx
import oracle
import pytest
import torch
import transformers

from precast.runtime import CompiledModel
from precast.runtime.artifact.onnx_graph import find_tensors
from precast.runtime.engines import footprint
from precast.runtime.engines.safetensors_map import list_stored
from precast.runtime.errors import FormatError, UsageError

CHINESE_BERT = {"vocab_size": 21128, "num_labels": 2}
"""BERT's base size with the vocabulary of Chinese checkpoints, which has 102,269,186 parameters."""
HALF, ROUNDED = 204_546_564, 119_022_084
"""What transformers counts of it in float16, and after LLM.int8 has rounded its linear layers but the head."""
_NAMES = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64", torch.int8: "I8"}


def write_head(path, tensors):
    """A safetensors file of these (name, dtype, shape) whose weights are holes: they take no room on disk."""
    head, at = {}, 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        head[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    data = json.dumps(head).encode()
    with open(path, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + at)
    return path


def test_the_count_of_a_whole_model_is_that_of_transformers(tmp_path):
    """Of a size that is published, without its weights; and how the smaller number comes about."""
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**CHINESE_BERT)).half()
    assert model.get_memory_footprint() == HALF
    tensors = [(name, each.dtype, each.shape) for name, each in [*model.named_parameters(), *model.named_buffers()]]
    assert sum(each.size for each in list_stored(write_head(tmp_path / "half", tensors), tmp_path / "half")) == HALF
    linear = {f"{name}.weight" for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    linear -= {"classifier.weight"}
    tensors = [(name, torch.int8 if name in linear else dtype, shape) for name, dtype, shape in tensors]
    assert sum(each.size for each in list_stored(write_head(tmp_path / "int8", tensors), tmp_path / "int8")) == ROUNDED


def test_an_artifact_in_float16_takes_what_transformers_counts(checkpoint, artifact):
    """But for the buffer of segments, which the graph has no use for: they are an input."""
    source = checkpoint("bert", "AutoModelForSequenceClassification")
    made = artifact(source, backend="export", dtype="float16", batch_size=2, sequence_length=16)
    model = CompiledModel.from_pretrained(made)
    eager = transformers.AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float16)
    segments = eager.bert.embeddings.token_type_ids
    assert model.get_memory_footprint() == eager.get_memory_footprint() - segments.numel() * segments.element_size()
    assert model.get_memory_footprint(return_buffers=False) == eager.get_memory_footprint(return_buffers=False)
    with pytest.raises(UsageError, match="Did you mean return_buffers"):
        model.get_memory_footprint(return_buffer=False)


def test_graphs_of_onnx_count_what_they_share_once(checkpoint, artifact):
    """Two lengths over one set of weights take the bytes of the weights and small tables, not twice as much."""
    source = checkpoint("bert", "AutoModelForSequenceClassification")
    model = CompiledModel.from_pretrained(artifact(source, batch_size=2, sequence_length=(16, 48)), prepack=False)
    eager = oracle.eager(source, "AutoModelForSequenceClassification").get_memory_footprint()
    assert abs(model.get_memory_footprint() / eager - 1) < 0.05
    on_disk = sum((model.artifact.path / name).stat().st_size for name in model.variant.weights)
    assert model.get_memory_footprint() >= on_disk - mmap.PAGESIZE * 4


def test_codes_and_scales_are_counted_as_they_lie_there(checkpoint, artifact):
    counts = [
        CompiledModel.from_pretrained(made, prepack=False).get_memory_footprint()
        for made in (
            artifact(checkpoint("llama")),
            artifact(checkpoint("llama"), quantize="int8", accept_loss=True),
            artifact(checkpoint("llama"), quantize="int4", accept_loss=True),
        )
    ]
    assert counts == sorted(counts, reverse=True)
    # A code of a byte, and for 32 of them a scale of four, where there were 32 times four.
    assert abs(counts[1] / counts[0] - 36 / 128) < 0.02


def test_nothing_of_the_weights_is_read(decoder, monkeypatch):
    """Only graph files are mapped: of the file beside them not even its existence matters to the count."""
    opened = []
    real = footprint.open_regular
    monkeypatch.setattr(footprint, "open_regular", lambda root, name: opened.append(name) or real(root, name))
    CompiledModel.from_pretrained(decoder, prepack=False).get_memory_footprint()
    assert opened == ["model.onnx"]


def test_tensors_of_a_graph_are_those_of_the_library(decoder):
    found = find_tensors((decoder / "model.onnx").read_bytes(), "x")
    model = onnx.load(decoder / "model.onnx", load_external_data=False)
    inner = [each.t for node in model.graph.node for each in node.attribute if each.HasField("t")]
    known = [*model.graph.initializer, *inner]
    assert sorted(each.shape for each in found) == sorted(tuple(each.dims) for each in known)
    for each in known:
        external = {entry.key: entry.value for entry in each.external_data}
        assert any(
            one.shape == tuple(each.dims)
            and one.place == ((external["location"], int(external.get("offset", 0))) if external else None)
            and one.size == int(external.get("length", len(each.raw_data) or one.size))
            for one in found
        )
    with pytest.raises(FormatError, match="is not an ONNX graph"):
        find_tensors(b"\x3a\xff\xff\xff\xff\x0f", "x")
