"""What an export can be asked for, checked before any work starts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from precast.runtime.arguments import refuse_unknown
from precast.runtime.artifact.backends import BACKENDS, Backend, get_backend
from precast.runtime.artifact.schema import Dtype
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import UsageError
from precast.runtime.terminal import quoted

from .layout import LAYOUTS, layout_problems
from .neuron import NEURON_FLAGS, neuron_problems

__all__ = [
    "AUTO", "AUTO_CAST", "AUTO_CAST_TYPES", "DEVICES", "DTYPES", "GROUP_SIZES", "ISAS", "KV_CACHES", "QUANTIZE",
    "QUANTIZE_METHODS", "SIZE_EXAMPLES", "ExportOptions", "flag_of",
]  # fmt: skip

AUTO = "auto"
"""A backend's name that stands for all of them."""
DTYPES = ("float32", "bfloat16", "float16")
AUTO_CAST = ("none", "matmul", "all")
AUTO_CAST_TYPES: dict[str, Dtype] = {"bf16": "bfloat16", "fp16": "float16", "tf32": "float32"}
"""In tf32 numbers keep their 32 bits, and products read 19 of them: a compiler's own, for hardware that has it."""
ISAS = ("native", "avx2", "avx512")
DEVICES = ("cpu", "cuda")
QUANTIZE = ("none", "source", "int8", "int4", "auto")
QUANTIZE_METHODS = ("rtn", "search", "gptq", "awq")
"""The names of quantize.METHODS, which are made of torch."""
KV_CACHES = ("float32", "float16", "int8")
GROUP_SIZES = (16, 32, 64, 128, 256)

SIZE_EXAMPLES = {
    "batch_size": 1,
    "text_batch_size": 8,
    "num_choices": 4,
    "sequence_length": 128,
    "audio_sequence_length": 160000,
    "image_size": 224,
}
"""What is proposed where a size has to be given, by the names of ExportOptions."""

SIZES = {
    "encoder": (
        "batch_size", "sequence_length", "num_choices", "text_batch_size", "audio_sequence_length", "image_size",
    ),
    "decoder": ("batch_size", "sequence_length", "prefill_lengths"),
    "seq2seq": ("batch_size", "sequence_length", "decoder_sequence_length"),
}  # fmt: skip
"""The sizes that models of each kind can be compiled for; which of them one model has, its inputs decide."""
_LISTS = ("sequence_length", "prefill_lengths", "audio_sequence_length", "image_size", "skip", "compiler_args", "also")
_OWN_AXES = ("num_choices", "text_batch_size")
"""Those that single tasks have."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The arguments of `export()`.

    Attributes:
        task: a task name; None infers it from the checkpoint.
        batch_size: rows per call; required for encoders, which may be compiled for several, 1 for decoders if None.
        sequence_length: encoders: one or more compiled lengths (buckets); decoders: the cache's capacity in tokens,
            prompt and answer together, by default the model's max_position_embeddings.
        decoder_sequence_length: encoder-decoders: the capacity of the answer in tokens, its start included, by default
            as many as the model has positions for; sequence_length is then that of the source.
        num_choices: multiple-choice: choices per row.
        text_batch_size: zero-shot-image-classification: texts per call, where batch_size counts images.
        audio_sequence_length: sound: one or more compiled lengths, in samples (or frames, for models of spectrograms).
        image_size: pixels, (height, width) or (side,); by default what the checkpoint's configuration or its
            preprocessor_config.json says.
        prefill_lengths: decoders: compile fully static graphs with these prompt lengths and one for decoding.
        dynamic_batch_size: at run time, split larger batches into slices of `batch_size`.
        backend: what compiles, one of the backends' names; "auto" tries all that take these options, and keeps the
            fastest here.
        dtype: the dtype of weights, caches and computation; results are float32 always.
        auto_cast: what is computed in less than float32 all the same: "matmul", products of matrices and convolutions,
            their weights stored so; "all", everything but norms, softmax and sums.
        auto_cast_type: what to compute it in, one of AUTO_CAST_TYPES; None is "bf16".
        isa: the instructions of the CPU that native code may use: those that this machine has, or a level.
        device: where native code runs.
        instance_type: neuron: what to compile for, one of INSTANCE_TYPES; required.
        strategy: neuron: how to compile, one of STRATEGIES; None is "trace", or "model-builder" for several cores.
        tensor_parallel: neuron: over how many NeuronCores to spread each layer's weights.
        inline_weights: neuron: weights within every compiled graph, rather than once beside all of them.
        optlevel: neuron: how hard neuronx-cc optimises, 1 to 3; None is its own default, 2.
        compiler_args: neuron: further arguments of neuronx-cc, as they are.
        compiler_workdir: neuron: where neuronx-cc is to leave its files; None is a folder that goes away again.
        atol: the allowed difference from the reference, relative to max(1, max|reference|).
        validate: compare with the eager model before publishing.
        revision, token: of a Hub checkpoint.
        trust_remote_code: run modelling code that comes with the checkpoint.
        quantize: "none"; "int8" or "int4", the linear layers' and embedding's weights on a grid; "source", the grid
            that the checkpoint's weights lie on already; "auto", the smallest mixture of int8 and int4 within `max_kl`.
        quantize_method: how weights get onto the grid, one of QUANTIZE_METHODS; None is "rtn" for int8, "awq" where a
            row shares a scale, "search" for int4.
        group_size: weights that share a scale; None is 32, or a whole row for int8 where the backend prefers that.
        symmetric: zero in the middle of each grid, or anywhere; None is True for int8 in groups, False for int4 and
            for rows that share a scale.
        skip: patterns of layers' names that stay as they are.
        calibration: a text file for methods that look at activations; None is a small text of our own.
        kv_cache: the caches' dtype; "float16" where the backend takes it, "int8" with scales from the calibration text.
        max_kl: the largest mean KL divergence from the eager fp32 model, in nats per token of held-out text.
        min_agreement: the smallest share of tokens for which the likeliest is the same.
        accept_loss: write the artifact even if it is below these floors, and record that.
        also: further backends to compile with, into the same artifact; the loader takes the first that runs on a host.
            They are given what they take of these options.
        layout: how the files are named, one of LAYOUTS; "optimum-neuron" can be opened by that library as well.
        force: replace an existing artifact.
    """

    task: str | None = None
    batch_size: int | tuple[int, ...] | None = None
    sequence_length: tuple[int, ...] = ()
    decoder_sequence_length: int | None = None
    num_choices: int | None = None
    text_batch_size: int | None = None
    audio_sequence_length: tuple[int, ...] = ()
    image_size: tuple[int, ...] = ()
    prefill_lengths: tuple[int, ...] = ()
    dynamic_batch_size: bool = False
    backend: str = "onnx"
    dtype: Dtype = "float32"
    auto_cast: str = "none"
    auto_cast_type: str | None = None
    isa: str = "native"
    device: str = "cpu"
    instance_type: str | None = None
    strategy: str | None = None
    tensor_parallel: int = 1
    inline_weights: bool = False
    optlevel: int | None = None
    compiler_args: tuple[str, ...] = ()
    compiler_workdir: Path | None = None
    atol: float = 1e-4
    validate: bool = True
    revision: str | None = None
    token: str | None = None
    trust_remote_code: bool = False
    quantize: str = "none"
    quantize_method: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    skip: tuple[str, ...] = ()
    calibration: Path | None = None
    kv_cache: Dtype = "float32"
    max_kl: float | None = None
    min_agreement: float | None = None
    accept_loss: bool = False
    also: tuple[str, ...] = ()
    layout: str = "precast"
    force: bool = False

    @classmethod
    def of(cls, keywords: Mapping[str, Any], asked_by: str = "export()") -> ExportOptions:
        """The options that are given by name, where a single number or word may stand for a list of one.

        Raises UsageError for a name that there is not, with the nearest.
        """
        refuse_unknown(asked_by, keywords, [each.name for each in fields(cls)])
        lists = (name for name in _LISTS if isinstance(keywords.get(name), int | str))
        return cls(**{**keywords, **{name: (keywords[name],) for name in lists}})

    def for_backend(self, backend: str) -> ExportOptions:
        """The same request of one backend alone: what others take and it does not is as by default."""
        taken = frozenset[str]().union(*(row.takes for row in BACKENDS.values()))
        given = {name: getattr(ExportOptions, name) for name in taken - get_backend(backend).takes}
        if "auto_cast" in given:
            given["auto_cast_type"] = None
        if backend != self.backend:
            given["layout"] = ExportOptions.layout
        asked = replace(self, backend=backend, also=(), **given)
        if self.is_lossy and not asked.is_lossy:
            return replace(asked, max_kl=None, min_agreement=None, accept_loss=False)
        return replace(asked, atol=ExportOptions.atol) if asked.is_lossy else asked

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """All batch sizes that were given, from the smallest to the largest."""
        given = self.batch_size
        return () if given is None else (given,) if isinstance(given, int) else tuple(sorted(given))

    @property
    def is_rounded(self) -> bool:
        """Whether weights or caches are stored in less than float32."""
        return self.quantize != "none" or self.kv_cache != "float32"

    @property
    def is_calibrated(self) -> bool:
        """Whether anything is put on a grid, which text may help to choose."""
        return self.quantize != "none" or self.kv_cache == "int8"

    @property
    def is_cast(self) -> bool:
        """Whether less than float32 is computed in."""
        return self.dtype != "float32" or self.auto_cast != "none"

    @property
    def is_lossy(self) -> bool:
        """Whether less than fp32 is asked for, so that the artifact is held to a loss rather than to a difference."""
        return self.is_rounded or self.is_cast

    @property
    def cast_dtype(self) -> Dtype:
        """The dtype of what is computed in where `is_cast`."""
        return self.dtype if self.dtype != "float32" else AUTO_CAST_TYPES[self.auto_cast_type or "bf16"]

    @property
    def cast_type(self) -> str:
        """What is computed in where `is_cast`, in short: one of AUTO_CAST_TYPES."""
        if self.dtype == "float32":
            return self.auto_cast_type or "bf16"
        return next(short for short, dtype in AUTO_CAST_TYPES.items() if dtype == self.dtype)

    def check(self) -> None:
        """Raise one UsageError that lists everything wrong with these options; with the backend "auto" what is wrong
        with the first that it stands for, where none takes them."""
        backends = list(BACKENDS) if self.backend == AUTO and not self.also else [self.backend]
        problems = [list(replace(self, backend=name)._problems()) for name in backends]
        if all(problems):
            raise UsageError(" ".join(problems[0]))

    def check_task(self, task: Task) -> None:
        """Raise UsageError for what these options ask of a task that has no place for it."""
        self._check_sizes_of(task)
        if task.kind != "decoder" and (useless := self._given("max_kl", "min_agreement")):
            raise UsageError(
                f"{' and '.join(useless)} bound what is lost on the text that a decoder predicts, and {task.name!r} "
                f"predicts none: what --dtype and --auto-cast may cost it is fixed, and --accept-loss takes more."
            )
        if self.is_rounded and task.kind != "decoder":
            raise UsageError(
                f"--quantize and --kv-cache are for decoders: what they cost is measured on the text that a model "
                f"predicts, and {task.name!r} predicts none. Leave them out."
            )

    def _check_sizes_of(self, task: Task) -> None:
        taken = [name for name in SIZES[task.kind] if name not in _OWN_AXES or name in task.axes]
        every = dict.fromkeys(name for names in SIZES.values() for name in names)
        if useless := [flag_of(name) for name in every if getattr(self, name) and name not in taken]:
            inferred = "" if self.task else ", which is inferred from the checkpoint (--task names another)"
            raise UsageError(
                f"{' and '.join(useless)} {'is' if len(useless) == 1 else 'are'} not for the task {task.name!r}"
                f"{inferred}. Of such sizes it takes: {', '.join(map(flag_of, taken))}."
            )

    def check_sizes(self, model: str, task: str, needed: Sequence[str], longest: int | None) -> None:
        """Raise UsageError where one of the sizes `needed` is not given, with the command that gives them all.

        `longest` is the sequence that the model was made for, if that is known.
        """
        missing = [name for name in needed if not getattr(self, name)]
        if not missing:
            return
        examples = {**SIZE_EXAMPLES, "sequence_length": min(SIZE_EXAMPLES["sequence_length"], longest or 128)}
        flags = " and ".join(f"{flag_of(name)} N" for name in missing)
        example = " ".join(f"{flag_of(name)} {examples[name]}" for name in needed)
        given = f" --task {quoted(self.task)}" if self.task else ""
        raise UsageError(
            f"The task {task!r} is compiled for fixed shapes: {', '.join(needed)}. Add {flags}, for example: "
            f"precast export {quoted(model)}{given} {example} -o OUT"
        )

    def _problems(self) -> Iterator[str]:
        for flag, values in self._sizes().items():
            for value in values:
                if value < 1:
                    yield f"--{flag} must be at least 1, not {value}."
            if len(set(values)) != len(values) and flag != "image-size":
                what = "length" if "length" in flag else "size"
                yield f"--{flag} names a {what} twice: {','.join(map(str, values))}."
        if len(self.image_size) > 2:
            yield f"--image-size is HEIGHT,WIDTH or one number for both, not {','.join(map(str, self.image_size))}."
        yield from self._choice_problems()
        yield from self._cast_problems()
        if AUTO in (self.backend, *self.also):
            yield f"--backend {AUTO} keeps one backend's files, and --also adds another's: name both of them."
            return
        yield from self._backend_problems()
        yield from self._also_problems()
        yield from layout_problems(self)
        yield from self._quantization_problems()
        if not self.atol > 0:
            yield f"--atol must be above 0, not {self.atol}."

    def _sizes(self) -> dict[str, tuple[int, ...]]:
        """Every size that was given, by its flag."""
        return {
            "batch-size": self.batch_sizes,
            "sequence-length": self.sequence_length,
            "prefill-lengths": self.prefill_lengths,
            "decoder-sequence-length": () if self.decoder_sequence_length is None else (self.decoder_sequence_length,),
            "num-choices": () if self.num_choices is None else (self.num_choices,),
            "text-batch-size": () if self.text_batch_size is None else (self.text_batch_size,),
            "audio-sequence-length": self.audio_sequence_length,
            "image-size": self.image_size,
        }

    def _choice_problems(self) -> Iterator[str]:
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed and value is not None:
                known = ", ".join(map(str, allowed))
                yield f"--{name.replace('_', '-')} {value!r} is not supported; the choices are: {known}."

    def _cast_problems(self) -> Iterator[str]:
        if self.auto_cast_type is not None and self.auto_cast == "none":
            yield f"--auto-cast-type {self.auto_cast_type} says what --auto-cast casts to; give it matmul or all, too."
        if self.dtype != "float32" and self.auto_cast != "none":
            yield (
                f"--auto-cast {self.auto_cast} casts what is in float32, and --dtype {self.dtype} leaves nothing in "
                f"it; give one of them."
            )
        if self.is_cast and self.is_rounded:
            given = f"--dtype {self.dtype}" if self.dtype != "float32" else f"--auto-cast {self.auto_cast}"
            rounded = f"--quantize {self.quantize}" if self.quantize != "none" else f"--kv-cache {self.kv_cache}"
            yield f"{given} cannot be combined with {rounded}, whose operators compute in float32; give one of them."

    def _backend_problems(self) -> Iterator[str]:
        row = self._backend_row()
        taken = row.takes.union(*(get_backend(name).takes for name in self.also))
        for name in ("dtype", "auto_cast", "isa", "device", *NEURON_FLAGS):
            value = getattr(self, name)
            if value != getattr(ExportOptions, name) and name not in taken:
                others = ", ".join(each.name for each in BACKENDS.values() if name in each.takes) or "none"
                given = NEURON_FLAGS.get(name) or f"--{name.replace('_', '-')} {value}"
                yield f"{given} is not for --backend {row.name}: {row.because}. Backends that take it: {others}."
        if self.kv_cache == "float16" and not row.halves_caches:
            others = ", ".join(each.name for each in BACKENDS.values() if each.halves_caches)
            yield (
                f"--kv-cache float16 is not for --backend {row.name}, whose attention computes in what its caches "
                f"hold. Backends that take it: {others}; int8 is for all."
            )
        if row.name == "neuron":
            yield from neuron_problems(self)
        elif self.auto_cast_type == "tf32":
            yield f"--auto-cast-type tf32 is for --backend neuron; with --backend {row.name} it is bf16 or fp16."

    def _backend_row(self) -> Backend:
        try:
            return get_backend(self.backend)
        except UsageError as error:
            raise UsageError(f"{str(error).removesuffix('.')}, or {AUTO}, which keeps the fastest here.") from None

    def _also_problems(self) -> Iterator[str]:
        names = [self.backend, *self.also]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            yield f"--also {name} would compile for {name} a second time: give each backend once."
        for name in dict.fromkeys(self.also):
            if get_backend(name).name != self.backend:
                yield from self.for_backend(name)._backend_problems()

    def _quantization_problems(self) -> Iterator[str]:
        if self.quantize_method not in (None, *QUANTIZE_METHODS):
            known = ", ".join(QUANTIZE_METHODS)
            yield f"--method {self.quantize_method!r} is not supported; the choices are: {known}."
        if self.quantize == "none" and (useless := self._given("group_size", "skip")):
            yield f"{', '.join(useless)} say how weights are rounded; give --quantize, too."
        if self.quantize in ("none", "source") and (useless := self._only_for_rounding()):
            yield f"{', '.join(useless)} say how weights are rounded, which --quantize {self.quantize} does not do."
        if not self.is_calibrated and self.calibration is not None:
            yield "--calibration says how weights and caches are rounded; give --quantize or --kv-cache int8, too."
        if not self.is_lossy and (useless := self._given("max_kl", "min_agreement", "accept_loss")):
            yield (
                f"{', '.join(useless)} bound what is lost; without --quantize, --kv-cache, --dtype and --auto-cast "
                f"nothing is, and --atol is the bound."
            )
        if self.is_lossy and not self.also and self._given("atol") and self.atol > 0:
            yield (
                f"--atol {self.atol:g} bounds the difference of a model that computes in float32; what --quantize, "
                f"--kv-cache, --dtype and --auto-cast cost is bounded by --max-kl and --min-agreement."
            )
        if self.max_kl is not None and not self.max_kl > 0:
            yield f"--max-kl must be above 0, not {self.max_kl}."
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            yield f"--min-agreement must lie between 0 and 1, not {self.min_agreement}."
        if self.calibration is not None and not self.calibration.is_file():
            yield f"--calibration: there is no file {self.calibration}."

    def _only_for_rounding(self) -> list[str]:
        given = {"--method": self.quantize_method, "--symmetric/--asymmetric": self.symmetric}
        return [flag for flag, value in given.items() if value is not None]

    def _given(self, *names: str) -> list[str]:
        """The flags of those options that are not as they are by default."""
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != getattr(ExportOptions, name)]


def flag_of(name: str) -> str:
    """An option of ExportOptions as it is typed."""
    return f"--{name.replace('_', '-')}"


_CHOICES: dict[str, Collection[object]] = {
    "dtype": DTYPES,
    "auto_cast": AUTO_CAST,
    "auto_cast_type": AUTO_CAST_TYPES,
    "isa": ISAS,
    "device": DEVICES,
    "quantize": QUANTIZE,
    "kv_cache": KV_CACHES,
    "layout": LAYOUTS,
    "group_size": GROUP_SIZES,
}
