"""Weights that lie on a grid are found there, exactly; others are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.exporter.quantize.scheme import (
    EXACT,
    QuantizedWeight,
    QuantParams,
    detect_quantization,
    encode,
    split_groups,
)

some = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)
groups_of = st.sampled_from([16, 32, 64])
magnitudes = st.sampled_from([1e-20, 1e-3, 1.0, 1e3, 1e20])


def half(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Scales as files hold them: of float16's precision."""
    return random.uniform(0.01, 1.0, shape).astype(np.float16).astype(np.float32)


def weights(codes: np.ndarray, scales: np.ndarray, columns: int, offsets: np.ndarray | float = 0.0) -> torch.Tensor:
    """[N, G, group] whole numbers times [N, G] scales plus offsets, in float32 as a dequantizer computes it."""
    values = codes.astype(np.float32) * scales[..., None] + np.asarray(offsets, np.float32)[..., None]
    return torch.from_numpy(values.reshape(len(codes), -1)[:, :columns].astype(np.float32))


def is_exact(found: QuantizedWeight, weight: torch.Tensor) -> bool:
    largest = split_groups(weight, found.group).abs().amax(-1, keepdim=True)
    error = (split_groups(found.dequantize(), found.group) - split_groups(weight, found.group)).abs()
    # EXACT for the search, and half a bit each for the product and the sum.
    return bool((error <= (EXACT + 2**-22) * largest).all())


def shape_of(random: np.random.Generator, group: int) -> tuple[int, int, int]:
    """Rows, groups and columns, the last group possibly cut short."""
    rows, count = int(random.integers(1, 5)), int(random.integers(1, 5))
    return rows, count, count * group - int(random.integers(0, group))


# ---------------------------------------------------------------- symmetric


@some
@given(seed=seeds, group=groups_of, magnitude=magnitudes)
def test_q8_0(seed, group, magnitude):
    """Codes -127 .. 127, one of the ends in every group."""
    random = np.random.default_rng(seed)
    rows, count, columns = shape_of(random, group)
    codes = random.integers(-127, 128, (rows, count, group))
    codes[..., 0] = random.choice([-127, 127], (rows, count))
    weight = weights(codes, half(random, (rows, count)) * np.float32(magnitude), columns)
    found = detect_quantization(weight, group, 8)
    assert found is not None
    assert found.offsets is None
    assert found.is_symmetric
    assert found.columns == columns
    assert is_exact(found, weight)


@some
@given(seed=seeds, group=groups_of, magnitude=magnitudes, side=st.sampled_from([-1, 1]))
def test_q4_0(seed, group, magnitude, side):
    """Codes -8 .. 7, the largest weight at -8, its scale of either sign."""
    random = np.random.default_rng(seed)
    rows, count, columns = shape_of(random, group)
    codes = random.integers(-7, 8, (rows, count, group))
    codes[..., 0] = -8
    scales = side * half(random, (rows, count)) * np.float32(magnitude)
    weight = weights(codes, scales, columns)
    found = detect_quantization(weight, group, 4)
    assert found is not None
    assert found.is_symmetric
    assert is_exact(found, weight)


# ---------------------------------------------------------------- any


@some
@given(seed=seeds, group=groups_of, magnitude=magnitudes)
def test_q4_1(seed, group, magnitude):
    """Codes 0 .. 15, both ends used, the minimum anywhere."""
    random = np.random.default_rng(seed)
    rows, count, columns = shape_of(random, group)
    codes = random.integers(0, 16, (rows, count, group))
    codes[..., 0], codes[..., -1] = 0, 15
    scales = half(random, (rows, count)) * np.float32(magnitude)
    minima = -scales * random.uniform(2, 13, (rows, count)).astype(np.float16).astype(np.float32)
    weight = weights(codes, scales, columns, minima)
    found = detect_quantization(weight, group, 4)
    assert found is not None
    assert is_exact(found, weight)


@some
@given(seed=seeds, group=groups_of, data=st.data())
def test_groups_that_do_not_use_their_ends(seed, group, data):
    """GPTQ and AWQ: whole zero points, and ranges that end before the grid does. No offset is needed."""
    random = np.random.default_rng(seed)
    rows, count, _ = shape_of(random, group)
    low = data.draw(st.integers(0, 7))
    high = data.draw(st.integers(low + 1, 15))
    codes = random.integers(low, high + 1, (rows, count, group))
    # All of the range's codes occur, so that the spacing is the grid's.
    codes[..., : high - low + 1] = np.arange(low, high + 1)
    zeros = random.integers(low, high + 1, (rows, count, 1))
    weight = weights(codes - zeros, half(random, (rows, count)), count * group)
    found = detect_quantization(weight, group, 4)
    assert found is not None
    assert is_exact(found, weight)
    assert found.offsets is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e20, -1e-20])
def test_flat_groups(bits, value):
    weight = torch.full((3, 80), value)
    found = detect_quantization(weight, 32, bits)
    assert found is not None
    assert is_exact(found, weight)
    assert found.offsets is None


def test_flat_groups_beside_others():
    """One value in a group has no spacing, but needs no offset either: zero is the other end."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (4, 3, 32)) - 5
    codes[..., :16] = np.arange(16) - 5
    codes[0, 0], codes[1, 1], codes[2, 2] = 9, -4, 0
    weight = weights(codes, half(random, (4, 3)), 96)
    found = detect_quantization(weight, 32, 4)
    assert found is not None
    assert is_exact(found, weight)
    assert found.offsets is None


@some
@given(seed=seeds, group=groups_of, bits=st.sampled_from([4, 8]))
def test_random_weights_are_on_no_grid(seed, group, bits):
    weight = torch.randn(4, 4 * group, generator=torch.Generator().manual_seed(seed))
    assert detect_quantization(weight, group, bits) is None


def test_one_weight_beside_the_grid_is_enough():
    random = np.random.default_rng(1)
    codes = random.integers(-8, 8, (4, 4, 32))
    codes[..., 0] = -8
    weight = weights(codes, half(random, (4, 4)), 128)
    assert detect_quantization(weight, 32, 4) is not None
    weight[3, 100] += 1e-4
    assert detect_quantization(weight, 32, 4) is None


def test_a_grid_in_larger_groups_is_one_in_smaller_too():
    """Spacings are found per group; so Q4 in groups of 64 lies on a grid in groups of 32 as well."""
    random = np.random.default_rng(2)
    codes = random.integers(0, 16, (4, 2, 64))
    codes[..., :16] = codes[..., 32:48] = np.arange(16)
    weight = weights(codes - 7, half(random, (4, 2)), 128)
    found = detect_quantization(weight, 32, 4)
    assert found is not None
    assert is_exact(found, weight)


# ---------------------------------------------------------------- codes


@some
@given(seed=seeds, group=groups_of, bits=st.sampled_from([4, 8]), with_offsets=st.booleans())
def test_encoding_what_was_decoded_changes_nothing(seed, group, bits, with_offsets):
    random = np.random.default_rng(seed)
    rows, count, columns = shape_of(random, group)
    codes = torch.from_numpy(random.integers(0, 2**bits, (rows, count, group)).astype(np.uint8))
    zeros = torch.from_numpy(random.integers(0, 2**bits, (rows, count)).astype(np.uint8))
    scales = torch.from_numpy(half(random, (rows, count)))
    offsets = torch.from_numpy(half(random, (rows, count))) if with_offsets else None
    grid = QuantizedWeight(bits, codes, scales, zeros, offsets, columns)
    again = encode(split_groups(grid.dequantize(), group), QuantParams(scales, zeros.float(), offsets), bits, columns)
    assert torch.equal(again.codes.flatten(1)[:, :columns], codes.flatten(1)[:, :columns])
    assert grid.dequantize().shape == (rows, columns)
