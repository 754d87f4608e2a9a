"""Libraries that stand alone: their pieces compute what PyTorch, Sleef and OpenMP would, and a decoder runs without
any of these installed."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import threading
from ctypes import POINTER, byref, c_bool, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnxruntime
import processes
import pytest
import torch
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch._inductor import cpp_builder

from precast.cli import inspect
from precast.exporter.backends.aoti import isa
from precast.exporter.backends.aoti.standalone import link
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.integrity import Contents
from precast.runtime.artifact.publish import hash_files
from precast.runtime.engines import Settings
from precast.runtime.engines.aoti import StandaloneEngine
from precast.runtime.errors import ArtifactError, FormatError
from precast.runtime.hosts.machine import cpu_flags
from precast.runtime.inputs.tensors import allocate

_DRIVER = Path(__file__).parent.parent / "helpers" / "standalone_driver.cpp"
LEVELS = [level for level in ("avx2", "avx512") if set(isa.cpu_flags_needed(level)) <= cpu_flags()]
_OWN = ("-Wl,-z,defs", "-Wl,--as-needed", "-Wl,-Bsymbolic")
"""Or functions that can be seen are those of PyTorch's OpenMP, which this process has, too."""
DTYPES = {torch.float32: 6, torch.bfloat16: 15, torch.float16: 5}
"""Of products. Numbers of c10/core/ScalarType.h."""
OTHER_DTYPES = {torch.int64: 4, torch.int32: 3, torch.int8: 1, torch.float64: 7}


@pytest.fixture(
    scope="module", params=[*(pytest.param(level, marks=pytest.mark.slow) for level in LEVELS[:-1]), *LEVELS[-1:]]
)
def pieces(request, tmp_path_factory):
    """The pieces and the driver in one library, whose functions can be seen."""
    target = tmp_path_factory.mktemp("pieces") / f"{request.param}.so"
    sources = [link._SOURCES / f"{name}.cpp" for name in link._PIECES if name != "run"]
    sources += [link._SOURCES / f"{name}.cpp" for name in link._MATMUL_PIECES]
    compiler = [cpp_builder.get_cpp_compiler(), f"-march={isa.march(request.param)}"]
    flags = [*(each for each in link._FLAGS if not each.startswith("-fvisibility")), "-Wall", "-Wextra", "-Werror"]
    objects = []
    for source in (*sources, _DRIVER):
        objects.append(target.with_name(f"{source.stem}.o"))
        subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(objects[-1])], check=True)
    # Without -fopenmp, which would add the compiler's own library: all of OpenMP is to come from the pieces.
    subprocess.run([*compiler, "-shared", *map(str, objects), *_OWN, "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.run_barriers.restype = library.run_regions.restype = c_int64
    library.call_function.restype = c_bool
    needed = subprocess.run(["readelf", "-d", str(target)], check=True, capture_output=True, text=True).stdout
    assert "gomp" not in needed
    library.aoti_torch_cpu_addmm_out.argtypes = [c_void_p] * 4 + [c_double] * 2
    library.aoti_torch_cpu_baddbmm_out.argtypes = [c_void_p] * 4 + [c_double] * 2
    return library


def handle(pieces, tensor: torch.Tensor) -> c_void_p:
    """The C ABI's tensor over a tensor's memory."""
    sizes, strides = ((c_int64 * 8)(*values) for values in (tensor.shape, tensor.stride()))
    made = c_void_p()
    dtype = {**DTYPES, **OTHER_DTYPES}[tensor.dtype]
    assert not pieces.aoti_torch_create_tensor_from_blob(
        c_void_p(tensor.data_ptr()), c_int64(tensor.dim()), sizes, strides, c_int64(0), dtype, 0, 0, byref(made)
    )
    return made


# ------------------------------------------------------------------ functions

FUNCTIONS = {
    "exp": (np.exp, -104, 88.7), "tanh": (np.tanh, -20, 20), "log": (np.log, 1e-38, 1e30), "sin": (np.sin, -1e5, 1e5),
    "cos": (np.cos, -1e5, 1e5), "erf": (np.vectorize(math.erf), -6, 6), "log1p": (np.log1p, -0.99, 100),
    "expm1": (np.expm1, -50, 80),
}  # fmt: skip
STRANGE = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3e38, -3e38, 1e10, -1e10]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("lanes", [8, 16])
def test_functions_are_exact_to_a_few_units_in_the_last_place(pieces, name, lanes):
    exact, low, high = FUNCTIONS[name]
    random = np.random.default_rng(0)
    near = random.uniform(max(low, -2), min(high, 2), 2**15)
    x = np.concatenate([random.uniform(low, high, 2**15), near, near * 1e-3 if low < 0 else near]).astype(np.float32)
    y = np.empty_like(x)
    if not pieces.call_function(name.encode(), lanes, *(array.ctypes.data_as(POINTER(c_float)) for array in (x, y)),
                                c_int64(x.size)):  # fmt: skip
        pytest.skip("this level has no vectors of so many lanes")
    expected = exact(x.astype(np.float64))
    unit = np.spacing(np.maximum(np.abs(expected), 1.2e-38).astype(np.float32)).astype(np.float64)
    # Near their zeros sine and cosine are as exact as numbers of their size, not of the zero's.
    unit = np.maximum(unit, 1e-9) if name in ("sin", "cos") else unit
    assert (np.abs(y - expected) / unit).max() < 2.5


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_strange_numbers(pieces, name):
    x = np.array((STRANGE * 2)[:16], np.float32)
    y = np.empty_like(x)
    pieces.call_function(name.encode(), 8, *(array.ctypes.data_as(POINTER(c_float)) for array in (x, y)), c_int64(16))
    expected = getattr(torch, name)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, expected, rtol=3e-7, atol=1e-9 if name in ("sin", "cos") else 2e-45)


# ------------------------------------------------------------------ threads


@given(count=st.integers(1, 300), threads=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_every_iteration_runs_once_whatever_the_schedule(pieces, count, threads):
    ran = np.zeros(count, np.int32)
    pieces.run_loops(c_int64(count), threads, ran.ctypes.data_as(POINTER(c_int32)))
    assert (ran == 30 * 3).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_meet_at_barriers(pieces, threads):
    assert pieces.run_barriers(200, threads) == 0


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_regions_run_once_on_each_thread_and_on_one_within_another(pieces, threads):
    assert pieces.run_regions(500, threads) == 500 * threads * (threads + 1) // 2


def test_several_callers_do_not_disturb_each_other(pieces):
    found = []

    def call():
        ran = np.zeros(100, np.int32)
        for _ in range(20):
            pieces.run_loops(c_int64(100), 2, ran.ctypes.data_as(POINTER(c_int32)))
        found.append((ran == 20 * 30 * 3).all())

    callers = [threading.Thread(target=call) for _ in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert found == [True] * 4


def test_the_child_of_a_fork_has_threads_of_its_own(pieces):
    assert pieces.run_regions(10, 3) == 60
    child = os.fork()
    if not child:
        os._exit(0 if pieces.run_regions(10, 3) == 60 and pieces.run_barriers(20, 3) == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0


# ------------------------------------------------------------------ tensors and products


def test_a_view_may_not_reach_beyond_its_tensor(pieces):
    tensor, made = handle(pieces, torch.zeros(4, 4)), c_void_p()

    def view(sizes, strides, offset):
        arrays = [(c_int64 * 9)(*values) for values in (sizes, strides)]
        return pieces.aoti_torch__reinterpret_tensor(tensor, c_int64(len(sizes)), *arrays, c_int64(offset), byref(made))

    assert view([2, 4], [4, 1], 8) == 0
    for refused in (([2, 4], [4, 1], 9), ([17], [1], 0), ([2], [1], -1), ([1] * 9, [1] * 9, 0)):
        assert view(*refused) == 1


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_copies_and_clones_keep_every_element(pieces, data):
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(sizes))))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.int64]))
    tensor = (torch.arange(math.prod(sizes)) % 100).to(dtype).view(sizes).permute(order)
    made, pointer = c_void_p(), c_void_p()
    assert not pieces.aoti_torch_clone(handle(pieces, tensor), byref(made))
    target = torch.zeros(tensor.shape, dtype=dtype)
    assert not pieces.aoti_torch_copy_(handle(pieces, target), made, 0)
    assert torch.equal(target, tensor)
    assert not pieces.aoti_torch_get_data_ptr(made, byref(pointer))
    assert pointer.value % 64 == 0
    assert not pieces.aoti_torch_delete_tensor_object(made)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_products_are_those_of_the_matrices(pieces, data):
    rows, depth, columns = (data.draw(st.integers(1, most)) for most in (200, 70, 150))
    depth += data.draw(st.sampled_from([0, 512, 1000]))
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    batch = data.draw(st.sampled_from([None, 1, 3]))
    lead = [] if batch is None else [batch]
    torch.manual_seed(rows)
    a, b = torch.randn(*lead, rows, depth), torch.randn(*lead, depth, columns)
    a, b = (x.to(dtype).mT.contiguous().mT if data.draw(st.booleans()) else x.to(dtype) for x in (a, b))
    out = torch.full([*lead, rows, columns], math.nan).to(data.draw(st.sampled_from([torch.float32, dtype])))
    added = torch.randn(data.draw(st.sampled_from([(columns,), (rows, columns), (1, columns)]))).to(dtype)
    beta, alpha = data.draw(st.sampled_from([(0.0, 1.0), (1.0, 1.0), (0.5, -2.0)]))
    pieces.omp_set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
    handles = [handle(pieces, x) for x in (out, added, a, b)]
    product, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if beta == 0.0:
        call = pieces.aoti_torch_cpu_mm_out if batch is None else pieces.aoti_torch_cpu_bmm_out
        assert call(handles[0], *handles[2:]) == 0
    else:
        call = pieces.aoti_torch_cpu_addmm_out if batch is None else pieces.aoti_torch_cpu_baddbmm_out
        assert call(*handles, beta, alpha) == 0
        product, size = beta * added.double() + alpha * product, added.double().abs() + 2 * size
    # Of the size of what is summed, which may cancel out, and of the sum itself where it is rounded further.
    rounding = {torch.float32: 1e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}[out.dtype]
    assert ((out.double() - product).abs() <= 1e-6 * size + rounding * product.abs() + 1e-7).all()


@pytest.mark.parametrize("sizes", [((2, 3), (4, 5)), ((2, 3), (3, 4, 1)), ((3, 3), (3, 5))])
def test_products_that_do_not_fit_are_refused_by_name(pieces, sizes):
    a, b = (torch.randn(size) for size in sizes)
    out = handle(pieces, torch.zeros(2, 5))
    assert pieces.aoti_torch_cpu_mm_out(out, handle(pieces, a), handle(pieces, b)) == 1
    integers = handle(pieces, torch.ones(2, 2, dtype=torch.int64))
    assert pieces.aoti_torch_cpu_mm_out(integers, integers, integers) == 1


def read(pieces, made: c_void_p, dtype: torch.dtype) -> torch.Tensor:
    """A copy of a tensor of the C ABI, with its strides; the tensor is deleted."""
    dims, data, sizes, strides = c_int64(), c_void_p(), POINTER(c_int64)(), POINTER(c_int64)()
    assert not pieces.aoti_torch_get_dim(made, byref(dims))
    assert not pieces.aoti_torch_get_data_ptr(made, byref(data))
    assert not pieces.aoti_torch_get_sizes(made, byref(sizes))
    assert not pieces.aoti_torch_get_strides(made, byref(strides))
    size, stride = (tuple(each[: dims.value]) for each in (sizes, strides))
    count = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else 0
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(data.value) if count else b""
    held = torch.frombuffer(bytearray(memory), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    found = torch.as_strided(held, size, stride).clone(memory_format=torch.preserve_format)
    assert not pieces.aoti_torch_delete_tensor_object(made)
    assert found.stride() == stride or not count
    return found


def integers(values) -> tuple[ctypes.Array, c_int64]:
    return (c_int64 * len(values))(*values), c_int64(len(values))


def convolve(pieces, x, weight, bias, asked, transposed) -> torch.Tensor:
    stride, padding, dilation, more, groups = asked
    made, given = c_void_p(), None if bias is None else byref(handle(pieces, bias))
    arrays = [integers(each) for each in (stride, padding, dilation)]
    status = pieces.aoti_torch_cpu_convolution(
        handle(pieces, x), handle(pieces, weight), given, *(each for array in arrays for each in array),
        int(transposed), *integers(more), c_int64(groups), byref(made),
    )  # fmt: skip
    assert status == 0
    return read(pieces, made, torch.float32)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_convolutions_are_pytorchs_in_their_places_in_memory(pieces, data):
    """Any sizes, steps, paddings and groups; inputs and weights in any order; so are the results."""
    dims, transposed = data.draw(st.integers(1, 3)), data.draw(st.booleans())

    def numbers(low, high):
        return [data.draw(st.integers(low, high)) for _ in range(dims)]

    groups, per_group, made_per_group = (data.draw(st.sampled_from([1, 1, 2, 3])) for _ in range(3))
    kernel, stride, dilation = numbers(1, 4), numbers(1, 3), numbers(1, 2)
    padding = [data.draw(st.integers(0, (size - 1) // 2 + 1)) for size in kernel]
    more = (
        [data.draw(st.integers(0, max(each) - 1)) for each in zip(stride, dilation, strict=True)]
        if transposed
        else [0] * dims
    )
    windows = [apart * (size - 1) + 1 for apart, size in zip(dilation, kernel, strict=True)]
    size = [data.draw(st.integers(max(1, window), window + 12)) for window in windows]
    if transposed:
        places = zip(size, stride, padding, windows, more, strict=True)
        assume(all((n - 1) * step - 2 * pad + window + rest > 0 for n, step, pad, window, rest in places))
    channels, rows = groups * per_group, groups * made_per_group
    torch.manual_seed(sum(size))
    x = torch.randn(data.draw(st.integers(1, 2)), channels, *size)
    first, second = (channels, made_per_group) if transposed else (rows, per_group)
    weight = torch.randn(first, second, *kernel)
    if dims < 3 and data.draw(st.booleans()):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    if dims < 3 and data.draw(st.booleans()):
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    bias = torch.randn(rows) if data.draw(st.booleans()) else None
    pieces.omp_set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
    asked = (stride, padding, dilation, more, groups)
    expected = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, transposed, more, groups)
    found = convolve(pieces, x, weight, bias, asked, transposed)
    assert found.shape == expected.shape
    assert found.stride() == expected.stride()
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "weight", "transposed"),
    [
        ((1, 8, 300, 300), (4, 8, 5, 5), False),
        ((2, 64, 20000), (16, 64, 3), False),
        ((1, 4, 300, 300), (4, 8, 3, 3), True),
    ],
)
def test_windows_are_laid_side_by_side_in_pieces(pieces, x, weight, transposed):
    """Of so large an input that they would not fit at once: of whole lines, or of parts of one."""
    x, weight, dims = torch.randn(x), torch.randn(weight), len(x) - 2
    asked = ([1] * dims, [2] * dims, [1] * dims, [0] * dims, 1)
    expected = torch.ops.aten.convolution(x, weight, None, *asked[:3], transposed, *asked[3:])
    assert torch.allclose(convolve(pieces, x, weight, None, asked, transposed), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("x", "weight", "groups"), [((1, 4, 8), (4, 3, 3), 1), ((1, 4, 8, 8), (4, 4, 3), 1), ((1, 4, 2), (4, 4, 3), 1),
                                ((1, 4, 8), (5, 2, 3), 2), ((1, 2, 3, 3, 3, 3), (2, 2, 1, 1, 1, 1), 1)]
)  # fmt: skip
def test_convolutions_that_do_not_fit_are_refused(pieces, x, weight, groups):
    ones, none = integers([1] * (len(x) - 2)), integers([0] * (len(x) - 2))
    given = [handle(pieces, torch.ones(size)) for size in (x, weight)]
    status = pieces.aoti_torch_cpu_convolution(
        *given, None, *ones, *none, *ones, 0, *none, c_int64(groups), byref(c_void_p())
    )
    assert status == 1


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_largest_are_pytorchs(pieces, data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    dim = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    k, largest = data.draw(st.integers(0, sizes[dim])), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([*DTYPES, *OTHER_DTYPES]))
    order = data.draw(st.permutations(range(len(sizes))))
    # No two alike, whose order would be anybody's.
    x = torch.randperm(math.prod(sizes)).to(dtype).view([sizes[each] for each in order])
    x = x.permute([order.index(each) for each in range(len(sizes))])
    if dtype.is_floating_point and data.draw(st.booleans()):
        x[(0,) * x.ndim] = math.nan
    expected = torch.topk(x, k, dim, largest)
    made = [c_void_p(), c_void_p()]
    status = pieces.aoti_torch_cpu_topk(handle(pieces, x), c_int64(k), c_int64(dim), int(largest), 1, *map(byref, made))
    assert status == 0
    values, indices = (read(pieces, each, kind) for each, kind in zip(made, (dtype, torch.int64), strict=True))
    assert torch.equal(indices, expected.indices)
    assert values.stride() == expected.values.stride()
    assert torch.equal(values.nan_to_num(9e9), expected.values.nan_to_num(9e9))


# ------------------------------------------------------------------ whole libraries


@pytest.fixture(scope="module")
def llama(checkpoint, artifact):
    # As test_native_backends.py compiles it, so that it is compiled once.
    source = checkpoint("llama", num_hidden_layers=4)
    options = {"batch_size": 3, "sequence_length": (48,), "dynamic_batch_size": True}
    return source, artifact(source, backend="aoti", **options, isa="avx2")


def test_a_decoder_generates_without_torch(llama):
    from transformers import AutoModelForCausalLM

    source, made = llama
    [variant] = read_artifact(made).contract.variants
    assert (variant.abi, variant.requires_torch, list(variant.host.min_versions)) == (1, [], ["glibc"])
    ids = [list(range(5, 22))]
    expected = AutoModelForCausalLM.from_pretrained(source).generate(
        torch.tensor(ids), max_new_tokens=12, do_sample=False
    )
    assert processes.generate_without_torch(made, ids, 12) == expected.tolist()


def test_inspect_says_that_they_stand_alone(llama):
    shown = CliRunner().invoke(inspect.command, [str(llama[1])], catch_exceptions=False)
    assert re.search(r"libraries +stand alone, interface 1", shown.output)


def open_engine(folder: Path, **changes) -> StandaloneEngine:
    """The engine of whatever lies in the folder now, as if it had been hashed so."""
    [variant] = read_artifact(folder).contract.variants
    contents = Contents(folder, hash_files(folder))
    artifact = SimpleNamespace(path=folder, contents=contents)
    return StandaloneEngine(artifact, replace(variant, **changes), Settings(threads=1))


def bind_decode(engine: StandaloneEngine, folder: Path):
    """Bind its decode step to new arrays; raises what opening does."""
    [variant] = read_artifact(folder).contract.variants
    graph = next(each for each in variant.graphs if each.role == "decode")
    inputs = {
        each.name: allocate([size if isinstance(size, int) else size.max for size in each.shape], each.dtype)
        for each in graph.inputs
    }
    outputs = {each.name: allocate(each.shape, each.dtype) for each in graph.outputs}
    for layer in graph.cache:
        outputs |= {layer.key_out: inputs[layer.key_in], layer.value_out: inputs[layer.value_in]}
    return engine.bind(graph.name, inputs, outputs), inputs, outputs


@pytest.fixture
def copied(llama, tmp_path):
    return Path(shutil.copytree(llama[1], tmp_path / "made"))


def test_another_version_of_the_interface_is_refused(copied):
    with pytest.raises(ArtifactError, match=r"version 7 of the interface to this runtime, which has version 1"):
        open_engine(copied, abi=7)


def test_a_library_that_asks_for_another_is_refused_before_it_is_opened(copied):
    foreign = next(Path(onnxruntime.__file__).parent.glob("capi/onnxruntime_pybind11_state*.so"))
    shutil.copy(foreign, copied / "decode.so")
    with pytest.raises(FormatError, match=r"decode\.so asks for .*libstdc\+\+\.so\.6"):
        bind_decode(open_engine(copied), copied)


def test_a_library_without_the_interface_is_refused(copied):
    shutil.copy(msgspec._core.__file__, copied / "decode.so")
    with pytest.raises(ArtifactError, match=r"decode\.so cannot be opened: .*precast_abi|undefined symbol"):
        bind_decode(open_engine(copied), copied)


def test_weights_that_are_missing_or_of_another_kind_are_refused(copied):
    tensors = load_file(copied / "model.safetensors")
    name = next(iter(tensors))
    for changed, words in (
        ({key: value for key, value in tensors.items() if key != name}, "needs the weight"),
        (tensors | {name: tensors[name].double()}, "in another dtype than float64"),
    ):
        save_file(changed, copied / "model.safetensors")
        engine = open_engine(copied)
        with pytest.raises(FormatError, match=words):
            [engine._get_library(graph) for graph in ("prefill", "decode")]


def test_arrays_of_another_shape_are_refused(copied):
    engine = open_engine(copied)
    step, inputs, outputs = bind_decode(engine, copied)
    step()
    assert np.isfinite(outputs["logits"]).all()
    with pytest.raises(ArtifactError, match=r"logits is to be a contiguous array of float32"):
        engine.bind("decode", inputs, outputs | {"logits": outputs["logits"][..., :-1].copy()})
