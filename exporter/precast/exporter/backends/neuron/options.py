"""The options of the `neuron` backend, and which combinations mean something.

Sources: the instance types and flags are those of the Neuron documentation, compiler/neuronx-cc/api-reference-guide;
what trace takes that of frameworks/torch/torch-neuronx/api-reference-guide/inference/api-torch-neuronx-trace.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...options.declaration import describe
from ...options.layout import OPTIMUM_NEURON
from ...options.parallel import ParallelOptions
from ...options.shapes import ShapeOptions

__all__ = ["INSTANCE_TYPES", "STRATEGIES", "NeuronOptions"]

INSTANCE_TYPES = ("inf1", "inf2", "trn1", "trn1n", "trn2")
STRATEGIES = ("trace", "model-builder")

_REFUSED = {
    "torch-native": "TorchNeuron, the successor that compiles through torch.compile(backend='neuron'), is in closed "
    "beta, and its first release compiles only on a device and saves no file",
    "transformers-neuronx": "AWS ended the support of transformers-neuronx with Neuron SDK 2.26; its models are "
    "compiled by the strategies above",
}
"""Strategies that are known and impossible, with the reason."""

_OURS = {
    "--target": "by instance_type",
    "--auto-cast": "by auto_cast",
    "--auto-cast-type": "by auto_cast_type",
    "--optlevel": "by optlevel=",
    "-O": "by optlevel=",
    "-O1": "by optlevel=1",
    "-O2": "by optlevel=2",
    "-O3": "by optlevel=3",
    "--framework": "by no option, as it is always XLA",
    "--output": "by the target of the export, and the artifact names its files",
}
"""What neuronx-cc calls what options of our own say."""


@dataclass(frozen=True, kw_only=True)
class NeuronOptions(ParallelOptions):
    """What neuronx-cc compiles for, and how. Each rank is a NeuronCore.

    Attributes:
        instance_type: what to compile for, one of INSTANCE_TYPES; required.
        strategy: how to compile, one of STRATEGIES; None is "trace", or "model-builder" for several cores.
        inline_weights: weights within every compiled graph, rather than once beside all of them.
        optlevel: how hard neuronx-cc optimises, 1 to 3; None is its own default, 2.
        compiler_args: further arguments of neuronx-cc, as they are.
        compiler_workdir: where neuronx-cc is to leave its files; None is a folder that goes away again.
    """

    instance_type: str | None = field(
        default=None, metadata=describe(metavar="TYPE", help_text="Compile for inf2, trn1, trn1n or trn2.")
    )
    strategy: str | None = field(
        default=None,
        metadata=describe(metavar="NAME", help_text="As: trace, or model-builder (one set of weights, several cores)."),
    )
    inline_weights: bool = field(
        default=False, metadata=describe(help_text="Weights within each graph, or once beside them (default).")
    )
    optlevel: int | None = field(
        default=None, metadata=describe(flags=("-O",), metavar="1|2|3", help_text="How hard to optimise; 2.")
    )
    compiler_args: tuple[str, ...] = field(
        default=(),
        metadata=describe(
            flags=("--compiler-arg",),
            metavar="ARG",
            help_text="Passed to neuronx-cc, as --compiler-arg=--verbose=info; repeatable.",
        ),
    )
    compiler_workdir: Path | None = field(
        default=None, metadata=describe(metavar="DIR", help_text="Keep neuronx-cc's files and log here.")
    )

    @property
    def chosen_strategy(self) -> str:
        """The strategy that the user named, or the one that can do what is asked for."""
        return self.strategy or ("model-builder" if self.is_parallel else "trace")

    def problems(self) -> Iterator[str]:
        """See OptionsPart."""
        yield from super().problems()
        yield from _target_problems(self.instance_type)
        yield from _strategy_problems(self)
        if self.optlevel not in (None, 1, 2, 3):
            yield f"optlevel={self.optlevel} is no level of neuronx-cc; the choices are: 1, 2, 3."
        yield from _argument_problems(self.compiler_args)

    @property
    def instead_of_ranks(self) -> str:
        """See ParallelOptions."""
        return "Leave it out; opened with cores='0-1', say, a whole model runs on each of these NeuronCores"

    def layout_problems(self, layout: str, shapes: ShapeOptions) -> Iterator[str]:
        """See BackendOptions."""
        if layout != OPTIMUM_NEURON:
            return
        flag = f"layout={OPTIMUM_NEURON!r}"
        if not self.inline_weights:
            yield f"{flag} has no file for weights beside the graph; give inline_weights=True, too."
        if self.strategy not in (None, "trace") or self.is_parallel:
            yield f"{flag} holds one graph for one NeuronCore; leave out strategy= and tensor_parallel."
        sizes = {"batch_size": shapes.batch_sizes, "sequence_length": shapes.sequence_length,
                 "audio_sequence_length": shapes.audio_sequence_length}  # fmt: skip
        for name, given in sizes.items():
            if len(given) > 1:
                yield f"{flag} holds one graph, and {name}={','.join(map(str, given))} asks for more; give one size."


def _target_problems(instance_type: str | None) -> Iterator[str]:
    known = ", ".join(INSTANCE_TYPES[1:])
    if instance_type is None:
        yield f"backend='neuron' compiles for one kind of machine: give instance_type; the choices are: {known}."
    elif instance_type == "inf1":
        yield (
            f"instance_type='inf1' has NeuronCores of the first version, which torch-neuronx and neuronx-cc do not "
            f"compile for, and what does, torch-neuron, ends with PyTorch 1.13. The choices are: {known}."
        )
    elif instance_type not in INSTANCE_TYPES:
        yield f"instance_type={instance_type!r} is not supported; the choices are: {known}."


def _strategy_problems(options: NeuronOptions) -> Iterator[str]:
    known, cores = ", ".join(STRATEGIES), options.tensor_parallel
    if options.strategy in _REFUSED:
        yield f"strategy={options.strategy!r} is not possible: {_REFUSED[options.strategy]}. The choices are: {known}."
    elif options.strategy not in (None, *STRATEGIES):
        yield f"strategy={options.strategy!r} is not supported; the choices are: {known}."
    if cores > 1 and options.strategy == "trace":
        yield (
            f"tensor_parallel={cores} divides weights between NeuronCores, and strategy='trace' compiles for one; "
            f"leave strategy= out, or give 'model-builder'."
        )
    if options.inline_weights and options.chosen_strategy == "model-builder":
        yield (
            "inline_weights=True puts weights into each graph; model-builder has one set for all. Give "
            "strategy='trace'."
        )


def _argument_problems(arguments: tuple[str, ...]) -> Iterator[str]:
    for argument in arguments:
        name = argument.partition("=")[0].split()[0] if argument.strip() else ""
        if not name.startswith("-"):
            yield f"compiler_args={argument!r} is no argument of neuronx-cc, as compiler_args='--verbose=info' is."
        elif name in _OURS:
            yield f"compiler_args={argument!r} is said otherwise: {_OURS[name]}."
