"""sentence-transformers checkpoints: token vectors to one vector per text, inside the graph.

The modules that `modules.json` lists after the transformer are computed as Pooling, Dense, LayerNorm, Dropout and
Normalize of https://github.com/huggingface/sentence-transformers compute them, without that library. How texts are
prepared before is in sentence_texts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from precast.runtime.artifact import strict_json
from precast.runtime.errors import ArtifactError, CheckpointError

from .files import check_files, path_within

__all__ = ["OUTPUT", "attach_sentences", "check_prompt", "embeds_sentences", "output_names", "sentence_weights"]

OUTPUT = "sentence_embedding"
"""[batch, dim], beside the outputs of the task."""


def output_names(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """A task's outputs, and the sentence embedding where the checkpoint has one."""
    return (*names, OUTPUT) if embeds_sentences(model) else names


def embeds_sentences(model: nn.Module) -> bool:
    """Whether a model answers `sentence_embedding`."""
    return hasattr(model, "sentence_head")


def attach_sentences(model: nn.Module, directory: Path, name: str) -> None:
    """Let `model` answer `sentence_embedding` too where the checkpoint's directory has a modules.json.

    Raises CheckpointError for other modules than those above.
    """
    modules = _read_modules(directory, name)
    if not modules:
        return
    device = next(model.parameters()).device
    head = nn.ModuleList(_MAKERS[kind](directory / path, name) for kind, path in modules)
    _check_order(head, name)
    model.sentence_head = head.to(device).eval().requires_grad_(False)
    model.register_forward_hook(_add_embedding, with_kwargs=True)


def sentence_weights(directory: Path, name: str) -> list[Path]:
    """The weight files of the modules after the transformer."""
    folders = [directory / path for kind, path in _read_modules(directory, name) if kind in ("Dense", "LayerNorm")]
    return [_weight_file(folder, name) for folder in folders]


def check_prompt(directory: Path, name: str, prompt: str) -> None:
    """Raise CheckpointError where pooling would have to leave out the prompt's tokens."""
    for kind, path in _read_modules(directory, name):
        if kind == "Pooling" and prompt and _read_config(directory / path, name).get("include_prompt") is False:
            raise CheckpointError(
                f"{path}/config.json of {name} leaves its default prompt, {prompt!r:.60}, out of the embedding "
                f"(include_prompt: false), which a compiled graph cannot tell from the text. Set default_prompt_name "
                f"to null in config_sentence_transformers.json to export it without a prompt."
            )


def _read_modules(directory: Path, name: str) -> list[tuple[str, str]]:
    """Read modules.json: (kind, folder) of every module after the transformer; none without that file."""
    path = directory / "modules.json"
    if not path.is_file():
        return []
    try:
        # The strict parser takes objects only, so the list is wrapped in one.
        listed = strict_json.loads(b'{"modules": ' + path.read_bytes() + b"}", f"{name}/modules.json")["modules"]
        if own := [each["type"] for each in listed if not str(each["type"]).startswith("sentence_transformers.")]:
            raise CheckpointError(
                f"The modules.json of {name} has a module of its own code, {own[0]}, so its sentence embeddings cannot "
                f"be compiled. Without modules.json the model is exported for its token vectors."
            )
        found = [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in listed]
    except (ArtifactError, KeyError, TypeError) as error:
        raise CheckpointError(f"The modules.json of {name} cannot be used: {type(error).__name__} {error}") from error
    if not found or found[0][0] != "Transformer" or found[0][1] not in ("", "."):
        raise CheckpointError(
            f"The modules.json of {name} begins with {found[0] if found else 'nothing'}; precast compiles a "
            f"Transformer that lies beside it."
        )
    if odd := [kind for kind, _ in found[1:] if kind not in _MAKERS]:
        raise CheckpointError(
            f"The modules.json of {name} has a module of the kind {odd[0]}; precast knows Transformer, "
            f"{', '.join(_MAKERS)}."
        )
    for _, folder in found[1:]:
        path_within(directory, folder, name, "modules.json")
    check_files(directory, name, [folder for _, folder in found[1:]])
    return found[1:]


def _check_order(head: nn.ModuleList, name: str) -> None:
    """Raise CheckpointError where a module does not take the output of the one before it."""
    at = "token_embeddings"
    for module in head:
        if isinstance(module, _Pooling):
            at = OUTPUT
        elif (names := tuple(map(str, module.names))) != (at, at):  # type: ignore[arg-type]
            raise CheckpointError(
                f"A module of {name} makes {names[1]} of {names[0]} where {at} are at hand; precast compiles modules "
                f"one after another."
            )


def _tensor_names(config: Mapping[str, Any]) -> tuple[str, str]:
    """The names of a module's input and output."""
    source = config.get("module_input_name") or OUTPUT
    return source, config.get("module_output_name") or source


def _add_embedding(model: Any, args: Any, named: Mapping[str, Any], result: Any) -> Any:
    states, mask = result["last_hidden_state"], named.get("attention_mask")
    mask = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.to(states.dtype)
    value = states
    for module in model.sentence_head:
        # Pooling takes the tokens' vectors, whatever module comes before it.
        value = module(states if isinstance(module, _Pooling) else value, mask)
    result[OUTPUT] = value
    return result


class _Pooling(nn.Module):
    """Pooling in one or several ways, whose results are concatenated in sentence-transformers' order."""

    def __init__(self, ways: list[str]) -> None:
        super().__init__()
        self.ways = ways

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([_WAYS[way](states, mask) for way in self.ways], -1)


def _pool_first(states: Tensor, mask: Tensor) -> Tensor:
    return states[:, 0]


def _pool_max(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask[:, :, None] == 0, -1e9).amax(1)


def _pool_mean(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


def _pool_mean_sqrt(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[:, :, None]).sum(1) / torch.sqrt(mask.sum(1, keepdim=True))


def _pool_weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Later tokens count more: position i counts i times (SGPT, https://arxiv.org/abs/2202.08904)."""
    return _pool_mean(states, mask * torch.arange(1, states.shape[1] + 1, device=states.device))


def _pool_last(states: Tensor, mask: Tensor) -> Tensor:
    """The last real token of each row."""
    last = (mask * torch.arange(1, states.shape[1] + 1, device=states.device)).argmax(1)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1]))[:, 0]


_WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _pool_first,
    "max": _pool_max,
    "mean": _pool_mean,
    "mean_sqrt_len_tokens": _pool_mean_sqrt,
    "weightedmean": _pool_weighted_mean,
    "lasttoken": _pool_last,
}
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def _make_pooling(folder: Path, name: str) -> nn.Module:
    config = _read_config(folder, name)
    given = config.get("pooling_mode") or [way for flag, way in _FLAGS.items() if config.get(flag)] or "mean"
    ways = [given] if isinstance(given, str) else list(given)
    if any(way not in _WAYS for way in ways):
        raise CheckpointError(
            f"The pooling of {name} is {', '.join(map(str, ways)) or 'none'}; precast knows {', '.join(_WAYS)}."
        )
    return _Pooling(ways)


class _Dense(nn.Module):
    """A linear layer and an activation over the last dimension, with a residual connection where config.json asks."""

    def __init__(self, config: Mapping[str, Any], activation: nn.Module) -> None:
        super().__init__()
        width, size = config["in_features"], config["out_features"]
        self.names = _tensor_names(config)
        self.activation = activation
        self.linear = nn.Linear(width, size, bias=config.get("bias", True))
        self.is_residual = bool(config.get("use_residual"))
        if self.is_residual:
            self.residual = nn.Identity() if width == size else nn.Linear(width, size, bias=False)

    def forward(self, vector: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.activation(self.linear(vector))
        return found + self.residual(vector) if self.is_residual else found


_ACTIVATIONS = {"Tanh": nn.Tanh, "Identity": nn.Identity, "ReLU": nn.ReLU, "GELU": nn.GELU, "SiLU": nn.SiLU}


def _make_dense(folder: Path, name: str) -> nn.Module:
    config = _read_config(folder, name)
    written = str(config.get("activation_function", "torch.nn.Tanh"))
    activation = written.rpartition(".")[2]
    if activation not in _ACTIVATIONS or not written.startswith("torch."):
        raise CheckpointError(
            f"{folder.name} of {name} has the activation {written}; precast knows torch's {', '.join(_ACTIVATIONS)}."
        )
    return _with_weights(lambda: _Dense(config, _ACTIVATIONS[activation]()), folder, name)


class _LayerNorm(nn.Module):
    names = (OUTPUT, OUTPUT)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, vector: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.norm(vector)
        return found


def _make_layer_norm(folder: Path, name: str) -> nn.Module:
    config = _read_config(folder, name)
    return _with_weights(lambda: _LayerNorm(config["dimension"]), folder, name)


def _with_weights(make: Callable[[], nn.Module], folder: Path, name: str) -> nn.Module:
    """Make a module and load its weights. Raises CheckpointError where config.json and weights do not fit."""
    weights = _load_weights(_weight_file(folder, name))
    try:
        module = make()
        module.load_state_dict({key: value.float() for key, value in weights.items()})
    except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())}"
        raise CheckpointError(f"{folder.name} of {name} cannot be made as its config.json says: {reason}") from error
    return module


def _load_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def _weight_file(folder: Path, name: str) -> Path:
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (folder / file).is_file():
            return folder / file
    raise CheckpointError(f"{folder.name} of {name} has no weights: no model.safetensors or pytorch_model.bin in it.")


class _Normalize(nn.Module):
    """Scale vectors to length 1."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = _tensor_names(config)

    def forward(self, vector: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.normalize(vector, p=2.0, dim=-1)


def _make_normalize(folder: Path, name: str) -> nn.Module:
    # Before sentence-transformers 5 it had no config.json, so its folder is empty or, after git, missing.
    return _Normalize(_read_config(folder, name) if (folder / "config.json").is_file() else {})


class _Dropout(nn.Module):
    """The identity: dropout is for training only."""

    names = (OUTPUT, OUTPUT)

    def forward(self, vector: Tensor, mask: Tensor) -> Tensor:
        return vector


def _make_dropout(folder: Path, name: str) -> nn.Module:
    return _Dropout()


_MAKERS: dict[str, Callable[[Path, str], nn.Module]] = {
    "Pooling": _make_pooling,
    "Dense": _make_dense,
    "LayerNorm": _make_layer_norm,
    "Dropout": _make_dropout,
    "Normalize": _make_normalize,
}


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    try:
        return strict_json.loads((folder / "config.json").read_bytes(), f"{name}/{folder.name}/config.json")
    except FileNotFoundError:
        raise CheckpointError(
            f"{name} lacks the file {folder.name}/config.json, which its modules.json needs."
        ) from None
    except (ArtifactError, OSError) as error:
        raise CheckpointError(f"The {folder.name} of {name} cannot be used: {error}") from error
