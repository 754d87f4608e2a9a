"""Pipelines of sound: classification, features, speech recognition."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar

import msgspec
import numpy as np

from ..artifact.published_json import parse_object, select
from ..errors import ArtifactError, UsageError
from ..generation.timestamps import SECONDS_PER_TIME
from ..inputs.spectrogram import Spectrogram
from ..inputs.tensors import ModelOutput
from .base import Array, Batch, Pipeline
from .generation import GeneratingPipeline, details_of
from .processors import SoundProcessor
from .scores import classify_row
from .transcripts import language_names, split_chunks

__all__ = [
    "AudioClassificationPipeline",
    "AudioFeatureExtractionPipeline",
    "SpeechRecognitionPipeline",
    "TranscriptionPipeline",
]


class _SoundPipeline(Pipeline):
    parts: ClassVar[tuple[str, ...]] = ("feature_extractor",)

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
        sounds, given, is_one = self._open_sounds(inputs, truncation)
        return Batch(self._make_arrays(sounds), given, is_one, samples=[len(sound) for sound in sounds])

    def _open_sounds(self, inputs: Any, truncation: bool) -> tuple[list[Array], list[Any], bool]:
        """The samples of each sound, what was given for it, and whether it was no list."""
        given, is_one = self._as_list(inputs)
        most = self._max_length() if truncation else None
        return [self.processor.open_sound(each)[:most] for each in given], given, is_one

    def _make_arrays(self, sounds: list[Array]) -> dict[str, Array]:
        """What the model takes of them."""
        taken = [spec.name for spec in self.model.variant.graphs[0].inputs]
        made = self.processor(sounds)
        if taken[0] not in made:
            raise ArtifactError(
                f"{self.model.artifact.path / 'preprocessor_config.json'} does not fit its model: "
                f"{self.processor.kind} makes {', '.join(made)}, and the model takes {taken[0]}. Correct the file in "
                f"the checkpoint, and export it again."
            )
        return {name: rows for name, rows in made.items() if name in taken}

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
    """Speech recognition with a decoder, Whisper: sounds of any length, window by window."""

    parts = ("feature_extractor", "tokenizer")
    task = "automatic-speech-recognition"

    def preprocess(
        self,
        inputs: Any,
        *,
        truncation: bool = False,
        chunk_length_s: float | None = None,
        stride_length_s: float | list[float] | None = None,
    ) -> Batch:
        """Sounds as Whisper's `input_features` float32 [sounds, mels, frames]; those that are longer than the model
        hears at a time are apart from these, and their spectrograms computed as they are heard.

        Args:
            inputs: a .wav file, an array float [samples] or {"raw": array, "sampling_rate": n}; or a list of these.
            truncation: hear only the beginning of what is longer than the model hears at a time.
            chunk_length_s, stride_length_s: not done here: None.
        """
        if chunk_length_s or stride_length_s:
            raise UsageError(
                "chunk_length_s and stride_length_s, transformers' pieces that are heard apart and matched where they "
                "overlap, are not done here. Leave them out: a long sound is heard window by window, each from where "
                "the one before ended, which is Whisper's own way."
            )
        sounds, given, is_one = self._open_sounds(inputs, truncation)
        longest = self._max_length() if self.processor.hears_long else None
        long = {at: sound for at, sound in enumerate(sounds) if longest is not None and len(sound) > longest}
        short = [sound for at, sound in enumerate(sounds) if at not in long]
        return Batch(
            self._make_arrays(short) if short else {}, given, is_one,
            long={at: self.processor.spectrogram(sound) for at, sound in long.items()},
        )  # fmt: skip

    def forward(
        self,
        batch: Batch,
        *,
        return_timestamps: bool | str | None = None,
        return_language: bool | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Batch:
        """{"sequences": int64 [sounds, new]}.

        Args:
            batch: of `preprocess`.
            return_timestamps: write times; long sounds have them always.
            return_language: note the language of each sound.
            generate_kwargs: a dict of options of generate(), which go before `options`.
            options: those of generate(), such as language="french" and task="translate".
        """
        _check_times(return_timestamps)
        asked = self._with_task({"return_timestamps": return_timestamps, **options, **(generate_kwargs or {})})
        asked |= {"return_dict_in_generate": False, "return_segments": bool(return_language)}
        rows: dict[int, list[int]] = {}
        details: dict[int, dict[str, Any]] = {}
        for places, features in self._split_batch(batch):
            is_long = isinstance(features, Spectrogram)
            times = {"return_timestamps": True} if is_long and asked["return_timestamps"] is None else {}
            found = self._write_down(features, self._options_of({**asked, **times}, places, len(batch.inputs)))
            rows |= zip(places, (tokens for tokens, _ in found), strict=True)
            details |= zip(places, (each for _, each in found), strict=True)
        pad = self.tokenizer.token_id("pad") or self.tokenizer.token_id("eos") or 0
        sequences = np.full((len(rows), max(map(len, rows.values()))), pad, np.int64)
        for place, row in rows.items():
            sequences[place, : len(row)] = row
        outputs = batch.with_arrays({"sequences": sequences})
        outputs.notes["details"] = [details[place] for place in sorted(details)]
        return outputs

    def postprocess(
        self, outputs: Batch, *, return_timestamps: bool | str | None = None, return_language: bool | None = None
    ) -> Any:
        """{"text"} for each sound, and what else generate() was asked to return of it, as from text-generation.

        Args:
            outputs: of `forward`.
            return_timestamps: also "chunks", a list of {"timestamp": (start, end), "text"}, seconds of the whole sound;
                `end` is None where the sound ended within. By default where the model's generation_config says so.
            return_language: also "chunks", with the "language" of each, by its English name.
        """
        _check_times(return_timestamps)
        if return_timestamps is None:
            return_timestamps = self.model.generation_config.unsupported.get("return_timestamps")
        rows = outputs["sequences"].tolist()
        return outputs.answer([
            {**self._tell(row, bool(return_timestamps), bool(return_language)), **details}
            for row, details in zip(rows, outputs.notes["details"], strict=True)
        ])  # fmt: skip

    def _split_batch(self, batch: Batch) -> Iterator[tuple[list[int], Array | Spectrogram]]:
        """What generate() takes at a time, and which of the inputs these are."""
        long, size = batch.notes["long"], self.model.batch_size
        short = [at for at in range(len(batch.inputs)) if at not in long]
        for start in range(0, len(short), size):
            yield short[start : start + size], batch[self.model.main_input_name][start : start + size]
        for at, spectrogram in long.items():
            yield [at], spectrogram

    def _write_down(self, features: Any, asked: dict[str, Any]) -> list[tuple[list[int], dict[str, Any]]]:
        """The tokens of these sounds, and what else was asked of them; the token of the language goes before the others
        where segments are asked for."""
        found = self.model.generate(features, **asked)
        if asked["return_segments"]:
            languages = [self._find_language(segments) for segments in found.segments]
            return [([*one, *row.tolist()], {}) for one, row in zip(languages, found.sequences, strict=True)]
        if not isinstance(found, ModelOutput):
            return [(row.tolist(), {}) for row in found]
        return [(row.tolist(), each) for row, each in zip(found.sequences, details_of(dict(found)), strict=True)]

    def _find_language(self, segments: list[dict[str, Any]]) -> list[int]:
        begun = segments[0]["result"].tolist() if segments else []
        return [token for token in begun if token in self._languages][:1]

    def _tell(self, row: list[int], with_times: bool, with_language: bool) -> dict[str, Any]:
        silent = self.tokenizer.vocabulary_id("<|notimestamps|>")
        positions = self.model.config["max_source_positions"]
        heard = self.processor.longest
        chunks = split_chunks(
            row, first=None if silent is None else silent + 1, special=self.tokenizer.special_ids,
            languages=self._languages, splits_languages=not with_times,
            seconds=SECONDS_PER_TIME if heard is None else heard / self.processor.rate / positions,
        )  # fmt: skip
        texts = [self.tokenizer.decode(chunk.tokens, skip_special_tokens=False) for chunk in chunks]
        answer: dict[str, Any] = {"text": "".join(texts)}
        if with_times or with_language:
            answer["chunks"] = [
                {**({"language": chunk.language} if with_language else {}),
                 **({"timestamp": (chunk.start, chunk.end)} if with_times else {}), "text": text}
                for chunk, text in zip(chunks, texts, strict=True)
            ]  # fmt: skip
        return answer

    @cached_property
    def _languages(self) -> dict[int, str]:
        return language_names(self.tokenizer)


def _check_times(asked: bool | str | None) -> None:
    """Raise UsageError for times of words or characters."""
    if isinstance(asked, str):
        raise UsageError(
            f"return_timestamps={asked!r} is not done here: times of single words follow from what the decoder attends "
            f"to, which a compiled one does not tell. return_timestamps=True gives the times of segments."
        )


class SpeechRecognitionPipeline(_SoundPipeline):
    """Speech recognition by connectionist temporal classification (Graves et al. 2006): the likeliest character of
    every frame, repetitions and blanks taken out. Models that generate have a pipeline of their own."""

    parts = ("feature_extractor", "tokenizer")

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
        path, files = self._part_files("tokenizer")
        vocabulary = files.get("vocab.json")
        if vocabulary is None:
            raise ArtifactError(f"{path} has no vocab.json, which says what the model's classes spell.")
        name = str(path / "tokenizer_config.json")
        given = parse_object(files.get("tokenizer_config.json") or b"{}", name)
        config = select(given, _SPELLING, name)
        words = parse_object(vocabulary, str(path / "vocab.json"))
        # A vocabulary for several languages has one inside for each.
        words = words.get(config.get("target_lang", ""), words)
        words = select({"words": words}, {"words": dict[str, int]}, str(path / "vocab.json"))["words"]
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
