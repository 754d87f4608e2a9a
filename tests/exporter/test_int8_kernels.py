"""Products of 8 bits: what weights and activations are rounded to, and kernels that compute what the operator means, on
every level of instructions, for odd shapes, by any number of threads."""

from __future__ import annotations

from typing import NamedTuple

import native_code
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from precast.exporter.backends.aoti import kernel_template
from precast.exporter.backends.aoti.int8_gemm import int8_gemm, pack_panels
from precast.exporter.backends.onnx.lowering import lower
from precast.exporter.kinds.trace import Program
from precast.exporter.quantize.activations import choose_range
from precast.exporter.quantize.int8_linear import ActivationRange, Int8Linear, Int8Weight, multiply_int8
from precast.runtime.artifact.schema import Graph, Input, Output


class Case(NamedTuple):
    """A product's shape, and what it has."""

    rows: int
    columns: int
    outputs: int
    bias: bool
    balance: bool
    static: bool

    @property
    def weight(self) -> Int8Weight:
        torch.manual_seed(self.columns)
        return Int8Weight.round(torch.randn(self.outputs, self.columns))

    @property
    def parts(self) -> list[Tensor | None]:
        """Scales, bias, balance, and the scale and zero point of activations."""
        scales = self.weight.scales
        return [
            scales,
            torch.linspace(-1, 1, self.outputs) if self.bias else None,
            torch.linspace(0.5, 2, self.columns) if self.balance else None,
            torch.tensor([0.03]) if self.static else None,
            torch.tensor([101], dtype=torch.uint8) if self.static else None,
        ]

    def inputs(self, seed: int, size: float) -> Tensor:
        """Numbers that are not half-way between two codes, many of them beyond the range of a static scale."""
        random = torch.Generator().manual_seed(seed)
        codes = torch.randint(-126, 127, (self.rows, self.columns), generator=random).float()
        codes[:, 0] = 127
        between = 0.8 * torch.rand(codes.shape, generator=random) - 0.4
        between[:, 0] = 0
        x = (3 * codes + between) * 0.03 if self.static else (codes + between) * size
        return x if self.parts[2] is None else x / self.parts[2]


CASES = [
    Case(1, 5, 3, True, False, True),
    Case(1, 64, 130, False, True, False),
    Case(7, 83, 65, True, True, True),
    Case(13, 64, 200, False, False, False),
    Case(300, 42, 9, True, True, False),
    Case(300, 40, 70, False, False, True),
    Case(2, 4, 64, True, False, False),
]


class Products(nn.Module):
    """Every case's product; weights are inputs, so that there is one library and nothing beside it."""

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        taken, found = iter(given), []
        for case in CASES:
            x, panels = next(taken), next(taken)
            parts = [None if part is None else next(taken) for part in case.parts]
            found.append(int8_gemm(x, panels, *parts))
        return tuple(found)


@pytest.fixture(
    scope="module",
    params=["native", *(pytest.param(level, marks=pytest.mark.slow) for level in ("avx2", "avx512"))],
)
def products(request, tmp_path_factory):
    """A function of the cases' inputs; however little there is to do, all threads do it."""
    sources, folder = kernel_template._SOURCES, tmp_path_factory.mktemp("cpp")
    for source in sources.iterdir():
        text = source.read_text()
        (folder / source.name).write_text(text.replace("MIN_PARALLEL_MACS = 1 << 15", "MIN_PARALLEL_MACS = 0"))
    fixed = [[pack_panels(case.weight.codes), *(p for p in case.parts if p is not None)] for case in CASES]

    def spread(xs):
        return tuple(each for x, held in zip(xs, fixed, strict=True) for each in [x, *held])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_template, "_SOURCES", folder)
        example = spread([case.inputs(0, 1.0) for case in CASES])
        run = native_code.compiled(Products(), example, tmp_path_factory.mktemp("products"), request.param)
    return lambda xs: run(*spread(xs))


def expected(case: Case, x: Tensor) -> Tensor:
    return multiply_int8(x, case.weight.codes, *case.parts)


def check(case: Case, x: Tensor, found: Tensor) -> None:
    right = expected(case, x)
    # Of the products' own size, since they may cancel out.
    allowed = 1e-5 * (x.abs() @ case.weight.dequantize().abs().T * 2 + 1)
    assert bool(((found - right).abs() <= allowed).all()), case


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), size=st.sampled_from([0.0, 1e-12, 1.0, 1e20]), threads=st.integers(1, 5))
def test_kernels_compute_the_operator(products, seed, size, threads):
    xs = [case.inputs(seed, size) for case in CASES]
    with native_code.threads_set_to(threads):
        found = products(xs)
    for case, x, result in zip(CASES, xs, found, strict=True):
        check(case, x, result)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_not_lost(products, odd):
    xs = [case.inputs(1, 1.0) for case in CASES]
    for x in xs:
        x[0, -1] = odd
    for case, result in zip(CASES, products(xs), strict=True):
        assert not result[0].isfinite().any(), case
        assert result[1:].isfinite().all(), case


# ---------------------------------------------------------------- codes


weights = st.builds(
    lambda seed, outputs, columns, spread: (
        torch.randn(outputs, columns, generator=torch.Generator().manual_seed(seed)).sign().mul(spread)
        + torch.randn(outputs, columns, generator=torch.Generator().manual_seed(seed + 1))
    ),
    st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 40), st.sampled_from([0.0, 1.0, 100.0]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(weight=weights)
def test_pairs_of_codes_are_multiplied_without_saturation(weight):
    """CPUs that add the products of two neighbours in 16 bits, 255 times a code each, hold every such sum."""
    codes, scales = Int8Weight.round(weight)
    pairs = nn.functional.pad(codes.T.int(), (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
    for sign in (1, -1):
        assert int((pairs * sign).clamp(min=0).sum(-1).max()) * 255 < 2**15
    error = (Int8Weight(codes, scales).dequantize() - weight).abs()
    assert bool((error <= 0.5001 * scales[:, None]).all())


def test_a_row_of_zeros_has_a_scale():
    weight = Int8Weight.round(torch.zeros(3, 5))
    assert not weight.codes.any()
    assert weight.scales.isfinite().all()


def test_panels_hold_codes_and_their_sums():
    codes = Case(1, 83, 65, False, False, False).weight.codes
    panels = pack_panels(codes)
    assert panels.shape == (2, 22, 64, 4)
    laid = panels[:, :-1].permute(1, 3, 0, 2).reshape(84, 128)
    assert torch.equal(laid[:83, :65], codes)
    assert not laid[83:].any()
    sums = panels[:, -1].reshape(-1).view(torch.int32)
    assert torch.equal(sums[:65].long(), codes.sum(0))


# ---------------------------------------------------------------- ranges


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    other=st.floats(-1e6, 1e6, width=32),
)
def test_zero_is_exact_and_values_beyond_the_range_become_its_ends(values, other):
    found = choose_range(torch.tensor([values]))
    layer = Int8Linear(Int8Weight(torch.ones(1, 1, dtype=torch.int8), torch.ones(1)), None, None, found)
    low, high = (found.scale * (end - found.zero.float()) for end in (0, 255))
    assert float(layer(torch.zeros(1, 1))) == 0
    result = float(layer(torch.full((1, 1), other)))
    bounded = min(max(other, float(low)), float(high))
    assert abs(result - bounded) <= 0.51 * float(found.scale) + 1e-6 * abs(bounded)


def test_nothing_but_zeros_has_a_range():
    found = choose_range(torch.zeros(4, 8))
    assert isinstance(found, ActivationRange)
    layer = Int8Linear(Int8Weight.round(torch.eye(8)), None, None, found)
    assert torch.equal(layer(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_rare_outliers_are_cut_off():
    """One number in many thousands does not take the steps from all others."""
    torch.manual_seed(0)
    sample = torch.randn(256, 2048)
    sample[3, 5] = 12.0
    assert float(choose_range(sample).scale) < 0.9 * float(sample.max() - sample.min()) / 255


# ---------------------------------------------------------------- ONNX Runtime


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("balanced", [True, False])
def test_onnx_runtime_computes_the_operator(static, balanced):
    case = Case(7, 83, 65, balanced, balanced, static)
    scales, bias, balance, x_scale, x_zero = case.parts
    layer = Int8Linear(case.weight, bias, balance, ActivationRange(x_scale, x_zero) if static else None)
    assert torch.equal(layer.scales, scales)
    for seed, size in ((0, 1.0), (1, 0.0), (2, 1e3)):
        x = case.inputs(seed, size)[None]
        check(case, x[0], torch.from_numpy(run_in_onnx_runtime(layer, x))[0])


def run_in_onnx_runtime(layer: nn.Module, x: Tensor) -> np.ndarray:
    graph = Graph(
        name="layer", role="encode", file="layer.onnx", batch=1, length=1, capacity=1, cache=[],
        inputs=[Input(name="x", dtype="float32", shape=list(x.shape), pad=0)],
        outputs=[Output(name="y", dtype="float32", shape=[1], slice=[None])],
    )  # fmt: skip
    model = lower(Program(graph, torch.export.export(layer, (x,), strict=False)))
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in model.graph) == 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]
