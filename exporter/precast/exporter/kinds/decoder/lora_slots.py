"""Slots for adapters in a decoder: which layers have them, and how they get into its traced graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from precast.runtime.artifact.schema import Lora, LoraTarget
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import ExportError, UsageError

from ...operators.lora import lora
from ...options import AdapterSlotOptions
from ..plan import run_skeleton

__all__ = ["adding_adapters", "plan_slots"]

_BATCH, _LENGTH = 2, 3


def plan_slots(options: AdapterSlotOptions, model: nn.Module, task: Task) -> Lora | None:
    """The slots that the options ask for, in a model without weights; None where they ask for none.

    Raises UsageError for a pattern that names no layer, or one that an adapter could not change.
    """
    if not options.is_asked:
        return None
    assert options.lora_rank is not None, "the options are checked"
    fitting = _layers_of_rows(model, task)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    if options.lora_targets:
        names = _match(options.lora_targets, list(modules), fitting)
    else:
        names = [name for name in modules if name in fitting and _is_in_block(model, name)]
    if not names:
        raise UsageError(
            f"lora_slots={options.lora_slots}: {type(model).__name__} has no linear layers in its blocks that take one "
            f"vector per token, which is what adapters change. lora= merges an adapter into its weights."
        )
    targets = [LoraTarget(module=name, inputs=ins, outputs=outs) for name in names for ins, outs in [fitting[name]]]
    return Lora(slots=options.lora_slots, rank=options.lora_rank, targets=targets)


def _match(patterns: Sequence[str], layers: list[str], fitting: dict[str, tuple[int, int]]) -> list[str]:
    for pattern in patterns:
        found = [name for name in layers if fnmatchcase(name, pattern)]
        if not found:
            some = ", ".join(layers[:3])
            raise UsageError(f"lora_targets={pattern!r} matches no layer. Layers are called {some}, …, {layers[-1]}.")
        if wrong := next((name for name in found if name not in fitting), None):
            raise UsageError(
                f"lora_targets={pattern!r} matches {wrong}, which is not called with one vector for each token of each "
                f"row, so that rows could not have adapters of their own there. Leave it out."
            )
    return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _is_in_block(model: nn.Module, name: str) -> bool:
    """Whether a layer is part of one of the blocks that a model is a list of; its head is not."""
    is_head = model.get_submodule(name) is model.get_output_embeddings()  # type: ignore[operator]
    return not is_head and any(part.isdigit() for part in name.split("."))


def _layers_of_rows(model: nn.Module, task: Task) -> dict[str, tuple[int, int]]:
    """The widths, in and out, of each linear layer that is called with one vector for each token of each row, or with
    all of these in their order."""
    seen: dict[str, list[Any]] = {}

    def note(name: str, _: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        seen.setdefault(name, []).append((tuple(given[0].shape), tuple(made.shape)) if given else None)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                stack.enter_context(module.register_forward_hook(partial(note, name)))
        ids = torch.ones(_BATCH, _LENGTH, dtype=torch.int64, device="meta")
        run_skeleton(model, task, {"input_ids": ids, "use_cache": False})
    return {
        name: (calls[0][0][-1], calls[0][1][-1])
        for name, calls in seen.items()
        if all(call and all(shape[:-1] in ((_BATCH, _LENGTH), (_BATCH * _LENGTH,)) for shape in call) for call in calls)
    }


@contextmanager
def adding_adapters(model: nn.Module, plan: Lora | None, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Within this block the layers of `plan` add adapters, by `precast::lora`; `inputs` are the slots of the batch's
    rows and the weights of each layer. Raises ExportError, at its end, where a layer was never called."""
    if plan is None:
        yield
        return
    slots, *weights = inputs
    called: set[str] = set()
    with ExitStack() as stack:
        for target, held in zip(plan.targets, weights, strict=True):
            hook = partial(_add_adapter, called, target.module, held, slots)
            stack.enter_context(model.get_submodule(target.module).register_forward_hook(hook))
        yield
    if missing := next((target.module for target in plan.targets if target.module not in called), None):
        raise ExportError(
            f"{type(model).__name__} multiplies by the weight of {missing} without calling that layer, so that no "
            f"adapter can change it. Name other layers: lora_targets='*.q_proj', say."
        )


def _add_adapter(
    called: set[str], name: str, weights: Tensor, slots: Tensor, _: nn.Module, given: tuple[Any, ...], made: Tensor
) -> Tensor:
    called.add(name)
    batch, x = slots.shape[0], given[0]
    if x.ndim == 3:
        added: Tensor = lora(made, x, weights, slots)
        return added
    # Batch and length in one dimension.
    flat: Tensor = lora(made.view(batch, -1, made.shape[-1]), x.reshape(batch, -1, x.shape[-1]), weights, slots)
    return flat.view(made.shape)
