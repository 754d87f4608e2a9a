"""Speech to text with an encoder-decoder: Whisper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..advice import suggest_larger
from ..artifact.published_json import select
from ..errors import FormatError, InputError
from ..generation.config import GenerationConfig
from ..generation.prompt import Prompt
from ..generation.sampling import Processor
from ..generation.unsupported import SPEECH
from ..inputs.padding import as_ids, as_mask, real_rows
from ..inputs.tensors import ModelOutput, convert_like, to_numpy, to_python
from .generative import Generation, check_streamer
from .languages import CODES
from .seq2seq import EncoderCall, EncoderDecoder
from .training_loss import with_labels

__all__ = ["CompiledModelForSpeechSeq2Seq"]

Array = np.ndarray[Any, Any]

_FRAMES_PER_TIME = 2
"""A timestamp token is a multiple of 0.02 s, two frames of a spectrogram."""


class CompiledModelForSpeechSeq2Seq(EncoderDecoder[Array]):
    """Whisper: what is said in up to 30 seconds of sound, or its English translation, without timestamps."""

    task = "automatic-speech-recognition"

    @cached_property
    def _file_settings(self) -> dict[str, Any]:
        """Whisper's own settings in generation_config.json. Raises FormatError for a wrong type."""
        return select(self._generation_file, SPEECH, str(self.artifact.path / "generation_config.json"))

    def _speech_settings(self, config: GenerationConfig) -> dict[str, Any]:
        """Whisper's own settings of a call: its configuration goes before the file. Raises InputError for a wrong
        type."""
        said = {name: config.unsupported.get(name) for name in SPEECH}
        other = {name: value for name, value in said.items() if value != to_python(self._generation_file.get(name))}
        try:
            changed = select(other, SPEECH, "The generation_config")
        except FormatError as error:
            raise InputError(str(error)) from None
        return {**{name: value for name, value in self._file_settings.items() if name not in other}, **changed}

    @with_labels
    def __call__(
        self, input_features: Any = None, decoder_input_ids: Any = None, *, attention_mask: Any = None
    ) -> ModelOutput:
        """Logits for every token of the decoder's rows.

        Args:
            input_features: log-mel spectrograms as the checkpoint's feature extractor makes them, float32
                [batch, mels, frames], numpy or torch.
            decoder_input_ids: int64 [batch, answer], each row beginning with the decoder's start token.
            attention_mask: as the feature extractor makes it; changes nothing, as in transformers, for Whisper hears
                the silence behind a sound.

        Returns:
            `.logits` [batch, answer, vocabulary].

        Raises:
            InputError: the tensors do not fit each other or the compiled sizes.
        """
        if decoder_input_ids is None:
            raise InputError("Logits are those of the decoder's rows: pass decoder_input_ids, or use generate().")
        sources = self._check_sources(self._main_input("input_features", input_features))
        ids = as_ids(to_numpy(decoder_input_ids), self._vocabulary_size(), "decoder_input_ids")
        return ModelOutput(logits=convert_like(input_features, self._score_rows(sources, ids, as_mask(None, ids))))

    def generate(
        self,
        input_features: Any = None,
        generation_config: Any = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        streamer: Any = None,
        *,
        prefix_allowed_tokens_fn: Any = None,
        inputs: Any = None,
        attention_mask: Any = None,
        language: str | Sequence[str] | None = None,
        task: str | None = None,
        return_timestamps: bool | None = None,
        is_multilingual: bool | None = None,
        decoder_input_ids: Any = None,
        **options: Any,
    ) -> Any:
        """Write down what is said, as `transformers.WhisperForConditionalGeneration.generate` does.

        Args:
            input_features, inputs: log-mel spectrograms as the checkpoint's feature extractor makes them, float32
                [batch, mels, frames], of 30 seconds each.
            attention_mask: as for a call; changes nothing.
            generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn: as for decoders.
            streamer: told each step's tokens by `put`, and the end by `end`.
            language: a name ("french"), a code ("fr") or one per row; None is what the configurations say, which have
                it detected where they say nothing.
            task: "transcribe" or "translate" (into English).
            return_timestamps: not done here: None or False.
            is_multilingual: whether the model may be told a language and a task, where its file is wrong about that.
            decoder_input_ids: what the answers begin with, int64 [batch, length], instead of language and task.
            options: fields of GenerationConfig, such as max_new_tokens=64 or num_beams=4.

        Returns:
            int64 [batch * num_return_sequences, new]: the tokens that were generated, without those that an answer
            begins with and without its end; shorter rows are filled with pad_token_id. With return_dict_in_generate
            as for decoders.

        Raises:
            InputError: an argument is wrong, the request is longer than compiled for, or the model writes times that
                say where it would listen on.
        """
        input_features = self._main_input("input_features", input_features, inputs)
        sources = self._check_sources(input_features)
        config = self._merge_config(generation_config, options)
        said = self._speech_settings(config)
        if return_timestamps or (return_timestamps is None and said.get("return_timestamps")):
            raise InputError("return_timestamps=True is not done by this runtime. Pass return_timestamps=False.")
        if not (said.get("is_multilingual", True) if is_multilingual is None else is_multilingual) and (
            language or task
        ):
            raise InputError("This model knows English only; leave language and task out.")
        if decoder_input_ids is None:
            prompts = self._make_prompts(sources, config, {**said, **_not_none(language=language, task=task)})
        else:
            ids = as_ids(to_numpy(decoder_input_ids), self._vocabulary_size(), "decoder_input_ids")
            self._check_rows(len(ids), len(sources))
            prompts = real_rows(ids, as_mask(None, ids))
        first = max(map(len, prompts))
        full, count = self._answer_lengths(
            lambda by: self._new_token_count(by, first), config, self.capacity - first, generation_config, options,
            stopping_criteria,
        )  # fmt: skip
        self._check_room(first, count)
        self._check_lookup(config)
        check_streamer(streamer, len(sources), config)
        asked = Generation(
            input_features, config, count, full=full, processors=logits_processor, criteria=stopping_criteria,
            streamer=streamer, allowed=prefix_allowed_tokens_fn,
        )  # fmt: skip
        rows = Prompt.rows(prompts, prompts)
        return self._generate_all(input_features, rows, sources, asked, np.zeros((len(sources), 0), np.int64))

    def _source_tokens(self, prompt: Prompt, context: Array) -> None:
        # Sound is no tokens.
        return None

    def _suggest_larger(self, length: int, more: str = "") -> str:
        # The length of a source is fixed by the model, so no flag is given for it.
        return suggest_larger(self.artifact, f"--batch-size {self.batch_size}{more}")

    def _finish_answer(self, tokens: list[int], config: GenerationConfig) -> list[int]:
        return self._cut_at_last_segment(
            tokens[:-1] if tokens[-1] in config.eos_ids else tokens, self._speech_settings(config)
        )

    def _cut_at_last_segment(self, tokens: list[int], said: Mapping[str, Any]) -> list[int]:
        """Cut an answer at its last two timestamps in a row, which end a segment: transformers hears the sound after
        them in a second pass. An answer of one segment, or one that closes with a single timestamp, is kept whole
        (transformers' `_retrieve_segment`). Raises InputError where the sound goes on after the cut."""
        silent = said.get("no_timestamps_token_id")
        is_time = [silent is not None and token > silent for token in tokens]
        ends = [at for at in range(len(tokens) - 1) if is_time[at] and is_time[at + 1]]
        if silent is None or not ends or is_time[-2:] == [False, True]:
            return tokens
        (frames,), time = self._encoders, tokens[ends[-1]] - silent - 1
        if _FRAMES_PER_TIME * time < frames:
            raise InputError(
                f"This model writes times without being asked, and stopped at {time * 0.02:.2f} s; the rest would be "
                f"heard in a second pass, which this runtime does not do. Pass suppress_tokens with those of "
                f"generation_config.json and all ids from {silent + 1} on: then it writes no times."
            )
        return tokens[: ends[-1] + 2]

    def _check_sources(self, input_features: Any) -> list[Array]:
        features = np.asarray(to_numpy(input_features))
        (frames,) = self._encoders
        wanted = self._encoders[frames].inputs["input_features"].shape[1:]
        if features.ndim != 3 or features.shape[1:] != wanted or features.dtype.kind != "f":
            raise InputError(
                f"input_features must be log-mel spectrograms, float32 [batch, {wanted[0]}, {wanted[1]}]; these are "
                f"{features.dtype} {list(features.shape)}. The checkpoint's feature extractor makes them, padded to 30 "
                f"seconds; longer sound must be cut."
            )
        return list(features.astype(np.float32, copy=False))

    def _run_encoder(self, source: Array) -> tuple[EncoderCall, int]:
        (call,) = self._encoders.values()
        call.inputs["input_features"][0] = source
        call.run()
        return call, 0

    def _new_token_count(self, config: GenerationConfig, first: int) -> int:
        """New tokens: as transformers counts them here, `max_length` does not count the first ones."""
        count = config.max_new_tokens
        if count is None:
            most = self.config["max_target_positions"] - first
            count = min(20 if config.max_length is None else config.max_length, most)
        return count

    def _make_prompts(self, sources: list[Array], config: GenerationConfig, said: Mapping[str, Any]) -> list[Array]:
        """The tokens that each answer begins with: start, language, task, no timestamps."""
        is_old = said.get("language") is None and said.get("task") is None
        first = [self.start_token(config), *(self._forced_prefix(said) if is_old else [])]
        rows = [_complete_prefix(first, code, said) for code in self._find_languages(sources, first, said, config)]
        return [
            as_ids(row, self._vocabulary_size(), "What generation_config.json begins with", ("length",)) for row in rows
        ]

    def _forced_prefix(self, said: Mapping[str, Any]) -> list[int | None]:
        """The tokens that older checkpoints force after the start, by position; None stands for the language."""
        older = select(self.config, {"forced_decoder_ids": SPEECH["forced_decoder_ids"]}, "config.json")
        found = said.get("forced_decoder_ids") or older.get("forced_decoder_ids") or []
        return [token for _, token in found]

    def _find_languages(
        self, sources: list[Array], first: list[int | None], said: Mapping[str, Any], config: GenerationConfig
    ) -> list[int | None]:
        """The language's token for each source, None where the model has none or it is set already."""
        known, language = said.get("lang_to_id"), said.get("language")
        if language is not None:
            given = [language] * len(sources) if isinstance(language, str) else list(language)
            if wrong := [name for name in given if not isinstance(name, str)]:
                raise InputError(f"language is a name, a code, or one for each row; this is {wrong[0]!r:.40}.")
            if len(given) != len(sources):
                raise InputError(f"language names {len(given)} languages; there are {len(sources)} rows.")
            return [self._language_id(name, known or {}) for name in given]
        if known and (len(first) == 1 or first[1] is None):
            return [*self._detect_languages(sources, self.start_token(config), list(known.values()))]
        return [None] * len(sources)

    def _language_id(self, name: str, known: dict[str, int]) -> int:
        for token in (name.lower(), f"<|{CODES.get(name.lower(), name.lower())}|>"):
            if token in known:
                return known[token]
        codes = ", ".join(token.strip("<|>") for token in known)
        raise InputError(f"language={name!r} is none that this model knows: {codes or 'it names none'}.")

    def _detect_languages(self, sources: list[Array], start: int, languages: list[int]) -> list[int]:
        """The likeliest language of each source, by the logits after the start token."""
        ids = np.full((len(sources), 1), start)
        logits = self._score_rows(sources, ids, as_mask(None, ids))[:, 0]
        return [languages[int(values[languages].argmax())] for values in logits]


def _not_none(**named: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    return {name: value for name, value in named.items() if value is not None}


def _complete_prefix(first: list[int | None], code: int | None, said: Mapping[str, Any]) -> list[int]:
    """`first` with the tokens of the language, `code`, of the task, and of no timestamps."""
    row, tasks, task = list(first), said.get("task_to_id", {}), said.get("task")
    if code is not None:
        row[1:2] = [code]
    if task is not None and task not in tasks:
        raise InputError(f"task={task!r} is none that this model knows: {', '.join(tasks) or 'it names none'}.")
    if tasks and (task or said.get("language") is not None):
        row.append(tasks.get(task or "transcribe"))
    silent = said.get("no_timestamps_token_id")
    if silent is not None and row[-1] != silent:
        row.append(silent)
    return [token for token in row if token is not None]
