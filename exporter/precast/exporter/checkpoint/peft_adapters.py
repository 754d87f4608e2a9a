"""Find PEFT adapters that nobody asked for and that are not merged into a model's weights, and refuse them with advice.

transformers applies an adapter that lies beside a model only where peft is installed, and ignores an adapter's tensors
among the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from precast.runtime.artifact import strict_json
from precast.runtime.artifact.integrity import read_regular
from precast.runtime.artifact.peft_files import CONFIG, WEIGHT_FILES
from precast.runtime.artifact.prefix_files import METHODS
from precast.runtime.errors import CheckpointError, FormatError
from precast.runtime.terminal import quoted

from ..adapters.adapter import KINDS

__all__ = ["check_merged", "check_no_adapter"]

_FILES = (CONFIG, *WEIGHT_FILES)
_TENSORS = re.compile(
    r"(^|\.)(base_layer|modules_to_save|original_module"
    r"|(boft|bone|fourierft|hada|hra|ia3|lokr|lora|oft|randlora|shira|vblora|vera)_\w+)(\.|$)"
)
_AUTO = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
}
"""peft's class that loads the adapter and the model that it names, by `task_type`."""
_OF_PROMPTS = ("ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING")
"""Values of `peft_type` for adapters that work on a prompt, and that `prefix_tuning` does not take."""


def check_no_adapter(path: Path, given: str) -> None:
    """Raise CheckpointError for an adapter in the directory `path`, with the lines of peft that merge it."""
    found = next((name for name in _FILES if (path / name).is_file()), None)
    if found is None:
        return
    config = _read_settings(path)
    if not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
        base = config.get("base_model_name_or_path")
        model = base if isinstance(base, str) and base else "BASE"
        command = f"Merge it into that model: precast export {quoted(model)} -o OUT --lora {quoted(given)}"
        raise CheckpointError(
            f"{given} is an adapter ({found}) without the model that it changes. {_give_advice(given, config, command)}"
        )
    command = f"precast export {quoted(given)} -o OUT --lora ADAPTER"
    apart = f"To merge it, move its files into a directory of their own, here ADAPTER: {command}"
    raise CheckpointError(
        f"{given} holds an adapter ({found}) beside the model, which counts where peft is installed only. "
        f"{_give_advice(given, config, apart)}. Or move {found} away to export the model without it."
    )


def check_merged(unexpected: Iterable[str], name: str) -> None:
    """Raise CheckpointError for tensors of an adapter among those that the model has no place for."""
    found = sorted(key for key in unexpected if _TENSORS.search(key))
    if found:
        raise CheckpointError(
            f"The weights of {name} hold an adapter that is not merged into them, {len(found)} tensors such as "
            f"{found[0]}, which would be left out. Where it was trained, save it merged: model = "
            f"model.merge_and_unload(); model.save_pretrained({f'{name}-merged'!r})"
        )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return strict_json.loads(read_regular(path / CONFIG, strict_json.MAX_BYTES), CONFIG)
    except (OSError, FormatError):
        # The adapter is refused in any case; only the advice depends on its settings.
        return {}


def _give_advice(given: str, config: dict[str, Any], merged: str) -> str:
    """How to have the adapter in the model: `merged`, where precast merges its kind."""
    kind = config.get("peft_type")
    if kind in METHODS:
        folder = Path(given) if Path(given).is_dir() else Path(given).parent
        return (
            f"It is put before every prompt (peft_type {kind}): export the model that it was tuned for with "
            f"prefix_tuning={str(folder)!r}"
        )
    if kind in _OF_PROMPTS:
        return f"It is put before every prompt (peft_type {kind}) and cannot be merged, which precast would need"
    if config and kind is None:
        return "It is of another library than peft: merge it there, and save the model"
    if not config or kind in KINDS:
        return merged
    auto = _AUTO.get(str(config.get("task_type")), "AutoPeftModelForCausalLM")
    return (
        f"Merge it, and export what that saves: from peft import {auto}; model = "
        f"{auto}.from_pretrained({given!r}).merge_and_unload(); model.save_pretrained({f'{Path(given).name}-merged'!r})"
    )
