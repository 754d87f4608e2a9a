"""The `neuron` backend: graphs for AWS Inferentia and Trainium, compiled by neuronx-cc, on any machine."""

from __future__ import annotations

__all__: list[str] = []
