"""What an export can be asked for, checked before any work starts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from precast.runtime.arguments import refuse_unknown
from precast.runtime.artifact.backends import BACKENDS, Backend, backend_rows, get_backend
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import UsageError
from precast.runtime.terminal import quoted

from .accuracy import AccuracyOptions
from .adapter_slots import AdapterSlotOptions
from .adapters import AdapterOptions
from .backend_options import (
    BackendOptions,
    backends_that_take,
    fill,
    find_option,
    options_class,
    taken_by,
    why_not_taken,
)
from .combinations import backend_rule_problems, conflict_problems, need_problems
from .declaration import OptionsPart, choice_problems, describe, keyword_of
from .layout import LAYOUTS, OPTIMUM_NEURON
from .precision import AUTOMATIC, BY_BACKEND, PrecisionOptions
from .quantization import GROUP_SIZES, QUANTIZE_METHODS, QuantizationOptions
from .shapes import SIZE_EXAMPLES, SIZES, ShapeOptions
from .spellings import THEIR_NAMES, in_our_words

__all__ = [
    "AUTO", "GROUP_SIZES", "QUANTIZE_METHODS", "SIZES", "SIZE_EXAMPLES", "AccuracyOptions", "AdapterOptions",
    "AdapterSlotOptions", "BackendOptions", "ExportOptions", "PrecisionOptions", "QuantizationOptions", "ShapeOptions",
    "describe", "keyword_of", "option_names",
]  # fmt: skip

AUTO = "auto"
"""A backend's name that stands for all of them."""

PARTS: dict[str, type[OptionsPart]] = {
    "shapes": ShapeOptions,
    "adapters": AdapterOptions,
    "adapter_slots": AdapterSlotOptions,
    "precision": PrecisionOptions,
    "quantization": QuantizationOptions,
    "accuracy": AccuracyOptions,
}
"""The parts of ExportOptions that every backend has, by their names there."""


@dataclass(frozen=True, init=False)
class ExportOptions:
    """The arguments of `export()`.

    They lie in parts, and are given by their own names: `ExportOptions(batch_size=1, dtype="bfloat16")` has
    `shapes.batch_size` and `precision.dtype`, which `options.batch_size` and `options.dtype` find as well. Options of a
    single backend are given in the same way, as in `ExportOptions(backend="neuron", instance_type="trn1")`; they are
    declared by the class that the backend's row names.

    Attributes:
        task: a task name; None infers it from the checkpoint.
        shapes: the sizes that graphs are compiled for.
        backend: what compiles, one of the backends' names; "auto" tries all that take these options, and keeps the
            fastest here.
        precision: the dtype of weights and computation.
        backend_keywords: options of single backends that are not as by default, by name: those of `backend`, and those
            that backends in `also` take.
        revision, token: of a Hub checkpoint.
        trust_remote_code: run modelling code that comes with the checkpoint.
        weights: a file or folder with the weights, where they do not lie with the checkpoint's configuration.
        adapters: what is merged into the weights.
        adapter_slots: which adapters can be loaded at run time.
        prefix_tuning: the folder of a PEFT adapter of type PREFIX_TUNING, PROMPT_TUNING or P_TUNING, or PaddleNLP's
            pre_caches.npy: keys and values that lie before every prompt, in `sequence_length`, too.
        quantization: how weights and caches are rounded.
        accuracy: the bounds that validation holds the artifact to.
        also: further backends to compile with, into the same artifact; the loader takes the first that runs on a host.
            They are given what they take of these options.
        layout: how the files are named, one of LAYOUTS; "optimum-neuron" can be opened by that library as well.
        force: replace an existing artifact.
    """

    task: str | None = None
    shapes: ShapeOptions = field(default=ShapeOptions())
    backend: str = "onnx"
    precision: PrecisionOptions = field(default=PrecisionOptions())
    backend_keywords: tuple[tuple[str, Any], ...] = ()
    revision: str | None = None
    token: str | None = None
    trust_remote_code: bool = False
    weights: str | None = None
    adapters: AdapterOptions = field(default=AdapterOptions())
    adapter_slots: AdapterSlotOptions = field(default=AdapterSlotOptions())
    prefix_tuning: str | None = None
    quantization: QuantizationOptions = field(default=QuantizationOptions())
    accuracy: AccuracyOptions = field(default=AccuracyOptions())
    also: tuple[str, ...] = ()
    layout: str = field(default="precast", metadata=describe(choices=LAYOUTS))
    force: bool = False

    def __init__(self, **keywords: Any) -> None:
        """Take whole parts or single options by name; a single one goes over that of its part. A number or word may
        stand for a list of one.

        Raises TypeError for a name that there is not.
        """
        values = {each.name: _listed(keywords.pop(each.name, each.default), each) for each in fields(self)}
        for name, part in PARTS.items():
            mine = {each.name: _listed(keywords.pop(each.name), each) for each in fields(part) if each.name in keywords}
            values[name] = replace(values[name], **mine)
        values["backend_keywords"] = _differing({**dict(values["backend_keywords"]), **keywords})
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """A single option or property of a part, or an option of a backend, by its own name."""
        if not name.startswith("_"):
            for part, kind in PARTS.items():
                if hasattr(kind, name):
                    return getattr(getattr(self, part), name)
            if declared := find_option(name):
                return dict(self.backend_keywords).get(name, declared.default)
        raise AttributeError(f"ExportOptions has no option {name!r}")

    @classmethod
    def of(
        cls, keywords: Mapping[str, Any], asked_by: str = "export()", without: Collection[str] = ()
    ) -> ExportOptions:
        """The options that are given by name, ours or those of the libraries that `spellings` reads.

        Raises UsageError for a name that there is not, or that is among `without`, with the nearest.
        """
        options = in_our_words(keywords, asked_by)
        refuse_unknown(asked_by, options, [name for name in cls.defaults() if name not in without])
        return cls(**options)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every option by its own name, with its default: of the request, of its parts, of all backends."""
        found: dict[str, Any] = {}
        for each in fields(cls):
            if each.name in PARTS:
                found.update((one.name, one.default) for one in fields(PARTS[each.name]))
            elif each.name == "backend_keywords":
                declared = (one for row in backend_rows() for one in fields(options_class(row)))
                found.update((one.name, one.default) for one in declared if one.name not in found)
            else:
                found[each.name] = each.default
        return found

    def as_keywords(self) -> dict[str, Any]:
        """The options by their own names, of backends those alone that are not as by default: `ExportOptions(**them)`
        is this."""
        parts = {name: value for part in PARTS for name, value in vars(getattr(self, part)).items()}
        own = {name: value for name, value in vars(self).items() if name not in (*PARTS, "backend_keywords")}
        return {**own, **parts, **dict(self.backend_keywords)}

    def replace(self, **keywords: Any) -> ExportOptions:
        """These options but for those that are given, by name or in whole parts."""
        return replace(self, **keywords)

    def for_backend(self, backend: str) -> ExportOptions:
        """The same request of one backend alone: what others take and it does not is as by default."""
        row, defaults = get_backend(backend), self.defaults()
        others = set(dict(self.backend_keywords)).union(*map(taken_by, BACKENDS.values()))
        given = {name: defaults[name] for name in others - taken_by(row)}
        if "auto_cast" in given:
            given["auto_cast_type"] = None
        if backend != self.backend:
            given["layout"] = defaults["layout"]
        asked = self.replace(backend=backend, also=(), **given)
        if self.is_lossy and not asked.is_lossy:
            return asked.replace(max_kl=None, min_agreement=None, accept_loss=False)
        return asked.replace(atol=AccuracyOptions.atol) if asked.is_lossy else asked

    @property
    def backend_options(self) -> Any:
        """The options of the backend, an instance of the class that its row names. Raises UsageError where there is no
        such backend."""
        return fill(options_class(get_backend(self.backend)), dict(self.backend_keywords))

    def per_variant(self) -> list[ExportOptions]:
        """The request of each variant of the artifact. Raises UsageError where there is no such backend."""
        requests = [self.for_backend(name) for name in (self.backend, *self.also)]
        return [one.replace(**vars(own)) for one in requests for own in one.backend_options.variants()]

    @property
    def is_lossy(self) -> bool:
        """Whether less than fp32 is asked for, so that the artifact is held to a loss rather than to a difference."""
        return self.quantization.is_rounded or self.precision.is_cast

    def check(self) -> None:
        """Raise one UsageError that lists everything wrong with these options; with the backend "auto" what is wrong
        with the first that it stands for, where none takes them."""
        backends = list(BACKENDS) if self.backend == AUTO and not self.also else [self.backend]
        asked = [self.replace(backend=name) for name in backends]
        problems = [list(each.problems()) for each in asked]
        if all(problems):
            raise UsageError(" ".join(problems[0]))
        fitting = [each for each, wrong in zip(asked, problems, strict=True) if not wrong]
        if self.backend == AUTO and (several := [each.backend for each in fitting if len(each.per_variant()) > 1]):
            raise UsageError(
                f"backend={AUTO!r} keeps one variant, the fastest here, and several are asked for: name "
                f"backend={several[0]!r} for all of them."
            )

    def check_task(self, task: Task) -> None:
        """Raise UsageError for what these options ask of a task that has no place for it."""
        self.shapes.check_task(task, is_inferred=not self.task)
        if self.prefix_tuning is not None and task.kind != "decoder":
            raise UsageError(
                f"prefix_tuning={self.prefix_tuning!r} stands before the prompts of decoders, and {task.name!r} has no "
                f"prompts. Leave it out."
            )
        if self.adapter_slots.is_asked and task.kind != "decoder":
            raise UsageError(
                f"lora_slots={self.lora_slots} are for decoders, and {task.name!r} is done by none: lora= merges an "
                f"adapter into any model."
            )
        self._check_bounds(task)
        rounding = self.quantization
        if rounding.kv_cache != "float32" and task.kind != "decoder":
            raise UsageError(
                f"kv_cache={rounding.kv_cache!r} is for decoders, whose caches grow with what they write; those of "
                f"{task.name!r} stay float32. Leave it out."
            )
        if rounding.quantize == "auto" and task.kind != "decoder":
            raise UsageError(
                f"quantize='auto' chooses layers by what they cost on the text that a decoder predicts, and "
                f"{task.name!r} predicts none. Give quantize='int8' or int4, and skip= for layers to leave out."
            )

    def _check_bounds(self, task: Task) -> None:
        """Raise UsageError for bounds on a loss that this task does not have."""
        is_rounded = self.quantization.is_rounded
        bounded: tuple[str, ...] = ()
        if task.kind == "decoder" or (task.kind == "seq2seq" and is_rounded):
            bounded, words = (
                ("max_kl", "min_agreement"),
                "predicts text: max_kl and min_agreement bound what that loses",
            )
        elif is_rounded:
            bounded = ("min_cosine", "min_agreement")
            words = "predicts no text: min_cosine and min_agreement bound what quantize= costs it"
        else:
            words = "has fixed bounds on what dtype= and auto_cast may cost it, and accept_loss=True takes more"
        names = [name for name in ("max_kl", "min_agreement", "min_cosine") if name not in bounded]
        if useless := self.accuracy.given(*names):
            raise UsageError(f"{' and '.join(useless)} cannot be given here: {task.name!r} {words}.")

    def check_sizes(self, model: str, task: str, needed: Sequence[str], longest: int | None) -> None:
        """Raise UsageError where one of the sizes `needed` is not given, with the command that gives them all.

        `longest` is the sequence that the model was made for, if that is known.
        """
        given = f" --task {quoted(self.task)}" if self.task else ""
        self.shapes.check_needed(needed, task, longest, model, task_flag=given)

    def problems(self) -> Iterator[str]:
        """Describe everything that is wrong with these options, a sentence each."""
        for part in (self.shapes, self.adapters, self.adapter_slots, self.precision, self.quantization):
            yield from part.problems()
        yield from conflict_problems(self)
        yield from need_problems(self)
        yield from self._choice_problems()
        if AUTO in (self.backend, *self.also):
            yield f"backend={AUTO!r} keeps one backend's files, and also= adds another's: name both of them."
            return
        yield from self._backend_problems()
        yield from self._also_problems()
        yield from self._layout_problems()
        yield from self._bound_problems()
        yield from self.accuracy.problems()

    def _choice_problems(self) -> Iterator[str]:
        """Options that lie in no part, and of backends whether it takes them or not."""
        for name, value in self.backend_keywords:
            if declared := find_option(name):
                yield from choice_problems(declared, value)
        for each in fields(self):
            yield from choice_problems(each, getattr(self, each.name))

    def _backend_problems(self) -> Iterator[str]:
        row = self._backend_row()
        yield from backend_rule_problems(self)
        yield from self._foreign_problems(row)
        yield from self.backend_options.problems()
        if self.precision.auto_cast_type == "tf32" and not row.casts_itself:
            others = ", ".join(each.name for each in BACKENDS.values() if each.casts_itself)
            yield f"auto_cast_type='tf32' is for backend={others!r}; with backend={row.name!r} it is bf16 or fp16."

    def _foreign_problems(self, row: Backend) -> Iterator[str]:
        """Options that neither the backend nor another that is asked for takes."""
        taken = taken_by(row).union(*(taken_by(get_backend(name)) for name in self.also))
        shared = [
            each
            for each in fields(PrecisionOptions)
            if each.name in BY_BACKEND and self.precision.is_given(each) and getattr(self, each.name) != AUTOMATIC
        ]
        for each in [*shared, *filter(None, (find_option(name) for name, _ in self.backend_keywords))]:
            if each.name not in taken:
                # A choice is a word, as others need not be.
                is_word = bool(each.metadata.get("choices"))
                given = f"{each.name}={getattr(self, each.name)!r}" if is_word else keyword_of(each)
                yield (
                    f"{given} is not for backend={row.name!r}: {why_not_taken(row, each.name)}. Backends that take it: "
                    f"{backends_that_take(each.name)}."
                )

    def _backend_row(self) -> Backend:
        try:
            return get_backend(self.backend)
        except UsageError as error:
            raise UsageError(f"{str(error).removesuffix('.')}, or {AUTO}, which keeps the fastest here.") from None

    def _also_problems(self) -> Iterator[str]:
        names = [self.backend, *self.also]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            yield f"also={name!r} would compile for {name} a second time: give each backend once."
        for name in dict.fromkeys(self.also):
            if get_backend(name).name != self.backend:
                yield from self.for_backend(name)._backend_problems()

    def _layout_problems(self) -> Iterator[str]:
        if "layout" in get_backend(self.backend).takes:
            yield from self.backend_options.layout_problems(self.layout, self.shapes)
        elif self.layout == OPTIMUM_NEURON:
            yield (
                f"layout={OPTIMUM_NEURON!r} is that of Neuron artifacts; give backend='neuron', too, or leave it out."
            )

    def _bound_problems(self) -> Iterator[str]:
        """Bounds of a loss where nothing is lost, and of a difference where something is."""
        bounds = self.accuracy
        if self.precision.is_automatic:
            return
        if not self.is_lossy and (useless := bounds.given("max_kl", "min_agreement", "min_cosine", "accept_loss")):
            yield (
                f"{', '.join(useless)} bound what is lost; without quantize=, kv_cache, dtype= and auto_cast "
                f"nothing is, and atol= is the bound."
            )
        if self.is_lossy and not self.also and bounds.given("atol") and bounds.atol > 0:
            yield (
                f"atol={bounds.atol:g} bounds the difference of a model that computes in float32; what quantize=, "
                f"kv_cache, dtype= and auto_cast cost is bounded by max_kl, min_cosine and min_agreement."
            )


def option_names() -> list[str]:
    """The names of all options of an export, ours and those of other libraries that `ExportOptions.of` reads."""
    return [*ExportOptions.defaults(), *THEIR_NAMES]


def _listed(value: Any, declared: Field[Any]) -> Any:
    """A value as it is kept: a single one as a tuple where the option has several."""
    return (value,) if isinstance(declared.default, tuple) and isinstance(value, int | str) else value


def _differing(keywords: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Options of backends that are not as by default. Raises TypeError for a name that there is not."""
    kept = []
    for name, value in sorted(keywords.items()):
        declared = find_option(name)
        if declared is None:
            raise TypeError(f"ExportOptions.__init__() got an unexpected keyword argument {name!r}")
        if (value := _listed(value, declared)) != declared.default:
            kept.append((name, value))
    return tuple(kept)
