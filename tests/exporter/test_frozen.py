"""Encoders as native code: libraries that stand alone and share their weights, or have them packed within where that
pays."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from precast.exporter import ExportOptions, export
from precast.exporter.backends.aoti import freezing, isa
from precast.exporter.backends.aoti.options import AotiOptions
from precast.exporter.backends.aoti.standalone import link
from precast.runtime import CompiledModelForFeatureExtraction

ROWS = [[5, 9, 30, 7, 200, 41, 17], [80, 3, 3]]


def lowered(role="encode", cache=(), count=100):
    weight = torch.zeros(1).expand(count) if count > 1000 else torch.zeros(count)
    return SimpleNamespace(
        graph=SimpleNamespace(role=role, cache=list(cache)),
        exported=SimpleNamespace(state_dict={"a": weight, "b": weight}),
    )


def test_what_can_be_frozen():
    native = AotiOptions()
    assert freezing.can_freeze([lowered(), lowered()], native)
    assert not freezing.can_freeze([lowered(), lowered(role="decoder")], native), "an encoder-decoder shares its table"
    assert not freezing.can_freeze([lowered()], AotiOptions(isa="avx2")), "packed for this CPU only"
    assert not freezing.can_freeze([lowered()], AotiOptions(device="cuda"))
    half = freezing.MAX_BYTES // 4 // 2
    assert freezing.can_freeze([lowered(count=half)] * 2, native)
    assert not freezing.can_freeze([lowered(count=half)] * 3, native), "a copy in every library is too much"


@pytest.mark.parametrize(
    ("module", "x", "flags", "narrow", "pays"),
    [
        (nn.Linear(4, 4), torch.zeros(2, 4), {"avx512_bf16"}, False, False),
        (nn.Linear(4, 4).bfloat16(), torch.zeros(2, 4).bfloat16(), {"avx512_bf16"}, True, True),
        (nn.Linear(4, 4).bfloat16(), torch.zeros(2, 4).bfloat16(), set(), False, False),
        (nn.Linear(4, 4).half(), torch.zeros(2, 4).half(), {"avx512_bf16"}, False, False),
        (nn.Conv1d(4, 4, 3), torch.zeros(2, 4, 8), set(), False, True),
        (nn.Conv2d(4, 4, (2, 3), stride=2), torch.zeros(2, 4, 8, 8), set(), False, True),
        (nn.Conv2d(4, 4, 2, stride=2), torch.zeros(2, 4, 8, 8), set(), False, False),
        (nn.Conv2d(4, 4, 1), torch.zeros(2, 4, 8, 8), set(), False, False),
    ],
)  # fmt: skip
def test_when_it_pays(monkeypatch, module, x, flags, narrow, pays):
    monkeypatch.setattr(isa, "cpu_flags", lambda: frozenset({*isa._V4, *flags}))
    program = SimpleNamespace(exported=torch.export.export(module, (x,)))
    assert freezing.multiplies_narrow([program], "native") == narrow
    assert freezing.pays([program], "native") == pays


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


# Which is right where it has none, and a test of its own.
WARNED = pytest.mark.filterwarnings("ignore:.*has no instructions that multiply bfloat16")


@pytest.fixture
def onednn(monkeypatch):
    monkeypatch.setattr(freezing, "pays", lambda *_: True)


@pytest.mark.slow
@WARNED
def test_a_frozen_encoder_in_bfloat16(checkpoint, tmp_path, onednn):
    source = checkpoint("bert", "AutoModel")
    variant = made(source, tmp_path / "out", auto_cast="matmul")
    assert (variant.name, variant.dtype, variant.weights) == ("aoti-bf16-matmul", "float32", [])
    told = variant.compiler.options
    assert (told["frozen"], told["auto_cast"], told["auto_cast_type"]) == (True, "matmul", "bf16")
    assert variant.accuracy.status == "passed"
    assert 0 < variant.accuracy.figures["max_row_error"] < 0.045
    check(tmp_path / "out", source, 0.05)


@pytest.mark.parametrize("lengths", [(16,), pytest.param((8, 16), marks=pytest.mark.slow)])
def test_an_encoder_in_float32_stands_alone(checkpoint, tmp_path, lengths):
    source = checkpoint("bert", "AutoModel")
    variant = made(source, tmp_path / "out", sequence_length=lengths)
    assert (variant.requires_torch, variant.weights) == ([], ["model.safetensors"])
    check(tmp_path / "out", source, 1e-4)


@pytest.mark.slow
@WARNED
@pytest.mark.parametrize("options", [{"isa": "avx2"}, {"isa": "avx2", "dtype": "bfloat16"}])
def test_for_other_machines_nothing_is_frozen(checkpoint, tmp_path, onednn, options):
    source = checkpoint("bert", "AutoModel")
    variant = made(source, tmp_path / "out", **options)
    assert (variant.compiler.options["frozen"], bool(variant.weights)) == (False, True)
    assert variant.dtype == options.get("dtype", "float32")
    check(tmp_path / "out", source, 0.05 if "dtype" in options else 1e-4)


@pytest.mark.slow
@WARNED
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"sequence_length": (8, 16)}])
def test_frozen_answers_are_the_reference(checkpoint, tmp_path, onednn, options):
    source = checkpoint("bert", "AutoModel")
    variant = made(source, tmp_path / "out", **options)
    assert (variant.compiler.options["frozen"], variant.weights, variant.requires_torch) == (True, [], ["oneDNN"])
    check(tmp_path / "out", source, 0.05 if "dtype" in options else 1e-4)


@pytest.mark.slow
def test_what_cannot_stand_alone_is_frozen(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(link, "_MATMUL_PIECES", ())
    source = checkpoint("bert", "AutoModel")
    variant = made(source, tmp_path / "out", sequence_length=(8, 16))
    assert (variant.compiler.options["frozen"], variant.weights) == (True, [])
    assert variant.requires_torch[0] == "oneDNN"
    assert any("mm" in name for name in variant.requires_torch[1:])
    assert not (tmp_path / "out" / "model.safetensors").exists()
    check(tmp_path / "out", source, 1e-4)
