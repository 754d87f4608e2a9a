"""Operators of a `.pt2` that trust their caller do not get what they would trust."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fuzz import operators
from fuzz.targets import SEEDS

from precast.runtime.artifact.pt2.format import Graph, Node, Ref
from precast.runtime.engines.export import _as_torch_argument, _Interpreter
from precast.runtime.engines.operator_checks import guard_operator
from precast.runtime.engines.operator_sizes import SIZES
from precast.runtime.errors import ArtifactError
from precast.runtime.hosts.machine import memory_bytes

ATEN = "torch.ops.aten."


def tensor(*shape, dtype="float32", **more):
    return {"tensor": dtype, "shape": list(shape), **more}


def call(target, *args, results=1, **kwargs):
    operators.run(json.dumps({"target": target, "args": args, "kwargs": kwargs, "results": results}).encode())


IMAGE = tensor(1, 2, 4, 5)
NORM = "_native_batch_norm_legit_no_training"
UNSAFE = {
    "too few means": (
        (f"{NORM}.default", tensor(1, 64, 1, 1), None, None, tensor(1), tensor(64), 0.1, 0.0),
        r"\[1\] where the channels of \[1, 64, 1, 1\] need \[64\]",
    ),
    "too few weights": (
        (f"{NORM}.default", tensor(2, 9), tensor(1), None, tensor(9), tensor(9), 0.1, 0.0),
        r"\[1\] where the channels of \[2, 9\] need \[9\]",
    ),
    "no channels": (
        (f"{NORM}.default", tensor(9), None, None, tensor(9), tensor(9), 0.1, 0.0),
        r"\[9\] has no channels",
    ),
    "a short norm": (
        ("_weight_norm.default", tensor(4000, 2), tensor(1, 1), 0), r"\[1, 1\] where dimension 0 of v need",
    ),
    "a norm of no dimension": (("_weight_norm.default", tensor(4, 2), tensor(4, 1), 5), r"has no dimension 5"),
    "a norm of nothing": (("_weight_norm.default", tensor(0, 2), tensor(0, 1), 0), r"\[0, 2\] has no elements"),
    "a padding of 32 bits": (
        ("col2im.default", tensor(1, 4, 9), [4, 4], [2, 2], [1, 1], [0, 2**31], [1, 1]),
        r"\[1, 4, 9\] where [\d,]+ columns make \[4, 4\]",
    ),
    "values longer than keys": (
        ("scaled_dot_product_attention.default", tensor(2, 4, 5, 8), tensor(2, 4, 4, 8), tensor(2, 4, 7, 8)),
        r"keys \[2, 4, 4, 8\] and values \[2, 4, 7, 8\] do not belong together",
    ),
    "a scale that reads beyond": (
        ("_upsample_bilinear2d_aa.default", IMAGE, [3, 7], False, None, 0.5), r"5 times 0.5 is not 7",
    ),
    "repeats beyond 64 bits": (
        ("repeat_interleave.Tensor", tensor(4, dtype="int64", values=[2**62])),
        r"its result would have [\d,]+ elements",
    ),
    "the smallest integer by -1": (
        ("div.Tensor_mode", tensor(2, dtype="int64", fill=-(2**63)), tensor(2, dtype="int64", fill=-1)),
        r"divided by -1",
    ),
    "few scales of int4": (
        ("_weight_int4pack_mm_for_cpu.default", tensor(2, 64), tensor(16, 32, dtype="uint8"), 32, tensor(1, 16, 2)),
        r"scales \[1, 16, 2\] do not fit",
    ),
    "statistics that change": (
        ("batch_norm.default", IMAGE, None, None, tensor(2), tensor(2), True, 0.1, 0.0, False),
        r"it changes the statistics",
    ),
    "random numbers": (("dropout.default", IMAGE, 0.5, True), r"drops values at random"),
    "a million pieces": (("unbind.int", tensor(2**20, strides=[0])), r"in 1,048,576 pieces"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE)
def test_an_operator_that_would_read_or_write_elsewhere_is_not_called(name):
    (target, *args), words = UNSAFE[name]
    kwargs = {"rounding_mode": "trunc"} if target == "div.Tensor_mode" else {}
    with pytest.raises(ArtifactError, match=words):
        call(ATEN + target, *args, **kwargs)


@pytest.mark.parametrize("target", ["cumsum.default", "scalar_tensor.default"])
def test_a_number_is_no_dtype(target):
    args = [tensor(4), 0] if target == "cumsum.default" else [1]
    with pytest.raises(ArtifactError, match="whose dtype is a dtype, with something else"):
        call(ATEN + target, *args, dtype=-1)


@pytest.mark.parametrize(
    "given",
    [("_upsample_bilinear2d_aa.default", IMAGE, [7, 7], False, None, tensor()), ("full.default", [tensor()], 1)],
)
def test_a_tensor_is_no_number(given):
    """torch takes a tensor of one element for one, and a check of numbers would not see it."""
    with pytest.raises(ArtifactError, match="is no tensor, with one"):
        call(*[ATEN + given[0], *given[1:]])


@pytest.mark.parametrize("given", [("copy.default", None, tensor(3, 2)), ("cat.default", [tensor(2), None])])
def test_nothing_is_no_tensor(given):
    """torch hands an operator a tensor without memory, which some read."""
    with pytest.raises(ArtifactError, match="is to be a tensor, with nothing"):
        call(*[ATEN + given[0], *given[1:]])


@pytest.mark.parametrize("target", ["pow.int", "mul.left_t", "remainder.int"])
def test_arithmetic_of_torchscript_is_not_called(target):
    with pytest.raises(ArtifactError, match="which computes without tensors"):
        call(ATEN + target, 2, 10**9)


FAR = tensor(1, dtype="int64", values=[10**9])
OUTSIDE = {
    "embedding.default": (tensor(4, 4), FAR),
    "gather.default": (tensor(4), 0, FAR),
    "index_select.default": (tensor(4), 0, FAR),
    "index.Tensor": (tensor(4), [FAR]),
    "index_put.default": (tensor(4), [FAR], tensor(1)),
    "index_add.default": (tensor(4), 0, FAR, tensor(1)),
    "index_copy.default": (tensor(4), 0, FAR, tensor(1)),
    "scatter.src": (tensor(4), 0, FAR, tensor(1)),
    "take.default": (tensor(4), FAR),
    "select.int": (tensor(4), 0, 10**9),
    "select_scatter.default": (tensor(4), tensor(), 0, 10**9),
    "kthvalue.default": (tensor(4), 10**9),
    "_softmax.default": (tensor(4), 9, False),
    "masked_scatter.default": (tensor(64), tensor(64, dtype="bool"), tensor(1)),
    "_weight_int8pack_mm.default": (tensor(1, 64), tensor(4096, 64, dtype="int8"), tensor(1)),
    "_int_mm.default": (tensor(32, 64, dtype="int8"), tensor(32, 64, dtype="int8")),
    "native_layer_norm.default": (tensor(2, 64), [64], tensor(1), tensor(1), 1e-5),
    "native_group_norm.default": (tensor(1, 64, 1), tensor(1), tensor(1), 1, 64, 1, 1, 1e-5),
    "grid_sampler_2d.default": (IMAGE, tensor(1000, 4, 4, 2), 0, 0, False),
    "bilinear.default": (tensor(1, 4), tensor(1, 4), tensor(2, 9, 9), None),
    "istft.default": (tensor(1, 5, 4, dtype="complex64"), 8, 2, 8, tensor(3)),
    "unfold.default": (tensor(4), 0, 2**62, 1),
    "reflection_pad1d.default": (tensor(1, 4), [-10, 20]),
    "upsample_nearest2d.default": (IMAGE, [-5, 5]),
    "view.dtype": (tensor(3, dtype="uint8"), {"dtype": "float64"}),
    "cdist.default": (tensor(2, 3), tensor(2, 4)),
}
"""What torch itself refuses."""


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_lies_outside_a_tensor_is_neither_read_nor_written(name):
    with pytest.raises(ArtifactError, match=rf"model\.pt2 failed at {ATEN}{name}: \w"):
        call(ATEN + name, *OUTSIDE[name], results=2 if name == "kthvalue.default" else 1)


HUGE = {
    "full.default": ([2**20, 2**20], 1.0),
    "zeros.default": ([2**40],),
    "new_ones.default": (tensor(1), [2**40]),
    "arange.start_step": (0, 2**40, 1),
    "linspace.default": (0, 1, 2**40),
    "eye.m": (2**20, 2**20),
    "hann_window.default": (2**40,),
    "tril_indices.default": (2**20, 2**20),
    "expand.default": (tensor(1, 4), [2**40, -1]),
    "as_strided.default": (tensor(4), [2**40], [0]),
    "repeat.default": (tensor(4), [2**40]),
    "tile.default": (tensor(4), [2**40]),
    "repeat_interleave.self_int": (tensor(4), 2**40),
    "one_hot.default": (tensor(4, dtype="int64"), 2**40),
    "constant_pad_nd.default": (tensor(1, 4), [0, 2**40]),
    "pad.default": (tensor(1, 4), [0, 0, 2**40, 0]),
    "replication_pad1d.default": (tensor(1, 4), [2**40, 0]),
    "upsample_nearest2d.default": (IMAGE, [2**20, 2**20]),
    "upsample_bilinear2d.vec": (IMAGE, None, False, [1e6, 1e6]),
    "adaptive_avg_pool2d.default": (IMAGE, [2**20, 2**20]),
    "im2col.default": (IMAGE, [1, 1], [1, 1], [2**20, 2**20], [1, 1]),
    "convolution.default": (IMAGE, tensor(3, 2, 1, 1), None, [1, 1], [2**20, 2**20], [1, 1], False, [0, 0], 1),
    "conv_transpose1d.default": (tensor(1, 2, 4), tensor(2, 3, 2), None, [2**40]),
    "outer.default": (tensor(2**20, strides=[0]), tensor(2**20, strides=[0])),
    "mm.default": (tensor(2**20, 1, strides=[0, 0]), tensor(1, 2**20, strides=[0, 0])),
    "matmul.default": (tensor(2**20, 1, strides=[0, 0]), tensor(1, 2**20, strides=[0, 0])),
    "linear.default": (tensor(2**20, 1, strides=[0, 0]), tensor(2**20, 1, strides=[0, 0])),
    "add.Tensor": (tensor(2**20, 1, strides=[0, 0]), tensor(1, 2**20, strides=[0, 0])),
    "embedding.default": (tensor(4, 2**20, strides=[0, 0]), tensor(2**20, strides=[0], dtype="int64", fill=0)),
    "index.Tensor": (tensor(4, 2**20, strides=[0, 0]), [tensor(2**20, strides=[0], dtype="int64", fill=0)]),
    "diagflat.default": (tensor(2**20, strides=[0]),),
    "cartesian_prod.default": ([tensor(2**20, strides=[0]), tensor(2**20, strides=[0])],),
    "einsum.default": ("i,j->ij", [tensor(2**20, strides=[0]), tensor(2**20, strides=[0])]),
    "tensordot.default": (tensor(2**20, strides=[0]), tensor(2**20, strides=[0]), [], []),
    "fft_fft.default": (tensor(4), 2**40),
    "fft_irfftn.default": (tensor(4, 4), [2**20, 2**20]),
    "cat.default": ([tensor(2**24, strides=[0])] * 2**12,),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_result_beyond_memory_is_refused_before_it_is_asked_for(name):
    with pytest.raises(
        ArtifactError,
        match=rf"its result would have [\d,]+ elements of torch\.\w+, more than memory's {memory_bytes():,}",
    ):
        call(ATEN + name, *HUGE[name])


def test_no_result_is_larger_than_was_thought():
    """Over the valid calls of every operator whose result grows."""
    tried = 0
    for case in (SEEDS / "operators" / "calls.jsonl").read_text().splitlines():
        given = json.loads(case)
        name, overload = given["target"].removeprefix(ATEN).split(".")
        if SIZES.get(name) is None:
            continue
        weights = {}
        args = _real([operators._value(each, weights) for each in given["args"]], weights)
        kwargs = {key: _real(operators._value(each, weights), weights) for key, each in given["kwargs"].items()}
        found = getattr(getattr(torch.ops.aten, name), overload)(*args, **kwargs)
        found = found if isinstance(found, list | tuple) else [found]
        tried += 1
        assert max(each.numel() for each in found) <= SIZES[name](*args, **kwargs), case
    assert tried > 100


def _real(value, weights):
    if isinstance(value, list):
        return [_real(each, weights) for each in value]
    return weights[value.name] if isinstance(value, Ref) else _as_torch_argument(value)


def test_a_median_of_rows_that_overlap_is_the_right_one():
    x = torch.arange(4.0).expand(1000, 4)
    found = guard_operator("median", torch.ops.aten.median.dim, 1)(x, 0)
    np.testing.assert_array_equal(found[0], [0, 1, 2, 3])


@pytest.mark.parametrize("kind", ["fft", "ifft", "rfft", "irfft"])
@pytest.mark.parametrize("args", [(), ([6, 5], [-2, -1]), ([3, 4], [0, 2], "ortho"), (None, [-1, -3], "forward")])
def test_fourier_transforms_along_several_dimensions_are_what_numpy_gives(kind, args):
    """torch's own, with MKL, damage the heap for some lengths."""
    x = torch.randn(4, 6, 5, dtype=torch.float64 if kind == "rfft" else torch.complex64)
    for many in ("2", "n"):
        found = guard_operator(f"fft_{kind}{many}", None, 1)(x, *args)
        expected = getattr(np.fft, f"{kind}{many}")(x.numpy(), *args)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


SIZES_TOO_LARGE = {
    "a power": ("_operator.pow", 10, 10**9),
    "bits": ("_operator.lshift", 1, 2**40),
    "a product": ("_operator.mul", 2**62, 2),
    "a list": ("_operator.mul", [1, 2], 10**10),
    "a text": ("_operator.mul", "x", 10**10),
    "a tensor": ("_operator.add", tensor(2), 1),
}


@pytest.mark.parametrize("name", SIZES_TOO_LARGE)
def test_arithmetic_on_sizes_keeps_to_64_bits(name):
    with pytest.raises(ArtifactError, match=r"a size has more than 64 bits|moved by so many bits|sizes are numbers"):
        call(*SIZES_TOO_LARGE[name])


def test_the_result_of_a_note_that_is_not_run_may_be_named(tmp_path):
    note = Node(f"{ATEN}_assert_tensor_metadata.default", [Ref("x")], {}, ["y"])
    used = Node(f"{ATEN}neg.default", [Ref("y")], {}, ["z"])
    program = _Interpreter(Graph({"x": "x"}, [], [note, used], [], {}), {"x": torch.ones(2)}, tmp_path / "model.pt2")
    with pytest.raises(ArtifactError, match=r"failed at torch\.ops\.aten\.neg\.default"):
        program.run([], [])
