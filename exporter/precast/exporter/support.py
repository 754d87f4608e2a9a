"""The support table that ships with precast: which model types work, and which are refused and why.

`tools/support_table.py` makes it: every model type of transformers is exported from a tiny random checkpoint and
compared with the eager model. It is read without torch, so that a model that cannot be exported is refused before
anything is downloaded in full or imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from precast.runtime.artifact.tasks import Task

__all__ = [
    "Support",
    "choose_task",
    "supported_tasks",
    "supported_types",
    "table",
    "infer_task",
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
"""The tasks of a model class by the end of its name: of several, the first that the table has for its type. Classes
that are not here are looked up later, in transformers."""

_LAST_CHOICES = ("text2text-generation", "fill-mask", "feature-extraction")
"""Tasks that a class with several is least likely published for: speech models are also text2text-generation, BART
also fill-mask, and some classes with a head are their type's AutoModel."""


@dataclass(frozen=True)
class Support:
    """One line of the table.

    Attributes:
        model_type, task: the pair that was tried.
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
    """All lines of the table, ordered by type and task."""
    raw = json.loads(resources.files(__package__).joinpath("support.json").read_text("utf-8"))
    return tuple(Support(**{**line, "axes": tuple(line.get("axes", ()))}) for line in raw["lines"])


def supported_tasks(model_type: str) -> dict[str, Support]:
    """The lines of a model type, by task; empty where it was never tried."""
    return {line.task: line for line in table() if line.model_type == model_type}


def supported_types(task: str) -> list[str]:
    """The model types that pass for a task."""
    return [line.model_type for line in table() if line.task == task and line.passes]


def infer_task(config: Mapping[str, Any]) -> str | None:
    """The task of the class that a configuration names, by that name; None where the name does not say."""
    known = supported_tasks(str(config.get("model_type")))
    for name in config.get("architectures") or []:
        for ending, tasks in _ENDINGS.items():
            if str(name).endswith(ending):
                if len(tasks) == 1:
                    return tasks[0]
                found = next((task for task in tasks if task in known), None)
                return "text-generation" if found == "fill-mask" and _is_causal(config) else found
    return None


def choose_task(rows: Sequence[Task], config: Mapping[str, Any]) -> Task:
    """Choose the task that a checkpoint with this configuration is published for, of those of its class."""
    left_out = "fill-mask" if _is_causal(config) else "text-generation"
    both = {"fill-mask", "text-generation"} <= {row.name for row in rows}
    able = [row for row in rows if not both or row.name != left_out]
    return min(able, key=lambda row: _LAST_CHOICES.index(row.name) if row.name in _LAST_CHOICES else -1)


def _is_causal(config: Mapping[str, Any]) -> bool:
    """Whether XLM's one head predicts the next token, as checkpoints with this key do, or masked tokens."""
    return config.get("causal") is True
