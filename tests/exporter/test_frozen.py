"""Encoders as native code: weights packed into the library where that pays, and shared by the libraries elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch

from precast.exporter import ExportOptions, export
from precast.exporter.backends.aoti import freezing
from precast.exporter.backends.aoti.options import AotiOptions
from precast.runtime import CompiledModelForFeatureExtraction

ROWS = [[5, 9, 30, 7, 200, 41, 17], [80, 3, 3]]


def lowered(role="encode", cache=(), count=100):
    weight = torch.zeros(1).expand(count) if count > 1000 else torch.zeros(count)
    return SimpleNamespace(
        graph=SimpleNamespace(role=role, cache=list(cache)),
        exported=SimpleNamespace(state_dict={"a": weight, "b": weight}),
    )


def test_when_it_pays():
    native = AotiOptions()
    assert freezing.should_freeze([lowered(), lowered()], native)
    assert not freezing.should_freeze([lowered(), lowered(role="decoder")], native), (
        "an encoder-decoder shares its table"
    )
    assert not freezing.should_freeze([lowered()], AotiOptions(isa="avx2")), "packed for this CPU only"
    assert not freezing.should_freeze([lowered()], AotiOptions(device="cuda"))
    half = freezing.MAX_BYTES // 4 // 2
    assert freezing.should_freeze([lowered(count=half)] * 2, native)
    assert not freezing.should_freeze([lowered(count=half)] * 3, native), "a copy in every library is too much"


def check(path, source, tolerance):
    ids, mask = oracle.padded(ROWS, "left")
    found = CompiledModelForFeatureExtraction.from_pretrained(path)(ids, mask).last_hidden_state
    model = oracle.eager(source, "AutoModel")
    for index, row in enumerate(ROWS):
        with torch.inference_mode():
            expected = model(torch.tensor([row])).last_hidden_state[0].numpy()
        difference = np.abs(found[index, ids.shape[1] - len(row) :] - expected).max()
        assert difference <= tolerance * np.abs(expected).max()
        assert found.dtype == np.float32


def made(source, target, **options):
    asked = {"backend": "aoti", "batch_size": 2, "sequence_length": (16,), "task": "feature-extraction", **options}
    return export(str(source), target, ExportOptions(**asked)).contract.variants[0]


@pytest.mark.slow
# Which is right where it has none, and a test of its own.
@pytest.mark.filterwarnings("ignore:This CPU has no instructions that multiply bfloat16")
def test_a_frozen_encoder_in_bfloat16(checkpoint, tmp_path):
    source = checkpoint("bert", "AutoModel")
    variant = made(source, tmp_path / "out", auto_cast="matmul")
    assert (variant.name, variant.dtype, variant.weights) == ("aoti-bf16-matmul", "float32", [])
    told = variant.compiler.options
    assert (told["frozen"], told["auto_cast"], told["auto_cast_type"]) == (True, "matmul", "bf16")
    assert variant.accuracy.status == "passed"
    assert 0 < variant.accuracy.figures["max_row_error"] < 0.045
    check(tmp_path / "out", source, 0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has no instructions")
@pytest.mark.parametrize(
    "options",
    [{}, {"isa": "avx2"}, {"isa": "avx2", "dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"sequence_length": (8, 16)}],
)
def test_frozen_or_not_the_answers_are_the_reference(checkpoint, tmp_path, options):
    source = checkpoint("bert", "AutoModel")
    variant = made(source, tmp_path / "out", **options)
    assert variant.compiler.options["frozen"] == (not variant.weights) == ("isa" not in options)
    assert variant.dtype == options.get("dtype", "float32")
    check(tmp_path / "out", source, 0.05 if "dtype" in options else 1e-4)
