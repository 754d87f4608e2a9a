"""The tasks: one row each. A row's strings are imported when the task is used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UsageError

__all__ = ["TASK_TABLE", "TASKS", "Task", "find_tasks", "get_task", "kind_of_roles", "makes_segments"]


@dataclass(frozen=True)
class Task:
    """One task of models.

    Attributes:
        name: as optimum's TasksManager spells it.
        kind: how the model is traced and run: "encoder", "decoder" or "seq2seq". One name may have rows of several
            kinds; the checkpoint's class decides at export, the graphs' roles at run time.
        auto: the class of transformers that loads a model for it.
        axes: the static shapes that every export must be given, as ExportOptions names them. What a model's own inputs
            need in addition (sequence_length for text, audio_sequence_length for sound) the plan finds out.
        outputs: the fields of the model's output that are kept, by transformers' names.
        model_class: the runtime's class for it, as `module:class`.
    """

    name: str
    kind: str
    auto: str
    axes: tuple[str, ...]
    outputs: tuple[str, ...]
    model_class: str


_ANY = ("batch_size",)
_TEXT = ("batch_size", "sequence_length")
_CHOICES = ("batch_size", "num_choices", "sequence_length")
_AUDIO = ("batch_size", "audio_sequence_length")
_PAIRS = ("batch_size", "text_batch_size")
_LOGITS = ("logits",)


def _encoder_task(
    name: str, auto: str, model_class: str, axes: tuple[str, ...], outputs: tuple[str, ...] = _LOGITS
) -> Task:
    return Task(name, "encoder", f"AutoModel{auto}", axes, outputs, f"precast.runtime.models.{model_class}")


# Of several tasks of one class, the first is inferred.
TASK_TABLE = (
    _encoder_task(
        "zero-shot-image-classification", "ForZeroShotImageClassification",
        "vision:CompiledModelForZeroShotImageClassification", _PAIRS,
        ("logits_per_image", "image_embeds", "text_embeds"),
    ),
    _encoder_task(
        "feature-extraction", "", "text:CompiledModelForFeatureExtraction", _ANY, ("last_hidden_state",)
    ),
    _encoder_task("fill-mask", "ForMaskedLM", "text:CompiledModelForMaskedLM", _TEXT),
    _encoder_task(
        "text-classification", "ForSequenceClassification", "text:CompiledModelForSequenceClassification", _TEXT
    ),
    _encoder_task(
        "token-classification", "ForTokenClassification", "text:CompiledModelForTokenClassification", _TEXT
    ),
    _encoder_task(
        "question-answering", "ForQuestionAnswering", "text:CompiledModelForQuestionAnswering", _TEXT,
        ("start_logits", "end_logits"),
    ),
    _encoder_task("multiple-choice", "ForMultipleChoice", "text:CompiledModelForMultipleChoice", _CHOICES),
    _encoder_task("image-classification", "ForImageClassification", "vision:CompiledModelForImageClassification", _ANY),
    _encoder_task(
        "semantic-segmentation", "ForSemanticSegmentation", "vision:CompiledModelForSemanticSegmentation", _ANY
    ),
    _encoder_task(
        "object-detection", "ForObjectDetection", "vision:CompiledModelForObjectDetection", _ANY,
        ("logits", "pred_boxes"),
    ),
    _encoder_task("audio-classification", "ForAudioClassification", "audio:CompiledModelForAudioClassification", _ANY),
    _encoder_task("automatic-speech-recognition", "ForCTC", "audio:CompiledModelForCTC", _AUDIO),
    _encoder_task(
        "audio-frame-classification", "ForAudioFrameClassification",
        "audio:CompiledModelForAudioFrameClassification", _AUDIO,
    ),
    _encoder_task(
        "audio-xvector", "ForAudioXVector", "audio:CompiledModelForXVector", _AUDIO, ("logits", "embeddings")
    ),
    Task(
        "text-generation", "decoder", "AutoModelForCausalLM", (), _LOGITS,
        "precast.runtime.models.causal_lm:CompiledModelForCausalLM",
    ),
    Task(
        "text2text-generation", "seq2seq", "AutoModelForSeq2SeqLM", ("sequence_length",), _LOGITS,
        "precast.runtime.models.seq2seq:CompiledModelForSeq2SeqLM",
    ),
    Task(
        "automatic-speech-recognition", "seq2seq", "AutoModelForSpeechSeq2Seq", (), _LOGITS,
        "precast.runtime.models.whisper:CompiledModelForSpeechSeq2Seq",
    ),
)  # fmt: skip

TASKS: dict[str, Task] = {}
for _row in TASK_TABLE:
    TASKS.setdefault(_row.name, _row)


_ALIASES = {
    "ner": "token-classification",
    "sentiment-analysis": "text-classification",
    "summarization": "text2text-generation",
    "translation": "text2text-generation",
}


def get_task(name: str, kind: str | None = None) -> Task:
    """The row of task `name`, of the given kind where it has several; dashes may be underscores.

    Raises UsageError, which lists the names.
    """
    name = _canonical_name(name)
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"There is no task {name!r}.{hint} The tasks are: {', '.join(TASKS)}.")
    rows = find_tasks(name)
    return next((row for row in rows if row.kind == kind), rows[0])


def find_tasks(name: str) -> list[Task]:
    """All rows of a name, one per kind of model that does it; none for an unknown name."""
    return [row for row in TASK_TABLE if row.name == _canonical_name(name)]


def _canonical_name(name: str) -> str:
    dashed = name.replace("_", "-")
    return _ALIASES.get(dashed, dashed)


def kind_of_roles(roles: Iterable[str]) -> str:
    """The kind of model whose graphs have these roles."""
    found = set(roles)
    if "encode" not in found:
        return "decoder"
    return "encoder" if found == {"encode"} else "seq2seq"


def makes_segments(model_type: str, task: str) -> bool:
    """Whether a model that is given no token_type_ids makes some of its own: BigBird tells a question from its text by
    the first separator, where transformers' tokenizer for it says nothing."""
    return (model_type, task) == ("big_bird", "question-answering")
