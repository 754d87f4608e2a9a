"""What native code for a level of instructions multiplies in, and how programs are written for it."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._inductor import cpp_builder
from torch._inductor.cpu_vec_isa import VecAMX, VecAVX512, VecAVX512VNNI, VecISA
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from precast.exporter.backends.aoti import compiler, inductor_patches, isa, library
from precast.exporter.backends.aoti.options import AotiOptions
from precast.exporter.backends.aten import linear, lowering
from precast.exporter.options import PrecisionOptions
from precast.exporter.quantize.linear import Packed
from precast.exporter.quantize.methods import Scheme, round_to_nearest
from precast.runtime.errors import PrecastWarning

F = nn.functional
BF16, FP16 = torch.bfloat16, torch.float16
ZEN3, ZEN4 = {*isa._V3}, {*isa._V4, "avx512_vnni", "avx512_bf16"}
SAPPHIRE_RAPIDS = {*ZEN4, "amx_tile", "amx_bf16", "avx512_fp16"}


@pytest.mark.parametrize(
    ("level", "flags", "products"),
    [
        ("avx2", SAPPHIRE_RAPIDS, set()),
        ("avx512", SAPPHIRE_RAPIDS, set()),
        ("native", ZEN3, set()),
        ("native", ZEN4, {BF16}),
        ("native", SAPPHIRE_RAPIDS, {BF16, FP16}),
        ("native", {"asimd", "asimdhp"}, {FP16}),
        ("native", {"asimd", "asimdhp", "bf16", "i8mm"}, {BF16, FP16}),
        ("native", set(), set()),
    ],
)
def test_a_level_multiplies_what_it_has_instructions_for(monkeypatch, level, flags, products):
    """The level that is compiled for decides, whatever this machine has."""
    monkeypatch.setattr(isa, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(isa.platform, "machine", lambda: "x86_64")
    forms = library.lowering_options_for("cpu", level)
    assert {BF16, FP16} - forms.float32_matmuls == products
    assert forms.matmul_dtype == (BF16 if BF16 in products else torch.float32)
    recorded = library.matmul_dtype_names(forms).split(", ")
    assert recorded == ["float32", *sorted(str(each).removeprefix("torch.") for each in products)]


def test_a_gpu_multiplies_bfloat16_whatever_the_host_has(monkeypatch):
    monkeypatch.setattr(isa, "cpu_flags", frozenset)
    forms = library.lowering_options_for("cuda", "native")
    assert (forms.matmul_dtype, forms.float32_matmuls) == (BF16, frozenset())


class Multiplies(nn.Module):
    """Products of every kind, many rows each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv1d(12, 12, 3, padding="same")
        self.patches, self.up = nn.Conv2d(1, 4, 2, stride=2), nn.ConvTranspose1d(12, 12, 2, stride=2)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.linear(x)
        attended = F.scaled_dot_product_attention(y, x, x, attn_mask=seen)
        scores = torch.bmm(x, y.mT)
        return (
            attended, self.conv(scores), self.up(x), self.patches(x[:, None]), x @ y.mT,
            torch.einsum("bik,bjk->bij", x, y), torch.baddbmm(scores, x, y.mT),
        )  # fmt: skip


class Seen(TorchDispatchMode):
    """The dtypes of what is multiplied, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes, self.count = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("mm", "conv", "attention", "linear")):
            self.dtypes |= {each.dtype for each in tree_leaves(args) if torch.is_tensor(each) and each.ndim > 1}
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_what_the_processor_does_not_multiply_is_multiplied_in_float32(dtype):
    """Four to thirty times as fast as what libraries do instead; a mask of what is seen is no number."""
    torch.manual_seed(0)
    module, x = Multiplies().eval(), torch.randn(2, 12, 8)
    given = x.to(dtype), torch.ones(12, 12, dtype=torch.bool).tril()
    exported = torch.export.export(module.to(dtype), given)
    run = lowering._LoweringInterpreter(exported.graph_module, library.lowering_options_for("cpu", "avx2"), None)
    held = [exported.state_dict[spec.target] for spec in exported.graph_signature.input_specs if spec.target]
    with Seen() as seen, torch.no_grad():
        found = run.run(*held, *given)
    assert seen.count >= 8
    assert seen.dtypes <= {torch.float32, torch.bool}
    with torch.no_grad():
        expected = module(*given)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype, "what comes after counts on it"
        assert torch.allclose(one.float(), other.float(), atol=0.05)


def test_an_encoder_is_written_anew_only_where_it_has_to():
    exported = torch.export.export(nn.Linear(8, 8, dtype=BF16), (torch.ones(30, 8, dtype=BF16),))
    assert lowering._has_float32_matmul(exported, library.lowering_options_for("cpu", "avx2"))
    assert not lowering._has_float32_matmul(exported, library.lowering_options_for("cuda", "avx2"))
    plain = torch.export.export(nn.Linear(8, 8), (torch.ones(30, 8),))
    assert not lowering._has_float32_matmul(plain, library.lowering_options_for("cpu", "avx2"))


@pytest.mark.parametrize(
    "scheme", [Scheme(8, 64, "integer"), Scheme(8, 32, "symmetric"), Scheme(4, 32, "symmetric")], ids=str
)
@pytest.mark.parametrize("level", ["avx2", "avx512"])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_codes_are_multiplied_as_the_level_does(scheme, level, has_kernel):
    """By the kernel, and where it does not take such groups as a matrix of float32."""
    asked = []

    def gemm(x, codes, scales, zeros, bits):
        asked.append("kernel")
        return x.new_full((len(x), len(codes)), 7.0) if has_kernel else None

    def matrix(codes, scales, zeros, bits, dtype):
        asked.append(dtype)
        return codes.new_zeros(codes.shape[0], 64, dtype=dtype)

    forms = library.lowering_options_for("cpu", level)
    kernels = replace(forms.kernels, quantized_gemm=gemm, dequantize=matrix)
    packed = Packed(round_to_nearest(torch.randn(5, 64), scheme))
    codes = linear.PackedWeight(
        packed.codes, packed.scales, packed.zeros, packed.bits, packed.group, packed.columns, packed.extra
    )
    x = torch.randn(3, 10, 64)
    found = linear.quantized_linear(x, codes, torch.ones(5), lambda x: x, forms.matmul_dtype, kernels, False)
    assert asked == (["kernel"] if has_kernel else ["kernel", torch.float32])
    assert torch.equal(found, torch.full((3, 10, 5), 8.0 if has_kernel else 1.0))


def test_a_dtype_that_is_not_multiplied_is_said(recwarn):
    avx2, forms = AotiOptions(isa="avx2"), library.lowering_options_for("cpu", "avx2")
    with pytest.warns(PrecastWarning, match=r"isa='avx2' has no instructions that multiply float16: .* float32"):
        compiler._warn_of_float32_matmuls(avx2, PrecisionOptions(auto_cast="matmul", auto_cast_type="fp16"), forms)
    with pytest.warns(PrecastWarning, match="multiply bfloat16"):
        compiler._warn_of_float32_matmuls(avx2, PrecisionOptions(dtype="bfloat16"), forms)
    recwarn.clear()
    compiler._warn_of_float32_matmuls(avx2, PrecisionOptions(), forms)
    compiler._warn_of_float32_matmuls(
        AotiOptions(device="cuda"), PrecisionOptions(dtype="bfloat16"), library.lowering_options_for("cuda", "native")
    )
    assert not recwarn


# ---------------------------------------------------------------- trial programs


@pytest.fixture
def tried(monkeypatch):
    """The trial programs that were compiled: a function of the release of GCC, 0 for another compiler."""

    def ask(gcc, code):
        programs = []
        monkeypatch.setattr(VecISA, "check_build", lambda isa, code: programs.append(code))
        monkeypatch.setattr(inductor_patches, "_gcc_release", lambda compiler: gcc)
        with inductor_patches.know_the_compiler():
            answer = VecAVX512().check_build(code)
        return answer, programs

    return ask


TRIAL = VecAVX512._avx512_bf16_code


@pytest.mark.parametrize(("gcc", "code"), [(9, TRIAL), (0, TRIAL), (14, "another program")])
def test_a_compiler_that_is_not_known_to_manage_is_tried(tried, gcc, code):
    assert tried(gcc, code) == (False, [code])


@pytest.mark.parametrize("gcc", [10, 14])
def test_a_compiler_that_is_known_to_manage_is_not_tried(tried, gcc):
    assert tried(gcc, TRIAL) == (True, [])


FLAGS = {
    VecISA._avx_code: "-mavx2",
    TRIAL: "-mavx512bf16",
    VecAVX512VNNI._avx512_vnni_code: "-mavx512vnni -mavx512vl",
    VecAMX._amx_code: "-mamx-tile -mamx-bf16 -mamx-int8",
    VecAMX._amx_fp16_code: "-mamx-tile -mamx-fp16",
}


@pytest.mark.parametrize("code", FLAGS, ids=FLAGS.get)
def test_this_compiler_manages_what_it_is_known_to(code, tmp_path):
    """On whatever CPU: the first of the programs, which is PyTorch's own headers, by its flags alone."""
    compiler = cpp_builder.get_cpp_compiler()
    if inductor_patches._gcc_release(compiler) < inductor_patches._FIRST_GCC[code]:
        pytest.skip("GCC is older, or the compiler is another")
    (tmp_path / "trial.cpp").write_text("#include <immintrin.h>" if code is VecISA._avx_code else code, "utf-8")
    flags = ["-mavx512f", "-mavx512vl", *FLAGS[code].split()]
    subprocess.run([compiler, *flags, "-c", tmp_path / "trial.cpp", "-o", tmp_path / "trial.o"], check=True)
