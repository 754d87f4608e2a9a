"""How an artifact's files are named and described: as ours, or so that another library can open them as well."""

from __future__ import annotations

from precast.runtime.artifact.optimum_neuron import LAYOUT as OPTIMUM_NEURON

__all__ = ["LAYOUTS", "OPTIMUM_NEURON"]

LAYOUTS = ("precast", OPTIMUM_NEURON)
