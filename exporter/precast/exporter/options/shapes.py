"""Which static shapes are compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import UsageError
from precast.runtime.terminal import quoted

from .declaration import OptionsPart, flag_of, keyword_of

__all__ = ["SIZES", "SIZE_EXAMPLES", "ShapeOptions"]

SIZE_EXAMPLES = {
    "batch_size": 1,
    "text_batch_size": 8,
    "num_choices": 4,
    "sequence_length": 128,
    "audio_sequence_length": 160000,
    "image_size": 224,
}
"""Proposed where a size has to be given, by the names of ShapeOptions."""

SIZES = {
    "encoder": (
        "batch_size", "sequence_length", "num_choices", "text_batch_size", "audio_sequence_length", "image_size",
    ),
    "decoder": ("batch_size", "sequence_length", "prefill_lengths"),
    "seq2seq": ("batch_size", "sequence_length", "decoder_sequence_length"),
}  # fmt: skip
"""The sizes that models of each kind can be compiled for; which of them one model has, its inputs decide."""

_OWN_AXES = ("num_choices", "text_batch_size")
"""Those that single tasks have."""


@dataclass(frozen=True, kw_only=True)
class ShapeOptions(OptionsPart):
    """The sizes that graphs are compiled for.

    Attributes:
        batch_size: rows per call; required for encoders, which may be compiled for several, 1 for decoders if None.
        sequence_length: encoders: one or more compiled lengths (buckets); decoders: the cache's capacity in tokens,
            prompt and answer together, by default the model's max_position_embeddings.
        decoder_sequence_length: encoder-decoders: the capacity of the answer in tokens, its start included, by default
            as many as the model has positions for; sequence_length is then that of the source.
        num_choices: multiple-choice: choices per row.
        text_batch_size: zero-shot-image-classification: texts per call, where batch_size counts images.
        audio_sequence_length: sound: one or more compiled lengths, in samples (or frames, for models of spectrograms).
        image_size: pixels, (height, width) or (side,); by default that of the checkpoint's configuration or its
            preprocessor_config.json.
        prefill_lengths: decoders: compile fully static graphs with these prompt lengths and one for decoding.
        dynamic_batch_size: at run time, split larger batches into slices of `batch_size`.
    """

    batch_size: int | tuple[int, ...] | None = None
    sequence_length: tuple[int, ...] = ()
    decoder_sequence_length: int | None = None
    num_choices: int | None = None
    text_batch_size: int | None = None
    audio_sequence_length: tuple[int, ...] = ()
    image_size: tuple[int, ...] = ()
    prefill_lengths: tuple[int, ...] = ()
    dynamic_batch_size: bool = False

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """All batch sizes that were given, from the smallest to the largest."""
        return tuple(sorted(self.values_of("batch_size")))

    def values_of(self, name: str) -> tuple[int, ...]:
        """The values of one size; empty where it is not given."""
        value: int | tuple[int, ...] | None = getattr(self, name)
        return () if value is None else (value,) if isinstance(value, int) else value

    def problems(self) -> Iterator[str]:
        """See OptionsPart."""
        for name in (each.name for each in fields(self) if each.name != "dynamic_batch_size"):
            values = self.batch_sizes if name == "batch_size" else self.values_of(name)
            yield from (f"{keyword_of(name)} must be at least 1, not {value}." for value in values if value < 1)
            if len(set(values)) != len(values) and name != "image_size":
                what = "length" if "length" in name else "size"
                yield f"{keyword_of(name)} names a {what} twice: {','.join(map(str, values))}."
        if len(self.image_size) > 2:
            yield f"image_size is height and width, or one number for both, not {','.join(map(str, self.image_size))}."

    def check_task(self, task: Task, *, is_inferred: bool) -> None:
        """Raise UsageError for sizes that models for this task do not have."""
        taken = [name for name in SIZES[task.kind] if name not in _OWN_AXES or name in task.axes]
        every = dict.fromkeys(name for names in SIZES.values() for name in names)
        if useless := [keyword_of(name) for name in every if getattr(self, name) and name not in taken]:
            inferred = ", which is inferred from the checkpoint (task= names another)" if is_inferred else ""
            raise UsageError(
                f"{' and '.join(useless)} {'is' if len(useless) == 1 else 'are'} not for the task {task.name!r}"
                f"{inferred}. Of such sizes it takes: {', '.join(map(keyword_of, taken))}."
            )

    def check_needed(
        self, needed: Sequence[str], task: str, longest: int | None, model: str, *, task_flag: str
    ) -> None:
        """Raise UsageError where one of the sizes `needed` is not given, with the command that gives them all.

        Args:
            needed: names of sizes that models for the task have.
            task: the task's name.
            longest: the longest sequence that the model was made for, if that is known.
            model: as it was given to the command.
            task_flag: `--task NAME` with a space before it, where it was given; else empty.
        """
        missing = [name for name in needed if not getattr(self, name)]
        if not missing:
            return
        examples = {**SIZE_EXAMPLES, "sequence_length": min(SIZE_EXAMPLES["sequence_length"], longest or 128)}
        asked = " and ".join(f"{name}=N" for name in missing)
        example = " ".join(f"{flag_of(name)} {examples[name]}" for name in needed)
        raise UsageError(
            f"The task {task!r} is compiled for fixed shapes: {', '.join(needed)}. Add {asked}, for example: "
            f"precast export {quoted(model)}{task_flag} {example} -o OUT"
        )
