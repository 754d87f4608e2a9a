"""Give padded rows the answer of the row alone, in layers where transformers lets padding in.

transformers masks attention, but convolutions along the sequence, norms and statistics over time read padding as well,
so the answer would depend on how far a row is padded. While a model is traced, hooks give such layers what they would
see without padding: zeros beyond the end, and means over real positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import CheckpointError

from .frames import Convolutions, read_convolutions

__all__ = ["allow_batches", "check_paddable", "ignore_padding"]


class _RealPositions:
    """Masks of the real positions: of the input, and after each convolution.

    A mask is found by the length of a tensor, since every stage is shorter than the one before.
    """

    def __init__(self, mask: Tensor, chain: Convolutions) -> None:
        mask = mask.reshape(-1, mask.shape[-1])
        self.masks = {mask.shape[-1]: mask.bool()}
        length, counts = mask.shape[-1], mask.sum(-1)
        for kernel, stride in chain.stages:
            length = (length - kernel) // stride + 1
            counts = torch.div(counts - kernel, stride, rounding_mode="floor") + 1
            self.masks[length] = self.first(counts, length)
        self.counts = counts

    @staticmethod
    def first(counts: Tensor, length: int) -> Tensor:
        """bool [B, length]: the first `counts` [B] of each row."""
        return torch.arange(length)[None] < counts[:, None]

    def at(self, length: int) -> Tensor | None:
        """bool [B, length]; None where no stage is so long."""
        return self.masks.get(length)


@contextmanager
def ignore_padding(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Within this block `model` answers each row as without its padding, which is where `mask` [B, …, L] is 0."""
    with ExitStack() as stack:
        if mask is not None:
            real = _RealPositions(mask, read_convolutions(model.config.to_dict()))  # type: ignore[operator, union-attr]
            for module in model.modules():
                for rule in _RULES:
                    for undo in rule(module, real):
                        stack.callback(undo)
        yield


Undo = Callable[[], None]
"""Takes a hook or a replacement away again."""


def _convolution(module: nn.Module, real: _RealPositions) -> Iterator[Undo]:
    """A convolution that pads with zeros: its input is zero at padding, too."""
    if not isinstance(module, nn.Conv1d) or module.padding in ("valid", (0,)):
        return

    def zero_padding(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        mask = real.at(args[0].shape[-1])
        return None if mask is None else (args[0] * mask[:, None],)

    yield module.register_forward_pre_hook(zero_padding).remove


def _group_norm(module: nn.Module, real: _RealPositions) -> Iterator[Undo]:
    """Group norm over time: mean and variance of real positions only."""
    if not isinstance(module, nn.GroupNorm):
        return

    def normalize(norm: nn.GroupNorm, args: tuple[Tensor], usual: Tensor) -> Tensor:
        mask = real.at(args[0].shape[-1]) if args[0].ndim == 3 else None
        return usual if mask is None else _masked_group_norm(norm, args[0], mask)

    yield module.register_forward_hook(normalize).remove


def _masked_group_norm(norm: nn.GroupNorm, x: Tensor, mask: Tensor) -> Tensor:
    """`nn.GroupNorm` of x [B, C, T] over the frames in mask [B, T]."""
    groups = x.reshape(len(x), norm.num_groups, -1, x.shape[-1])
    weights = mask[:, None, None].to(x.dtype)
    count = weights.sum(-1, keepdim=True) * groups.shape[2]
    centred = (groups - (groups * weights).sum((2, 3), keepdim=True) / count) * weights
    variance = (centred * centred).sum((2, 3), keepdim=True) / count
    found = (centred / torch.sqrt(variance + norm.eps)).reshape(x.shape)
    return found * norm.weight[:, None] + norm.bias[:, None]


def _frame_mask(module: Any, real: _RealPositions) -> Iterator[Undo]:
    """The mask of frames: looked up, where transformers scatters into a tensor, which graphs do slowly."""
    if "_get_feature_vector_attention_mask" not in dir(module) or not read_convolutions(module.config.to_dict()).stages:
        return
    module._get_feature_vector_attention_mask = lambda length, mask, add_adapter=None: real.at(length)
    yield lambda: delattr(module, "_get_feature_vector_attention_mask")


def _statistics(module: Any, real: _RealPositions) -> Iterator[Undo]:
    """An x-vector's mean and standard deviation: over real frames only.

    transformers loops over rows by their lengths, and does not count the dilation of its layers.
    """
    if not hasattr(module, "tdnn"):
        return
    seen: dict[str, Tensor] = {}
    lost = sum((layer.kernel_size - 1) * layer.dilation for layer in module.tdnn)

    def keep_mask(_: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        seen["mask"] = named.pop("attention_mask")
        return args, named

    def give_mask(_: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        return args, {**named, "attention_mask": seen["mask"]}

    def keep_states(_: nn.Module, args: Any, states: Tensor) -> None:
        seen["states"] = states

    def pool(_: nn.Module, args: Any) -> tuple[Tensor]:
        states = seen["states"]
        return (_mean_and_deviation(states, real.first(real.counts - lost, states.shape[1])),)

    yield module.register_forward_pre_hook(keep_mask, with_kwargs=True).remove
    yield module.base_model.register_forward_pre_hook(give_mask, with_kwargs=True).remove
    yield module.tdnn[-1].register_forward_hook(keep_states).remove
    yield module.feature_extractor.register_forward_pre_hook(pool).remove


def _mean_and_deviation(states: Tensor, mask: Tensor) -> Tensor:
    """Mean and standard deviation of states [B, T, D] over mask [B, T]: [B, 2 D]. The deviation is torch's, which
    divides by the count less one."""
    weights = mask[:, :, None].to(states.dtype)
    count = weights.sum(1)
    mean = (states * weights).sum(1) / count
    centred = (states - mean[:, None]) * weights
    return torch.cat([mean, torch.sqrt((centred * centred).sum(1) / (count - 1))], -1)


def _named_layers(module: nn.Module, real: _RealPositions) -> Iterator[Undo]:
    rule = _BY_CLASS.get(type(module).__name__)
    if rule is not None:
        yield from rule(module, real)


def _zero_output(module: nn.Module, real: _RealPositions) -> Undo:
    """Set the output of `module`, [B, L, D], to zero at padding."""

    def zero_padding(_: nn.Module, args: Any, result: Tensor) -> Tensor:
        mask = real.at(result.shape[1])
        return result if mask is None else result * mask[:, :, None]

    return module.register_forward_hook(zero_padding).remove


def _convbert(module: Any, real: _RealPositions) -> Iterator[Undo]:
    """ConvBERT cuts spans from a projection that it pads with zeros."""
    yield _zero_output(module.conv_out_layer, real)


def _mobilebert(module: Any, real: _RealPositions) -> Iterator[Undo]:
    """MobileBERT concatenates each position's embedding with those of its neighbours."""
    yield _zero_output(module.word_embeddings, real)


def _nystromformer(module: Any, real: _RealPositions) -> Iterator[Undo]:
    """Nyströmformer convolves the values, [B, heads, L, D], along the sequence."""

    def zero_padding(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        mask = real.at(args[0].shape[2])
        return None if mask is None else (args[0] * mask[:, None, :, None],)

    yield module.conv.register_forward_pre_hook(zero_padding).remove


def _summary(module: Any, real: _RealPositions) -> Iterator[Undo]:
    """A sequence summary: the state of the last real position, or the mean over real positions."""
    if module.summary_type not in ("last", "mean"):
        return

    def summarize(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        mask = real.at(args[0].shape[1])
        if mask is None:
            return None
        weights = mask.to(args[0].dtype)
        if module.summary_type == "last":
            numbers = torch.arange(1, args[0].shape[1] + 1)
            weights = nn.functional.one_hot((mask * numbers).argmax(1), args[0].shape[1]).to(args[0].dtype)
        return (weights[:, None] @ args[0] / weights.sum(1)[:, None, None], *args[1:])

    yield module.register_forward_pre_hook(summarize).remove


def _last_token(module: Any, real: _RealPositions) -> Iterator[Undo]:
    """A decoder that classifies by its last token: the last one by the mask. A caller may pad with other ids than the
    model's `pad_token_id`, and models without one would pool the last position, padding or not.
    """
    if not _pools_last_token(module):
        return
    head = module.score if hasattr(module, "score") else module.classifier
    pad, seen = module.config.get_text_config().pad_token_id, {}

    def keep_ids(_: nn.Module, args: Any, named: dict[str, Any]) -> None:
        seen["ids"] = named["input_ids"]

    def pool(_: nn.Module, args: Any, logits: Tensor) -> Tensor:
        """Put the answer at every position, so that the model finds it wherever it looks."""
        mask = real.at(logits.shape[1])
        assert mask is not None, "a mask is as long as the tokens"
        counted = mask if pad is None else mask & (seen["ids"] != pad)
        last = (counted * torch.arange(1, logits.shape[1] + 1)).argmax(1)
        return logits.gather(1, last[:, None, None].expand(-1, logits.shape[1], logits.shape[2]))

    yield _padding_token(module)
    yield module.register_forward_pre_hook(keep_ids, with_kwargs=True).remove
    yield head.register_forward_hook(pool).remove


def _pools_last_token(module: nn.Module) -> bool:
    """Whether the module classifies by the last token, read off its code: most types share one, some write it out."""
    forward: Any = inspect.unwrap(type(module).forward)
    return isinstance(forward, FunctionType) and "last_non_pad_token" in forward.__code__.co_varnames


def _padding_token(module: Any) -> Undo:
    """Give the configuration a padding token where it has none: without one, transformers refuses several rows."""
    config = module.config.get_text_config()
    before = config.pad_token_id
    config.pad_token_id = 0 if before is None else before
    return lambda: setattr(config, "pad_token_id", before)


@contextmanager
def allow_batches(model: nn.Module) -> Iterator[None]:
    """Within this block `model` takes several rows, even where it has no padding token."""
    undo = _padding_token(model) if _pools_last_token(model) else lambda: None
    try:
        yield
    finally:
        undo()


def _sew(module: Any, real: _RealPositions) -> Iterator[Undo]:
    """SEW pools frames by a factor and spreads them again: a row's rest that fills no pool is dropped, then zero."""
    factor = module.config.squeeze_factor
    whole = real.counts // factor

    def mask_attention(_: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        keep = real.first(whole, args[0].shape[1])[:, None, None]
        lowest = torch.finfo(args[0].dtype).min
        return args, {**named, "attention_mask": torch.where(keep, 0.0, lowest)}

    def drop_rest(_: nn.Module, args: Any, result: Any) -> Any:
        states = result.last_hidden_state
        result.last_hidden_state = states * real.first(whole * factor, states.shape[1])[:, :, None]
        return result

    for layer in module.layers:
        yield layer.register_forward_pre_hook(mask_attention, with_kwargs=True).remove
    yield module.register_forward_hook(drop_rest).remove


def _xlnet(module: Any, real: _RealPositions) -> Iterator[Undo]:
    """XLNet subtracts its mask from 1.0, which torch.onnx cannot do with integers."""

    def make_float(_: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        return args, {**named, "attention_mask": named["attention_mask"].to(module.dtype)}

    yield module.register_forward_pre_hook(make_float, with_kwargs=True).remove


_BY_CLASS: dict[str, Callable[[Any, _RealPositions], Iterator[Undo]]] = {
    "ConvBertSelfAttention": _convbert,
    "MobileBertEmbeddings": _mobilebert,
    "NystromformerSelfAttention": _nystromformer,
    "SEWEncoder": _sew,
    "XLNetModel": _xlnet,
    **{
        f"{prefix}SequenceSummary": _summary
        for prefix in ("ConvBert", "Electra", "Flaubert", "RoFormer", "XLM", "XLNet")
    },
}

_RULES = (_convolution, _group_norm, _frame_mask, _statistics, _last_token, _named_layers)


def check_paddable(model: nn.Module, task: Task) -> None:
    """Raise CheckpointError for a model whose answer to a row depends on its padding in a way that no hook mends."""
    config: Any = model.config
    if config.model_type == "nystromformer" and config.num_landmarks != config.segment_means_seq_len:
        raise CheckpointError(
            f"This nystromformer approximates attention by {config.num_landmarks} means over "
            f"{config.segment_means_seq_len} positions, padding among them; only models with as many landmarks as "
            f"positions can be compiled for {task.name}."
        )
