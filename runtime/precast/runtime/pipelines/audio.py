"""Pipelines of sound: classification, features, speech recognition."""

from __future__ import annotations

from functools import cached_property
from itertools import groupby
from typing import Any

import msgspec
import numpy as np

from ..artifact.published_json import parse_object, select
from ..errors import ArtifactError
from .base import Batch, Pipeline
from .generation import GeneratingPipeline
from .processors import SoundProcessor
from .scores import classify_row

__all__ = [
    "AudioClassificationPipeline",
    "AudioFeatureExtractionPipeline",
    "SpeechRecognitionPipeline",
    "TranscriptionPipeline",
]


class _SoundPipeline(Pipeline):
    @cached_property
    def processor(self) -> SoundProcessor:
        """The checkpoint's feature extractor."""
        return SoundProcessor(*self._part_files("feature_extractor"))

    def preprocess(self, inputs: Any, *, truncation: bool = False) -> Batch:
        """Sounds as `input_values` float32 [sounds, samples], or as spectrograms where the model takes these, as
        Whisper's `input_features` float32 [sounds, mels, frames].

        Args:
            inputs: a .wav file, an array float [samples] or {"raw": array, "sampling_rate": n}; or a list of these.
            truncation: hear only the beginning of what is longer than the model hears, instead of refusing it.
        """
        given, is_one = self._as_list(inputs)
        sounds = [self.processor.open_sound(each) for each in given]
        if truncation:
            sounds = [sound[: self._max_length()] for sound in sounds]
        taken = [spec.name for spec in self.model.variant.graphs[0].inputs]
        made = self.processor(sounds)
        if taken[0] not in made:
            raise ArtifactError(
                f"{self.model.artifact.path / 'preprocessor_config.json'} does not fit its model: "
                f"{self.processor.kind} makes {', '.join(made)}, and the model takes {taken[0]}. Correct the file in "
                f"the checkpoint, and export it again."
            )
        arrays = {name: rows for name, rows in made.items() if name in taken}
        return Batch(arrays, given, is_one, samples=[len(sound) for sound in sounds])

    def _max_length(self) -> int | None:
        """The most samples of a sound: the processor's limit, or the compiled length of waveforms."""
        shapes = [graph.inputs[0].shape for graph in self.model.variant.graphs]
        waves = [shape[1] for shape in shapes if len(shape) == 2]
        return self.processor.longest or max(waves, default=None)


class AudioClassificationPipeline(_SoundPipeline):
    """Labels of sounds."""

    def postprocess(self, outputs: Batch, *, top_k: int | None = 5, function_to_apply: str | None = None) -> Any:
        """[{"score", "label"}, …] for each sound, the likeliest first; options as for text-classification."""
        several = "softmax" if self.model.config.get("problem_type") is None else None
        rows = [classify_row(self.model.config, row, function_to_apply or several)[:top_k] for row in outputs["logits"]]
        return outputs.answer(rows)


class AudioFeatureExtractionPipeline(_SoundPipeline):
    """Vectors of sounds."""

    def postprocess(self, outputs: Batch) -> Any:
        """Every frame's vector, [1, frames, hidden], as nested lists."""
        states = outputs["last_hidden_state"]
        counts = [self.model.frames(samples) for samples in outputs.notes["samples"]]
        return outputs.answer([rows[None, :count].tolist() for rows, count in zip(states, counts, strict=True)])


class TranscriptionPipeline(_SoundPipeline, GeneratingPipeline):
    """Speech recognition with a decoder, Whisper: up to 30 seconds of sound."""

    task = "automatic-speech-recognition"

    def forward(self, batch: Batch, *, generate_kwargs: dict[str, Any] | None = None, **options: Any) -> Batch:
        """{"sequences": int64 [sounds, new]}; `options` are generate()'s, such as language="french", which can also be
        given as a dict, generate_kwargs."""
        return self.run_generate(batch, {**options, **(generate_kwargs or {})})

    def postprocess(self, outputs: Batch) -> Any:
        """{"text"} for each sound, and what else generate() was asked to return of it, as from text-generation."""
        rows = zip(outputs["sequences"], outputs.notes["details"], strict=True)
        return outputs.answer([{"text": self.tokenizer.decode(row), **details} for row, details in rows])


class SpeechRecognitionPipeline(_SoundPipeline):
    """Speech recognition by connectionist temporal classification (Graves et al. 2006): the likeliest character of
    every frame, repetitions and blanks taken out. Models that generate have a pipeline of their own."""

    @classmethod
    def of(cls, model: Any) -> type[Pipeline]:
        """The class for how the model writes."""
        return TranscriptionPipeline if model.can_generate() else cls

    def postprocess(self, outputs: Batch) -> Any:
        """{"text"} for each sound."""
        frames = [self.model.frames(samples) for samples in outputs.notes["samples"]]
        rows = zip(outputs["logits"], frames, strict=True)
        return outputs.answer([{"text": self._decode_characters(logits[:count].argmax(-1))} for logits, count in rows])

    def _decode_characters(self, ids: np.ndarray[Any, Any]) -> str:
        spelled = self._read_spelling
        kept = [
            spelled["tokens"].get(index, spelled["unknown"])
            for index, _ in groupby(ids.tolist())
            if index != spelled["blank"]
        ]
        text = "".join(" " if token == spelled["space"] else token for token in kept).strip()
        return text.lower() if spelled["lower"] else text

    @cached_property
    def _read_spelling(self) -> dict[str, Any]:
        artifact = self.model.artifact
        vocabulary = artifact.contents.get("vocab.json")
        if vocabulary is None:
            raise ArtifactError(f"{artifact.path} has no vocab.json, which says what the model's classes spell.")
        name = str(artifact.path / "tokenizer_config.json")
        given = parse_object(artifact.contents.get("tokenizer_config.json") or b"{}", name)
        config = select(given, _SPELLING, name)
        words = parse_object(vocabulary, str(artifact.path / "vocab.json"))
        # A vocabulary for several languages has one inside for each.
        words = words.get(config.get("target_lang", ""), words)
        words = select({"words": words}, {"words": dict[str, int]}, str(artifact.path / "vocab.json"))["words"]
        added = {index: token.content for index, token in config.get("added_tokens_decoder", {}).items()}
        tokens = {**added, **{index: token for token, index in words.items()}}
        written = {name: _token_text(config.get(f"{name}_token", usual)) for name, usual in _USUAL.items()}
        return {"tokens": tokens, "blank": words.get(written["pad"]), "space": written["word_delimiter"],
                "unknown": written["unk"], "lower": config.get("do_lower_case", False)}  # fmt: skip


_USUAL = {"pad": "<pad>", "word_delimiter": "|", "unk": "<unk>"}


class _Added(msgspec.Struct):
    content: str


_SPELLING: dict[str, Any] = {
    "target_lang": str,
    "pad_token": str | _Added,
    "word_delimiter_token": str | _Added,
    "unk_token": str | _Added,
    "do_lower_case": bool,
    "added_tokens_decoder": dict[int, _Added],
}


def _token_text(token: str | _Added) -> str:
    return token if isinstance(token, str) else token.content
