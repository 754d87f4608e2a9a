"""Packed tensors in safetensors files -> the tensors of the model, one module at a time."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from precast.runtime.errors import CheckpointError

from .scheme import FLOATS, Packing, SchemeError

__all__ = ["check_all_used", "unpack_tensors"]


def unpack_tensors(files: list[Path], packing: Packing) -> dict[str, Tensor]:
    """Read safetensors files, under the names that the unquantized model has, with packed weights as float32.

    Beside the result no more than one module's weight is held; tensors that are not packed stay mapped from their file.
    Raises SchemeError where the tensors are not as `packing` says, and what the file system and safetensors raise.
    """
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        where = {name: file for file in _open_files(files, stack) for name in file.keys()}  # noqa: SIM118
        modules = {name.rpartition(".")[0] for name in where if name.endswith(f".{packing.marker}")}
        if not modules:
            raise SchemeError(f"no tensor in its safetensors files is a *.{packing.marker}")
        for name, file in where.items():
            module, _, last = name.rpartition(".")
            if module not in modules or last not in packing.parts:
                tensors[name] = _read_plain(name, file)
            elif last == packing.marker:
                tensors[f"{module}.weight"] = _read_weight(module, where, packing)
    return tensors


def check_all_used(model: nn.Module, tensors: dict[str, Tensor], unexpected: Iterable[str], name: str) -> None:
    """Raise CheckpointError where a tensor of one of the model's modules is unused, unless it is zero.

    Answers would change without it: AutoAWQ, for instance, stores scales that activations are divided by. Biases of
    zero are AutoGPTQ's, for every module.
    """
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise CheckpointError(
            f"{name} is quantized, and {type(model).__name__} keeps weights transposed (Conv1D): which way round the "
            "packed ones lie is not known. Export the checkpoint that it was quantized from."
        )
    # A checkpoint of a headless model names its modules without the prefix that they have below a head, and conversely.
    prefix = f"{model.base_model_prefix}."
    leaves = {path.removeprefix(prefix) for path, module in model.named_modules() if not any(module.children())}
    unused = [key for key in sorted(unexpected) if key.rpartition(".")[0].removeprefix(prefix) in leaves]
    if unused := [key for key in unused if key not in tensors or tensors[key].any()]:
        raise CheckpointError(
            f"{name} is quantized with tensors that {type(model).__name__} has no place for: {', '.join(unused[:3])}"
            f"{' …' if len(unused) > 3 else ''}. Export the checkpoint that it was quantized from."
        )


def _open_files(files: list[Path], stack: ExitStack) -> list[Any]:
    return [stack.enter_context(safe_open(path, framework="pt")) for path in files]


def _read_plain(name: str, file: Any) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    # Codes whose scales are missing would pass for a weight.
    if name.endswith(".weight") and tensor.dtype not in FLOATS:
        raise SchemeError(f"{name} is in {tensor.dtype} and has none of the tensors that would tell its scale")
    return tensor


def _read_weight(module: str, where: dict[str, Any], packing: Packing) -> Tensor:
    parts = {last: where[name].get_tensor(name) for last in packing.parts if (name := f"{module}.{last}") in where}
    try:
        return packing.weight(parts)
    except SchemeError as error:
        raise SchemeError(f"{module} {error}") from error
