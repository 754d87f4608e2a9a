"""transformers' pipeline tests, of ours beside theirs.

What their mixin would load from the Hub is made here: a tiny random checkpoint of the same architecture, with a
tokenizer or processor of its own, and images. Each pipeline that a test makes answers by ours, and the same call of
theirs, eager, must give the same.
"""

from __future__ import annotations

import inspect
import itertools
import json
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import GeneratorType
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from precast.runtime import pipeline
from precast.runtime.errors import PrecastError

from . import checkpoints, tally

# Task of theirs -> the task to export for, and the name of our pipeline.
TASKS = {
    "audio-classification": ("audio-classification", "audio-classification"),
    "automatic-speech-recognition": ("automatic-speech-recognition", "automatic-speech-recognition"),
    "feature-extraction": ("feature-extraction", "feature-extraction"),
    "fill-mask": ("fill-mask", "fill-mask"),
    "image-classification": ("image-classification", "image-classification"),
    "image-feature-extraction": ("feature-extraction", "image-feature-extraction"),
    "text-classification": ("text-classification", "text-classification"),
    "text-generation": ("text-generation", "text-generation"),
    "token-classification": ("token-classification", "token-classification"),
    "zero-shot": ("text-classification", "zero-shot-classification"),
}
# What they are told where a test says nothing else: theirs draws by default.
SETTLED = {"text-generation": {"do_sample": False}}
# In a batch, theirs answers with the vectors of padding, too.
ALONE = ("feature-extraction",)


class Different(Exception):
    """Ours ended in another way than theirs; no test of theirs expects this."""


class Both:
    """Ours and theirs of the same checkpoint: called, ours answers, and theirs must agree."""

    def __init__(self, ours: Any, eager: Any, task: str) -> None:
        self._ours, self._eager, self._task = ours, eager, task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._eager, name)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        tally.reached()
        inputs = tuple(map(_on_disk, inputs))
        ours, theirs = (tuple(parts) for parts in zip(*map(_twice, inputs), strict=True)) if inputs else ((), ())
        alone = {"batch_size": 1} if self._task in ALONE and "batch_size" in options else {}
        try:
            expected = _all(self._eager(*theirs, **{**options, **alone}))
        except Exception as refused:
            self._refuses(refused, ours, options)
            raise
        answer = _all(self._ours(*ours, **options))
        if not options.get("do_sample"):
            assert_close(answer, expected)
        return answer

    def _refuses(self, refused: Exception, inputs: Any, options: dict[str, Any]) -> None:
        """Raise Different unless ours refuses by name what theirs raises this for."""
        try:
            answer = _all(self._ours(*inputs, **options))
        except PrecastError:
            return
        except Exception as raw:
            raise Different(f"theirs raises {refused!r:.200}, ours {raw!r:.200}") from raw
        raise Different(f"theirs raises {refused!r:.200}, ours answers {answer!r:.200}") from refused


def assert_close(ours: Any, theirs: Any, where: str = "answer") -> None:
    """The same structure, with numbers that differ in their last places only."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), f"{where}: ours has {sorted(ours)}, theirs {sorted(theirs)}"
        for name, value in theirs.items():
            assert_close(ours[name], value, f"{where}[{name!r}]")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), f"{where}: ours has {len(ours)}, theirs {len(theirs)}"
        for at, (own, value) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(own, value, f"{where}[{at}]")
    elif isinstance(theirs, str | None):
        assert ours == theirs, f"{where}: ours {ours!r}, theirs {theirs!r}"
    else:
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-3, atol=1e-4, err_msg=where)


def run_pipeline_test(self: Any, task: str, repo_name: str, model_architecture: Any, **names: Any) -> None:
    """In the place of the mixin's: ours, of a checkpoint that is made here."""
    from tests.test_pipeline_mixin import pipeline_test_mapping

    if names.get("dtype", "float32") != "float32":
        self.skipTest(f"{names['dtype']} is not what these artifacts are compiled in")
    compiled_for = model_architecture.config_class.model_type, TASKS[task][0]
    source, artifact = checkpoints.source_of(*compiled_for), checkpoints.artifact_of(*compiled_for)
    named = pipeline_test_mapping[task]["test"]
    # Older ones have the class itself.
    tests = (pkgutil.resolve_name(named) if isinstance(named, str) else named)()
    _put_both(sys.modules[type(tests).__module__], task, artifact)
    # What these two get from the Hub is images, made here, and sounds, left out.
    tests._dataset = [{"image": Image.open(_PICTURE).convert(mode)} for mode in ("RGBA", "LA", "L")]
    tests._load_dataset = tests.run_torchaudio = lambda *_: None
    model = model_architecture.from_pretrained(source).eval()
    both, examples = tests.get_test_pipeline(model, **_parts(source))
    tests.run_pipeline_test(both, examples)
    answers = list(both((examples[at % len(examples)] for at in range(10)), batch_size=4))
    assert len(answers) == 10


def _put_both(module: Any, task: str, artifact: Path) -> None:
    """Let a module's tests make pipelines that are both."""
    for name, value in list(vars(module).items()):
        is_class = inspect.isclass(value) and issubclass(value, transformers.Pipeline)
        original = getattr(value, "original", value if is_class or value is transformers.pipeline else None)
        if original is not None and original is not transformers.Pipeline:
            setattr(module, name, _maker(original, task, artifact))


def _maker(original: Callable[..., Any], task: str, artifact: Path) -> Callable[..., Both]:
    def make(**given: Any) -> Both:
        given = {**SETTLED.get(task, {}), **given}
        parts = ("task", "model", "tokenizer", "feature_extractor", "image_processor", "processor", "dtype")
        options = {name: value for name, value in given.items() if name not in parts}
        return Both(pipeline(TASKS[task][1], str(artifact), **options), original(**given), task)

    make.original = original  # type: ignore[attr-defined]
    return make


_PICTURE = "./tests/fixtures/tests_samples/COCO/000000039769.png"


def _on_disk(given: Any) -> Any:
    """With the one picture that tests ask of the network as the file that lies beside them."""
    if isinstance(given, list):
        return [_on_disk(each) for each in given]
    return _PICTURE if isinstance(given, str) and given.startswith("http") else given


def _twice(given: Any) -> tuple[Any, Any]:
    """The same to two readers."""
    if not isinstance(given, GeneratorType):
        # Theirs takes what it reads out of a dict.
        return given, dict(given) if isinstance(given, dict) else given
    first, second = itertools.tee(given)
    return (_on_disk(each) for each in first), (_on_disk(each) for each in second)


def _all(answer: Any) -> Any:
    is_lazy = isinstance(answer, Iterator) or type(answer).__name__ == "PipelineIterator"
    return list(answer) if is_lazy else answer


def _parts(source: Path) -> dict[str, Any]:
    """What a pipeline of theirs prepares its inputs by."""
    found: dict[str, Any] = {}
    if (source / "tokenizer_config.json").exists():
        found["tokenizer"] = transformers.AutoTokenizer.from_pretrained(source)
    if (file := source / "preprocessor_config.json").exists():
        kind = "image_processor" if "image_processor_type" in json.loads(file.read_text()) else "feature_extractor"
        load = transformers.AutoImageProcessor if kind == "image_processor" else transformers.AutoFeatureExtractor
        found[kind] = load.from_pretrained(source, **({"backend": "pil"} if kind == "image_processor" else {}))
    return found


class _Known(dict[str, Any]):
    """A table that has a row for everything."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> dict[str, list[str]]:
        return {"tokenizer_classes": [], "processor_classes": []}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only the mixin's tests, of pipelines that precast has."""
    from tests import test_pipeline_mixin as mixin

    mixin.PipelineTesterMixin.run_pipeline_test = run_pipeline_test
    # Of every model, not of those alone that have a checkpoint on the Hub.
    mixin.tiny_model_summary = _Known(mixin.tiny_model_summary)
    # Of theirs and the Hub's, not of ours.
    mixin.compare_pipeline_args_to_hub_spec = lambda *_: None
    names = {f"test_pipeline_{task.replace('-', '_')}" for task in TASKS}
    chosen = [item for item in items if item.name in names]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
