"""How an artifact's files are named and described: as ours, or so that another library can open them as well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from precast.runtime.artifact.optimum_neuron import LAYOUT as OPTIMUM_NEURON

if TYPE_CHECKING:
    from . import ExportOptions

__all__ = ["LAYOUTS", "OPTIMUM_NEURON", "layout_problems"]

LAYOUTS = ("precast", OPTIMUM_NEURON)


def layout_problems(options: ExportOptions) -> Iterator[str]:
    """Everything in these options that the layout has no place for, in words."""
    if options.layout != OPTIMUM_NEURON:
        return
    flag = f"--layout {OPTIMUM_NEURON}"
    if options.backend != "neuron":
        yield f"{flag} is that of Neuron artifacts; give --backend neuron, too, or leave it out."
        return
    if not options.inline_weights:
        yield f"{flag} has no file for weights beside the graph; give --inline-weights, too."
    if options.strategy not in (None, "trace") or options.tensor_parallel > 1:
        yield f"{flag} holds one graph for one NeuronCore; leave out --strategy and --tensor-parallel."
    sizes = {"--batch-size": options.batch_sizes, "--sequence-length": options.sequence_length,
             "--audio-sequence-length": options.audio_sequence_length}  # fmt: skip
    for name, given in sizes.items():
        if len(given) > 1:
            yield f"{flag} holds one graph, and {name} {','.join(map(str, given))} asks for more; give one size."
