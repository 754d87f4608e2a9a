"""What is known to work, and what is not and why: a table that ships with precast.

The tests make it (`tests/support.py`): every model type of transformers is exported from a tiny random checkpoint and
compared with the eager model. It is read without torch, so that a model that cannot be exported is refused before
anything is downloaded in full or imported.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from precast.runtime.artifact import KEY, strict_json
from precast.runtime.artifact.integrity import read_regular
from precast.runtime.artifact.tasks import Task, get_task
from precast.runtime.errors import CheckpointError
from precast.runtime.storage.reach import hub_or_cache

from .checkpoint.locate import is_compiled, not_given

__all__ = [
    "Support",
    "check_supported",
    "meant",
    "read_config",
    "supported_tasks",
    "supported_types",
    "table",
    "task_in",
]

_ENDINGS: dict[str, tuple[str, ...]] = {
    "ForCausalLM": ("text-generation",),
    "ForMaskedLM": ("fill-mask",),
    "ForSequenceClassification": ("text-classification",),
    "ForTokenClassification": ("token-classification",),
    "ForQuestionAnswering": ("question-answering",),
    "ForMultipleChoice": ("multiple-choice",),
    "ForImageClassification": ("image-classification",),
    "ForSemanticSegmentation": ("semantic-segmentation",),
    "ForObjectDetection": ("object-detection",),
    "ForAudioFrameClassification": ("audio-frame-classification",),
    "ForXVector": ("audio-xvector",),
    "ForCTC": ("automatic-speech-recognition",),
    "ForConditionalGeneration": ("automatic-speech-recognition", "text2text-generation"),
    "MarianMTModel": ("text2text-generation",),
    # Before there were names for what a head is for: T5's, XLM's and FlauBERT's.
    "WithLMHeadModel": ("text2text-generation", "fill-mask"),
    "LMHeadModel": ("text-generation",),
    "HeadsModel": (),
    # One without a head: CLIP's is what compares images and texts.
    "Model": ("zero-shot-image-classification", "feature-extraction"),
}
"""What a class is for, by how its name ends: of several tasks, the first that its type is known for. What is not here
is inferred later, with the library's help."""

_LESS_TELLING = ("text2text-generation", "fill-mask", "feature-extraction")
"""Tasks that transformers lists classes under that are published for another: speech models generate text from what
they hear, BART can fill masks, and some classes with a head are their type's AutoModel."""


@dataclass(frozen=True)
class Support:
    """One line of the table.

    Attributes:
        model_type, task: what was tried.
        way: how it is compiled: "operator" and "adapter" (cached attention as one operator), "ordinary operators",
            "encoder", …; empty where it is refused.
        difference: the largest from eager fp32, relative to max(1, max|reference|).
        kl_int8: the KL divergence of `--quantize int8` with random weights, in nats; None where that is not offered.
        axes: the sizes that an export must be given, as ExportOptions names them.
        reason: why it is refused; empty where it passes.
        configuration: the published checkpoint whose configuration it was measured on, made small; empty where that was
            the default of its type.
    """

    model_type: str
    task: str
    way: str = ""
    difference: float = 0.0
    kl_int8: float | None = None
    axes: tuple[str, ...] = ()
    reason: str = ""
    configuration: str = ""

    @property
    def passes(self) -> bool:
        return not self.reason


@cache
def table() -> tuple[Support, ...]:
    """All lines, by type and task."""
    raw = json.loads(resources.files(__package__).joinpath("support.json").read_text("utf-8"))
    return tuple(Support(**{**line, "axes": tuple(line.get("axes", ()))}) for line in raw["lines"])


def supported_tasks(model_type: str) -> dict[str, Support]:
    """What is known of a model type, by task; empty where it was never tried."""
    return {line.task: line for line in table() if line.model_type == model_type}


def supported_types(task: str) -> list[str]:
    """The model types that pass for a task."""
    return [line.model_type for line in table() if line.task == task and line.passes]


def check_supported(
    model: str,
    task: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any] | None:
    """Raise CheckpointError for a checkpoint that is known not to work, with the reason and what works instead.

    Reads its configuration only, and says nothing about one that cannot be read or was never tried. Returns that
    configuration; None where nothing can be concluded from it.
    """
    config = read_config(model, revision=revision, token=token)
    if config is None or (trust_remote_code and "auto_map" in config):
        return None
    if KEY in config:
        raise is_compiled(model)
    model_type = str(config.get("model_type"))
    known = supported_tasks(model_type)
    task = get_task(task).name if task else task_in(config)
    found = known.get(task) if task else None
    if found is None and known and not any(line.passes for line in known.values()):
        found = next(iter(known.values()))
    if found is not None and not found.passes:
        raise CheckpointError(
            f"{model} cannot be exported for {found.task}: models of type {model_type!r} are refused because "
            f"{found.reason}. {_instead(found, known)}"
        )
    return config


def task_in(config: Mapping[str, Any]) -> str | None:
    """The task of the class that a configuration names, where the name says it."""
    known = supported_tasks(str(config.get("model_type")))
    for name in config.get("architectures") or []:
        for ending, tasks in _ENDINGS.items():
            if str(name).endswith(ending):
                if len(tasks) == 1:
                    return tasks[0]
                found = next((task for task in tasks if task in known), None)
                return "text-generation" if found == "fill-mask" and _is_causal(config) else found
    return None


def meant(rows: Sequence[Task], config: Mapping[str, Any]) -> Task:
    """Which of the tasks of one class a checkpoint with this configuration is published for."""
    left_out = "fill-mask" if _is_causal(config) else "text-generation"
    both = {"fill-mask", "text-generation"} <= {row.name for row in rows}
    able = [row for row in rows if not both or row.name != left_out]
    return min(able, key=lambda row: _LESS_TELLING.index(row.name) if row.name in _LESS_TELLING else -1)


def _is_causal(config: Mapping[str, Any]) -> bool:
    """XLM's one head predicts the next token in checkpoints that say so, and masked ones in others."""
    return config.get("causal") is True


def read_config(model: str, *, revision: str | None = None, token: str | None = None) -> dict[str, Any] | None:
    """The checkpoint's config.json, alone, or as much of one as the head of a GGUF file says; None where there is none.

    Raises CheckpointError for a name that is neither here nor on the Hub.
    """
    path: Path | None = Path(model).expanduser() / "config.json"
    if model.endswith(".gguf"):
        return _gguf_config(Path(model).expanduser())
    if not Path(model).expanduser().exists() and not model.startswith((".", "/", "~")):
        path = _from_hub(model, revision, token)
    try:
        config = json.loads(read_regular(path, strict_json.MAX_BYTES)) if path else None
    except (OSError, ValueError):
        # Whoever opens it next says what is wrong with it.
        return None
    return config if isinstance(config, dict) else None


def _gguf_config(path: Path) -> dict[str, Any] | None:
    """What the first entry of a GGUF file says: `general.architecture`, in most cases transformers' model type."""
    try:
        head = read_regular(path, 256)
    except OSError:
        return None
    # Magic, version, number of tensors and of entries; then key, type and value, strings with their length before.
    found = re.match(rb"GGUF.{20}\x14.{7}general\.architecture\x08.{3}(.).{7}([a-z0-9_-]+)", head, re.DOTALL)
    if found is None:
        return None
    return {"model_type": found[2][: found[1][0]].decode(), "architectures": ["ForCausalLM"]}


def _from_hub(model: str, revision: str | None, token: str | None) -> Path | None:
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
            raise not_given(model, problem or str(error).splitlines()[0]) from error


def _instead(found: Support, known: Mapping[str, Support]) -> str:
    others = [line.task for line in known.values() if line.passes]
    if others:
        return f"It can be exported for: {', '.join(others)}."
    close = difflib.get_close_matches(found.model_type, supported_types(found.task), n=3, cutoff=0.5)
    nearest = f"The nearest types that work: {', '.join(close)}. " if close else ""
    return f"{nearest}All that work: precast tasks --task {found.task}."
