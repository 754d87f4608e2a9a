"""The inputs by which a graph takes LoRA adapters: the weights in each slot, and the slot of each row."""

from __future__ import annotations

from .schema import Graph, Input, Lora, LoraTarget

__all__ = ["SLOTS", "adapter_bytes", "lora_inputs", "lora_problem", "weights_input"]

SLOTS = "lora_slots"
"""A decoder's input, int64 [batch]: which slot's adapter each row has; 0 is none."""


def weights_input(target: LoraTarget) -> str:
    """The name of the input that holds a layer's adapters."""
    return f"lora.{target.module}"


def lora_inputs(lora: Lora, batch: int) -> list[Input]:
    """The inputs of a graph for adapters, in their order: `lora_slots`, then for each target the weights in all slots,
    float32 [slots + 1, rank, inputs + outputs].

    A row of a slot is one of A [rank, inputs], then one of the transposed B [outputs, rank], already scaled. Slot 0
    holds zeros, and so does what a slot has beyond the rank of its adapter.
    """
    slots = Input(name=SLOTS, dtype="int64", shape=[batch], pad=0)
    return [slots, *(_weights_spec(lora, target) for target in lora.targets)]


def _weights_spec(lora: Lora, target: LoraTarget) -> Input:
    shape = [lora.slots + 1, lora.rank, target.inputs + target.outputs]
    return Input(name=weights_input(target), dtype="float32", shape=[*shape], pad=0)


def adapter_bytes(lora: Lora) -> int:
    """The memory that one adapter takes, whatever its own rank."""
    return 4 * lora.rank * sum(target.inputs + target.outputs for target in lora.targets)


def lora_problem(lora: Lora, graph: Graph) -> str | None:
    """What keeps a graph from taking these adapters, as the end of a sentence."""
    if lora.slots < 1 or lora.rank < 1:
        return f"has {lora.slots} slots for adapters of rank {lora.rank}"
    given = {spec.name: spec for spec in graph.inputs}
    wanted = lora_inputs(lora, graph.slots)
    if len({spec.name for spec in wanted}) < len(wanted):
        return "has two slots for adapters of one name"
    if wrong := next((spec.name for spec in wanted if given.get(spec.name) != spec), None):
        return f"lacks the input {wrong} for adapters, or has it in another shape"
    return None
