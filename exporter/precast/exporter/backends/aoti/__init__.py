"""The `aoti` backend: native code of AOTInductor, one library per graph, weights in one file beside them."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from precast.runtime.artifact.schema import Compiler, Graph, Host
from precast.runtime.errors import PrecastWarning

from ...kinds.trace import Program
from ...options import ExportOptions
from ...progress import progress
from .. import Compiled
from ..aten.lowering import Forms, Lowered, lower
from ..aten.safetensors import save_weights
from . import freezing
from .gpu import check_gpu, facts, free, moved
from .isa import flags_of
from .library import build, check_compiler, forms_of, names_of, workspace

__all__ = ["AotiCompiler"]

WEIGHTS = "model.safetensors"


class AotiCompiler:
    """`torch.export` programs lowered to ATen, compiled by AOTInductor and the host's C++ compiler; for a GPU their
    kernels by Triton."""

    def check_tools(self, options: ExportOptions) -> None:
        """See NeedsTools."""
        check_compiler()
        if options.device == "cuda":
            check_gpu()

    def compile(self, programs: Iterable[Program], stage: Path, options: ExportOptions) -> Compiled:
        """See ProgramCompiler. Raises ExportError where there is no compiler, or where it fails."""
        forms = forms_of(options.device, options.isa)
        _say_widened(options, forms)
        lowered = [lower(program, forms) for program in programs]
        is_frozen, is_here = freezing.pays(lowered, options), options.device == "cpu"
        if not is_frozen:
            # While all graphs hold the same weights, in the host's memory.
            save_weights(lowered, stage / WEIGHTS)
        with workspace():
            graphs = list(_libraries(lowered, stage, options, freezing.FROZEN if is_frozen else {}))
        if not is_here:
            free()
        return Compiled(
            graphs=graphs,
            weights=[] if is_frozen else [WEIGHTS],
            host=Host(
                platforms=[f"{platform.system().lower()}-{platform.machine()}"],
                device=options.device,
                isa=flags_of(options.isa),
                min_versions={"torch": _release("torch")},
            ),
            compiler=Compiler(
                name="aotinductor",
                version=_release("torch"),
                options={
                    "isa": options.isa,
                    "frozen": is_frozen,
                    **({"products": names_of(forms)} if is_here else facts()),
                },
                torch=_release("torch"),
                transformers=version("transformers"),
            ),
        )


def _say_widened(options: ExportOptions, forms: Forms) -> None:
    """Tell who asked for a dtype that it does not make everything faster."""
    if options.is_cast and getattr(torch, options.cast_dtype) in forms.widened:
        what = "This CPU" if options.isa == "native" else f"--isa {options.isa}"
        warnings.warn(
            f"{what} has no instructions that multiply {options.cast_dtype}: prompts and encoders are multiplied in "
            f"float32 and gain nothing from it; a decoder's steps read half the bytes.",
            PrecastWarning,
            stacklevel=2,
        )


def _libraries(lowered: list[Lowered], stage: Path, options: ExportOptions, more: Mapping[str, Any]) -> Iterator[Graph]:
    """Compile the programs one by one, each of which is let go of afterwards."""
    total = len(lowered)
    while lowered:
        progress(total - len(lowered), total, f"{lowered[0].graph.name} as native code")
        each = lowered.pop(0)
        exported = each.exported if options.device == "cpu" else moved(each.exported, options.device)
        file = f"{each.graph.name}.so"
        build(exported, stage / file, options.isa, options.device, more)
        yield replace(each.graph, file=file)


def _release(name: str) -> str:
    return version(name).split("+", maxsplit=1)[0]
