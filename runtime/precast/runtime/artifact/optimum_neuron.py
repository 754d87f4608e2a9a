"""Import artifacts of optimum-neuron: `config.json` with a section `neuron`, and `model.neuron` beside it.

That section names task, static sizes and compiler, but neither inputs nor outputs, which optimum-neuron takes from the
export configuration of the model type each time it loads. Those here are its release 0.4.6's:
`store_compilation_config` in optimum/neuron/utils/argument_utils.py wrote the section, `inputs` and `outputs` are those
of optimum/exporters/neuron/model_configs.py and base.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, FormatError, IntegrityError
from .integrity import remember, sha256_of
from .schema import (
    PATH_PATTERN,
    Accuracy,
    Axis,
    Compiler,
    Contract,
    Dtype,
    File,
    Graph,
    Host,
    Input,
    Output,
    Shapes,
    Source,
    Variant,
)

__all__ = ["FILE", "LAYOUT", "SECTION", "TASKS", "import_contract", "text_inputs"]

LAYOUT = "optimum-neuron"
SECTION, FILE = "neuron", "model.neuron"

_TWO_INPUTS = ("camembert", "distilbert", "esm", "modernbert", "mpnet", "phi", "roberta", "transformer", "xlm-roberta")
_THREE_INPUTS = (
    "albert", "bert", "convbert", "deberta", "deberta-v2", "electra", "flaubert", "mobilebert", "roformer", "xlm",
)  # fmt: skip
_POOLERS = ("albert", "bert", "camembert", "esm", "mobilebert", "mpnet", "roberta", "xlm-roberta")
"""Types whose features come with those of a pooler."""
_SENTENCES = "transformer"
"""optimum-neuron's name for a model of sentence-transformers, of whatever type."""

_FORMAT = 2
"""The format of the contracts made here. They do not depend on path or reader, so their digests can be pinned."""
_TEXT: tuple[Axis, ...] = ("batch", "length")
TASKS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "feature-extraction": (("last_hidden_state", ("batch", "length", "hidden")),),
    "fill-mask": (("logits", ("batch", "length", "vocabulary")),),
    "text-classification": (("logits", ("batch", "labels")),),
    "token-classification": (("logits", ("batch", "length", "labels")),),
    "question-answering": (("start_logits", ("batch", "length")), ("end_logits", ("batch", "length"))),
    "multiple-choice": (("logits", ("batch", "choices")),),
    "image-classification": (("logits", ("batch", "labels")),),
    "audio-classification": (("logits", ("batch", "labels")),),
}
"""Per task the outputs that come first, with their axes: those whose sizes follow from config.json."""
_OTHER_NAMES = {"sentence-similarity": "feature-extraction"}
_DTYPES: dict[str, Dtype] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def text_inputs(model_type: str, config: Mapping[str, Any]) -> list[str] | None:
    """The inputs of a text model of this type, in their order; None for a type that optimum-neuron has not."""
    if model_type in _TWO_INPUTS or (model_type == "deberta" and config.get("type_vocab_size") == 0):
        return ["input_ids", "attention_mask"]
    return ["input_ids", "attention_mask", "token_type_ids"] if model_type in _THREE_INPUTS else None


def import_contract(config: Mapping[str, Any], path: Path) -> Contract | None:
    """Make the contract, but for its digest, of an artifact of optimum-neuron at `path`; None where it is none. Its
    files are hashed.

    Raises ArtifactError for a layout or task that is not supported, FormatError for a broken section, IntegrityError
    for a file that cannot be read.
    """
    _refuse_others(path)
    section = config.get(SECTION)
    if not isinstance(section, dict):
        return None
    found = _Section(config, section, path)
    name = _find_compiled_file(path)
    graph = found.make_graph(name)
    files = _hash_files(path)
    return Contract(
        format_version=_FORMAT,
        precast_version=LAYOUT,
        digest="0" * 64,
        task=found.task,
        source=Source(model=found.source, revision=None, weights_sha256=files[name].sha256),
        shapes=Shapes(
            batch_size=graph.slots,
            sequence_length=[found.size("sequence_length")] if "input_ids" in _input_names(graph) else [],
            prefill_lengths=[],
            dynamic_batch_size=section.get("dynamic_batch_size") is True,
        ),
        variants=[found.make_variant(graph)],
        files=files,
    )


def _refuse_others(path: Path) -> None:
    """Raise ArtifactError for layouts of optimum-neuron that hold something else than one traced graph."""
    advice = "Export it again with precast: precast export MODEL --backend neuron --instance-type …"
    if (path / "neuron_config.json").is_file():
        raise ArtifactError(
            f"{path} is a decoder of optimum-neuron: a bundle of NxD, whose graphs sample on the device and take cache "
            f"slots and positions that only its own library feeds. {advice}"
        )
    if (path / "encoder" / FILE).exists():
        raise ArtifactError(
            f"{path} is an encoder-decoder of optimum-neuron: two graphs, of which none says how it is fed by the "
            f"other. {advice}"
        )
    if (path / FILE).is_dir():
        raise ArtifactError(
            f"{path / FILE} is a directory: optimum-neuron's form for tensor parallel, made by parallel_model_trace, "
            f"which AWS no longer supports. {advice}"
        )


def _find_compiled_file(path: Path) -> str:
    """The one compiled file, by optimum-neuron's own rule."""
    names = sorted(each.name for each in path.glob("*.neuron"))
    if len(names) != 1:
        raise ArtifactError(
            f"{path} has a config.json of optimum-neuron and {len(names)} files *.neuron where one is needed: "
            f"{', '.join(names) or 'none'}. Download or export it again."
        )
    return names[0]


def _hash_files(path: Path) -> dict[str, File]:
    """Size and hash of every file in the directory but hidden ones; stamped, so that they are not hashed again."""
    names = [each.name for each in sorted(path.iterdir()) if each.is_file() and re.match(PATH_PATTERN, each.name)]
    try:
        files = {
            name: File(size=(path / name).stat().st_size, sha256=sha256_of(path / name))
            for name in names
            if name not in ("config.json", "README.md", "bench.json")
        }
        remember(path, files)
    except OSError as error:
        raise IntegrityError(f"{error.filename} cannot be read: {error.strerror}.") from None
    return files


class _Section:
    """The section `neuron` of one config.json, and the parts of a contract made of both."""

    def __init__(self, config: Mapping[str, Any], section: Mapping[str, Any], path: Path) -> None:
        self.config, self.section, self.path = config, section, path
        self.model_type = str(section.get("model_type") or config.get("model_type"))
        task = str(section.get("task"))
        self.task = _OTHER_NAMES.get(task, task)
        if self.task not in TASKS:
            raise ArtifactError(
                f"{path} was compiled by optimum-neuron for {task}: its config.json does not say what its outputs are, "
                f"and precast knows them for {', '.join(TASKS)}. Export it again with precast export --backend neuron."
            )

    @property
    def source(self) -> str:
        name = str(self.config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]
        return name or self.model_type

    def size(self, axis: str) -> int:
        """A static size. Raises FormatError where the section lacks it."""
        found = self.section.get(f"static_{axis}")
        if type(found) is not int or not 0 < found < 2**31:
            raise FormatError(f"{self.path / 'config.json'}: {SECTION}.static_{axis} is {found!r}, not a size.")
        return found

    def make_graph(self, file: str) -> Graph:
        inputs = list(self._make_inputs())
        is_text = inputs[0].name == "input_ids"
        return Graph(
            name="model", role="encode", file=file, batch=self.size("batch_size"),
            length=self.size("sequence_length") if is_text else 0, capacity=0, inputs=inputs,
            outputs=list(self._make_outputs()), cache=[],
        )  # fmt: skip

    def _make_inputs(self) -> Iterator[Input]:
        if self.task == "image-classification":
            channels = self.section.get("static_num_channels") or self.config.get("num_channels")
            yield self._float_input("pixel_values", [_as_size(channels) or 3, *self._image_size()])
        elif self.task == "audio-classification":
            # Sound that is shorter than compiled would need a mask, which the graph does not take.
            yield self._float_input("input_values", [self.size("audio_sequence_length")])
        else:
            yield from self._text_inputs()

    def _float_input(self, name: str, sizes: list[int]) -> Input:
        axes: list[Axis | None] = ["batch", *(None for _ in sizes)]
        return Input(name=name, dtype="float32", shape=[self.size("batch_size"), *sizes], pad=0, axes=axes)

    def _image_size(self) -> list[int]:
        given = self.section.get("static_image_size") or self.config.get("image_size")
        if isinstance(given, list) and len(given) == 2:
            return [_as_size(size) for size in given]
        return [given, given] if isinstance(given, int) else [self.size("height"), self.size("width")]

    def _text_inputs(self) -> Iterator[Input]:
        names = text_inputs(self.model_type, self.config)
        if names is None:
            known = ", ".join(sorted({*_TWO_INPUTS, *_THREE_INPUTS}))
            raise ArtifactError(
                f"{self.path} was compiled by optimum-neuron for the model type {self.model_type!r}, and its "
                f"config.json does not say what its inputs are. precast knows those of: {known}."
            )
        axes: list[Axis | None] = ["batch", "choices", "length"] if self.task == "multiple-choice" else [*_TEXT]
        pad = self.config.get("pad_token_id")
        for name in names:
            yield Input(
                name=name, dtype=self._int_dtype(), shape=[self._axis_sizes()[str(axis)] for axis in axes],
                pad=pad if name == "input_ids" and isinstance(pad, int) else 0, axes=axes,
            )  # fmt: skip

    def _int_dtype(self) -> Dtype:
        found = self.section.get("int_dtype", "int64")
        if found not in ("int64", "int32"):
            raise FormatError(f"{self.path / 'config.json'}: {SECTION}.int_dtype is {found!r}, not int64 or int32.")
        return "int64" if found == "int64" else "int32"

    def _make_outputs(self) -> Iterator[Output]:
        outputs = TASKS[self.task]
        if self.task == "feature-extraction" and self.model_type in (_SENTENCES, *_POOLERS):
            name = "sentence_embedding" if self.model_type == _SENTENCES else "pooler_output"
            outputs = (*outputs, (name, ("batch", "hidden")))
        for name, axes in outputs:
            cut: list[Axis | None] = [axis if axis in ("batch", "length", "choices") else None for axis in axes]  # type: ignore[misc]
            yield Output(name=name, dtype="float32", shape=[self._axis_sizes()[axis] for axis in axes], slice=cut)

    def _axis_sizes(self) -> dict[str, int]:
        """The size of every axis that the model may have."""
        config, is_choice = self.config, self.task == "multiple-choice"
        hidden = next((config[key] for key in ("hidden_size", "dim", "emb_dim", "d_model") if key in config), 0)
        names = config.get("id2label")
        is_text = self.task not in ("image-classification", "audio-classification")
        return {
            "batch": self.size("batch_size"),
            "length": self.size("sequence_length") if is_text else 0,
            "choices": self.size("num_choices") if is_choice else 0,
            "hidden": _as_size(hidden),
            "vocabulary": _as_size(config.get("vocab_size")),
            # transformers leaves out the two labels that every configuration has by default.
            "labels": (len(names) if isinstance(names, dict) else 0) or _as_size(config.get("num_labels")) or 2,
        }

    def make_variant(self, graph: Graph) -> Variant:
        dtype = _DTYPES.get(str(self.section.get("float_dtype", "fp32")))
        if dtype is None:
            found = self.section.get("float_dtype")
            raise FormatError(
                f"{self.path / 'config.json'}: {SECTION}.float_dtype is {found!r}, not fp32, fp16 or bf16."
            )
        return Variant(
            name=LAYOUT, backend="neuron", dtype=dtype, quantization=None, kv_cache=None,
            host=Host(platforms=["linux-x86_64"], device="neuron", isa=[], min_versions={"torch-neuronx": "2.5"}),
            compiler=self._make_compiler(), trust="native",
            accuracy=Accuracy(status="skipped", reason="optimum-neuron records no comparison", figures={}),
            weights=[], graphs=[graph],
        )  # fmt: skip

    def _make_compiler(self) -> Compiler:
        section = self.section
        told = {name: section[name] for name in ("auto_cast", "auto_cast_type", "instance_type") if section.get(name)}
        return Compiler(
            name=str(section.get("compiler_type") or "neuronx-cc"),
            version=str(section.get("compiler_version") or "unknown"),
            options={
                **{name: str(value) for name, value in told.items()},
                "optlevel": str(section.get("optlevel") or 2),
                "inline_weights": section.get("inline_weights_to_neff") is not False,
                "cores": 1,
                "strategy": "trace",
                "layout": LAYOUT,
            },
            torch="unknown",
            transformers=str(self.config.get("transformers_version") or "unknown"),
        )


def _as_size(value: Any) -> int:
    """A size in a foreign configuration; 0 for anything that is none."""
    return value if type(value) is int and 0 < value < 2**31 else 0


def _input_names(graph: Graph) -> list[str]:
    return [spec.name for spec in graph.inputs]
