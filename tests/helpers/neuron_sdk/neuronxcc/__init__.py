"""A stand-in for neuronx-cc."""

from neuron_stand_in import COMPILER as __version__  # noqa: F401
