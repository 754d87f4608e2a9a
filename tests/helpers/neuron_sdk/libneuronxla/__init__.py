"""A stand-in for libneuronxla."""

__version__ = "2.2.1111.0"
