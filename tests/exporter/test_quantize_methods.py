"""What rounding may cost: bounds that hold for any weights, and that better methods are better."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.exporter.options import QUANTIZE_METHODS
from precast.exporter.quantize import Recipe, quantize
from precast.exporter.quantize.calibration import Calibration, _Moments, _raise_diagonal
from precast.exporter.quantize.linear import Packed, QuantizedEmbedding, QuantizedLinear
from precast.exporter.quantize.methods import METHODS, Scheme, awq, get_method, gptq, round_to_nearest, search
from precast.exporter.quantize.scheme import QuantizedWeight, split_groups
from precast.runtime.errors import UsageError

some = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31)
schemes = st.builds(
    Scheme,
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([16, 32]),
    zero_point=st.sampled_from(["symmetric", "integer", "float"]),
)
# Everything that a weight can be: huge, tiny, subnormal, zero, of either sign.
anything = st.one_of(
    st.just(0.0),
    st.floats(-1, 1, width=32),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.sampled_from([1e-45, -1e-38, 1e-20, 1e30, -1e30]),
)


def random_weight(seed: int, rows: int = 5, columns: int = 80) -> torch.Tensor:
    """Weights with a few outliers, in a row that is no multiple of 32."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random)
    return weight * torch.randn(rows, columns, generator=random).abs()


def inputs(seed: int, columns: int = 80, tokens: int = 400) -> torch.Tensor:
    """Correlated, as a layer's inputs are: a few directions carry most."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, columns, generator=random)
    noise = torch.randn(tokens, columns, generator=random)
    return torch.randn(tokens, 8, generator=random) @ mixing + 0.1 * noise


def hessian(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


# ---------------------------------------------------------------- any weights


@some
@given(values=st.lists(anything, min_size=1, max_size=70), scheme=schemes, name=st.sampled_from(list(METHODS)))
def test_any_finite_weights_give_finite_weights_in_range(values, scheme, name):
    weight = torch.tensor([values, values[::-1]])
    grid = get_method(name).quantize(weight, scheme, torch.eye(len(values)) if METHODS[name].is_calibrated else None)
    assert grid.dequantize().shape == weight.shape
    assert grid.dequantize().isfinite().all()
    assert (grid.bits, grid.group) == (scheme.bits, scheme.group)
    assert grid.scales.isfinite().all()
    assert grid.codes.shape[:2] == grid.scales.shape == grid.zeros.shape
    assert max(int(grid.codes.max()), int(grid.zeros.max())) < 2**scheme.bits
    assert (grid.offsets is None) == (scheme.zero_point != "float")
    assert scheme.zero_point != "symmetric" or grid.is_symmetric
    # Never worse than a group of zeros by much: no weight leaves its group's range by more than that range.
    largest = split_groups(weight, scheme.group).abs().amax(-1, keepdim=True)
    error = (split_groups(grid.dequantize(), scheme.group) - split_groups(weight, scheme.group)).abs()
    assert (error <= largest + 1e-44).all()


@some
@given(seed=seeds, scheme=schemes)
def test_round_to_nearest_is_off_by_half_a_step(seed, scheme):
    """Half a step; at the end of a symmetric grid that lacks a code, and where a zero point is rounded, one."""
    weight = random_weight(seed)
    grid = round_to_nearest(weight, scheme)
    error = (split_groups(grid.dequantize(), scheme.group) - split_groups(weight, scheme.group)).abs()
    step = grid.scales.abs()[..., None]
    inside = (grid.codes > 0) & (grid.codes < 2**scheme.bits - 1)
    bound = torch.where(inside | torch.tensor(scheme.zero_point == "float"), 0.5, 1.0)
    assert (error <= bound * step * (1 + 1e-4)).all()


@pytest.mark.parametrize("zero", ["symmetric", "integer", "float"])
@pytest.mark.parametrize("name", METHODS)
def test_zero_stays_zero_where_it_is_a_code(name, zero):
    """Pruned weights stay pruned unless the zero is free; a row of zeros always."""
    weight = random_weight(0, columns=64)
    weight[:, ::3] = 0
    weight[0] = 0
    found = get_method(name).quantize(weight, Scheme(4, 32, zero), None).dequantize()
    assert (found[0] == 0).all()
    if zero != "float":
        assert (found[:, ::3] == 0).all()


# ---------------------------------------------------------------- better methods


@some
@given(seed=seeds, scheme=schemes)
def test_search_loses_no_more_than_round_to_nearest(seed, scheme):
    """By the measure that it minimizes, group by group."""
    weight = random_weight(seed)
    groups = split_groups(weight, scheme.group)
    importance = groups.abs() + groups.square().mean(-1, keepdim=True).sqrt()

    def loss(grid):
        return (importance * (split_groups(grid.dequantize(), scheme.group) - groups).square())[:, :-1].sum(-1)

    assert (loss(search(weight, scheme)) <= loss(round_to_nearest(weight, scheme)) * (1 + 1e-4) + 1e-12).all()


def test_search_is_clearly_better_at_4_bits():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for zero, share in (("symmetric", 0.92), ("integer", 0.95), ("float", 0.95)):
        scheme = Scheme(4, 32, zero)
        errors = [
            (method(weight, scheme).dequantize() - weight).square().sum() for method in (round_to_nearest, search)
        ]
        assert errors[1] < share * errors[0], zero


@settings(max_examples=15, deadline=None)
@given(seed=seeds, zero=st.sampled_from(["symmetric", "integer", "float"]))
def test_gptq_loses_less_at_the_outputs(seed, zero):
    """x (w - ŵ)ᵀ for the inputs that it learned from: at most 0.9 of what search loses, typically half."""
    weight, x, scheme = random_weight(seed, rows=24), inputs(seed + 1), Scheme(4, 32, zero)
    losses = [
        (x @ (weight - grid.dequantize()).T).square().mean()
        for grid in (gptq(weight, scheme, hessian(x)), search(weight, scheme))
    ]
    assert losses[0] < 0.9 * losses[1]


@some
@given(seed=seeds, scheme=schemes)
def test_gptq_of_a_layer_that_no_token_reached_is_search(seed, scheme):
    weight = random_weight(seed)
    expected = search(weight, scheme).dequantize()
    for nothing in (None, torch.zeros(weight.shape[1], weight.shape[1])):
        assert torch.equal(gptq(weight, scheme, nothing).dequantize(), expected)


@some
@given(seed=seeds, scheme=schemes)
def test_gptq_of_uncorrelated_inputs_loses_what_search_does(seed, scheme):
    """Nothing to make up for: the squared error is what is left to minimize."""
    weight = random_weight(seed, rows=24)
    grids = gptq(weight, scheme, torch.eye(weight.shape[1])), search(weight, scheme)
    mine, plain = ((each.dequantize() - weight).square().sum() for each in grids)
    assert mine <= 1.05 * plain


def plain_gptq(weight: torch.Tensor, scheme: Scheme, hessian: torch.Tensor) -> torch.Tensor:
    """As published: columns in their own order, and ranges searched as if all columns were alike."""
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True).float()
    work, found = weight.clone(), torch.zeros_like(weight)
    for start in range(0, weight.shape[1], scheme.group):
        columns = range(start, min(start + scheme.group, weight.shape[1]))
        grid = search(work[:, columns], scheme)
        for index in columns:
            error = (work[:, index, None] - grid_values(grid)).abs().argmin(1)
            found[:, index] = grid_values(grid).gather(1, error[:, None])[:, 0]
            left = (work[:, index] - found[:, index]) / factor[index, index]
            work[:, index + 1 :] -= left[:, None] * factor[index, index + 1 :]
    return found


def grid_values(grid: QuantizedWeight) -> torch.Tensor:
    """What the codes of a row's only group stand for, [N, 2**bits]."""
    values = (torch.arange(2**grid.bits) - grid.zeros.float()) * grid.scales
    return values if grid.offsets is None else values + grid.offsets


@settings(max_examples=15, deadline=None)
@given(seed=seeds, zero=st.sampled_from(["symmetric", "integer", "float"]))
def test_gptq_loses_less_than_as_published(seed, zero):
    """For its order and its ranges; inputs differ in size, as they do."""
    weight, scheme = random_weight(seed, rows=48, columns=96), Scheme(4, 32, zero)
    x = inputs(seed + 1, columns=96) * torch.logspace(-1, 0.5, 96)
    found = gptq(weight, scheme, hessian(x)).dequantize(), plain_gptq(weight, scheme, hessian(x))
    mine, published = ((x @ (weight - each).T).square().mean() for each in found)
    assert mine < published


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_a_short_text_is_trusted_less(seed):
    """Fewer tokens than columns: what they say of each other is partly chance, and other text says something else."""
    weight, scheme, random = random_weight(seed, rows=48), Scheme(4, 32, "integer"), torch.Generator().manual_seed(seed)
    x = torch.randn(460, 80, generator=random) @ torch.randn(80, 80, generator=random)
    read, other = x.split([60, 400])
    raised = _raise_diagonal(_Moments(read.T @ read, len(read)))
    found = (gptq(weight, scheme, each).dequantize() for each in (raised, hessian(read)))
    mine, trusting = ((other @ (weight - each).T).square().mean() for each in found)
    assert mine < trusting


@pytest.mark.parametrize("dead", [slice(0, 1), slice(10, 50), slice(0, 80)])
def test_gptq_of_inputs_that_are_never_used(dead):
    """Columns whose inputs are always 0 neither fail nor spoil the others."""
    weight, x = random_weight(3, rows=24), inputs(4)
    x[:, dead] = 0
    scheme = Scheme(4, 32, "float")
    grid = gptq(weight, scheme, hessian(x))
    assert grid.dequantize().isfinite().all()
    loss, other = ((x @ (weight - each.dequantize()).T).square().mean() for each in (grid, search(weight, scheme)))
    assert loss <= other


def test_gptq_of_a_single_token():
    """A Hessian of rank 1 can be inverted only because it is damped."""
    weight, x = random_weight(5), inputs(6, tokens=1)
    assert gptq(weight, Scheme(4, 32, "symmetric"), hessian(x)).dequantize().isfinite().all()


@some
@given(
    seed=seeds,
    tokens=st.sampled_from([1, 400]),
    scheme=st.sampled_from(
        [Scheme(bits, group, zero) for bits, group in ((8, 80), (4, 16)) for zero in ("symmetric", "integer")]
    ),
)
def test_awq_loses_no_more_at_the_outputs_than_rounding_to_nearest(seed, tokens, scheme):
    weight, x = random_weight(seed), inputs(seed + 1, tokens=tokens)
    mine, plain = awq(weight, scheme, hessian(x)), round_to_nearest(weight, scheme)
    losses = [(x @ (weight - each.dequantize()).T).square().mean() for each in (mine, plain)]
    assert losses[0] <= losses[1] * (1 + 1e-4)


@pytest.mark.parametrize("zero", ["symmetric", "integer", "float"])
def test_awq_in_4_bits_searches_ranges_for_its_inputs(zero):
    """Better than ranges that cover each group, with the same channel scales."""
    random, scheme = torch.Generator().manual_seed(4), Scheme(4, 32, zero)
    weight, x = (
        torch.randn(48, 80, generator=random),
        torch.randn(400, 80, generator=random) * torch.logspace(-1, 0.5, 80),
    )
    mine = awq(weight, scheme, hessian(x))
    assert mine.channel_scales is not None
    covered = round_to_nearest(weight * mine.channel_scales, scheme).dequantize() / mine.channel_scales
    losses = [(x @ (weight - each).T).square().mean() for each in (mine.dequantize(), covered)]
    assert losses[0] < 0.99 * losses[1]


def test_awq_gains_where_inputs_differ_in_size():
    weight, x = random_weight(1), inputs(2) * torch.logspace(-2, 1, 80)
    scheme = Scheme(8, 80, "integer")
    mine, plain = awq(weight, scheme, hessian(x)), round_to_nearest(weight, scheme)
    losses = [(x @ (weight - each.dequantize()).T).square().mean() for each in (mine, plain)]
    assert losses[0] < losses[1] / 2


def test_a_stretched_layer_and_the_table_it_shares():
    """What is rounded stretched is multiplied and looked up as if it had never been."""
    weight, x = random_weight(7), inputs(8)
    grid = awq(weight, Scheme(8, 80, "integer"), hessian(x * torch.logspace(-2, 1, 80)))
    assert grid.channel_scales is not None
    assert grid.channel_scales.std() > 0.1
    packed, ids = Packed(grid), torch.tensor([[4, 0], [2, 2]])
    torch.testing.assert_close(QuantizedLinear(packed, None)(x), x @ grid.dequantize().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(QuantizedEmbedding(packed)(ids), grid.dequantize()[ids])
    torch.testing.assert_close(QuantizedLinear(packed, None).weight, grid.dequantize())


# ---------------------------------------------------------------- words


def test_methods_and_schemes_in_words():
    with pytest.raises(UsageError, match=r"no quantization method 'hqq'.*rtn, search, gptq, awq"):
        get_method("hqq")
    assert str(Scheme(4, 32, "float")) == "int4 in groups of 32, asymmetric with offsets"
    assert [name for name, method in METHODS.items() if method.is_calibrated] == ["gptq", "awq"]


TEXT = [{"input_ids": torch.arange(length)[None]} for length in (6, 3)]


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_the_text_is_read_once_per_block(name):
    """What a block learns knows of the errors of those before it."""
    model = Reader()
    quantize(model, Recipe(Scheme(8, 16, "integer"), name), TEXT)
    assert model.read == 3 * 2


class Reader(torch.nn.Module):
    """Two blocks and a head, that count what they read."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(8, 16), torch.nn.Linear(16, 8)
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(16, 16)}) for _ in range(2))
        self.read = 0

    def get_output_embeddings(self):
        return self.head

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache):
        self.read += 1
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer["up"](x)
        return self.head(x)


class Block(torch.nn.Module):
    """A layer that counts how often it computes."""

    def __init__(self):
        super().__init__()
        self.up, self.computed = torch.nn.Linear(16, 16), 0

    def forward(self, x, told):
        self.computed += 1
        told.append(x.mean())
        return torch.relu(self.up(x))


class Stack(Reader):
    """Five blocks in the given order, with a sum in place; with `tells` each needs what the one before has told."""

    def __init__(self, order, *, tells=False):
        torch.manual_seed(0)
        super().__init__()
        self.layers, self.order, self.tells = torch.nn.ModuleList(Block() for _ in range(5)), order, tells

    def forward(self, input_ids, use_cache):
        x, told = self.embed(input_ids), []
        for i in self.order:
            x = self.layers[i](x, told)
            x += told.pop() if self.tells else 1
        return self.head(x)


@pytest.mark.parametrize("name", ["awq", "gptq"])
@pytest.mark.parametrize(("order", "tells"), [(range(5), False), ((3, 1, 0, 4, 2), False), (range(5), True)])
def test_blocks_that_are_quantized_answer_once(name, order, tells, monkeypatch):
    """And what is learned is as if all of the text had been read anew for each block; as it is where blocks tell each
    other more than they return."""
    models = [Stack(order, tells=tells) for _ in range(2)]
    quantize(models[0], Recipe(Scheme(8, 16, "integer"), name), TEXT)
    monkeypatch.setattr(Calibration, "_replay", lambda *_: lambda: None)
    quantize(models[1], Recipe(Scheme(8, 16, "integer"), name), TEXT)
    if order == range(5) and not tells:
        # For the head, which comes first in this model, for itself, and once more when it is quantized.
        assert [layer.computed for layer in models[0].layers] == [3 * len(TEXT)] * 4 + [2 * len(TEXT)]
    for key, value in models[1].state_dict().items():
        assert torch.equal(models[0].state_dict()[key], value), key


def test_the_options_know_the_methods_by_name():
    assert tuple(METHODS) == QUANTIZE_METHODS
