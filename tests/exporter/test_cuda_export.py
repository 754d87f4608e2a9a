"""Compiling for a GPU, as far as it is known without one: what is refused, where programs go, what is recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from precast.exporter import ExportOptions, export
from precast.exporter.backends.aoti import compiler, gpu, library, workspace
from precast.runtime.engines.safetensors_map import open_weights
from precast.runtime.engines.torch_views import view_weights
from precast.runtime.errors import ExportError
from precast.runtime.hosts.cuda import CudaHost

ASKED = {"backend": "aoti", "device": "cuda", "sequence_length": (32,), "validate": False}
ALONE = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_begun(tmp_path):
    """The checkpoint is not even looked for."""
    message = "device='cuda' compiles on the GPU that it compiles for.*For this machine's CPU leave device= out"
    with pytest.raises(ExportError, match=message):
        export("no/such-model", tmp_path / "out", ExportOptions(**ASKED))


def test_without_triton_nothing_is_begun(monkeypatch):
    monkeypatch.setattr(gpu, "cuda_host", lambda: CudaHost("12.8", "9.0"))
    monkeypatch.setattr(gpu, "has_triton", lambda: False)
    with pytest.raises(ExportError, match="pip install triton"):
        compiler.AotiCompiler().check_tools(ExportOptions(**ASKED))


@pytest.fixture
def compiled(monkeypatch):
    """`export` for a GPU where PyTorch has none: programs go to its device without memory, and are not compiled."""
    built = {}

    def build(exported, target, isa, device, more, linker):
        assert (device, more, linker) == ("cuda", {}, None)
        built[target.stem] = exported
        target.write_bytes(b"\x7fELF")

    monkeypatch.setattr(gpu, "cuda_host", lambda: CudaHost("12.8", "9.0"))
    monkeypatch.setattr(gpu, "has_triton", lambda: True)
    monkeypatch.setattr(compiler, "move_to_device", lambda exported, device: gpu.move_to_device(exported, "meta"))
    monkeypatch.setattr(compiler, "build_library", build)
    return built


def places(exported):
    """Of everything that a program holds, makes and is tried with, by kind."""
    nodes = exported.graph.nodes
    kinds = {
        "weights": [*exported.state_dict.values(), *exported.constants.values()],
        "examples": tree_leaves(exported.example_inputs),
        "values": tree_leaves([node.meta.get("val") for node in nodes]),
    }
    found = {name: {each.device.type for each in held if torch.is_tensor(each)} for name, held in kinds.items()}
    asked = [leaf for node in nodes for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, torch.device)]
    named = [node.kwargs["device"] for node in nodes if "device" in node.kwargs]
    return {**found, "asked": {torch.device(each).type for each in [*asked, *named] if each is not None} or {"meta"}}


@pytest.mark.parametrize(
    ("family", "auto", "options"),
    [
        ("llama", "AutoModelForCausalLM", {}),
        ("gpt2", "AutoModelForCausalLM", {"quantize": "int8", "group_size": 16}),
        ("bert", "AutoModel", {"batch_size": 2, "sequence_length": (16, 32)}),
    ],
)
def test_all_of_a_program_goes_to_the_device(checkpoint, tmp_path, compiled, family, auto, options):
    """But for the weights in the artifact, which are those for a CPU."""
    made = export(str(checkpoint(family, auto)), tmp_path / "out", ExportOptions(**{**ASKED, **options}))
    (variant,) = made.contract.variants
    assert compiled.keys() == {graph.name for graph in variant.graphs}
    for exported in compiled.values():
        assert all(where == {"meta"} for where in places(exported).values()), places(exported)
        # Kernels of our own are for processors.
        assert {str(node.target) for node in exported.graph.nodes} & {
            "precast.gemv.default",
            "precast.decode_attention.default",
        } == set()
    weights = view_weights(open_weights([made.path / name for name in variant.weights]))
    needed = {name for each in compiled.values() for name in (*each.state_dict, *each.constants)}
    assert weights
    assert {name.rpartition(":")[2] for name in weights} <= needed
    assert all(each.device.type == "cpu" for each in weights.values())
    told = {name: said for name, said in variant.compiler.options.items() if name not in ("program", "request")}
    recorded = {"isa": "native", "frozen": False, "compute_capability": "9.0", "cuda": "12.8"}
    assert (variant.host.device, told) == ("cuda", recorded)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What inductor is told, instead of asking it; it leaves the files that are put into the list."""
    told = {"files": [str(tmp_path / "model.so")]}
    (tmp_path / "model.so").write_bytes(b"\x7fELF")

    def compile_(module, arguments, keywords, options):
        told["options"] = options
        return told["files"]

    monkeypatch.setattr(torch._inductor, "aot_compile", compile_)
    monkeypatch.setattr(library, "_strip_symbols", lambda strip, content: content)
    return told


def test_kernels_are_within_the_library(asked, tmp_path):
    with workspace.compiler_workspace():
        library.build_library(ALONE, tmp_path / "out.so", "native", "cuda")
    options = asked["options"]
    assert options["aot_inductor.embed_kernel_binary"] is True
    assert options["aot_inductor.package_constants_in_so"] is False
    assert "cpp.threads" not in options


def test_kernels_beside_the_library_are_not_lost(asked, tmp_path):
    asked["files"] += ["/cache/ab/cabc.cubin", "/cache/ab/cdef.cubin"]
    with (
        workspace.compiler_workspace(),
        pytest.raises(ExportError, match=r"left 2 kernels beside the library.*cabc\.cubin"),
    ):
        library.build_library(ALONE, tmp_path / "out.so", "native", "cuda")
    assert not Path(tmp_path / "out.so").exists()


def test_code_for_the_cpu_is_told_nothing_of_gpus(asked, tmp_path):
    with workspace.compiler_workspace():
        library.build_library(ALONE, tmp_path / "out.so", "native")
    assert asked["options"]["cpp.dynamic_threads"] is True
    assert "aot_inductor.embed_kernel_binary" not in asked["options"]
