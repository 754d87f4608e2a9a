"""Hessians for calibrated methods: the mean of x xᵀ over a layer's inputs on calibration text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["Calibration", "group_blocks"]


def group_blocks(names: Sequence[str]) -> dict[str, list[str]]:
    """Group layers by decoder block: `model.layers.3.mlp.up_proj` belongs to `model.layers.3`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r".*?\.\d+(?=\.)", name)
        groups.setdefault(found[0] if found else name, []).append(name)
    return groups


class Calibration:
    """Calibration text that `model` reads while it is quantized block by block.

    What blocks answer that are quantized already is computed once, and given again when the text is read for the blocks
    after them: else time would grow with the square of their number.

    Args:
        model: quantized in place.
        rows: inputs of the model by its arguments' names, with a batch dimension of 1 each.
        blocks: the names of all layers that are quantized, by block.
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[Mapping[str, Tensor]], blocks: Mapping[str, Sequence[str]]
    ) -> None:
        self._model, self._rows = model, rows
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._uncached = {"use_cache": False} if takes_cache else {}
        self._unfinished, self._finished = dict(blocks), list[str]()
        self._answers: list[dict[str, list[Any]]] = [{} for _ in rows]
        """For each row what finished blocks return, call by call."""
        self._can_replay = True

    def collect_hessians(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Per layer [K, K]: the sum of x xᵀ over every token x that reaches it, divided by the number of all tokens;
        nothing for one that none reaches.

        Blocks that are quantized already run quantized, so that inputs of later layers contain the errors of earlier
        ones.
        """
        sums: dict[str, Tensor] = {}
        for row, answers in zip(self._rows, self._answers, strict=True):
            for name, total in self._read(row, answers, names).items():
                sums[name] = sums.get(name, 0) + total
        tokens = sum(max(row.values(), key=Tensor.numel).numel() for row in self._rows)
        return {name: total / tokens for name, total in sums.items()}

    def finish(self, block: str) -> None:
        """All layers of a block are quantized."""
        del self._unfinished[block]
        self._finished.append(block)

    def _read(
        self, row: Mapping[str, Tensor], answers: dict[str, list[Any]], names: Sequence[str]
    ) -> dict[str, Tensor]:
        if self._can_replay and answers:
            try:
                return self._run(row, answers, names)
            except Exception:  # whatever a model raises that misses what its blocks tell each other by other ways
                self._can_replay = False
                answers.clear()
        return self._run(row, answers, names)

    def _run(self, row: Mapping[str, Tensor], answers: dict[str, list[Any]], names: Sequence[str]) -> dict[str, Tensor]:
        """The sums of x xᵀ over one row."""
        sums: dict[str, Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            if self._can_replay:
                stack.callback(self._replay(answers))
            for name in names:
                hook = _make_collector(sums, name, len(names))
                stack.callback(self._model.get_submodule(name).register_forward_pre_hook(hook).remove)
            with suppress(_AllCollectedError):
                self._model(**row, **self._uncached)
        return sums

    def _replay(self, answers: dict[str, list[Any]]) -> Callable[[], None]:
        """Let blocks give these answers, and record those of other finished blocks; until what this returns is called.

        Nothing is recorded behind a layer that is not quantized yet: that will change what reaches the block.
        """
        undo = ExitStack()
        is_final = True

        def begin(*_: Any) -> None:
            nonlocal is_final
            is_final = False

        def record(block: str, answer: Any) -> None:
            if is_final:
                answers.setdefault(block, []).append(_copied(answer))

        for name in (name for names in self._unfinished.values() for name in names):
            undo.callback(self._model.get_submodule(name).register_forward_pre_hook(begin).remove)
        for block in self._finished:
            module = self._model.get_submodule(block)
            if block in answers:
                undo.callback(_return_again(module, answers[block]))
            else:
                hook: Any = partial(_pass_answer, partial(record, block))
                undo.callback(module.register_forward_hook(hook).remove)
        return undo.close


def _pass_answer(take: Callable[[Any], None], module: nn.Module, inputs: Any, answer: Any) -> None:
    take(answer)


class _AllCollectedError(Exception):
    """Stops a forward pass once every layer has had its inputs: the rest would be computed for nothing."""


def _make_collector(sums: dict[str, Tensor], name: str, count: int) -> Callable[..., None]:
    def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + x.T @ x
        if len(sums) == count:
            raise _AllCollectedError

    return collect


def _return_again(module: nn.Module, answers: Sequence[Any]) -> Callable[[], None]:
    """Let a module return what it returned before, until what this returns is called."""
    rest, before = iter(answers), vars(module).get("forward")

    def undo() -> None:
        delattr(module, "forward")
        if before is not None:
            module.forward = before

    module.forward = lambda *_, **__: _copied(next(rest))
    return undo


def _copied(answer: Any) -> Any:
    """Copies of tensors: somebody may add to them in place."""
    return tree_map_only(Tensor, torch.clone, answer)
