"""The options of an export as arguments of neuronx-cc.

Source of every flag: the Neuron documentation, compiler/neuronx-cc/api-reference-guide/index.rst.
"""

from __future__ import annotations

from ...options.precision import PrecisionOptions
from .options import NeuronOptions

__all__ = ["flags_of"]

_CASTS = {"none": "none", "matmul": "matmult", "all": "all"}


def flags_of(neuron: NeuronOptions, precision: PrecisionOptions) -> list[str]:
    """The arguments of neuronx-cc, each one word; what the user adds comes last, and so has the last word.

    Defaults are said all the same, in this spelling: NxD looks for it, and where it does not find it adds its own
    `--auto-cast=none` and `-O1` (append_default_compiler_flags in neuronx_distributed/trace/functions.py). The model
    type is the one that optimum-neuron found all but diffusion models to need (optimum/exporters/neuron/convert.py).
    """
    flags = ["--target", str(neuron.instance_type), f"--auto-cast={_CASTS[precision.auto_cast]}"]
    if precision.auto_cast != "none":
        flags.append(f"--auto-cast-type={precision.cast_type}")
    flags += [f"-O{neuron.optlevel or 2}", "--model-type=transformer"]
    return [*flags, *(word for argument in neuron.compiler_args for word in argument.split())]
