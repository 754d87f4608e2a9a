"""The model of one rank: its parts of the weights, in modules that exchange what they make of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..operators.collectives import all_gather, all_reduce, rank_number
from ..options.parallel import Degrees
from ..quantize.linear import QuantizedEmbedding, QuantizedLinear
from . import plans
from .division import Division, Exchanging, divide

__all__ = ["first_rank", "local_model"]


def first_rank(model: nn.Module, degrees: Degrees) -> nn.Module:
    """The model of rank 0, of which all others are like. Raises UsageError, CheckpointError as `divide` does."""
    return local_model(model, divide(model, degrees), 0)


def local_model(model: nn.Module, division: Division, rank: int) -> nn.Module:
    """A copy of a model as a rank has it. What is not divided is shared with the model, and of what is divided by rows
    the parts are views."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    parts: dict[int, Any] = {id(tensor): _local_tensor(division, name, tensor, rank) for name, tensor in tensors}
    local = copy.deepcopy(model, parts)
    for name, attribute, value in division.numbers:
        setattr(local.get_submodule(name), attribute, value)
    for name, how in division.modules.items():
        _Local(local.get_submodule(name), how, division.ranks).replace_forward()
    return local


def _local_tensor(division: Division, name: str, tensor: Tensor, rank: int) -> Tensor:
    if name not in division.splits:
        return tensor
    part = division.take_part(name, tensor.detach(), rank)
    return nn.Parameter(part, requires_grad=False) if isinstance(tensor, nn.Parameter) else part


class _Local:
    """A module with its part of the weights, and how it exchanges with other ranks."""

    def __init__(self, module: Any, how: Exchanging, ranks: int) -> None:
        self.module, self.how, self.ranks = module, how, ranks
        self.compute: Callable[..., Tensor] = module.forward
        self.is_divided = how.copies < ranks

    def replace_forward(self) -> None:
        """Make the module exchange what it computes."""
        _narrow(self.module, self.how.style)
        # For code of an architecture that has numbers of its own for each part.
        self.module.part_number = self.part_number
        replacements = {
            plans.COLWISE_GATHERED: self.gather_output,
            plans.EMBEDDING: self.look_up,
            plans.BY_EXPERT: self.dispatch,
            plans.EXPERTS: self.reduce_output,
            plans.ROWWISE: self.multiply_part,
            plans.ROWWISE_SPLIT: self.multiply_own_part,
        }
        if (forward := replacements.get(self.how.style)) and (self.is_divided or self.how.input_copies < self.ranks):
            self.module.forward = forward

    def gather_output(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], of which each rank computes its part."""
        return self._gather(self.compute(x), self.how.copies)

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of a table of which each rank has a part: whoever has the row of an id gives it, the others zeros."""
        module = self.module
        rows = (module.table if isinstance(module, QuantizedEmbedding) else module.weight).shape[0]
        own = ids - self.part_number(ids) * rows
        is_here = (own >= 0) & (own < rows)
        found = self.compute(torch.where(is_here, own, 0))
        return self._reduce(torch.where(is_here[..., None], found, 0))

    def reduce_output(self, *given: Any, **named: Any) -> Tensor:
        """What all experts make, of each of which a rank has a part."""
        with _replaced(self.module, {name: self._only_first(name) for name in self.how.once}):
            return self._reduce(self.compute(*given, **named))

    def dispatch(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """[T, D], and per token K experts and their weights [T, K]: each rank computes what its own experts make. The
        first of these stands for others', with the weight 0."""
        own = experts - self.part_number(x) * self.module.num_experts
        is_here = (own >= 0) & (own < self.module.num_experts)
        return self._reduce(self.compute(x, torch.where(is_here, own, 0), torch.where(is_here, weights, 0)))

    def _only_first(self, name: str) -> Tensor:
        """A parameter on rank 0, and zeros elsewhere."""
        parameter: Tensor = getattr(self.module, name)
        return torch.where(rank_number(parameter) == 0, parameter, 0)

    def multiply_part(self, x: Tensor) -> Tensor:
        """[..., K of the rank] -> [..., N]."""
        if self.how.input_copies != self.how.copies:
            return self.multiply_own_part(self._gather(x, self.how.input_copies))
        return self._add_bias(self._reduce(self._multiply(x)))

    def multiply_own_part(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], of whose columns each rank multiplies its part."""
        if self.is_divided:
            parts = x.unflatten(-1, (self.ranks // self.how.copies, -1))
            x = parts.index_select(-2, self.part_number(x)).squeeze(-2)
        return self._add_bias(self._reduce(self._multiply(x)))

    def _multiply(self, x: Tensor) -> Tensor:
        if isinstance(self.module, QuantizedLinear):
            return self.module.multiply(x, None)
        weight: Tensor = self.module.weight
        return x @ weight if isinstance(self.module, Conv1D) else nn.functional.linear(x, weight)

    def _add_bias(self, x: Tensor) -> Tensor:
        """Add the bias, once, to what all ranks have summed up."""
        return x if self.module.bias is None else x + self.module.bias

    def _reduce(self, x: Tensor) -> Tensor:
        if not self.is_divided:
            return x
        total: Tensor = all_reduce(x.float().contiguous(), self.ranks, self.how.copies)
        return total.to(x.dtype)

    def _gather(self, x: Tensor, copies: int) -> Tensor:
        if copies == self.ranks:
            return x
        whole: Tensor = all_gather(x.float().contiguous(), self.ranks, copies)
        return whole.to(x.dtype)

    def part_number(self, like: Tensor) -> Tensor:
        """Which of the parts this rank has, int64 [1], on the device of `like`."""
        number: Tensor = rank_number(like)
        return number if self.how.copies == 1 else number // self.how.copies


@contextmanager
def _replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this block the module has these tensors in the place of its parameters."""
    held = {name: module._parameters.pop(name) for name in tensors}
    vars(module).update(tensors)
    try:
        yield
    finally:
        for name, parameter in held.items():
            del vars(module)[name]
            module._parameters[name] = parameter


def _narrow(module: Any, style: str) -> None:
    """Let a layer say the sizes that it has now."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, QuantizedLinear) and style in (plans.ROWWISE, plans.ROWWISE_SPLIT):
        packed = module.packed
        if packed.scales.shape[1] == 1:
            packed.group = packed.codes.shape[-1] * 8 // packed.bits
        packed.columns = packed.scales.shape[1] * packed.group
