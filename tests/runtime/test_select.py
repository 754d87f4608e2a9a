"""Which variant runs where: decided from facts, so these machines need not be this one."""

from __future__ import annotations

import handmade
import pytest

from precast.runtime.artifact.schema import Host
from precast.runtime.errors import HostError
from precast.runtime.hosts.select import Accepted, Machine, Rejected, choose_variant, judge, this_machine

XEON = Machine(
    "linux-x86_64", frozenset({"avx2", "avx512f", "amx_tile"}), frozenset({"cpu"}),
    {"onnxruntime": "1.31.1", "torch": "2.13.0+cpu"},
)  # fmt: skip
GRAVITON = Machine("linux-aarch64", frozenset({"asimd", "sve"}), frozenset({"cpu"}), {"onnxruntime": "1.31.1"})
GPU_BOX = Machine("linux-x86_64", frozenset({"avx2"}), frozenset({"cpu", "cuda"}), {"torch": "2.9.1"})
LAPTOP = Machine("darwin-arm64", frozenset(), frozenset({"cpu"}), {"onnxruntime": "1.20.0"})


def _variant(name="any", platforms=(), device="cpu", isa=(), **versions):
    host = Host(platforms=list(platforms), device=device, isa=list(isa), min_versions=versions)
    return handmade.variant(name, host=host)


ONNX = _variant("onnx", onnxruntime="1.23")
NATIVE = _variant("native", ["linux-x86_64"], isa=["avx2", "avx512f"], torch="2.13")
CUDA = _variant("cuda", ["linux-x86_64", "linux-aarch64"], "cuda", torch="2.9")


@pytest.mark.parametrize(
    ("variant", "machine", "reason"),
    [
        (_variant(), LAPTOP, None),
        (ONNX, XEON, None),
        (ONNX, GRAVITON, None),
        (ONNX, LAPTOP, "onnxruntime is 1.20.0, it needs 1.23 (pip install -U 'onnxruntime>=1.23')"),
        (ONNX, GPU_BOX, "onnxruntime is not installed (pip install 'onnxruntime>=1.23')"),
        (NATIVE, XEON, None),
        (NATIVE, GRAVITON, "it was built for linux-x86_64; this is linux-aarch64"),
        (
            NATIVE,
            GPU_BOX,
            "this CPU lacks avx512f; also, torch is 2.9.1, it needs 2.13 (pip install -U 'torch>=2.13')",
        ),
        (CUDA, GPU_BOX, None),
        (CUDA, XEON, "it needs the device cuda; here are cpu"),
        (CUDA, LAPTOP, "it was built for linux-x86_64, linux-aarch64; this is darwin-arm64"),
    ],
)
def test_judge(variant, machine, reason):
    expected = Accepted(variant) if reason is None else Rejected(variant, reason)
    assert judge(variant, machine) == expected


@pytest.mark.parametrize(
    ("have", "minimum", "runs"),
    [
        ("1.31.1", "1.31", True),
        ("1.31", "1.31.0", True),
        ("1.31.0", "1.31", True),
        ("1.9.2", "1.31", False),
        ("2.13.0+cpu", "2.13", True),
        ("2.13+cu129", "2.13.1", False),
        ("2.9.0rc1", "2.9", True),
        ("10.0", "9.9", True),
    ],
)
def test_versions_are_numbers(have, minimum, runs):
    verdict = judge(_variant(lib=minimum), Machine("linux-x86_64", versions={"lib": have}))
    assert isinstance(verdict, Accepted) == runs


def test_of_one_backend_the_most_instructions_are_chosen():
    old, new = (_variant(f"native-{len(isa)}", ["linux-x86_64"], isa=isa) for isa in (["avx2"], ["avx2", "avx512f"]))
    contract = handmade.contract(variants=[old, new])
    assert choose_variant(contract, XEON) == new
    assert choose_variant(contract, Machine("linux-x86_64", frozenset({"avx2"}))) == old
    assert choose_variant(contract, XEON, old.name) == old


def test_the_first_that_runs_is_chosen():
    contract = handmade.contract(variants=[CUDA, NATIVE, ONNX])
    assert choose_variant(contract, XEON) == NATIVE
    assert choose_variant(contract, GRAVITON) == ONNX
    assert choose_variant(contract, GPU_BOX) == CUDA
    assert choose_variant(contract, XEON, "onnx") == ONNX


def test_none_runs_and_each_says_why():
    contract = handmade.contract(variants=[CUDA, NATIVE, ONNX])
    with pytest.raises(HostError) as caught:
        choose_variant(contract, LAPTOP)
    assert str(caught.value) == (
        "No variant of this artifact runs here. "
        "cuda: it was built for linux-x86_64, linux-aarch64; this is darwin-arm64; "
        "native: it was built for linux-x86_64; this is darwin-arm64; "
        "onnx: onnxruntime is 1.20.0, it needs 1.23 (pip install -U 'onnxruntime>=1.23')."
    )


def test_the_one_asked_for_is_not_replaced_by_another():
    contract = handmade.contract(variants=[CUDA, ONNX])
    with pytest.raises(HostError, match="cuda: it needs the device cuda; here are cpu") as caught:
        choose_variant(contract, XEON, "cuda")
    assert "onnx:" not in str(caught.value)
    with pytest.raises(HostError, match=r"has no variant 'neuron'\. It has: cuda, onnx"):
        choose_variant(contract, XEON, "neuron")


def test_this_machine_is_asked_only_for_what_matters():
    contract = handmade.contract(
        variants=[ONNX, _variant("other", **{"numpy": "1", "no_such_library": "1", "../numpy": "1"})]
    )
    machine = this_machine(contract)
    assert set(machine.versions) == {"onnxruntime", "numpy"}
    assert machine.devices == {"cpu"}
    assert choose_variant(contract, machine) == ONNX
