"""What linear layers read on calibration samples: which of them read the same, how large it is, how it is rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .int8_linear import LEAST_SCALE, ActivationRange, round_activations

__all__ = ["Call", "InputGroup", "choose_range", "observe_inputs", "replay"]

Call: TypeAlias = Mapping[str, Any]
"""The arguments of a model for one calibration sample, by name."""
SAMPLE = 256
"""Tokens of each input that are kept."""
SHARES = tuple(0.85**step for step in range(9))
"""Shares of the observed range that are tried: what lies beyond is cut off, and the rest has finer steps."""


@dataclass
class InputGroup:
    """Layers that read one tensor.

    Attributes:
        names: of the layers.
        norm: the name of the normalization that the tensor comes from, if it does.
        largest: the largest magnitude in each channel, float32 [K].
        sample: tokens that were read, float32 [S, K].
        balance: what multiplies the tensor before it is rounded, float32 [K], and divides the layers' weights; None for
            nothing.
    """

    names: list[str] = field(default_factory=list)
    norm: str | None = None
    largest: Tensor = field(default_factory=lambda: torch.zeros(()))
    sample: Tensor = field(default_factory=lambda: torch.zeros(()))
    balance: Tensor | None = None

    def fold(self) -> None:
        """Take what was read as it is when the tensor is balanced where it comes from."""
        assert self.balance is not None
        self.largest, self.sample = self.largest * self.balance, self.sample * self.balance
        self.balance = None

    def add(self, x: Tensor, share: int) -> None:
        """Take notice of an input [tokens, K], and keep about `share` of its tokens, the largest of them too."""
        sizes = x.abs()
        picked = torch.arange(0, len(x), max(1, len(x) // share))
        kept = x[torch.cat([picked, sizes.amax(-1).argmax()[None]])]
        is_first = not self.sample.ndim
        self.largest = sizes.amax(0) if is_first else torch.maximum(self.largest, sizes.amax(0))
        self.sample = kept if is_first else torch.cat([self.sample, kept])


def observe_inputs(model: nn.Module, calls: Sequence[Call], names: Sequence[str]) -> list[InputGroup]:
    """Run `model` on every sample and watch the inputs of the layers; those that none reaches are in no group."""
    watch = _Watch(max(1, SAMPLE // len(calls)))
    with ExitStack() as stack:
        for name in names:
            hook: Any = partial(_take_input, partial(watch.read, name))
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        for name, module in model.named_modules():
            if _is_norm(module):
                hook = partial(_take_output, partial(watch.normalized, name))
                stack.callback(module.register_forward_hook(hook).remove)
        for call in calls:
            replay(model, call)
            watch.forget_tensors()
    return [group for name, group in watch.groups.items() if group.names[0] == name]


@torch.no_grad()
def replay(model: nn.Module, call: Call) -> Any:
    """What `model` answers to a sample."""
    return model(**call)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1


class _Watch:
    """Follows tensors through a model: which layers read the same one, and which normalization wrote it."""

    def __init__(self, share: int) -> None:
        self.groups: dict[str, InputGroup] = {}
        self._share = share
        self.forget_tensors()

    def forget_tensors(self) -> None:
        """Begin another run. Within one all tensors are held, so that no two have one identity."""
        self._first: dict[int, tuple[Tensor, str]] = {}
        self._norms: dict[int, tuple[Tensor, str]] = {}

    def normalized(self, name: str, x: Tensor) -> None:
        self._norms[id(x)] = (x, name)

    def read(self, name: str, x: Tensor) -> None:
        if name not in self.groups:
            _, first = self._first.setdefault(id(x), (x, name))
            group = self.groups[name] = self.groups.get(first) or InputGroup()
            group.names.append(name)
            group.norm = self._norms[id(x)][1] if id(x) in self._norms else None
        if self.groups[name].names[0] == name and x.numel():
            self.groups[name].add(x.detach().flatten(0, -2).float(), self._share)


def _take_input(take: Callable[[Tensor], None], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    take(inputs[0])


def _take_output(take: Callable[[Tensor], None], module: nn.Module, inputs: Any, output: Tensor) -> None:
    take(output)


def choose_range(sample: Tensor) -> ActivationRange:
    """The range for which rounding changes `sample` least, in the mean of squares: zero has a code, and values beyond
    it become its ends."""
    low, high = sample.min().clamp(max=0), sample.max().clamp(min=0)
    if high - low <= 255 * LEAST_SCALE:
        return ActivationRange(torch.ones(1), torch.zeros(1, dtype=torch.uint8))
    candidates = [_range(low * share, high * share) for share in SHARES]
    return min(candidates, key=lambda found: _rounding_error(sample, found))


def _range(low: Tensor, high: Tensor) -> ActivationRange:
    scale = ((high - low) / 255)[None]
    return ActivationRange(scale, (-low / scale).round().clamp(0, 255).to(torch.uint8))


def _rounding_error(sample: Tensor, found: ActivationRange) -> float:
    integers, scale = round_activations(sample, *found)
    return float((integers * scale - sample).square().mean())
