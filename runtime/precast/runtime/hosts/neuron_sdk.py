"""How to install AWS's Neuron SDK, and names that it can take. Nothing of it is imported here."""

from __future__ import annotations

__all__ = ["INDEX", "INSTALL", "parameter_path", "without_sdk"]

INDEX = "https://pip.repos.neuron.amazonaws.com"
"""Where AWS publishes the SDK. On PyPI its names are taken by placeholders that raise when they are imported."""
INSTALL = f"pip install --extra-index-url {INDEX} 'torch-neuronx>=2.5' 'neuronx-cc>=2.15'"
"""The floors are above the placeholders' versions, which are 1.x."""


def without_sdk(module: str, reason: str) -> str:
    """The message where `module` of the SDK cannot be imported; `reason` is the error's text."""
    is_placeholder = "WRONG PACKAGE" in reason
    why = "what is installed is PyPI's placeholder, which cannot be used" if is_placeholder else reason
    more = " 'neuronx-distributed>=0.9'" if module == "neuronx_distributed" else ""
    return f"AWS's Neuron SDK is needed, and {module} cannot be imported: {why}. Install it with: {INSTALL}{more}"


def parameter_path(name: str) -> str:
    """The path of a weight in the module that NxD compiles: its name, or of one that differs between graphs, whose name
    is `graph:name`, one that a module can have."""
    graph, mark, weight = name.rpartition(":")
    return f"of_{graph}.{weight}" if mark else name
