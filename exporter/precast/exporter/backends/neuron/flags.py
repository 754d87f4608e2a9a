"""What the user asked for, in the words of neuronx-cc.

Source of every flag: the Neuron documentation, compiler/neuronx-cc/api-reference-guide/index.rst.
"""

from __future__ import annotations

from ...options import ExportOptions

__all__ = ["flags_of"]

_CASTS = {"none": "none", "matmul": "matmult", "all": "all"}


def flags_of(options: ExportOptions) -> list[str]:
    """The arguments of neuronx-cc, each one word; what the user adds comes last, and so has the last word.

    Defaults are said all the same, in this spelling: NxD looks for it, and where it does not find it adds its own
    `--auto-cast=none` and `-O1` (append_default_compiler_flags in neuronx_distributed/trace/functions.py). The model
    type is the one that optimum-neuron found all but diffusion models to need (optimum/exporters/neuron/convert.py).
    """
    flags = ["--target", str(options.instance_type), f"--auto-cast={_CASTS[options.auto_cast]}"]
    if options.auto_cast != "none":
        flags.append(f"--auto-cast-type={options.cast_type}")
    flags += [f"-O{options.optlevel or 2}", "--model-type=transformer"]
    return [*flags, *(word for argument in options.compiler_args for word in argument.split())]
