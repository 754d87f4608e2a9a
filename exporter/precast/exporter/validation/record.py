"""Record the verdict of a validation in the artifact's contract."""

from __future__ import annotations

import msgspec

from precast.runtime.artifact import Artifact
from precast.runtime.artifact.publish import write_config
from precast.runtime.artifact.schema import Accuracy, Variant
from precast.runtime.hosts.select import missing_device, this_machine

__all__ = ["describe_loss", "record_accuracy", "skip_without_device"]


def record_accuracy(artifact: Artifact, variant: str, accuracy: Accuracy) -> Artifact:
    """Write a verdict on one of the artifact's variants into its `config.json`; returns the artifact with it."""
    variants = [
        msgspec.structs.replace(each, accuracy=accuracy) if each.name == variant else each
        for each in artifact.contract.variants
    ]
    contract = msgspec.structs.replace(artifact.contract, variants=variants)
    return write_config(artifact.path, artifact.config, contract)


def skip_without_device(artifact: Artifact) -> Accuracy | None:
    """The verdict "skipped" for an artifact just compiled for a device that is not here; None where it can be run."""
    reason = missing_device(artifact.contract.variants[0], this_machine(artifact.contract))
    later = "precast validate compares it there"
    return Accuracy(status="skipped", reason=f"no device: {reason}; {later}", figures={}) if reason else None


def describe_loss(variant: Variant) -> str | None:
    """How the variant is less than float32, in words; None where it is not."""
    cast = _describe_cast(variant)
    rounded = f"quantized to {_describe_quantization(variant)}" if _describe_quantization(variant) else None
    return ", ".join(part for part in (rounded, cast) if part) or None


def _describe_quantization(variant: Variant) -> str:
    parts = [variant.quantization, f"{variant.kv_cache} caches" if variant.kv_cache else None]
    return " with ".join(part for part in parts if part)


def _describe_cast(variant: Variant) -> str | None:
    if variant.dtype != "float32":
        return f"computed in {variant.dtype}"
    what, kind = (variant.compiler.options.get(name) for name in ("auto_cast", "auto_cast_type"))
    return f"with auto-cast {what} to {kind}" if what else None
