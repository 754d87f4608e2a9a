"""ExportedProgram -> one shared library, without weights and without paths of the machine that built it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch._inductor

from precast.runtime.errors import ExportError

from ...quiet import silence
from ..aten.kernel_set import Kernels
from ..aten.lowered import LoweringOptions
from ..aten.materialize import materialize
from . import collectives  # noqa: F401  (registers lowerings)
from .attention import attention, decode_attention, prefill_attention
from .dequantize import dequantize
from .fuse_attention import fuse_attention
from .gemv import gemv
from .gpu import GPU_OPTIONS, check_kernels_embedded
from .inductor_patches import keep_out_of_code, keep_short_loops_serial, know_the_compiler
from .int8_gemm import int8_gemm, pack_panels
from .isa import compiler_options, matmul_dtypes
from .layers import extract_layers
from .lora import lora
from .quantized_gemm import quantized_gemm
from .standalone.link import Linker
from .workspace import FOLDER

__all__ = ["build_library", "finish_library", "lowering_options_for", "make_module", "matmul_dtype_names"]

_LOWERING = LoweringOptions(
    materialize=materialize, reduce_small_matmul=True, matmul_dtype=torch.bfloat16, functional=False
)
_KERNELS = Kernels(
    gemv, quantized_gemm, pack_panels, int8_gemm, dequantize, decode_attention, prefill_attention, attention, lora
)
_NARROW = frozenset({torch.bfloat16, torch.float16})


def lowering_options_for(device: str, isa: str, *, is_parallel: bool = False) -> LoweringOptions:
    """How programs are lowered. One token: reductions that Inductor fuses, or kernels of our own where they are faster.
    More tokens: GEMMs, in bfloat16 where weights are quantized; on a CPU only in dtypes that it has instructions for,
    and between ranks in float32, as their libraries call nothing of PyTorch."""
    if device == "cuda":
        return _LOWERING
    dtypes = frozenset[torch.dtype]() if is_parallel else matmul_dtypes(isa)
    matmul_dtype = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32
    return replace(_LOWERING, kernels=_KERNELS, matmul_dtype=matmul_dtype, float32_matmuls=_NARROW - dtypes)


def matmul_dtype_names(options: LoweringOptions) -> str:
    """The dtypes in which matrices may be multiplied, for the record of the compiler's options."""
    dtypes = [torch.float32, *sorted(_NARROW - options.float32_matmuls, key=str)]
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


_OPTIONS: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    # Nothing for debuggers.
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
}
_CPU_OPTIONS: dict[str, Any] = {
    # Thread count is set at run time; short loops stay serial.
    "cpp.dynamic_threads": True,
    "cpp.threads": 2,
    # Our kernels cannot fuse what comes after them.
    "epilogue_fusion": False,
    # A concatenation is computed where it is read.
    "force_pointwise_cat": True,
    # Fused multiply-add, rounded once: the kernels of other backends do the same.
    "cpp.enable_floating_point_contract_flag": "fast",
}


def build_library(
    exported: torch.export.ExportedProgram,
    target: Path,
    isa: str,
    device: str = "cpu",
    extra: Mapping[str, Any] = MappingProxyType({}),
    linker: Linker | None = None,
) -> None:
    """Compile a program, whose weights are on `device`, to the library `target`, which is given the weights at run time
    unless Inductor's options in `extra` say otherwise. Without a `linker` it is linked with PyTorch.

    Raises ExportError.
    """
    by_device = _CPU_OPTIONS if device == "cpu" else GPU_OPTIONS
    options = {**_OPTIONS, **by_device, **compiler_options(isa), **extra}
    weights = [each for each in (*exported.state_dict.values(), *exported.constants.values()) if torch.is_tensor(each)]
    with silence("torch"), torch.no_grad(), know_the_compiler(), keep_out_of_code(weights), _thread_rule(device):
        try:
            files = _compile(exported, options, device == "cpu", linker)
        except Exception as error:
            # Inductor and the compiler that it calls raise errors of many types, and wrap those of our linker.
            if isinstance(cause := getattr(error, "inner_exception", error), ExportError):
                raise cause from None
            raise ExportError(f"AOTInductor cannot compile this model. {_first_line(error)}") from error
    _check_constants(exported, files)
    check_kernels_embedded(files)
    library = next(Path(file) for file in files if isinstance(file, str) and file.endswith(".so"))
    finish_library(library, target)


def finish_library(library: Path, target: Path) -> None:
    """Write a library that Inductor linked to where it is to be, without what tells of this machine."""
    folders = [os.environ[FOLDER], os.path.dirname(torch.__file__)]
    target.write_bytes(_remove_paths(library.read_bytes(), folders))


def _thread_rule(device: str) -> AbstractContextManager[None]:
    return keep_short_loops_serial() if device == "cpu" else nullcontext()


def _compile(
    exported: torch.export.ExportedProgram, options: dict[str, Any], is_cpu: bool, linker: Linker | None
) -> list[Any]:
    arguments, keywords = exported.example_inputs
    module = make_module(exported)
    if is_cpu:
        fuse_attention(module)
    if linker and linker.can_call_layers:
        layers = extract_layers(module, "precast_layer")
        for layer in layers:
            with linker.linking(layer.name):
                torch._inductor.aot_compile(layer.module, layer.inputs, options=options)
        if layers:
            # What is left names every weight: optimizing it takes long, and hardly any of a step is in it.
            options = {**options, "aot_inductor.compile_wrapper_opt_level": "O0"}
    with linker.linking() if linker else nullcontext():
        files: Any = torch._inductor.aot_compile(module, arguments, keywords, options=options)
    return list(files)


def make_module(exported: torch.export.ExportedProgram) -> Any:
    """A program as a module, without checks of what was known when it was traced."""
    module: Any = exported.module(check_guards=False)
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        module.graph.erase_node(node)
    return module


def _check_constants(exported: torch.export.ExportedProgram, files: list[Any]) -> None:
    """Raise ExportError where the library expects constants that are no weights of the program."""
    known = {*exported.state_dict, *exported.constants}
    for held in files:
        if not isinstance(held, str) and (unknown := sorted(set(held) - known)):
            raise ExportError(
                f"AOTInductor made the constants {', '.join(unknown[:3])} of its own, which are not saved."
            )


def _remove_paths(library: bytes, folders: list[str]) -> bytes:
    """Overwrite the names of these folders, which messages and build records contain: nothing that runs reads them."""
    strip = shutil.which("strip")
    if strip:
        library = _strip_symbols(strip, library)
    for folder in folders:
        library = re.sub(re.escape(folder.encode()), lambda found: b"." * len(found[0]), library)
    return library


def _strip_symbols(strip: str, library: bytes) -> bytes:
    """Remove debugging symbols and the compiler's record, which nothing needs to run."""
    with tempfile.NamedTemporaryFile(suffix=".so", dir=os.environ[FOLDER]) as file:
        file.write(library)
        file.flush()
        subprocess.run([strip, "--strip-unneeded", file.name], check=True, capture_output=True)
        return Path(file.name).read_bytes()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
