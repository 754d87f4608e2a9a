"""Quantized layers: the dequantized layer's answers, eagerly and as ONNX Runtime's operators."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from precast.exporter.backends.onnx.lowering import lower
from precast.exporter.backends.onnx.pack_projections import PackProjections
from precast.exporter.backends.onnx.qdq import write_qdq
from precast.exporter.kinds.trace import Program
from precast.exporter.quantize.linear import Packed, QuantizedEmbedding, QuantizedLinear
from precast.exporter.quantize.scheme import QuantizedWeight
from precast.runtime.artifact.schema import Graph, Input, Output

some = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31)
bits_ = st.sampled_from([4, 8])
zeros_ = st.sampled_from(["symmetric", "integer", "float"])
forms = pytest.mark.parametrize(
    ("bits", "zero"), [(4, "symmetric"), (4, "integer"), (4, "float"), (8, "symmetric"), (8, "integer")]
)
tables = pytest.mark.parametrize(
    ("bits", "zero", "count"), [(4, "symmetric", 3), (4, "integer", 3), (8, "symmetric", 2), (8, "integer", 1)]
)


def random_weight(
    seed: int, bits: int, zero: str, rows: int, count: int, group: int = 32, cut: int = 0
) -> QuantizedWeight:
    """[rows, count * group - cut]."""
    random = np.random.default_rng(seed)
    codes = torch.from_numpy(random.integers(0, 2**bits, (rows, count, group)).astype(np.uint8))
    zeros = torch.from_numpy(random.integers(0, 2**bits, (rows, count)).astype(np.uint8))
    scales = torch.from_numpy(random.uniform(0.1, 1, (rows, count)).astype(np.float32))
    if zero == "symmetric":
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    offsets = torch.from_numpy(random.uniform(-0.5, 0.5, (rows, count)).astype(np.float32)) * scales
    return QuantizedWeight(bits, codes, scales, zeros, offsets if zero == "float" else None, count * group - cut)


def whole_activations(seed: int, tokens: int, count: int, group: int = 32) -> torch.Tensor:
    """[1, tokens, count * group] that int8 holds exactly: whole numbers, in every group one of ±127, and so with the
    means of the groups."""
    random = np.random.default_rng(seed)
    means = random.integers(0, 128, (tokens, count, 1))
    x = np.repeat(means, group, 2)
    x[..., 0], x[..., 1] = 127, 2 * means[..., 0] - 127
    x[:, 0] = 127
    return torch.from_numpy((x * random.choice([-1, 1], (tokens, count, 1))).reshape(1, tokens, -1)).float()


def offset_bound(quantized: QuantizedWeight, x: torch.Tensor) -> torch.Tensor:
    """What offsets may be off by in the output: half a step of the symmetric codes that hold them, by each mean."""
    if quantized.offsets is None:
        return torch.zeros(())
    blocks = nn.functional.pad(quantized.offsets.abs(), (0, -quantized.offsets.shape[1] % quantized.group)).unflatten(
        1, (-1, quantized.group)
    )
    half_steps = blocks.amax(-1) / (2 ** (quantized.bits - 1) - 1) / 2
    per_group = half_steps.repeat_interleave(quantized.group, 1)[:, : quantized.offsets.shape[1]]
    sums = x.unflatten(-1, (-1, quantized.group)).sum(-1).abs()
    return sums @ per_group.T


def close(found, expected, x: torch.Tensor, weight: torch.Tensor, bound: torch.Tensor) -> bool:
    rounding = 1e-5 * (x.abs() @ weight.abs().T + 1)
    return bool(((torch.as_tensor(found) - expected).abs() <= bound * 1.0001 + rounding).all())


# ---------------------------------------------------------------- eager


@some
@given(seed=seeds, bits=bits_, zero=zeros_, count=st.integers(1, 5), cut=st.integers(0, 31), with_bias=st.booleans())
def test_a_quantized_linear_is_the_dequantized_one(seed, bits, zero, count, cut, with_bias):
    quantized = random_weight(seed, bits, zero, 7, count, cut=0 if zero == "float" else cut)
    x, bias = torch.randn(2, 3, quantized.columns), torch.randn(7) if with_bias else None
    found = QuantizedLinear(Packed(quantized), bias)(x)
    expected = nn.functional.linear(x, quantized.dequantize(), bias)
    assert close(found, expected, x, quantized.dequantize(), offset_bound(quantized, x))


@some
@given(
    seed=seeds,
    bits=bits_,
    zero=st.sampled_from(["symmetric", "integer"]),
    count=st.integers(1, 5),
    cut=st.integers(0, 31),
)
def test_a_quantized_embedding_is_the_dequantized_one(seed, bits, zero, count, cut):
    quantized = replace(random_weight(seed, bits, zero, 11, count, cut=cut), offsets=None)
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    assert torch.equal(QuantizedEmbedding(Packed(quantized))(ids), nn.functional.embedding(ids, quantized.dequantize()))


def test_bytes_are_what_the_bits_say():
    """4 bits: half a byte per code; zero points are stored only where they are not the middle."""
    for bits, zero, expected in ((4, "symmetric", 16 + 4), (8, "symmetric", 32 + 4), (4, "integer", 16 + 4 + 0.5)):
        quantized = random_weight(0, bits, zero, 6, 4)
        assert Packed(quantized).nbytes == 6 * 4 * expected


# ---------------------------------------------------------------- ONNX Runtime


def compiled(module: nn.Module, x: torch.Tensor, *, packed: bool = False, is_standard: bool = False) -> ir.Model:
    kind = "int64" if x.dtype == torch.int64 else "float32"
    outputs = module(x)
    names = [f"y{index}" for index in range(len(outputs) if isinstance(outputs, tuple) else 1)]
    graph = Graph(
        name="layer", role="encode", file="layer.onnx", batch=1, length=1, capacity=1, cache=[],
        inputs=[Input(name="x", dtype=kind, shape=list(x.shape), pad=0)],
        outputs=[Output(name=name, dtype="float32", shape=[1], slice=[None]) for name in names],
    )  # fmt: skip
    model = lower(Program(graph, torch.export.export(module, (x,), strict=False)), is_standard=is_standard)
    # As fuse_for_onnxruntime does: the means of one input are taken once.
    ir.passes.common.CommonSubexpressionEliminationPass()(model)
    if packed:
        assert PackProjections()(model).modified
    if is_standard:
        write_qdq(model)
        assert {node.domain for node in model.graph} == {""}
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def run(model: ir.Model, x: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})


def counts(model: ir.Model, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph)


@forms
def test_matmul_nbits_rounds_activations_by_half_a_step(bits, zero):
    """A step of int8 is a 127th of a group's largest activation."""
    quantized = random_weight(7, bits, zero, 16, 4)
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(7))
    found = run(compiled(QuantizedLinear(Packed(quantized), None), x), x)[0]
    weight, steps = quantized.dequantize(), x.unflatten(-1, (-1, 32)).abs().amax(-1) / 127
    bound = offset_bound(quantized, x) + 0.5 * steps @ weight.unflatten(1, (-1, 32)).abs().sum(-1).T
    # The codes' own middle is subtracted outside of the product, which adds the roundings of the group's sum.
    bound = bound + 0.5 * 32 * steps @ (quantized.scales * (quantized.zeros.float() if zero != "symmetric" else 0)).T
    if quantized.offsets is not None:
        means = x.unflatten(-1, (-1, 32)).mean(-1)
        bound = bound + 32 * 0.5 * means.abs().amax(-1, keepdim=True) / 127 * quantized.offsets.abs().sum(1)
    assert close(found, nn.functional.linear(x, weight), x, weight, bound)


def test_a_table_that_is_no_multiple_of_the_group():
    quantized = random_weight(0, 8, "symmetric", 16, 3, cut=16)
    x = whole_activations(0, 2, 3)[..., :80]
    expected = nn.functional.linear(x, quantized.dequantize())
    assert close(
        run(compiled(QuantizedLinear(Packed(quantized), None), x), x)[0],
        expected,
        x,
        quantized.dequantize(),
        torch.zeros(()),
    )
    ids = torch.tensor([[1, 15, 0]])
    found = run(compiled(QuantizedEmbedding(Packed(quantized)), ids), ids)[0]
    assert np.array_equal(found, nn.functional.embedding(ids, quantized.dequantize()).numpy())


@pytest.mark.parametrize("zero", ["symmetric", "float"])
@pytest.mark.parametrize("shape", [(6,), (2, 1, 3)], ids=["two", "four"])
def test_inputs_of_other_than_three_dimensions(zero, shape):
    """A router reads tokens as [tokens, K]; cached latents are [B, 1, C, K]."""
    quantized = random_weight(0, 4, zero, 16, 2)
    x = whole_activations(0, 6, 2)[0].view(*shape, -1)
    found = run(compiled(QuantizedLinear(Packed(quantized), None), x), x)[0]
    assert close(
        found, nn.functional.linear(x, quantized.dequantize()), x, quantized.dequantize(), offset_bound(quantized, x)
    )


@tables
def test_gather_block_quantized_is_the_dequantized_embedding(bits, zero, count):
    quantized = random_weight(7, bits, zero, 11, count)
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    model = compiled(QuantizedEmbedding(Packed(quantized)), ids)
    assert counts(model, "GatherBlockQuantized") == 1
    assert np.array_equal(run(model, ids)[0], nn.functional.embedding(ids, quantized.dequantize()).numpy())


# ---------------------------------------------------------------- siblings


class Family(nn.Module):
    """Layers that read one input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) + 1 for layer in self.layers)


def layer(seed: int, rows: int, *, bits: int = 4, zero: str = "float", bias: bool = False) -> QuantizedLinear:
    made = random_weight(seed, bits, zero, rows, 3)
    return QuantizedLinear(Packed(made), torch.randn(rows) if bias else None)


@pytest.mark.parametrize("biases", [(False, False), (True, False, True)])
@forms
def test_packed_siblings_give_what_each_gave(bits, zero, biases):
    """To the bit, with and without biases, and in their order."""
    torch.manual_seed(7)
    sizes = [16, 32, 8, 24]
    family = Family(*(layer(i, sizes[i], bits=bits, zero=zero, bias=bias) for i, bias in enumerate(biases)))
    x = torch.randn(1, 3, 96)
    apart, together = compiled(family, x), compiled(family, x, packed=True)
    assert (counts(together, "MatMulNBits"), counts(together, "Split")) == (1, 1)
    for found, expected in zip(run(together, x), run(apart, x), strict=True):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_only_siblings_of_one_format_are_packed():
    """4 and 8 bits, with zero points and without, stay apart, and so do layers that read something else."""
    x = torch.randn(1, 3, 96)
    family = Family(layer(0, 16), layer(1, 16, bits=8, zero="symmetric"), layer(2, 16), layer(3, 16, zero="symmetric"))
    model = compiled(family, x, packed=True)
    assert counts(model, "MatMulNBits") == 3
    for found, expected in zip(run(model, x), run(compiled(family, x), x), strict=True):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    chain = compiled(nn.Sequential(layer(0, 96), layer(1, 16)), x)
    assert not PackProjections()(chain).modified


# ---------------------------------------------------------------- operators of the standard


def same(module: nn.Module, x: torch.Tensor) -> list[tuple[ir.Value, ...]]:
    """Check that both formats give the same; returns the inputs of each DequantizeLinear."""
    standard = compiled(module, x, is_standard=True)
    for found, expected in zip(run(standard, x), run(compiled(module, x), x), strict=True):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    return [node.inputs for node in standard.graph if node.op_type == "DequantizeLinear"]


@forms
def test_dequantized_weights_give_what_matmul_nbits_gives(bits, zero):
    """ONNX Runtime makes the same operator of them; codes have a sign where they have no zero points."""
    bias = torch.randn(16)
    x = torch.randn(1, 5, 96, generator=torch.Generator().manual_seed(7))
    ((codes, scales, *zeros),) = same(QuantizedLinear(Packed(random_weight(7, bits, zero, 16, 3)), bias), x)
    columns = 128 if zero == "float" else 96
    assert (list(codes.shape), list(scales.shape)) == ([columns, 16], [columns // 32, 16])
    assert codes.dtype == ir.DataType[f"{'INT' if zero == 'symmetric' else 'UINT'}{bits}"]
    assert [list(each.shape) for each in zeros] == ([] if zero == "symmetric" else [[columns // 32, 16]])


def test_a_standard_product_of_a_width_that_is_no_multiple_of_the_group():
    same(QuantizedLinear(Packed(random_weight(0, 8, "symmetric", 16, 3, cut=16)), None), torch.randn(1, 2, 80))


@tables
def test_standard_lookups_are_the_dequantized_embedding(bits, zero, count):
    quantized = random_weight(7, bits, zero, 11, count)
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    found = run(compiled(QuantizedEmbedding(Packed(quantized)), ids, is_standard=True), ids)[0]
    assert np.array_equal(found, nn.functional.embedding(ids, quantized.dequantize()).numpy())


class Tied(nn.Module):
    """Embeddings in and out of one table."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.table, self.head = QuantizedEmbedding(packed), QuantizedLinear(packed, None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


@pytest.mark.parametrize(("bits", "zero"), [(8, "symmetric"), (8, "integer"), (4, "integer")])
def test_a_tied_table_is_stored_once_where_it_can_be_looked_up(bits, zero):
    module, ids = Tied(Packed(random_weight(7, bits, zero, 11, 2))), torch.tensor([[0, 10, 3], [3, 3, 7]])
    ((codes, *_),) = same(module, ids)
    (table, *_) = [node.inputs[0] for node in codes.graph if node.op_type == "Gather"]
    assert table is not codes, "ONNX Runtime makes MatMulNBits of codes that nothing else reads"
    assert (table.const_value.tobytes() == codes.const_value.tobytes()) == (bits == 8)


def test_standard_siblings_are_packed():
    family = Family(layer(0, 16), layer(1, 32, bias=True), layer(2, 8))
    assert len(same(family, torch.randn(1, 3, 96))) == 1
