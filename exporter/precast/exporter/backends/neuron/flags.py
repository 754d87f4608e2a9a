"""What the user asked for, in the words of neuronx-cc.

Source of every flag: the Neuron documentation, compiler/neuronx-cc/api-reference-guide/index.rst.
"""

from __future__ import annotations

from collections.abc import Iterable

from precast.runtime.artifact.schema import Graph

from ...options import ExportOptions

__all__ = ["flags_of"]

_CASTS = {"none": "none", "matmul": "matmult", "all": "all"}


def flags_of(options: ExportOptions, graphs: Iterable[Graph]) -> list[str]:
    """The arguments of neuronx-cc, each one word; what the user adds comes last, and so has the last word.

    Defaults are said all the same, in this spelling: NxD looks for it, and where it does not find it adds its own
    `--auto-cast=none` and `-O1` (append_default_compiler_flags in neuronx_distributed/trace/functions.py).
    """
    flags = [f"--target={options.instance_type}", f"--auto-cast={_CASTS[options.auto_cast]}"]
    if options.auto_cast != "none":
        flags.append(f"--auto-cast-type={options.cast_type}")
    flags.append(f"-O{options.optlevel or 2}")
    if any(graph.role != "encode" for graph in graphs):
        flags.append("--model-type=transformer")
    return [*flags, *(word for argument in options.compiler_args for word in argument.split())]
