"""The compiler of the `aoti` backend: programs lowered to ATen, then AOTInductor and the C++ compiler."""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from precast.runtime.artifact.schema import STANDALONE_ABI, Compiler, Graph, Host, Variant
from precast.runtime.artifact.weight_files import WEIGHTS
from precast.runtime.errors import PrecastWarning

from ...kinds.trace import Program
from ...options import ExportOptions
from ...options.precision import PrecisionOptions
from ...progress import progress
from .. import Compiled, release_of
from ..aten.lowered import Lowered, LoweringOptions
from ..aten.lowering import lower
from ..aten.safetensors import save_weights
from ..program_hash import hash_programs
from . import freezing
from .gpu import check_gpu, free_gpu_memory, gpu_facts, move_to_device
from .isa import cpu_flags_needed
from .library import (
    build_library,
    finish_library,
    lowering_options_for,
    matmul_dtype_names,
)
from .options import AotiOptions
from .standalone.link import Linker
from .workspace import check_compiler, compiler_workspace

__all__ = ["AotiCompiler"]


class AotiCompiler:
    """`torch.export` programs lowered to ATen, compiled by AOTInductor and the host's C++ compiler; for a GPU their
    kernels by Triton."""

    def check_tools(self, options: ExportOptions) -> None:
        """See NeedsTools."""
        check_compiler()
        if options.backend_options.device == "cuda":
            check_gpu()

    def compile(self, programs: Iterable[Program], stage: Path, options: ExportOptions) -> Compiled:
        """See ProgramCompiler. Raises ExportError where there is no compiler, or where it fails."""
        native: AotiOptions = options.backend_options
        lowering = lowering_options_for(native.device, native.isa, is_parallel=native.is_parallel)
        _warn_of_float32_matmuls(native, options.precision, lowering)
        lowered = [lower(program, lowering) for program in programs]
        program = _hash_lowered(lowered)
        is_cpu = native.device == "cpu"
        with compiler_workspace() as kept:
            if not is_cpu:
                # Before anything moves to a GPU: here all graphs still hold the same tensors.
                save_weights(lowered, stage / WEIGHTS)
                built = _Built(list(_build_libraries(lowered, stage, native, {})), ["CUDA"])
                free_gpu_memory()
            else:
                built = _build_for_cpu(lowered, stage, native, kept)
        graphs, missing = built.graphs, built.missing
        return Compiled(
            graphs=graphs,
            weights=[] if built.is_frozen else [WEIGHTS],
            host=Host(
                platforms=[f"{platform.system().lower()}-{platform.machine()}"],
                device=native.device,
                isa=cpu_flags_needed(native.isa),
                min_versions=_versions_needed(graphs, stage) if not missing else {"torch": release_of("torch")},
            ),
            compiler=Compiler(
                name="aotinductor",
                version=release_of("torch"),
                options={
                    "isa": native.isa,
                    "frozen": built.is_frozen,
                    **({"products": matmul_dtype_names(lowering)} if is_cpu else gpu_facts()),
                },
                torch=release_of("torch"),
                transformers=version("transformers"),
            ),
            abi=0 if missing else STANDALONE_ABI,
            requires_torch=missing,
            program=program,
        )

    def write_weights(
        self, programs: Iterable[Program], stage: Path, old: Variant | Compiled, options: ExportOptions
    ) -> Compiled:
        """See WritesWeights."""
        native: AotiOptions = options.backend_options
        lowering = lowering_options_for(native.device, native.isa, is_parallel=native.is_parallel)
        lowered = [lower(program, lowering) for program in programs]
        save_weights(lowered, stage / WEIGHTS)
        return Compiled(
            graphs=[replace(each.graph, file=f"{each.graph.name}.so") for each in lowered],
            weights=[WEIGHTS],
            host=old.host,
            compiler=old.compiler,
            abi=old.abi,
            requires_torch=old.requires_torch,
            program=_hash_lowered(lowered),
        )


def _hash_lowered(lowered: list[Lowered]) -> str:
    """The hash of what Inductor compiles, which writes single numbers into its code."""
    return hash_programs((each.exported for each in lowered), with_numbers=True)


def _warn_of_float32_matmuls(native: AotiOptions, precision: PrecisionOptions, lowering: LoweringOptions) -> None:
    """Warn where the CPU has no matrix instructions for the dtype that was asked for."""
    if precision.is_cast and getattr(torch, precision.cast_dtype) in lowering.float32_matmuls:
        subject = "This CPU" if native.isa == "native" else f"isa={native.isa!r}"
        warnings.warn(
            f"{subject} has no instructions that multiply {precision.cast_dtype}: prompts and encoders are multiplied "
            f"in float32 and gain nothing from it; a decoder's steps read half the bytes.",
            PrecastWarning,
            stacklevel=2,
        )


@dataclass(frozen=True)
class _Built:
    """Libraries, what they call that only PyTorch has, and whether their weights are within."""

    graphs: list[Graph]
    missing: list[str]
    is_frozen: bool = False


def _build_for_cpu(lowered: list[Lowered], stage: Path, native: AotiOptions, kept: Path) -> _Built:
    """Compile the programs so that all libraries stand alone. Where one cannot, or where oneDNN is faster, they are
    frozen if they can be, and else linked with PyTorch."""
    can_freeze, missing = freezing.can_freeze(lowered, native), ["oneDNN"]
    if not (can_freeze and freezing.pays(lowered, native.isa)):
        save_weights(lowered, stage / WEIGHTS)
        # Each is released when it is compiled, unless it may be compiled once more.
        built = _build_alone(list(lowered) if can_freeze else lowered, stage, native, kept, gives_up=can_freeze)
        if not (built.missing and can_freeze):
            return built
        (stage / WEIGHTS).unlink()
        missing += built.missing
    graphs = list(_build_libraries(lowered, stage, native, freezing.FREEZING_OPTIONS))
    return _Built(graphs, missing, is_frozen=True)


def _build_alone(lowered: list[Lowered], stage: Path, native: AotiOptions, kept: Path, *, gives_up: bool) -> _Built:
    """Compile the programs so that all libraries stand alone. Where one cannot, all are linked with PyTorch, or the
    others are not even compiled, if it `gives_up`."""
    has_products = not freezing.multiplies_narrow(lowered, native.isa)
    with Linker(native.isa, kept, has_products=has_products) as linker:
        graphs = []
        for graph in _build_libraries(lowered, stage, native, {}, linker):
            graphs.append(graph)
            if linker.missing and gives_up:
                return _Built(graphs, sorted(linker.missing))
        for graph, library in zip(graphs, linker.link_with_torch() if linker.missing else (), strict=False):
            finish_library(library, stage / graph.file)
        return _Built(graphs, sorted(linker.missing))


def _versions_needed(graphs: list[Graph], stage: Path) -> dict[str, str]:
    """The glibc that libraries that stand alone need: the newest release that one of their functions names."""
    named = {
        tuple(map(int, found.split(b".")))
        for graph in graphs
        for found in re.findall(rb"\0GLIBC_(\d+\.\d+)(?=\0)", (stage / graph.file).read_bytes())
    }
    return {"glibc": ".".join(map(str, max(named)))} if named else {}


def _build_libraries(
    lowered: list[Lowered],
    stage: Path,
    native: AotiOptions,
    extra: Mapping[str, Any],
    linker: Linker | None = None,
) -> Iterator[Graph]:
    """Compile the programs one by one, and release each afterwards."""
    total = len(lowered)
    while lowered:
        progress(total - len(lowered), total, f"{lowered[0].graph.name} as native code")
        each = lowered.pop(0)
        exported = each.exported if native.device == "cpu" else move_to_device(each.exported, native.device)
        file = f"{each.graph.name}.so"
        build_library(exported, stage / file, native.isa, native.device, extra, linker)
        yield replace(each.graph, file=file)
