"""Tiny random checkpoints in the place of those that other projects' tests load from the Hub, and their exports."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers
import zoo.decoders
import zoo.encoders
import zoo.seq2seq
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from zoo.shrink import tiny_config

from precast.exporter import ExportOptions, export, quiet_libraries
from precast.runtime.artifact.tasks import TASK_TABLE

from . import compiled, tally

SAMPLES = 34_000
"""The longest sound of transformers' tests."""
_SOUNDS = {
    "audio-spectrogram-transformer": {"num_mel_bins": 16, "max_length": 48},
    "whisper": {"feature_size": 16, "chunk_length": 1, "hop_length": 133},
}
_HEADED = set(zoo.decoders.TYPES) - {"whisper"}
"""Model types of texts that have other heads, too."""
_folder = tempfile.TemporaryDirectory(prefix="precast-foreign-")


def source_of(model_type: str, task: str) -> Path:
    """A checkpoint, with what prepares its inputs; made once. Skips the test where there is none to make."""
    source = _root(model_type, task) / "source"
    if not source.exists():
        quiet_libraries()
        _make(source, model_type, task)
        _limit_length(source)
        (source.parent / "made.json").write_text(json.dumps([model_type, task]))
        _add_processors(source, model_type, task)
    return source


def artifact_of(model_type: str, task: str) -> Path:
    """Its export; made once."""
    target = _root(model_type, task) / "artifact"
    if not target.exists():
        source = source_of(model_type, task)
        tally.reached()
        export(str(source), target, ExportOptions(task=task, validate=False, **_sizes(model_type, task)))
    return target


def _root(model_type: str, task: str) -> Path:
    return Path(_folder.name) / f"{model_type}-{task}"


def _family(model_type: str, task: str) -> Any:
    families = (zoo.decoders, zoo.encoders, zoo.seq2seq)
    return next((family for family in families if (model_type, task) in family.pairs()), None)


def _make(source: Path, model_type: str, task: str) -> None:
    family = _family(model_type, task)
    auto = next(
        (getattr(transformers, row.auto) for row in TASK_TABLE if row.name == task and row.kind == "encoder"), None
    )
    if family is not None:
        family.make(source, model_type, task)
    elif auto and model_type in _HEADED and transformers.CONFIG_MAPPING[model_type] in auto._model_mapping:
        # A decoder with another head.
        tiny.save_checkpoint(source, tiny_config(model_type, zoo.decoders.CONFIGS.get(model_type)), auto)
    else:
        pytest.skip(f"tests/zoo has no {model_type} for {task}")


def _limit_length(source: Path) -> None:
    """Let the tokenizer cut, where a test asks for it, what is longer than the models' positions."""
    file = source / "tokenizer_config.json"
    if file.exists():
        settings = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps({**settings, "model_max_length": compiled.LENGTH}), "utf-8")


def _sizes(model_type: str, task: str) -> dict[str, Any]:
    text, number = (compiled.LENGTH,), compiled.LENGTH
    wanted = {"sequence_length": text, "decoder_sequence_length": number, "audio_sequence_length": (SAMPLES,)}
    family = _family(model_type, task)
    own = family.options(model_type, task) if family else {"sequence_length": text}
    sizes = {**own, **{name: size for name, size in wanted.items() if name in own}}
    if "num_choices" in sizes:
        sizes["num_choices"] = 4
    return {**sizes, "batch_size": compiled.BATCH, "dynamic_batch_size": True}


def _add_processors(source: Path, model_type: str, task: str) -> None:
    if model_type in zoo.encoders.IMAGES:
        side = zoo.encoders.options(model_type, task)["image_size"][0]
        made = getattr(transformers, IMAGE_PROCESSOR_MAPPING_NAMES[model_type]["pil"])
        square = {"height": side, "width": side}
        edge = "shortest_edge" in (made.size or {})
        made(size={"shortest_edge": side} if edge else square, crop_size=square).save_pretrained(source)
    elif model_type in zoo.encoders.SOUND or model_type == "whisper":
        made = getattr(transformers, FEATURE_EXTRACTOR_MAPPING_NAMES[model_type])
        made(**_SOUNDS.get(model_type, {})).save_pretrained(source)
        if model_type != "whisper" and task == "automatic-speech-recognition":
            _spell(source)


def _spell(source: Path) -> None:
    """A tokenizer of characters, for connectionist temporal classification."""
    count = transformers.AutoConfig.from_pretrained(source).vocab_size
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    letters += [chr(0x4E00 + at) for at in range(count - len(letters))]
    file = source / "vocab.json"
    file.write_text(json.dumps({letter: at for at, letter in enumerate(letters)}), "utf-8")
    transformers.Wav2Vec2CTCTokenizer(str(file)).save_pretrained(source)
