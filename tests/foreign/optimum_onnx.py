"""optimum-onnx's tests of its models, with ours behind their ORTModelFor… names.

The library itself is not there (it is pinned to transformers 4), so what its tests import is made up here; and their
tiny checkpoints on the Hub are made by tests/zoo, of the architecture and task that a test is about. What a test asks
of ONNX Runtime's session, and draws at random, is left out: the answers are what is compared.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image
from transformers.modeling_outputs import BaseModelOutput

from precast.runtime import CompiledModel, pipeline

from . import checkpoints, tally

_MADE_UP = ("optimum.onnxruntime", "optimum.onnx", "optimum.exporters.onnx", "transformers.onnx")
# Of GPUs, sessions, files of ONNX models, and models on the Hub; a model of ours is the same with and without.
_LEFT_OUT = (
    "_on_gpu", "_on_rocm", "io_binding", "merged", "untested_architectures", "requiring_position_ids", "provider",
    "from_hub", "model_id", "default_model", "old_onnx", "from_cache", "not_supported", "external_data", "is_none",
    "session_options", "trust_remote", "zero_shot_classification", "sentence_transformers", "save_model",
    "infer_onnx_model",
)  # fmt: skip
_TASKS = {"ctc": "automatic-speech-recognition"}
_TYPES = {"xlm-qa": "xlm", "swin-window": "swin"}


class Running:
    """The test that runs."""

    task = ""


class ORTModel:
    """One of ours, with the attributes that optimum-onnx's tests look at."""

    def __init__(self, ours: Any) -> None:
        self._ours = ours
        self.config = transformers.AutoConfig.from_pretrained(ours.artifact.path)
        # No session; it is of its class, which is all that is asked.
        self.model = onnxruntime.InferenceSession.__new__(onnxruntime.InferenceSession)

    @classmethod
    def from_pretrained(cls, folder: Any, **_: Any) -> ORTModel:
        path = Path(folder)
        is_ours = "precast" in json.loads((path / "config.json").read_text())
        artifact = path if is_ours else checkpoints.artifact_of(*_made_for(path))
        tally.reached()
        return cls(CompiledModel.from_pretrained(artifact))

    def save_pretrained(self, folder: Any) -> None:
        self._ours.save_pretrained(folder, force=True)

    @property
    def input_names(self) -> dict[str, int]:
        """As optimum numbers them."""
        return {name: index for index, name in enumerate(self._ours.inputs)}

    def __call__(self, **inputs: Any) -> Any:
        answer = self._ours(**inputs)
        is_features = Running.task == "feature-extraction" and inputs.get("return_dict") is not False
        return BaseModelOutput(last_hidden_state=answer.last_hidden_state) if is_features else answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ours, name)


class Piped:
    """A pipeline of ours, with the device that theirs have."""

    def __init__(self, task: str, model: ORTModel | str, **options: Any) -> None:
        model = ORTModel.from_pretrained(model) if isinstance(model, str) else model
        # The tokenizer and the processors are the checkpoint's own, which the artifact holds.
        self._ours = pipeline(task, model._ours, **{k: v for k, v in options.items() if k not in _PREPARING})
        self.device, self.model, self.save_pretrained = model.device, model, self._ours.save_pretrained

    def __call__(self, inputs: Any, *given: Any, **options: Any) -> Any:
        is_url = isinstance(inputs, str) and inputs.startswith("http")
        return self._ours(_picture() if is_url else inputs, *given, **options)


_PREPARING = ("tokenizer", "image_processor", "feature_extractor", "sampling_rate", "model_kwargs")


class Checkpoints:
    """In the place of the table of checkpoints on the Hub: an architecture -> a folder, for the running test's task."""

    def __getitem__(self, architecture: str) -> str:
        task = _TASKS.get(Running.task, Running.task)
        return str(checkpoints.source_of(_TYPES.get(architecture, architecture), task))


class _Named:
    """Whatever else is imported."""

    MIN_TRANSFORMERS_VERSION = "0.0"


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        is_ours = any(name == made or name.startswith(made + ".") for made in _MADE_UP)
        return ModuleSpec(name, self, is_package=True) if is_ours else None

    def exec_module(self, module: ModuleType) -> None:
        def named(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if name.startswith("ORTModel"):
                return type(name, (ORTModel,), {})
            if name.startswith("ONNX_"):
                return "model.onnx"
            return {"pipeline": Piped, "get_preprocessor": _preprocessor}.get(name, _Named)

        module.__getattr__ = named  # type: ignore[method-assign]


def _made_for(source: Path) -> tuple[str, str]:
    model_type, task = json.loads((source.parent / "made.json").read_text())
    return model_type, task


def _preprocessor(folder: str) -> Any:
    if (Path(folder) / "tokenizer.json").exists():
        return transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


def _picture(*_: Any, **__: Any) -> Any:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))


def _download(*_: Any, **__: Any) -> Any:
    """In the place of requests.get: a picture, of whatever is asked."""
    file = io.BytesIO()
    _picture().save(file, "PNG")
    file.seek(0)
    return SimpleNamespace(raw=file)


def _shorter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Sounds of the length that models are compiled for here."""
    return lambda self: original(self)[: checkpoints.SAMPLES]


def _compare_logits(self: Any, inputs: Any, theirs: Any, ours: Any, *_: Any, **__: Any) -> None:
    """In the place of theirs: of tokens only, for eager's logits of padding mean nothing, and without the cache and the
    encoder's states, which stay in the compiled model."""
    assert isinstance(ours.logits, torch.Tensor)
    if hasattr(inputs, "keys") and "attention_mask" in inputs:
        padding = inputs["attention_mask"].unsqueeze(-1) == 0
        theirs.logits, ours.logits = (each.logits.masked_fill(padding, 0) for each in (theirs, ours))
    torch.testing.assert_close(theirs.logits, ours.logits, atol=self.ATOL, rtol=self.RTOL)


def _without_defaults(original: Callable[..., Any]) -> Callable[..., Any]:
    """Inputs without an option that generate() of transformers 5 no longer has."""

    def get_inputs(*given: Any, **options: Any) -> Any:
        inputs = original(*given, **options)
        if hasattr(inputs, "keys"):
            inputs.pop("use_model_defaults", None)
        return inputs

    return get_inputs


def pytest_configure() -> None:
    sys.meta_path.insert(0, _Finder())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What compares answers, of architectures and tasks that both have."""
    chosen = [item for item in items if not any(part in item.name for part in _LEFT_OUT)]
    for case in {item.cls for item in chosen if isinstance(item, pytest.Function)}:
        module: Any = sys.modules[case.__module__]
        module.MODEL_NAMES = sys.modules["testing_utils"].MODEL_NAMES = Checkpoints()
        module.requests = SimpleNamespace(get=_download)
        module.GenerationConfig = _undrawn
        case.check_onnx_model_attributes = lambda *_, **__: None
        if hasattr(case, "GEN_KWARGS"):
            case.GEN_KWARGS = {**case.GEN_KWARGS, "do_sample": False}
        if hasattr(case, "_generate_random_audio_data"):
            case._generate_random_audio_data = _shorter(case._generate_random_audio_data)
        if hasattr(case, "compare_logits"):
            case.compare_logits, case.get_inputs = _compare_logits, _without_defaults(case.get_inputs)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _undrawn(**given: Any) -> Any:
    """A GenerationConfig that draws nothing, whatever a test asks: draws are no one's to compare."""
    return transformers.GenerationConfig(**{**given, "do_sample": False})


def pytest_runtest_setup(item: pytest.Item) -> None:
    Running.task = getattr(getattr(item, "cls", None), "TASK", None) or ""
