"""Published configurations: which one a line of the support table is measured on, and tiny checkpoints of them."""

from __future__ import annotations

import json
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from corpus import PUBLISHED
from zoo.published import make_model, narrow

from precast.exporter.checkpoint.language_model import MULTIMODAL_CLASSES, multimodal_class
from precast.exporter.support import infer_task
from precast.runtime.artifact.tasks import Task

__all__ = ["make", "published_for"]

_UNFIT = {"glm-4v"}
"""Folders with a configuration of before its type had parts, with which transformers itself cannot compute."""


def published_for(model_type: str, task: Task, corpus: Path = PUBLISHED) -> Path | None:
    """The folder in `corpus` whose configuration a pair is measured on: the first, by name, whose class does the task.
    Encoders of one type differ by their heads alone, so that any of the type stands for all; heads of segmentation name
    the layers that they read, and stand for themselves. None where there is none."""
    folders = [folder for folder in _by_type(corpus).get(model_type, ()) if _config(folder)]
    own = [folder for folder in folders if _is_for(_raw(folder), task)]
    is_borrowed = task.kind == "encoder" and task.name != "semantic-segmentation"
    return next(iter(own or (folders if is_borrowed else ())), None)


def make(path: Path, folder: Path, task: Task) -> Path:
    """A tiny random checkpoint at `path` of what was published in `folder`, of the class that does the task."""
    path.mkdir()
    small = narrow(_raw(folder), _config(folder))
    if not _is_for(small, task):
        # Labels are of the head that it was published with.
        small = {name: value for name, value in small.items() if name not in ("id2label", "label2id", "num_labels")}
    (path / "config.json").write_text(json.dumps(small), "utf-8")
    if (folder / "generation_config.json").is_file():
        shutil.copy(folder / "generation_config.json", path)
    config = transformers.AutoConfig.from_pretrained(path)
    auto = getattr(transformers, task.auto)
    found = (auto if type(config) in auto._model_mapping else multimodal_class(config))._model_mapping[type(config)]
    # Weights are published of the whole model, where the task takes a part of it.
    whole = [getattr(transformers, name) for name in small.get("architectures") or () if name in _classes(small, task)]
    make_model(path, next(iter(whole), found[0] if isinstance(found, tuple) else found), config)
    return path


@cache
def _by_type(corpus: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(corpus.glob("*/config.json"), key=_order):
        if path.parent.name not in _UNFIT:
            found.setdefault(str(_raw(path.parent).get("model_type")), []).append(path.parent)
    return found


def _order(path: Path) -> tuple[bool, str]:
    """Copies of reduced sizes, made for tests, come last."""
    return path.parent.name.startswith("ipex-"), path.parent.name


@cache
def _raw(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    # Random weights are not packed.
    raw.pop("quantization_config", None)
    return raw


@cache
def _config(folder: Path) -> Any:
    """As transformers reads it; None where it does not, without code of its own."""
    try:
        with warnings.catch_warnings():
            # Of names that were given up: pytest would make an error of it.
            warnings.simplefilter("ignore")
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # It raises anything: KeyError, TypeError, validators' errors.
        return None


def _is_for(raw: dict[str, Any], task: Task) -> bool:
    """Whether the class that it names does the task, by transformers' tables or by its name."""
    return infer_task(raw) == task.name or bool(_classes(raw, task) & set(raw.get("architectures") or ()))


def _classes(raw: dict[str, Any], task: Task) -> set[str]:
    """Those that do the task for its type, by transformers' tables."""
    autos = (task.auto, *(MULTIMODAL_CLASSES if task.kind == "decoder" else ()))
    found = [getattr(transformers, auto)._model_mapping._model_mapping.get(raw["model_type"], ()) for auto in autos]
    return {name for names in found for name in ([names] if isinstance(names, str) else names)}
