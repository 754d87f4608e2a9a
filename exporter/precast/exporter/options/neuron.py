"""What an export for AWS Neuron can be asked for, and which combinations mean something.

Sources: the instance types and flags are those of the Neuron documentation, compiler/neuronx-cc/api-reference-guide;
what trace takes that of frameworks/torch/torch-neuronx/api-reference-guide/inference/api-torch-neuronx-trace.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import ExportOptions

__all__ = ["INSTANCE_TYPES", "NEURON_FLAGS", "STRATEGIES", "chosen_strategy", "neuron_problems"]

INSTANCE_TYPES = ("inf1", "inf2", "trn1", "trn1n", "trn2")
STRATEGIES = ("trace", "model-builder")

NEURON_FLAGS = {
    "instance_type": "--instance-type",
    "strategy": "--strategy",
    "tensor_parallel": "--tensor-parallel",
    "inline_weights": "--inline-weights",
    "optlevel": "-O",
    "compiler_args": "--compiler-arg",
    "compiler_workdir": "--compiler-workdir",
}
"""The options that only this backend takes, by the names of ExportOptions."""

_REFUSED = {
    "torch-native": "TorchNeuron, the successor that compiles through torch.compile(backend='neuron'), is in closed "
    "beta, and its first release compiles only on a device and saves no file",
    "transformers-neuronx": "AWS ended the support of transformers-neuronx with Neuron SDK 2.26; its models are "
    "compiled by the strategies above",
}
"""Strategies that are known and impossible, with the reason."""

_OURS = {
    "--target": "--instance-type",
    "--auto-cast": "--auto-cast",
    "--auto-cast-type": "--auto-cast-type",
    "--optlevel": "-O",
    "-O": "-O",
    "-O1": "-O1",
    "-O2": "-O2",
    "-O3": "-O3",
    "--framework": "no option: it is always XLA",
    "--output": "-o, and the artifact names its files",
}
"""What neuronx-cc calls what options of our own say."""


def chosen_strategy(options: ExportOptions) -> str:
    """The strategy that the user named, or the one that can do what is asked for."""
    return options.strategy or ("model-builder" if options.tensor_parallel > 1 else "trace")


def neuron_problems(options: ExportOptions) -> Iterator[str]:
    """Everything wrong with what an export for Neuron is asked for, in words."""
    yield from _target_problems(options.instance_type)
    yield from _strategy_problems(options)
    if options.optlevel not in (None, 1, 2, 3):
        yield f"-O{options.optlevel} is no level of neuronx-cc; the choices are: -O1, -O2, -O3."
    yield from _argument_problems(options.compiler_args)


def _target_problems(instance_type: str | None) -> Iterator[str]:
    known = ", ".join(INSTANCE_TYPES[1:])
    if instance_type is None:
        yield f"--backend neuron compiles for one kind of machine: give --instance-type; the choices are: {known}."
    elif instance_type == "inf1":
        yield (
            f"--instance-type inf1 has NeuronCores of the first version, which torch-neuronx and neuronx-cc do not "
            f"compile for, and what does, torch-neuron, ends with PyTorch 1.13. The choices are: {known}."
        )
    elif instance_type not in INSTANCE_TYPES:
        yield f"--instance-type {instance_type!r} is not supported; the choices are: {known}."


def _strategy_problems(options: ExportOptions) -> Iterator[str]:
    known, cores = ", ".join(STRATEGIES), options.tensor_parallel
    if options.strategy in _REFUSED:
        yield f"--strategy {options.strategy} is not possible: {_REFUSED[options.strategy]}. The choices are: {known}."
    elif options.strategy not in (None, *STRATEGIES):
        yield f"--strategy {options.strategy!r} is not supported; the choices are: {known}."
    if cores < 1:
        yield f"--tensor-parallel must be at least 1, not {cores}."
    if cores > 1 and options.strategy == "trace":
        yield (
            f"--tensor-parallel {cores} spreads weights over NeuronCores, and --strategy trace compiles for one; leave "
            f"--strategy out, or give model-builder."
        )
    if options.inline_weights and chosen_strategy(options) == "model-builder":
        yield "--inline-weights puts weights into each graph; model-builder has one set for all. Give --strategy trace."


def _argument_problems(arguments: tuple[str, ...]) -> Iterator[str]:
    for argument in arguments:
        name = argument.partition("=")[0].split()[0] if argument.strip() else ""
        if not name.startswith("-"):
            yield f"--compiler-arg {argument!r} is no argument of neuronx-cc, as --compiler-arg=--verbose=info is."
        elif name in _OURS:
            yield f"--compiler-arg {argument} is said otherwise: by {_OURS[name]}."
