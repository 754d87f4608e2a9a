"""Speech to text with an encoder-decoder: Whisper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import count
from typing import Any

import numpy as np

from ..advice import suggest_larger
from ..artifact.published_json import select
from ..errors import FormatError, InputError
from ..generation.config import GenerationConfig
from ..generation.outputs import Answer
from ..generation.probabilities import softmax
from ..generation.prompt import Prompt
from ..generation.sampling import Processor
from ..generation.timestamps import FRAMES_PER_TIME, SECONDS_PER_TIME, Segment, split_segments
from ..generation.unsupported import SPEECH
from ..inputs.padding import as_ids, as_mask, real_rows
from ..inputs.spectrogram import Spectrogram
from ..inputs.tensors import ModelOutput, convert_like, to_numpy, to_python
from .generative import Call, Generation, check_seeds, check_streamer, pad_answers
from .languages import CODES
from .long_sound import Listening, listen
from .seq2seq import EncoderCall, EncoderDecoder
from .training_loss import with_labels

__all__ = ["CompiledModelForSpeechSeq2Seq"]

Array = np.ndarray[Any, Any]
Frames = Array | Spectrogram
"""A sound, [mels, frames]."""

_SEED_STEP = 1_000_003
"""Between the seeds of windows, and of their attempts."""


class CompiledModelForSpeechSeq2Seq(EncoderDecoder[Array]):
    """Whisper: what is said in a sound, or its English translation; longer ones than 30 seconds window by window."""

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
        sources = self._check_sources(self._check_sounds(self._main_input("input_features", input_features)))
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
        return_segments: bool = False,
        return_token_timestamps: bool | None = None,
        is_multilingual: bool | None = None,
        temperature: float | Sequence[float] | None = None,
        compression_ratio_threshold: float | None = None,
        logprob_threshold: float | None = None,
        no_speech_threshold: float | None = None,
        condition_on_prev_tokens: bool | None = None,
        prompt_ids: Any = None,
        prompt_condition_type: str | None = None,
        monitor_progress: Any = None,
        decoder_input_ids: Any = None,
        **options: Any,
    ) -> Any:
        """Write down what is said, as `transformers.WhisperForConditionalGeneration.generate` does.

        Args:
            input_features, inputs: log-mel spectrograms as the checkpoint's feature extractor makes them, float32
                [batch, mels, frames]; longer ones than the model hears (30 seconds) are heard window by window.
            attention_mask: [batch, frames] of 0 and 1: how long each of several long sounds is.
            generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn: as for decoders.
            streamer: told the first tokens, then each step's by `put`, and the end by `end`, or a list with one for
                each row; not of sounds heard in windows.
            language: a name ("french"), a code ("fr") or one per row; None is what the configurations say, which have
                it detected where they say nothing.
            task: "transcribe" or "translate" (into English).
            return_timestamps: write times, from which segments follow; long sounds have them always.
            return_segments: return an output with `.segments`, for each sound a list of {"start", "end", "tokens",
                "result"}: seconds, ids, and all ids of the window that it is of, with those that it begins with.
            return_token_timestamps: not done here: None or False.
            is_multilingual: whether the model may be told a language and a task, where its file is wrong about that.
            temperature: sample with it; of several, a window is answered again with the next while its answer is bad.
            compression_ratio_threshold, logprob_threshold: an answer is bad that zlib makes so many times smaller, or
                whose tokens' mean log-probability is lower.
            no_speech_threshold: an unlikely answer where silence is likelier than this is left out.
            condition_on_prev_tokens: tell each window what was written before.
            prompt_ids: tokens that stand before the first window or, by prompt_condition_type="all-segments", all.
            monitor_progress: called with [[frames heard, frames]] before each window.
            decoder_input_ids: what the answers begin with, int64 [batch, length], instead of language and task.
            options: fields of GenerationConfig, such as max_new_tokens=64 or num_beams=4.

        Returns:
            int64 [batch * num_return_sequences, new]: the tokens that were generated, without those that an answer
            begins with and without its end; shorter rows are filled with pad_token_id. With return_dict_in_generate
            as for decoders, `.sequences` with both, and of windows without either and with `.segments`.

        Raises:
            InputError: an argument is wrong, or the request is longer than compiled for.
        """
        input_features = self._main_input("input_features", input_features, inputs)
        sounds = self._check_sounds(input_features)
        heard = {"temperature": temperature, "compression_ratio_threshold": compression_ratio_threshold,
                 "logprob_threshold": logprob_threshold, "no_speech_threshold": no_speech_threshold,
                 "condition_on_prev_tokens": condition_on_prev_tokens}  # fmt: skip
        if not isinstance(temperature, list | tuple):
            options = {**options, **_not_none(temperature=temperature)}
        config = self._merge_config(generation_config, options)
        said = {**self._speech_settings(config), **_not_none(**heard, return_timestamps=return_timestamps)}
        self._check_asked(said, is_multilingual, bool(language or task), return_token_timestamps)
        said |= _not_none(language=language, task=task)
        said |= {"prompt_ids": prompt_ids, "prompt_condition_type": prompt_condition_type}
        functions = {"processors": logits_processor, "criteria": stopping_criteria,
                     "allowed": prefix_allowed_tokens_fn}  # fmt: skip
        listen_to_all = partial(
            self._listen_to_all, input_features, sounds, attention_mask, config, said, functions, monitor_progress,
            return_segments,
        )  # fmt: skip
        is_followed = streamer is not None or decoder_input_ids is not None
        if self._hears_in_windows(sounds, said) or prompt_ids is not None or return_segments:
            if is_followed:
                raise InputError("Sounds that are heard in windows take no streamer and no decoder_input_ids.")
            return listen_to_all()
        asked = {**options, "generation_config": generation_config}
        try:
            return self._answer_at_once(
                input_features, self._check_sources(sounds), config, said, decoder_input_ids, asked, functions, streamer
            )
        except _SoundGoesOnError:
            if is_followed or config.returns_outputs or (config.num_return_sequences or 1) > 1:
                raise
            return listen_to_all()

    def _answer_at_once(
        self,
        given: Any,
        sources: list[Array],
        config: GenerationConfig,
        said: Mapping[str, Any],
        decoder_input_ids: Any,
        options: Mapping[str, Any],
        functions: Mapping[str, Any],
        streamer: Any,
    ) -> Any:
        """generate()'s answer to sounds of one window. Raises _SoundGoesOnError where it ends before its sound."""
        prompts = self._given_prompts(decoder_input_ids, len(sources)) or self._make_prompts(sources, config, said)
        first = max(map(len, prompts))
        full, count = self._answer_lengths(
            lambda by: self._new_token_count(by, first), config, self.capacity - first,
            options.get("generation_config"), options, functions["criteria"],
        )  # fmt: skip
        self._check_fits(first, count, config, streamer, len(sources))
        asked = Generation(given, config, count, full=full, streamer=streamer, **functions)
        front = np.stack(prompts) if config.returns_outputs else np.zeros((len(sources), 0), np.int64)
        return self._generate_all(Call(given, Prompt.rows(prompts, prompts), sources, asked, front))

    def _check_fits(self, first: int, count: int, config: GenerationConfig, streamer: Any, sources: int) -> None:
        """Raise InputError for what this model, or a streamer, cannot do."""
        self._check_room(first, count)
        self._check_lookup(config)
        check_streamer(streamer, sources, config)

    @staticmethod
    def _check_asked(said: Mapping[str, Any], is_multilingual: bool | None, is_told: bool, times_words: Any) -> None:
        """Raise InputError for times of words, and where a model of English is told a language or a task."""
        if times_words:
            raise InputError("return_token_timestamps=True, times of single words, is not done by this runtime.")
        knows_others = said.get("is_multilingual", True) if is_multilingual is None else is_multilingual
        if is_told and not knows_others:
            raise InputError("This model knows English only; leave language and task out.")

    def _given_prompts(self, decoder_input_ids: Any, sources: int) -> list[Array]:
        """What answers begin with by the caller's decoder_input_ids; nothing without."""
        if decoder_input_ids is None:
            return []
        ids = as_ids(to_numpy(decoder_input_ids), self._vocabulary_size(), "decoder_input_ids")
        self._check_rows(len(ids), sources)
        return real_rows(ids, as_mask(None, ids))

    def _source_tokens(self, prompt: Prompt, context: Array) -> None:
        # Sound is no tokens.
        return None

    def _suggest_larger(self, length: int, more: str = "") -> str:
        # The length of a source is fixed by the model, so no flag is given for it.
        return suggest_larger(self.artifact, f"--batch-size {self.batch_size}{more}")

    @property
    def _window(self) -> int:
        """Frames that the encoder hears at a time."""
        (frames,) = self._encoders
        return frames

    def _hears_in_windows(self, sounds: Sequence[Frames], said: Mapping[str, Any]) -> bool:
        """Whether sounds are heard window by window, whose answers are judged and cut. Raises InputError where they are
        long and no times are to be written."""
        is_long, times = sounds[0].shape[1] > self._window, said.get("return_timestamps")
        if is_long and times is False:
            raise InputError(
                f"These sounds have {sounds[0].shape[1]} frames, more than the {self._window} that the model hears at "
                f"a time: where it listens on follows from times that it writes. Pass return_timestamps=True, or cut "
                f"them."
            )
        silent = said.get("no_timestamps_token_id")
        has_times = silent is not None and silent + 1 < self._vocabulary_size()
        if (is_long or times) and not has_times:
            fix = "Pass return_timestamps=False."
            if is_long:
                fix = (
                    f"So it hears no more than {self._window} frames, and these are {sounds[0].shape[1]}: cut them, or "
                    f"give a pipeline truncation=True."
                )
            raise InputError(
                f"This checkpoint has no tokens for times, by no_timestamps_token_id of its generation_config.json. "
                f"{fix}"
            )
        judged = ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold", "condition_on_prev_tokens")
        asked = is_long or times or any(said.get(name) is not None for name in judged)
        return bool(asked or isinstance(said.get("temperature"), list | tuple))

    def _sound_lengths(self, sounds: Sequence[Frames], mask: Any) -> list[int]:
        """The frames of each sound that are heard."""
        whole = sounds[0].shape[1]
        if len(sounds) == 1 or whole <= self._window:
            return [whole] * len(sounds)
        if mask is None:
            raise InputError(
                f"There are {len(sounds)} long sounds; pass attention_mask=, which says how long each is: the feature "
                f"extractor makes it with return_attention_mask=True."
            )
        found = np.asarray(to_numpy(mask))
        if found.shape != (len(sounds), whole):
            raise InputError(
                f"attention_mask must be [{len(sounds)}, {whole}], as the sounds are, not {list(found.shape)}."
            )
        return [int(row.sum()) for row in found]

    def _listen_to_all(
        self,
        given: Any,
        sounds: Sequence[Frames],
        mask: Any,
        config: GenerationConfig,
        said: Mapping[str, Any],
        functions: Mapping[str, Any],
        monitor: Any,
        return_segments: bool,
    ) -> Any:
        """generate()'s answer to sounds that are heard window by window."""
        if (config.num_return_sequences or 1) > 1:
            raise InputError("num_return_sequences above 1 is not done for sounds that are heard in windows; pass 1.")
        lengths, is_long = self._sound_lengths(sounds, mask), sounds[0].shape[1] > self._window
        said = {**said, "return_timestamps": bool(said.get("return_timestamps")) or is_long}
        common = self._listening_settings(config, said)
        starts = self._make_prompts(self._first_windows(sounds), config, said)
        found = []
        settings = replace(config, return_dict_in_generate=True, output_scores=True)
        check_seeds(config.seed, len(sounds))
        seeds = config.seed if isinstance(config.seed, list) else [config.seed] * len(sounds)
        with self._lock:
            for sound, length, start, seed in zip(sounds, lengths, starts, seeds, strict=True):
                how = Listening(config=replace(settings, seed=seed), start=start.tolist(), **common)
                tell = (lambda seek, most=length: monitor(np.array([[seek, most]]))) if monitor else lambda seek: None
                asks = self._asker(given, functions)
                found.append(listen(sound, length, self._window, how, asks, self._silence_of(how), tell))
        return self._combine_segments(given, found, config, return_segments)

    def _listening_settings(self, config: GenerationConfig, said: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of Listening that are those of all sounds."""
        temperature = said.get("temperature")
        temperatures = temperature if isinstance(temperature, list | tuple) else [temperature]
        prompt = [] if said["prompt_ids"] is None else as_ids(
            to_numpy(said["prompt_ids"]), self._vocabulary_size(), "prompt_ids", ("length",)
        ).tolist()  # fmt: skip
        kind = said["prompt_condition_type"] or "first-segment"
        if kind not in ("first-segment", "all-segments"):
            raise InputError(f"prompt_condition_type must be 'first-segment' or 'all-segments', not {kind!r}.")
        if said.get("no_speech_threshold") is not None and said.get("logprob_threshold") is None:
            raise InputError("no_speech_threshold leaves out unlikely answers: pass logprob_threshold, too; -1.0, say.")
        previous = said.get("prev_sot_token_id")
        if previous is None and len(config.suppress_tokens or ()) >= 2:
            previous = config.suppress_tokens[-2]  # type: ignore[index]
        if prompt and kind == "first-segment" and prompt[0] == previous and said.get("condition_on_prev_tokens"):
            prompt = prompt[1:]
        return {
            "prompt": prompt, "prompts_all": kind == "all-segments", "previous": previous,
            "continues": bool(said.get("condition_on_prev_tokens")), "temperatures": temperatures,
            "most_compressed": said.get("compression_ratio_threshold"), "least_likely": said.get("logprob_threshold"),
            "silence": said.get("no_speech_threshold"), "silent": said.get("no_timestamps_token_id"),
            "latest_first": said.get("max_initial_timestamp_index"), "vocabulary": self._vocabulary_size(),
            "positions": self.config["max_target_positions"],
            "writes_times": said["return_timestamps"],
        }  # fmt: skip

    def _asker(self, given: Any, functions: Mapping[str, Any]) -> Any:
        """What answers a window; each draws by a seed of its own."""
        turn = count()

        def ask(part: Array, begin: list[int], config: GenerationConfig, most: int, rules: Any) -> Answer:
            row = np.array(begin, np.int64)
            room = min(most, self.capacity - len(row))
            if config.max_new_tokens is not None:
                self._check_room(len(row), most)
            seed = config.seed + next(turn) * _SEED_STEP if isinstance(config.seed, int) else None
            asked = Generation(
                given, replace(config, seed=seed), max(1, room), full=most, rules=rules, **functions
            )  # fmt: skip
            return self._answer_all([Prompt(row, row)], [part], asked)[0]

        return ask

    def _silence_of(self, how: Listening) -> Any:
        def probability(part: Array, begin: list[int], place: int) -> float:
            ids = np.array([begin], np.int64)
            logits = self._score_rows([part], ids, as_mask(None, ids))[0, place]
            assert how.silent is not None, "windows have times"
            return float(softmax(logits.astype(np.float32))[how.silent - 1])

        return probability

    def _combine_segments(
        self, given: Any, found: Sequence[Sequence[Segment]], config: GenerationConfig, return_segments: bool
    ) -> Any:
        """The tokens of all segments of each sound, padded, and the segments where they are asked for."""
        rows = [[token for segment in segments for token in segment.tokens] for segments in found]
        front = np.zeros((len(rows), 0), np.int64)
        sequences = convert_like(given, pad_answers(front, rows, config))
        if not (return_segments or config.return_dict_in_generate):
            return sequences
        told = [
            [{"start": each.start, "end": each.end, "tokens": convert_like(given, np.array(each.tokens, np.int64)),
              "result": convert_like(given, np.array(each.result, np.int64))} for each in segments]
            for segments in found
        ]  # fmt: skip
        return ModelOutput(sequences=sequences, segments=told)

    def _first_windows(self, sounds: Sequence[Frames]) -> list[Array]:
        """The beginnings of sounds, filled up to a window."""
        short = max(0, self._window - sounds[0].shape[1])
        return [np.pad(sound[:, : self._window], ((0, 0), (0, short))) for sound in sounds]

    def _finish_answer(self, tokens: list[int], config: GenerationConfig) -> list[int]:
        ended = tokens[:-1] if tokens[-1] in config.eos_ids else tokens
        heard = self._cut_at_last_segment(ended, self._speech_settings(config))
        # As in transformers, scores and the like are of all tokens.
        return tokens if config.returns_outputs else heard

    def _cut_at_last_segment(self, tokens: list[int], said: Mapping[str, Any]) -> list[int]:
        """Cut an answer at its last two timestamps in a row, which end a segment: transformers hears the sound after
        them in a second pass. An answer of one segment, or one that closes with a single timestamp, is kept whole
        (transformers' `_retrieve_segment`). Raises _SoundGoesOnError where the sound goes on after the cut."""
        silent = said.get("no_timestamps_token_id")
        if silent is None:
            return tokens
        segments, heard = split_segments(tokens, silent + 1, 0, self._window)
        if heard < self._window:
            raise _SoundGoesOnError(
                f"This model writes times without being asked, and stopped at "
                f"{heard * SECONDS_PER_TIME / FRAMES_PER_TIME:.2f} s. Pass return_timestamps=True: then the rest is "
                f"heard, too."
            )
        return [token for segment in segments for token in segment.tokens]

    def _check_sounds(self, input_features: Any) -> Sequence[Frames]:
        """Spectrograms [mels, frames], however long."""
        mels, window = self._encoders[self._window].inputs["input_features"].shape[1:]
        if isinstance(input_features, Spectrogram):
            if input_features.shape[0] != mels:
                raise InputError(f"The spectrogram has {input_features.shape[0]} mels; the model takes {mels}.")
            return [input_features]
        features = np.asarray(to_numpy(input_features))
        if features.ndim != 3 or features.shape[1] != mels or not features.size or features.dtype.kind != "f":
            raise InputError(
                f"input_features must be log-mel spectrograms, float32 [batch, {mels}, {window}] or longer; these are "
                f"{features.dtype} {list(features.shape)}. The checkpoint's feature extractor makes them."
            )
        return list(features.astype(np.float32, copy=False))

    def _check_sources(self, sounds: Sequence[Frames]) -> list[Array]:
        """Spectrograms that are as long as the encoder takes."""
        if sounds[0].shape[1] != self._window:
            raise InputError(
                f"input_features must be padded or cut to {self._window} frames, 30 seconds, as the checkpoint's "
                f"feature extractor does it; these have {sounds[0].shape[1]}."
            )
        return [sound[:, :] for sound in sounds]

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


class _SoundGoesOnError(InputError):
    """An answer ends, by its times, before its sound does."""


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
    if said.get("return_timestamps"):
        row = row[:-1] if row[-1] == silent is not None else row
    elif silent is not None and row[-1] != silent:
        row.append(silent)
    return [token for token in row if token is not None]
