"""Checks before torch is imported, which takes longer than all of them together."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precast.runtime.artifact import KEY, read_artifact, strict_json
from precast.runtime.artifact.integrity import read_regular
from precast.runtime.artifact.publish import check_target
from precast.runtime.artifact.tasks import find_tasks, get_task
from precast.runtime.errors import CheckpointError, PublishError, UsageError
from precast.runtime.hosts.reach import hub_or_cache
from precast.runtime.terminal import quoted

from ..options import ExportOptions
from ..support import Support, infer_task, supported_tasks, supported_types
from .adapters import read_local
from .locate import compiled_error, find_local, not_found_error

__all__ = ["check_comparison", "check_length", "check_request", "check_supported", "check_swap", "read_config"]

_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
          "vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "n_embd", "n_layer", "n_head")  # fmt: skip
"""Sizes of weights as configurations name them: where one differs, so do the weights."""

_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
"""Model types whose max_position_embeddings counts positions that no token has."""


def check_request(model: str, target: Path | None, options: ExportOptions) -> None:
    """Check options, target and MODEL, and the sizes as far as MODEL's config.json alone says what is possible.

    Raises PrecastError, as the export itself would later.
    """
    options.check()
    if target is not None:
        check_target(target, force=options.force)
    find_local(model, options.revision)
    read_local(options.adapters)
    config = check_supported(
        model, options.task, revision=options.revision, token=options.token, trust_remote_code=options.trust_remote_code
    )
    if config is not None:
        _check_sizes(model, config, options)


def check_comparison(artifact: Path, model: str, options: ExportOptions) -> None:
    """Check options, an artifact, and the MODEL that it is to be compared with. Raises PrecastError."""
    options.check()
    compiled = read_artifact(artifact)
    local = find_local(model, options.revision)
    config = check_supported(
        model, compiled.contract.task, revision=options.revision, token=options.token,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    given, needed = (config or {}).get("model_type"), compiled.config.get("model_type")
    # What a GGUF file calls its architecture is not always transformers' name.
    is_gguf = local is not None and local.gguf_file is not None
    if given and given != needed and not is_gguf:
        raise CheckpointError(
            f"{artifact} was compiled from {compiled.contract.source.model}, of type {needed!r}, and {model} is "
            f"of type {given!r}: is it the right checkpoint?"
        )


def check_swap(artifact: Path, model: str, target: Path | None, options: ExportOptions) -> None:
    """Check an artifact, the MODEL whose weights are to take the place of its own, and where the result is to be.

    Raises PrecastError.
    """
    if target is not None and target.resolve() == artifact.resolve():
        raise PublishError(f"{target} is the artifact itself, which stays as it is; give another directory.")
    check_comparison(artifact, model, options)
    if target is not None:
        check_target(target, force=options.force)
    compiled, config = read_artifact(artifact), read_config(model, revision=options.revision, token=options.token) or {}
    for name in _SIZES:
        old, new = compiled.config.get(name), config.get(name)
        if type(old) is type(new) is int and old != new:
            raise CheckpointError(
                f"The weights of {model} do not fit what is compiled in {artifact}: {name} is {new} and not {old}. "
                f"Instead, compile it with precast export {quoted(model)} -o OUT."
            )


def check_length(name: str, longest: int | None, length: int) -> None:
    """Raise UsageError for a sequence longer than the model was made for, `longest`, where that is known."""
    if longest is not None and length > longest:
        raise UsageError(
            f"sequence_length={length} is more than {name} was made for: its max_position_embeddings allow {longest}."
        )


def _check_sizes(model: str, config: Mapping[str, Any], options: ExportOptions) -> None:
    """Check sizes for tasks that one kind of model does, of types that were tried; planning checks all others."""
    name = get_task(options.task).name if options.task else infer_task(config)
    line = supported_tasks(str(config.get("model_type"))).get(name or "")
    rows = find_tasks(line.task) if line else []
    if line is None or len(rows) != 1:
        return
    options.check_task(rows[0])
    longest = _max_length(config)
    options.check_sizes(model, line.task, line.axes, longest)
    if "sequence_length" in line.axes or rows[0].kind == "decoder":
        check_length(Path(model).name, longest, max(options.sequence_length, default=0))


def _max_length(config: Mapping[str, Any]) -> int | None:
    found = config.get("max_position_embeddings")
    is_plain = type(found) is int and found > 0 and config.get("model_type") not in _OFFSET_POSITIONS
    return found if is_plain else None


def check_supported(
    model: str,
    task: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any] | None:
    """Raise CheckpointError for a checkpoint that is known not to work, with the reason and what works instead.

    Reads its config.json only, and accepts one that cannot be read or whose type was never tried. Returns that
    configuration; None where it says nothing.
    """
    config = read_config(model, revision=revision, token=token)
    if config is None or (trust_remote_code and "auto_map" in config):
        return None
    if KEY in config:
        raise compiled_error(model)
    model_type = str(config.get("model_type"))
    known = supported_tasks(model_type)
    task = get_task(task).name if task else infer_task(config)
    found = known.get(task) if task else None
    if found is None and known and not any(line.passes for line in known.values()):
        found = next(iter(known.values()))
    if found is not None and not found.passes:
        raise CheckpointError(
            f"{model} cannot be exported for {found.task}: models of type {model_type!r} are refused because "
            f"{found.reason}. {_suggest_instead(found, known)}"
        )
    return config


def read_config(model: str, *, revision: str | None = None, token: str | None = None) -> dict[str, Any] | None:
    """Read the checkpoint's config.json alone, or as much of one as the head of a GGUF file says; None where there is
    none.

    Raises CheckpointError for a name that is neither here nor on the Hub.
    """
    path: Path | None = Path(model).expanduser() / "config.json"
    if model.endswith(".gguf"):
        return _read_gguf_head(Path(model).expanduser())
    if not Path(model).expanduser().exists() and not model.startswith((".", "/", "~")):
        path = _download_config(model, revision, token)
    try:
        config = json.loads(read_regular(path, strict_json.MAX_BYTES)) if path else None
    except (OSError, ValueError):
        # Loading the checkpoint will say what is wrong with it.
        return None
    return config if isinstance(config, dict) else None


def _read_gguf_head(path: Path) -> dict[str, Any] | None:
    """The first entry of a GGUF file, `general.architecture`: in most cases transformers' model type."""
    try:
        head = read_regular(path, 256)
    except OSError:
        return None
    # Magic, version, number of tensors and of entries; then key, type and value, strings with their length before.
    found = re.match(rb"GGUF.{20}\x14.{7}general\.architecture\x08.{3}(.).{7}([a-z0-9_-]+)", head, re.DOTALL)
    if found is None:
        return None
    return {"model_type": found[2][: found[1][0]].decode(), "architectures": ["ForCausalLM"]}


def _download_config(model: str, revision: str | None, token: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    with hub_or_cache() as problem:
        is_cached = problem is not None
        try:
            return Path(
                hf_hub_download(model, "config.json", revision=revision, token=token, local_files_only=is_cached)
            )
        except RemoteEntryNotFoundError:
            return None
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            raise not_found_error(model, problem or str(error).splitlines()[0]) from error


def _suggest_instead(found: Support, known: Mapping[str, Support]) -> str:
    others = [line.task for line in known.values() if line.passes]
    if others:
        return f"It can be exported for: {', '.join(others)}."
    close = difflib.get_close_matches(found.model_type, supported_types(found.task), n=3, cutoff=0.5)
    nearest = f"The nearest types that work: {', '.join(close)}. " if close else ""
    return f"{nearest}All that work: precast tasks --task {found.task}."
