"""`pipeline(task, model)`: texts, images and sounds in, labels and texts out.

Text tasks take numpy and tokenizers, images Pillow too; what is prepared in less common ways takes transformers.
"""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from ..arguments import refuse_replaced, refuse_unknown
from ..errors import PrecastWarning, UsageError
from ..models.base import CompiledModel
from ..models.exporting import is_export_option
from .base import Batch, Pipeline
from .parts import PARTS

__all__ = ["PIPELINES", "Batch", "Pipeline", "pipeline", "pipeline_class", "task_of"]

_SAME = {
    "image-feature-extraction": "feature-extraction",
    "sentiment-analysis": "text-classification",
    "ner": "token-classification",
    "semantic-segmentation": "image-segmentation",
}
_DEFAULT_MODELS = {
    "text-classification": (
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
        "714eb0fa89d2f80546fda750413ed43d93601a13",
    )
}
"""Task -> the model, and its revision, that transformers takes where none is named."""
_DEFAULT_SHAPES = {"batch_size": 1, "sequence_length": (32, 128, 512), "dynamic_batch_size": True}
_PAIR = re.compile("translation_[^_]+_to_[^_]+")
"""Translation between two languages by name, as in translation_en_to_de."""
_SEQ2SEQ = ("text2text-generation", "summarization", "translation")

# Task -> where its pipeline is, and the tasks whose artifacts it runs.
PIPELINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "feature-extraction": ("features:FeatureExtractionPipeline", ("feature-extraction",)),
    "fill-mask": ("text:FillMaskPipeline", ("fill-mask",)),
    "text-classification": ("text:TextClassificationPipeline", ("text-classification",)),
    "token-classification": ("tokens:TokenClassificationPipeline", ("token-classification",)),
    "question-answering": ("answers:QuestionAnsweringPipeline", ("question-answering",)),
    "zero-shot-classification": ("choices:ZeroShotClassificationPipeline", ("text-classification",)),
    "multiple-choice": ("choices:MultipleChoicePipeline", ("multiple-choice",)),
    "image-classification": ("vision:ImageClassificationPipeline", ("image-classification",)),
    "image-segmentation": ("vision:ImageSegmentationPipeline", ("semantic-segmentation",)),
    "object-detection": ("vision:ObjectDetectionPipeline", ("object-detection",)),
    "zero-shot-image-classification": (
        "vision:ZeroShotImageClassificationPipeline",
        ("zero-shot-image-classification",),
    ),
    "audio-classification": ("audio:AudioClassificationPipeline", ("audio-classification",)),
    "automatic-speech-recognition": ("audio:SpeechRecognitionPipeline", ("automatic-speech-recognition",)),
    "text-generation": ("generation:TextGenerationPipeline", ("text-generation",)),
    "text2text-generation": ("generation:Text2TextGenerationPipeline", _SEQ2SEQ),
    "summarization": ("generation:SummarizationPipeline", _SEQ2SEQ),
    "translation": ("generation:TranslationPipeline", _SEQ2SEQ),
}


def pipeline(task: str | None = None, model: str | Path | CompiledModel | None = None, **options: Any) -> Pipeline:
    """Make a pipeline: a compiled model that takes texts, images or sounds, and answers with labels or texts.

    Args:
        task: by default what the model was compiled for. A model of text-classification also does
            zero-shot-classification. Dashes may be underscores.
        model: a directory, a Hub repository, or a model that is open already; with export=True a checkpoint, which is
            compiled first, as by `CompiledModel.from_pretrained`. Where sentiment-analysis is given none, it is the one
            that transformers takes, compiled when it is first asked for.
        options: of the pipeline and its steps, for every call, such as batch_size, and tokenizer, feature_extractor or
            image_processor where another is to be used than the artifact carries; all others as for
            `CompiledModel.from_pretrained`, with export=True those of an export, too, batch_size among them. As in
            transformers, device can be a number: -1 is "cpu", 0 is "cuda".

    Raises:
        UsageError: there is no such task or option, or the model was compiled for another task.
        ArtifactError: as `CompiledModel.from_pretrained`.
    """
    found = None if task is None else pipeline_class(task)
    if model is None:
        model, options = _default_model(task, options)
    if "device" in options:
        options["device"] = _device_name(options["device"])
    opened = model if isinstance(model, CompiledModel) else None
    if opened is None:
        # A part that is said to be the model's is the artifact's own.
        options = {name: value for name, value in options.items() if name not in PARTS or value != model}
        loading = _take_loading(task, found, options)
        opened = CompiledModel.from_pretrained(model, **loading)  # type: ignore[arg-type]
    elif (device := options.pop("device", None)) not in (None, str(opened.device)):
        raise UsageError(
            f"device={device!r} comes too late: the model is open already. Say it to CompiledModel.from_pretrained()."
        )
    compiled_for = opened.artifact.contract.task
    _check_task(task, opened, compiled_for)
    chosen = (found or pipeline_class(compiled_for)).of(opened)
    if opened is not model:
        known = [*chosen.option_names(), *chosen.passed_on(opened), "batch_size", *PARTS, *_LOADING]
        refuse_unknown("pipeline()", options, known)
    return chosen(opened, **options)


_LOADING = [
    each.name
    for each in inspect.signature(CompiledModel.from_pretrained).parameters.values()
    if each.kind is each.KEYWORD_ONLY
]


def _take_loading(task: str | None, found: type[Pipeline] | None, options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of opening the model out of `options`, and with export=True those of the export."""
    loading = {name: options.pop(name) for name in list(options) if name in _LOADING}
    refuse_replaced("pipeline(TASK, MODEL, export=True", options)
    if not loading.get("export"):
        return loading
    own = {*PARTS, *(found.option_names() if found else ())}
    loading |= {name: options.pop(name) for name in list(options) if is_export_option(name, own)}
    return loading if task is None else {"task": _export_task(task), **loading}


def _export_task(task: str) -> str:
    """What a checkpoint is exported for, for the pipeline of a task."""
    name = _canonical_name(task)
    runs = PIPELINES[name][1]
    return name if name in runs else runs[0]


def _default_model(task: str | None, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model of a task for which none was named, and the options to export it with. Raises UsageError where there
    is none."""
    name = None if task is None else _canonical_name(task)
    if name not in _DEFAULT_MODELS:
        asked = "model='out'" if task is None else f"{task!r}, model='out'"
        raise UsageError(f"Name the model: pipeline({asked}), a directory, a Hub repository, or a model.")
    model, revision = _DEFAULT_MODELS[name]
    warnings.warn(
        f"No model was named for {task}: {model} is used, revision {revision[:7]}, as transformers does. Name one in "
        f"what you keep: pipeline({task!r}, {model!r}, revision={revision[:7]!r}, export=True, batch_size=1, "
        f"sequence_length=128).",
        PrecastWarning,
        stacklevel=3,
    )
    return model, {"revision": revision, "export": True, **_DEFAULT_SHAPES, **options}


def _device_name(given: Any) -> str | None:
    """Translate a device of transformers' pipelines (-1, 0, "cuda:0") to its name here."""
    if isinstance(given, int):
        given = "cpu" if given < 0 else f"cuda:{given}"
    name = None if given is None else str(given)
    return "cuda" if name == "cuda:0" else name


def pipeline_class(task: str) -> type[Pipeline]:
    """The class of a task's pipeline. Raises UsageError, which lists the tasks."""
    name = _canonical_name(task)
    if name not in PIPELINES:
        close = difflib.get_close_matches(name, PIPELINES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"There is no pipeline for {task!r}.{hint} There are: {', '.join(PIPELINES)}.")
    module, _, attribute = PIPELINES[name][0].partition(":")
    found: type[Pipeline] = getattr(import_module(f"{__name__}.{module}"), attribute)
    # The pair of languages is what config.json's task_specific_params go by.
    return type(attribute, (found,), {"task": task}) if _PAIR.fullmatch(task) else found


def task_of(pipe: Pipeline) -> str:
    """The task by which `pipeline()` makes the same pipeline of the same model. Raises UsageError where it was given
    more than the model, or is of a class of somebody else's."""
    kind = type(pipe)
    if pipe.is_changed or not kind.__module__.startswith(__name__):
        raise UsageError(
            f"{kind.__name__} was made with more than a task and a model, and a worker that others make, too, is of a "
            f"plain one. Make it by pipeline(TASK, model), and pass options to the worker."
        )
    if pair := getattr(kind, "task", None):
        return str(pair)
    names = {where.partition(":")[2]: task for task, (where, _) in PIPELINES.items()}
    found = (names[each.__name__] for each in kind.__mro__ if each.__name__ in names)
    return next(found, pipe.model.artifact.contract.task)


def _canonical_name(task: str) -> str:
    """The name in PIPELINES of a task, which may have others, and underscores as in MindFormers."""
    if _PAIR.fullmatch(task):
        return "translation"
    name = task.replace("_", "-")
    return _SAME.get(name, name)


def _check_task(task: str | None, model: CompiledModel, compiled_for: str) -> None:
    fits = PIPELINES[_canonical_name(task)][1] if task is not None else (compiled_for,)
    if compiled_for not in fits:
        others = [name for name, (_, runs) in PIPELINES.items() if compiled_for in runs]
        raise UsageError(
            f"{model.artifact.path} was compiled for {compiled_for}, which the pipeline {task!r} does not run. Ask it "
            f"for: {', '.join(others)}."
        )
