"""Kernels of our own in native code compute what the operators mean, for any input, by any number of threads, on every
level of instructions.

One library holds every case, since each takes a compiler's time.
"""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import NamedTuple

import native_code
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from precast.exporter import ExportOptions, export
from precast.exporter.backends.aoti import compiler, isa, kernel_template, library
from precast.exporter.backends.aoti.attention import attention, decode_attention, prefill_attention
from precast.exporter.backends.aoti.dequantize import dequantize
from precast.exporter.backends.aoti.gemv import gemv
from precast.exporter.backends.aoti.int8_gemm import int8_gemm, pack_panels
from precast.exporter.backends.aoti.lora import lora
from precast.exporter.backends.aoti.quantized_gemm import quantized_gemm
from precast.exporter.backends.aten import lowering
from precast.exporter.backends.aten.attention import AttentionContext, cached_attention
from precast.exporter.backends.aten.kernel_set import Kernels
from precast.exporter.operators.lora import add_adapters
from precast.exporter.quantize.linear import Packed
from precast.exporter.quantize.linear import dequantize as dequantized
from precast.exporter.quantize.methods import Scheme, round_to_nearest

MATRICES = (torch.bfloat16, torch.float32)
OUTPUTS = (7, 1)
"""Of two layers side by side: fewer than threads, and none that divides evenly."""


class Case(NamedTuple):
    """Two layers with K columns, on a grid or as numbers, with one input or one each, and how many rows."""

    grid: Scheme | torch.dtype
    columns: int
    rows: int
    shares: bool

    @property
    def layers(self) -> list[Tensor | Packed]:
        torch.manual_seed(self.columns)
        weights = [torch.randn(outputs, self.columns) for outputs in OUTPUTS]
        if isinstance(self.grid, torch.dtype):
            return [weight.to(self.grid) for weight in weights]
        return [Packed(round_to_nearest(weight, self.grid)) for weight in weights]


GRIDS = [
    *(Case(dtype, columns, 2, True) for dtype in (torch.float32, torch.bfloat16, torch.float16) for columns in (5, 83)),
    *(Case(Scheme(bits, columns, zero), columns, 1, True)
      for bits, columns, zero in product((4, 8), (6, 64, 200), ("symmetric", "integer"))),
    *(Case(Scheme(bits, group, zero), 3 * group, 3, False)
      for bits, group, zero in product((4, 8), (16, 32, 64, 128), ("symmetric", "integer"))),
    Case(Scheme(8, 16, "integer"), 21 * 16, 11, False),
    Case(Scheme(4, 48, "integer"), 96, 1, True),
]  # fmt: skip
FEWER_GRIDS = [*GRIDS[::3], GRIDS[5]]
"""Of the fast lane: every kind of number, each with another kind of zeros, columns and rows."""


class Products(nn.Module):
    """Every case's products, then every grid's first layer as matrices, then many rows times those that have a kernel.
    Weights are inputs: then there is one library and nothing beside it."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.cases = cases

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        taken, found, widened, multiplied = iter(given), [], [], []
        for case in self.cases:
            xs, weights, scales, zeros = ([next(taken) for _ in range(count)] for count in counts(case))
            found.append(gemv(xs[:2], weights, scales, zeros, bits(case)))
            if bits(case):
                parts = weights[0], scales[0], zeros[0] if zeros else None, bits(case)
                widened += [dequantize(*parts, dtype) for dtype in MATRICES]
                multiplied.append(quantized_gemm(xs[2], *parts))
        return *found, *widened, *multiplied


def bits(case):
    return case.grid.bits if isinstance(case.grid, Scheme) else 0


def counts(case):
    """How many inputs (many rows for GEMM are the third), weights, scales and zeros a case takes."""
    is_grid, has_zeros = bits(case) > 0, bits(case) > 0 and case.grid.zero_point == "integer"
    return 2 + is_grid, 2, 2 * is_grid, 2 * has_zeros


def parts(case):
    """Weights, scales and zeros, as the operator takes them."""
    if not bits(case):
        return case.layers
    zeros = [points(layer) for layer in case.layers] if case.grid.zero_point == "integer" else []
    return [*(layer.codes for layer in case.layers), *(layer.scales for layer in case.layers), *zeros]


def points(layer):
    """All in the middle, where by chance they are."""
    bytes_ = -(-layer.scales.shape[1] * layer.bits // 8)
    middle = 128 if layer.bits == 8 else 0x88
    return torch.full((len(layer.codes), bytes_), middle, dtype=torch.uint8) if layer.zeros is None else layer.zeros


def matrices(case):
    """What the weights mean, float64 [N, K]."""
    if not bits(case):
        return [layer.double() for layer in case.layers]
    return [dequantized(layer.codes, layer.scales, layer.zeros, layer.bits).double() for layer in case.layers]


def inputs_of(case, seed, size):
    torch.manual_seed(seed)
    first = torch.randn(case.rows, case.columns) * size
    second = first if case.shares else torch.randn(case.rows, case.columns)
    return [first, second, *([torch.randn(many(case), case.columns) * size] if bits(case) else [])]


def many(case):
    """A number of rows: few, which are multiplied as a step's, or more, of all remainders, and once more than a task
    takes."""
    if case.shares:
        return 3 + case.columns % 14
    return 300 if case.rows == 11 else 17 + case.columns % 7


@pytest.fixture(scope="module", autouse=True)
def shared_out(tmp_path_factory):
    """However little there is to do, all threads do it."""
    folder = tmp_path_factory.mktemp("cpp")
    for source in kernel_template._SOURCES.iterdir():
        text = source.read_text()
        (folder / source.name).write_text(text.replace("MIN_PARALLEL_MACS = 1 << 15", "MIN_PARALLEL_MACS = 0"))
    assert "MIN_PARALLEL_MACS = 0" in (folder / "simd.h").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_template, "_SOURCES", folder)
        yield


LEVELS = ("native", "avx2", "avx512")


def levels(fewer, all_):
    """Parameters of a fixture: fewer cases on this machine's level, all of them on every level in the slow lane."""
    rare = [pytest.param((each, all_), marks=pytest.mark.slow) for each in LEVELS]
    return {"params": [("native", fewer), *rare], "ids": lambda given: f"{given[0]}-{len(given[1])}"}


@pytest.fixture(scope="module", **levels(FEWER_GRIDS, GRIDS))
def rows(request, tmp_path_factory):
    """The cases, and a function of their inputs."""
    level, cases = request.param
    arguments = tuple(each for case in cases for each in [*inputs_of(case, 0, 1), *parts(case)])
    run = native_code.compiled(Products(cases), arguments, tmp_path_factory.mktemp("rows"), level)
    fixed = {index: parts(case) for index, case in enumerate(cases)}

    def found(xs):
        return run(*(each for index, given in enumerate(xs) for each in [*given, *fixed[index]]))

    return cases, found


def rounding(case, xs):
    """What it may add up to that an input of a product with codes is rounded to 16 bits, by half of 2^-15 of the
    largest in its block (of its row, here), with a little to spare: each weight may have it."""
    each = zip(xs, matrices(case), strict=False)
    return torch.cat([(x.double().abs().amax(1, keepdim=True) * w.abs().sum(1) / 65000).flatten() for x, w in each])


some = settings(max_examples=15, deadline=None)
sizes = st.sampled_from([0.0, 1e-38, 1e-12, 1.0, 1e20])


@some
@given(seed=st.integers(0, 2**16), size=sizes, threads=st.integers(1, 5))
def test_products_are_those_of_the_matrices(rows, seed, size, threads):
    cases, xs, results = computed(rows, seed, size, threads)
    for case, given_, result in zip(cases, xs, results[: len(cases)], strict=True):
        check_products(case, given_[:2], result)


def computed(rows, seed, size, threads):
    """The cases, inputs of such a size, and what the kernels make of them."""
    cases, answer = rows
    xs = [inputs_of(case, seed, size) for case in cases]
    with native_code.threads_set_to(threads):
        return cases, xs, answer(xs)


def check_products(case, xs, result):
    """One product after the other, of as many weights as there are xs."""
    pairs = list(zip(xs, matrices(case), strict=False))
    expected = torch.cat([(x.double() @ w.T).flatten() for x, w in pairs])
    # Of the products' own size, since they may cancel out.
    least = torch.cat([(x.double().abs() @ w.abs().T).flatten() for x, w in pairs])
    allowed = 2e-6 * least + (rounding(case, xs) if bits(case) else 0)
    wrong = (result.double().flatten() - expected).abs() > allowed + 1e-30
    assert not wrong.any(), case


@some
@given(seed=st.integers(0, 2**16), size=sizes, threads=st.integers(1, 5))
def test_many_rows_are_multiplied_as_few_are(rows, seed, size, threads):
    cases, xs, results = computed(rows, seed, size, threads)
    grids = [(case, given_) for case, given_ in zip(cases, xs, strict=True) if bits(case)]
    for (case, given_), result in zip(grids, results[-len(grids) :], strict=True):
        assert result.shape == (many(case), OUTPUTS[0])
        check_products(case, given_[2:], result)


def test_no_kernel_takes_groups_that_are_no_whole_words():
    codes, scales = torch.zeros(7, 3, 6, dtype=torch.uint8), torch.ones(7, 3)
    assert quantized_gemm(torch.ones(9, 18), codes, scales, None, 8) is None


ODD = torch.tensor([float("nan"), float("inf"), -float("inf")])


def test_what_is_no_number_is_not_lost(rows):
    cases, answer = rows
    for odd in ODD:
        xs = [inputs_of(case, 1, 1) for case in cases]
        for given_ in xs:
            given_[0][0, 3] = odd
        for case, result in zip(cases, answer(xs)[: len(cases)], strict=True):
            assert not result[: OUTPUTS[0]].isfinite().any(), (case, odd)
            assert case.rows == 1 or result[OUTPUTS[0] : OUTPUTS[0] * case.rows].isfinite().all(), (case, odd)


def test_what_is_no_number_is_not_lost_among_many_rows(rows):
    cases, answer = rows
    xs = [inputs_of(case, 1, 1) for case in cases]
    for number, given_ in enumerate(xs):
        given_[2:] = [each.index_put((torch.tensor(2), torch.tensor(3)), ODD[number % 3]) for each in given_[2:]]
    grids = [case for case in cases if bits(case)]
    for case, result in zip(grids, answer(xs)[-len(grids) :], strict=True):
        assert not result[2].isfinite().any(), case
        assert result[:2].isfinite().all(), case
        assert result[3:].isfinite().all(), case


def test_a_matrix_of_codes_is_what_they_mean(rows):
    cases, answer = rows
    found = answer([inputs_of(case, 0, 1) for case in cases])[len(cases) :]
    grids = [case for case in cases if bits(case)]
    for (case, dtype), result in zip(product(grids, MATRICES), found[: -len(grids)], strict=True):
        assert torch.equal(result, matrices(case)[0].to(dtype)), (case, dtype)


# ---------------------------------------------------------------- adapters


class Adapters(NamedTuple):
    """Layers with adapters: rows, tokens, widths in and out, rank."""

    batch: int
    length: int
    columns: int
    outputs: int
    rank: int


ADAPTERS = [Adapters(3, 1, 83, 301, 5), Adapters(2, 21, 64, 40, 4), Adapters(1, 8, 5, 3, 1)]
"""One token, and more outputs than a thread takes at a time; more tokens than share weights; fewer than a vector."""


class Adapted(nn.Module):
    """Every case's sums."""

    def forward(self, slots: list[Tensor], *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(lora(*given[3 * i : 3 * i + 3], own) for i, own in enumerate(slots))


def adapted_inputs(seed):
    torch.manual_seed(seed)
    slots, found = [], []
    for case in ADAPTERS:
        slots.append(torch.randint(0, 3, (case.batch,)))
        found += [torch.randn(case.batch, case.length, width) for width in (case.outputs, case.columns)]
        weights = torch.randn(3, case.rank, case.columns + case.outputs)
        weights[0] = 0
        found.append(weights)
    return slots, found


@pytest.fixture(
    scope="module", params=[LEVELS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in LEVELS[1:])]
)
def adapted(request, tmp_path_factory):
    slots, given_ = adapted_inputs(0)
    return native_code.compiled(Adapted(), (slots, *given_), tmp_path_factory.mktemp("adapters"), request.param)


@some
@given(seed=st.integers(0, 2**16), threads=st.integers(1, 5))
def test_adapters_are_those_of_each_rows_slot(adapted, seed, threads):
    slots, given_ = adapted_inputs(seed)
    with native_code.threads_set_to(threads):
        results = adapted(*slots, *given_)
    for index, (own, result) in enumerate(zip(slots, results, strict=True)):
        y, x, weights = given_[3 * index : 3 * index + 3]
        expected = add_adapters(y.double(), x.double(), weights.double(), own)
        assert torch.allclose(result.double(), expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(result[own == 0], y[own == 0])


# ---------------------------------------------------------------- attention


class Asked(NamedTuple):
    """The shape of one attention: query heads, key heads, widths of keys and values, the caches' dtype, and more."""

    heads: int
    shared: int
    key: int
    value: int
    dtype: torch.dtype
    sinks: bool = False
    softcap: float = 0.0
    mask: str = "causal"
    slopes: bool = False


BATCH, CAPACITY, WINDOW = 3, 90, 20
ASKED = [
    Asked(6, 2, 16, 16, torch.float32),
    Asked(3, 1, 24, 7, torch.float32, sinks=True),
    Asked(2, 2, 64, 64, torch.bfloat16, softcap=4.0),
    Asked(4, 1, 20, 20, torch.float16, mask="window"),
    Asked(4, 2, 16, 16, torch.int8, mask="chunk", sinks=True),
    Asked(4, 4, 8, 8, torch.float32, slopes=True),
]
FEWER = ASKED[::2]
"""Of the fast lane, as each takes seconds to compile: grouped heads; narrow caches, soft caps; int8, chunks, sinks."""


class Attentions(nn.Module):
    """Every case by operators, or by kernels: once for each dtype of a prompt's products."""

    def __init__(self, asked: list[Asked], *products: torch.dtype) -> None:
        super().__init__()
        self.asked = asked
        kernels = Kernels(
            gemv,
            quantized_gemm,
            pack_panels,
            int8_gemm,
            dequantize,
            decode_attention,
            prefill_attention,
            attention,
            lora,
        )
        self.kinds = [{"kernels": kernels, "matmul_dtype": product} for product in products] or [{}]

    def forward(self, looked: Tensor, past: Tensor, new: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(each for kind in self.kinds for each in self.found(kind, looked, past, new, *given))

    def found(self, kind: dict, looked: Tensor, past: Tensor, new: Tensor, *given: Tensor) -> list[Tensor]:
        step, taken = AttentionContext(looked, lambda x: x, **kind), iter(given)
        found = []
        for asked in self.asked:
            q, k, v, keys, values = (next(taken) for _ in range(5))
            sinks = next(taken) if asked.sinks else None
            slopes = next(taken) if asked.slopes else None
            scales = [next(taken), next(taken)] if asked.dtype == torch.int8 else [None, None]
            found.append(
                cached_attention(step, q, k, v, keys, values, past, new, 0.3, asked.mask, WINDOW, asked.softcap, sinks,
                                 slopes, *scales)
            )  # fmt: skip
        return found


def tensors(cases, seed, length):
    torch.manual_seed(seed)
    found = []
    for asked in cases:
        found += [
            torch.randn(BATCH, asked.heads, length, asked.key),
            torch.randn(BATCH, asked.shared, length, asked.key),
        ]
        found += [torch.randn(BATCH, asked.shared, length, asked.value)]
        for width in (asked.key, asked.value):
            held = torch.randn(BATCH, asked.shared, CAPACITY + 1, width) * (30 if asked.dtype == torch.int8 else 1)
            found.append(held.to(asked.dtype))
        found += [torch.randn(asked.heads)] * asked.sinks + [torch.rand(asked.heads)] * asked.slopes
        if asked.dtype == torch.int8:
            found += [torch.rand(asked.shared, asked.key) / 30, torch.rand(asked.shared, asked.value) / 30]
    return found


def attentions(folder, isa, cases, length, *products):
    """Attention of so many tokens, or of any number."""
    rows_, tokens = torch.export.Dim("rows", min=2, max=CAPACITY), torch.export.Dim("tokens", min=2, max=CAPACITY)
    example = (
        torch.arange(50),
        *(torch.ones(BATCH, dtype=torch.int32) for _ in range(2)),
        *tensors(cases, 0, length or 9),
    )
    # Queries, keys and values come as [B, heads, tokens, width]; caches are longer than any of them.
    free = [{2: tokens} if length is None and each.ndim == 4 and each.shape[2] == 9 else None for each in example[3:]]
    return native_code.compiled(
        Attentions(cases, *products), example, folder, isa, ({0: rows_}, None, None, tuple(free))
    )


@pytest.fixture(scope="module", **levels(FEWER, ASKED))
def attending(request, tmp_path_factory):
    """The cases, and their attention of one token, and of any number with products in float32 and in bfloat16."""
    level, cases = request.param
    products = [(1, torch.float32), (None, torch.float32, torch.bfloat16)]
    return cases, [attentions(tmp_path_factory.mktemp("attend"), level, cases, *each) for each in products]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    length=st.sampled_from([1, 2, 7, 30, 61]),
    more=st.integers(0, CAPACITY),
    threads=st.integers(1, 5),
    data=st.data(),
)
def test_attention_by_the_kernel_is_attention_by_operators(attending, seed, length, more, threads, data):
    past = data.draw(st.lists(st.integers(0, CAPACITY - length), min_size=BATCH, max_size=BATCH))
    new = data.draw(st.lists(st.integers(1, length), min_size=BATCH, max_size=BATCH))
    looked = min(max(2, *(each + length for each in past)) + more, CAPACITY)
    common = (torch.arange(looked), torch.tensor(past, dtype=torch.int32), torch.tensor(new, dtype=torch.int32))
    cases, libraries = attending
    expected = Attentions(cases)(*common, *tensors(cases, seed, length))
    with native_code.threads_set_to(threads):
        found = libraries[length > 1](*common, *tensors(cases, seed, length))
    for start, bound in zip(range(0, len(found), len(cases)), (3e-5, 0.02), strict=False):
        for asked, one, other in zip(cases, found[start : start + len(cases)], expected, strict=True):
            for row, count in enumerate(new):
                assert torch.allclose(one[row, :, :count], other[row, :, :count], atol=bound), (asked, row, bound)


# ---------------------------------------------------------------- where they are used


@pytest.mark.parametrize(
    ("method", "level", "products"),
    [
        pytest.param("rtn", "native", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("awq", "native", torch.bfloat16, marks=pytest.mark.slow),
        ("rtn", "avx2", torch.float32),
    ],
)
def test_layers_of_one_input_are_one_call(checkpoint, tmp_path, monkeypatch, method, level, products):
    """Query, key and value; output; gate and up; down; and the output embedding: also where each has a balance of its
    own for their common input."""
    built, multiplied = {}, set()

    def build(exported, target, *_):
        nodes = list(exported.graph.nodes)
        built[target.stem] = Counter(str(node.target) for node in nodes)
        multiplied.update(node.args[-1] for node in nodes if node.target is torch.ops.precast.prefill_attention.default)
        target.write_bytes(b"\x7fELF")

    monkeypatch.setattr(compiler, "build_library", build)
    monkeypatch.setattr(isa, "cpu_flags", lambda: frozenset({*isa._V4, "avx512_bf16"}))
    model = checkpoint("llama", num_hidden_layers=2)
    rounded = {"quantize": "int8", "quantize_method": method}
    asked = ExportOptions(backend="aoti", isa=level, sequence_length=(32,), validate=False, **rounded)
    made = export(str(model), tmp_path / "out", asked)
    assert built["decode"]["precast.gemv.default"] == 2 * 4 + 1
    assert built["decode"]["precast.decode_attention.default"] == 2
    assert built["prefill"]["precast.gemv.default"] == 1, "of a prompt, rows whose logits are asked for"
    assert built["prefill"]["precast.prefill_attention.default"] == 2
    assert multiplied == {products}, "as the codes of a prompt's layers"
    assert made.contract.variants[0].compiler.options["products"].endswith(str(products).removeprefix("torch."))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_has_no_more_digits_than_the_layers_around_it(dtype, monkeypatch):
    monkeypatch.setattr(isa, "cpu_flags", lambda: frozenset({*isa._V4, "avx512_bf16"}))
    layer = torch.export.export(nn.Linear(8, 8, dtype=dtype), (torch.ones(3, 8, dtype=dtype),))
    expected = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert lowering._attention_matmul_dtype(layer.graph, library.lowering_options_for("cpu", "native")) == expected
    assert (
        lowering._attention_matmul_dtype(layer.graph, library.lowering_options_for("cpu", "avx2")) == torch.float32
    ), "as far as it multiplies"
