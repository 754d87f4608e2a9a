"""Which part of each weight every rank has, and which modules exchange what they make of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from precast.runtime.artifact.ranks import part_bounds, pattern_of
from precast.runtime.artifact.schema import Split
from precast.runtime.errors import UsageError

from ..options.parallel import DEGREES, Degrees
from ..quantize.linear import QuantizedEmbedding, QuantizedLinear
from . import plans

__all__ = ["Division", "Exchanging", "divide"]


@dataclass(frozen=True)
class Exchanging:
    """A module that has its part of the weights: transformers' style, of how many ranks each part is, of how many its
    input is, where that is in parts, and which of its parameters only one rank adds."""

    style: str
    copies: int
    input_copies: int
    once: tuple[str, ...] = ()


@dataclass(frozen=True)
class Division:
    """How a model is divided.

    Attributes:
        splits: of the tensors that are divided, by their names in the model.
        modules: those that exchange with other ranks, by name.
        numbers: attributes of modules that count what a rank has its part of: the module, the name, and the value.
    """

    degrees: Degrees
    splits: dict[str, Split] = field(default_factory=dict)
    modules: dict[str, Exchanging] = field(default_factory=dict)
    numbers: list[tuple[str, str, int]] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        return self.degrees.ranks

    def take_part(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        """A rank's part of a tensor of the model, contiguous: a view where it is one piece of whole rows."""
        split = self.splits.get(name)
        if split is None:
            return tensor
        bounds = part_bounds(tensor.shape[split.dim], split, rank, self.ranks)
        pieces = [tensor.narrow(split.dim, begin, end - begin) for begin, end in bounds]
        return torch.cat(pieces, split.dim) if len(pieces) > 1 else pieces[0].contiguous()


def divide(model: Any, degrees: Degrees) -> Division:
    """Divide a model that generates text. Raises UsageError where a size cannot be divided, with both numbers, and
    CheckpointError where the plan does not fit the model."""
    plan = {name: style for name, style in plans.find_plan(model).items() if style not in plans.WHOLE}
    head = _name_of(model, model.get_output_embeddings())
    found, heads = Division(degrees), _Heads(model.config.get_text_config(), degrees)
    heads.check()
    for name, module in model.named_modules():
        if style := plan.get(pattern_of(name)):
            kind = _kind(name, style, head)
            copies = heads.copies(module) if kind == "attn" else degrees.copies(kind)
            once = tuple(
                each for each, _ in module.named_parameters() if plan.get(pattern_of(f"{name}.{each}")) == plans.ONCE
            )
            if style == plans.EXPERTS and degrees.by_expert:
                _divide_experts(found, model, name, copies)
                continue
            found.modules[name] = Exchanging(style, copies, degrees.copies("attn" if kind == "o_proj" else kind), once)
            splits = {} if style == plans.EXPERTS else dict(_split_module(name, module, style, copies))
            _add_splits(found, {f"{name}.{each}": split for each, split in splits.items()}, model, kind)
            _divide_numbers(found, model, name, style, kind, heads.groups)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        style = plan.get(pattern_of(name))
        if style and style != plans.ONCE:
            kind = _kind(name, style, head)
            if kind == "moe" and degrees.by_expert:
                continue
            _add_splits(found, {name: _split_parameter(parameter, style, degrees.copies(kind))}, model, kind)
    _check_kinds(degrees, {_kind(name, each.style, head) for name, each in found.modules.items()}, model)
    # BLOOM's model itself makes the biases of all heads.
    base = model.base_model_prefix
    if isinstance(heads_of_all := vars(model.base_model).get("num_heads"), int):
        found.numbers.append((base, "num_heads", heads_of_all // degrees.attn))
    _check_tied(found, model)
    return found


def _check_kinds(degrees: Degrees, kinds: set[str], model: Any) -> None:
    """Raise UsageError for the degree of what the model does not have."""
    for kind in degrees.fewer():
        if kind.removesuffix("_ep") not in kinds:
            what = degrees.described(kind.removesuffix("_ep"))
            raise UsageError(
                f"{what} says how {DEGREES[kind.removesuffix('_ep')]} are divided, and the plan for models of type "
                f"{model.config.model_type!r} divides none. Leave it out."
            )


def _divide_experts(found: Division, model: nn.Module, name: str, copies: int) -> None:
    """Give each part of the ranks its experts, whole."""
    experts: Any = model.get_submodule(name)
    count = experts.num_experts
    stacked = [each for each, tensor in experts.named_parameters() if tensor.ndim > 1 and tensor.shape[0] == count]
    found.modules[name] = Exchanging(plans.BY_EXPERT, copies, copies)
    _add_splits(found, {f"{name}.{each}": Split(dim=0, copies=copies) for each in stacked}, model, "moe")
    found.numbers.append((name, "num_experts", count * copies // found.ranks))


def _check_tied(found: Division, model: nn.Module) -> None:
    """Raise UsageError where one tensor is to be divided in two ways."""
    by_tensor: dict[int, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        first = by_tensor.setdefault(id(tensor), name)
        if found.splits.get(name) != found.splits.get(first):
            raise UsageError(
                f"{first} and {name} are one tensor in this model, so that they are divided alike: give embed_tp and "
                f"lmhead_tp the same number, or neither."
            )


def _kind(name: str, style: str, head: str) -> str:
    """The kind of a module by its name; `head` is the name of the model's output layer."""
    if name == head:
        return "lmhead"
    if style == plans.EMBEDDING:
        return "embed"
    if style in (plans.EXPERTS, plans.BY_EXPERT) or ".experts" in name:
        return "moe"
    if "attn" in name or "attention" in name:
        return "o_proj" if style in (plans.ROWWISE, plans.ROWWISE_SPLIT) else "attn"
    return "mlp"


def _name_of(model: nn.Module, module: Any) -> str:
    return next((name for name, each in model.named_modules() if each is module), "")


@dataclass(frozen=True)
class _Heads:
    """A model's heads, of which every rank has whole ones."""

    config: Any
    degrees: Degrees

    @property
    def query(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def key(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.query)

    def check(self) -> None:
        """Raise UsageError where a rank would have a part of a head."""
        parts = self.degrees.attn
        if not self._can_share(parts):
            choices = [n for n in range(2, self.query + 1) if self._can_share(n)]
            raise UsageError(
                f"{self.degrees.described('attn')}: every rank has whole heads, and {parts} cannot share the "
                f"{self.query} attention heads and {self.key} key/value heads of this model. Possible are "
                f"{', '.join(map(str, choices)) or 'none'}."
            )

    def _can_share(self, parts: int) -> bool:
        return self.query % parts == 0 and (self.key % parts == 0 or parts % self.key == 0)

    @property
    def groups(self) -> int:
        """How many attention heads of a rank share a key/value head."""
        return self.query // self.degrees.attn // max(1, self.key // self.degrees.attn)

    def copies(self, module: Any) -> int:
        """Of how many ranks each part of a layer of attention is: of more where it makes keys or values of fewer heads
        than there are parts."""
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.query
        is_key = self.key < self.query and _output_size(module) == self.key * width
        return self.degrees.ranks // min(self.degrees.attn, self.key if is_key else self.degrees.attn)


def _output_size(module: Any) -> int:
    if isinstance(module, QuantizedLinear):
        return int(module.packed.codes.shape[0])
    return int(module.nf if isinstance(module, Conv1D) else module.weight.shape[0])


def _split_module(name: str, module: Any, style: str, copies: int) -> Iterator[tuple[str, Split]]:
    """The tensors of a layer that are divided."""
    by_outputs = style not in (plans.ROWWISE, plans.ROWWISE_SPLIT)
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        yield from _split_quantized(name, module, by_outputs, copies)
        return
    if not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        raise UsageError(
            f"tensor_parallel= divides linear layers and embeddings, also those quantized to int8 or int4, and {name} "
            f"is a {type(module).__name__}."
        )
    # Queries, keys and values in one.
    blocks = 3 if style == plans.PACKED else 1
    yield "weight", Split(dim=int(by_outputs == isinstance(module, Conv1D)), blocks=blocks, copies=copies)
    if by_outputs and getattr(module, "bias", None) is not None:
        yield "bias", Split(dim=0, blocks=blocks, copies=copies)


def _split_quantized(name: str, module: Any, by_outputs: bool, copies: int) -> Iterator[tuple[str, Split]]:
    packed = module.packed
    if packed.extra:
        raise UsageError(
            f"tensor_parallel= divides weights that are quantized without offsets, and {name} has them. Give "
            f"quantize='int8', or symmetric=True."
        )
    has_groups = packed.scales.shape[1] > 1
    if has_groups and not by_outputs and packed.columns % packed.group:
        raise UsageError(
            f"tensor_parallel= divides whole groups, and the {packed.columns} columns of {name} are none of "
            f"{packed.group}. Give another group_size."
        )
    yield "packed.codes", Split(dim=0 if by_outputs else 1 if has_groups else 2, copies=copies)
    if isinstance(module, QuantizedEmbedding):
        yield "table", Split(dim=0, copies=copies)
    if by_outputs or has_groups:
        dim = 0 if by_outputs else 1
        yield "packed.scales", Split(dim=dim, copies=copies)
        if packed.zeros is not None:
            yield "packed.zeros", Split(dim=dim, copies=copies)
    if not by_outputs and packed.balance is not None:
        yield "packed.balance", Split(dim=0, copies=copies)
    if by_outputs and getattr(module, "bias", None) is not None:
        yield "bias", Split(dim=0, copies=copies)


def _split_parameter(parameter: Tensor, style: str, copies: int) -> Split:
    """Experts' weights [experts, N, K] in one tensor, gate and up in two blocks, and numbers of heads."""
    dims = parameter.ndim
    dim = dims - 1 if style in (plans.ROWWISE, plans.PACKED_ROWWISE) else max(dims - 2, 0)
    return Split(dim=dim, blocks=2 if style in (plans.PACKED, plans.PACKED_ROWWISE) else 1, copies=copies)


def _add_splits(found: Division, splits: dict[str, Split], model: nn.Module, kind: str) -> None:
    """Add those that divide anything. Raises UsageError where a dimension has no equal parts."""
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    for name, split in splits.items():
        parts, size = found.ranks // split.copies, tensors[name].shape[split.dim]
        if size % (split.blocks * parts):
            choices = [n for n in range(2, 65) if size % (split.blocks * n) == 0]
            raise UsageError(
                f"{found.degrees.described(kind)}: {parts} ranks cannot share the {size} {_what(found, kind)} of "
                f"{name} equally. Possible are {', '.join(map(str, choices)) or 'none'}; {kind}_tp=1 leaves them whole."
            )
        if parts > 1:
            found.splits[name] = split


def _what(found: Division, kind: str) -> str:
    if kind == "moe" and found.degrees.by_expert:
        return "experts"
    return "tokens of the vocabulary" if kind in ("embed", "lmhead") else "rows or columns"


_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_kv_heads", "split_size",
           "intermediate_dim")  # fmt: skip
"""Attributes by which modules know how many heads or columns they have, where they do not read it off their weights."""


_GROUPS = "num_key_value_groups"


def _divide_numbers(found: Division, model: nn.Module, name: str, style: str, kind: str, groups: int) -> None:
    """Note the attributes of a module's parent, or of experts themselves, that say how many of something it has."""
    if style not in (plans.COLWISE, plans.PACKED, plans.EXPERTS):
        return
    owner = name if style == plans.EXPERTS else name.rpartition(".")[0]
    parts = int(getattr(found.degrees, kind))
    for attribute in (*_COUNTS, _GROUPS):
        value = vars(model.get_submodule(owner)).get(attribute)
        if isinstance(value, int) and (owner, attribute) not in [each[:2] for each in found.numbers]:
            found.numbers.append((owner, attribute, groups if attribute == _GROUPS else max(1, value // parts)))
