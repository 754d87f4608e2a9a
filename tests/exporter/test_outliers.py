"""LLM.int8: columns of large activations are multiplied as they are, all others in 8 bits."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from precast.exporter import ExportOptions, export
from precast.exporter.quantize.int8_linear import Int8Linear, Int8Weight
from precast.exporter.quantize.outliers import THRESHOLD, OutlierLinear, quantize_around_outliers
from precast.exporter.quantize.recipe import find_layers
from precast.runtime.errors import UsageError


def inputs(seed: int, columns: int, large: list[int]) -> torch.Tensor:
    """Tokens [5, columns], of which some columns are large."""
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed))
    x[:, large] *= 40 * THRESHOLD
    return x


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31), columns=st.integers(4, 40), rows=st.integers(1, 9), large=st.sets(st.integers(0, 2)),
    has_bias=st.booleans(),
)  # fmt: skip
def test_the_layer_is_the_paper_s_formula(seed, columns, rows, large, has_bias):
    kept = torch.tensor(sorted(large), dtype=torch.int64)
    x = inputs(seed, columns, sorted(large))
    weight, bias = torch.randn(rows, columns), torch.randn(rows) if has_bias else None
    layer = OutlierLinear(weight, bias, kept)
    rest = [index for index in range(columns) if index not in large]
    scale = x[:, rest].abs().amax(1, keepdim=True) / 127
    codes = (x[:, rest] / scale).round()
    expected = codes @ layer.rounded.codes.float()[rest] * scale * layer.rounded.scales + x[:, kept] @ weight[:, kept].T
    torch.testing.assert_close(layer(x), expected if bias is None else expected + bias, rtol=1e-4, atol=1e-4)


def test_large_activations_do_not_cost_the_small_ones_their_digits():
    x, weight = inputs(0, 64, [7, 30]), torch.randn(32, 64)
    exact = nn.functional.linear(x, weight)
    around = OutlierLinear(weight, None, torch.tensor([7, 30]))(x)
    plain = Int8Linear(Int8Weight.round(weight), None, None, None)(x)
    small = nn.functional.linear(inputs(0, 64, [7, 30]).index_fill(1, torch.tensor([7, 30]), 0), weight)
    assert (around - exact).norm() < 0.02 * small.norm()
    assert (plain - exact).norm() > 0.2 * small.norm()


def test_columns_are_found_by_what_calibration_reads():
    model = transformers.AutoModelForSequenceClassification.from_config(tiny.config_for("bert", num_labels=9)).eval()
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight[5] = 50.0
    layers = [layer for layer in find_layers(model, ()) if layer.linear and not layer.is_vocabulary]
    done = quantize_around_outliers(model, layers, [{"input_ids": torch.arange(3, 19)[None]}])
    query = model.bert.encoder.layer[0].attention.self.query
    assert query.kept.tolist() == [5]
    assert isinstance(model.bert.encoder.layer[0].output.dense, Int8Linear)
    assert set(done) == {layer.name for layer in layers}
    torch.testing.assert_close(query.weight[:, 5], query.columns[:, 0])


@pytest.mark.parametrize(
    "backend", ["onnx", pytest.param("aoti", marks=pytest.mark.slow), pytest.param("export", marks=pytest.mark.slow)]
)
def test_an_artifact_answers_as_the_model(checkpoint, tmp_path, backend):
    source = checkpoint("bert", "AutoModelForSequenceClassification", num_labels=9)
    options = ExportOptions(
        batch_size=2, sequence_length=(32,), quantize="int8", quantize_method="llm.int8", backend=backend,
    )  # fmt: skip
    (variant,) = export(str(source), tmp_path / "out", options).contract.variants
    assert variant.accuracy.status == "passed"
    assert variant.quantization.startswith("int8 weights and activations by llm.int8 (")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "int4"}, "give quantize='int8' with it"),
        ({"quantize": "int8", "group_size": 32}, "Leave them out"),
        ({"quantize": "int8", "smooth": 0.5}, "smooth= is for activations of 8 bits"),
    ],
)
def test_options_that_mean_nothing_to_it(options, words):
    with pytest.raises(UsageError, match=words):
        ExportOptions(quantize_method="llm.int8", **options).check()
