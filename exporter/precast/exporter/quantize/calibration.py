"""Hessians for calibrated methods: the mean of x xᵀ over a layer's inputs on calibration text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
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
        """Per layer [K, K]: the mean of x xᵀ over every token x that reaches it, with its diagonal raised by what so
        few tokens leave unknown; nothing for a layer that none reaches.

        Blocks that are quantized already run quantized, so that inputs of later layers contain the errors of earlier
        ones.
        """
        sums: dict[str, _Moments] = {}
        for row, answers in zip(self._rows, self._answers, strict=True):
            for name, found in self._read(row, answers, names).items():
                sums[name] = found.plus(sums.get(name))
        return {name: _raise_diagonal(found) for name, found in sums.items()}

    def finish(self, block: str) -> None:
        """All layers of a block are quantized."""
        del self._unfinished[block]
        self._finished.append(block)

    def _read(
        self, row: Mapping[str, Tensor], answers: dict[str, list[Any]], names: Sequence[str]
    ) -> dict[str, _Moments]:
        if self._can_replay and answers:
            try:
                return self._run(row, answers, names)
            except Exception:  # whatever a model raises that misses what its blocks tell each other by other ways
                self._can_replay = False
                answers.clear()
        return self._run(row, answers, names)

    def _run(
        self, row: Mapping[str, Tensor], answers: dict[str, list[Any]], names: Sequence[str]
    ) -> dict[str, _Moments]:
        """The sums of x xᵀ over one row."""
        sums: dict[str, _Moments] = {}
        with ExitStack() as stack, torch.no_grad():
            if self._can_replay:
                stack.callback(self._replay(answers))
            collector = _Collector(sums, len(names))
            for name in names:
                collect: Any = partial(collector.collect, name)
                stack.callback(self._model.get_submodule(name).register_forward_pre_hook(collect).remove)
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


@dataclass(frozen=True)
class _Moments:
    """The sum of x xᵀ over some tokens, and their number."""

    total: Tensor
    tokens: int

    def plus(self, other: _Moments | None) -> _Moments:
        return self if other is None else _Moments(self.total + other.total, self.tokens + other.tokens)


def _raise_diagonal(found: _Moments) -> Tensor:
    """The mean, with a share of its diagonal's median added there: the more columns there are per token, the less of
    their products is the same in other text, and methods that trust these lose more there than they gain here.

    The share is measured, with 1,200 tokens of SmolLM2 and 6,100 of a model of one domain: as many as ten tokens per
    column leave nothing unknown, and two need a quarter.
    """
    tokens = max(1, found.tokens)
    hessian = found.total / tokens
    share = min(1.0, (len(hessian) / tokens) ** 2)
    hessian.diagonal().add_(share * hessian.diagonal().median())
    return hessian


class _Collector:
    """Hooks that add up x xᵀ for `count` layers; what several layers read is multiplied once."""

    def __init__(self, sums: dict[str, _Moments], count: int) -> None:
        self._sums, self._count = sums, count
        self._last: tuple[Tensor, _Moments] | None = None

    def collect(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._last is None or self._last[0] is not inputs[0]:
            x = inputs[0].detach().flatten(0, -2).float()
            self._last = inputs[0], _Moments(x.T @ x, len(x))
        self._sums[name] = self._last[1].plus(self._sums.get(name))
        if len(self._sums) == self._count:
            raise _AllCollectedError


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
