"""An adapter changes a model's answers: beside it, alone, or among its weights, it is refused with what merges it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from precast.exporter import ExportOptions
from precast.exporter.checkpoint.resolve import resolve
from precast.runtime.artifact.tasks import get_task
from precast.runtime.errors import CheckpointError

LORA = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "user/base"}
PROMPTS = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM"}


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint("llama"), tmp_path / "mine")


def _refusal(path):
    with pytest.raises(CheckpointError) as caught:
        resolve(str(path), ExportOptions()).load(get_task("text-generation"), "float32")
    return str(caught.value)


def _of(path, config):
    (path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config), "utf-8")
    return _refusal(path)


def test_beside_a_model_it_is_refused_with_the_command_that_merges_it(copy):
    assert _of(copy, LORA) == (
        f"{copy} holds an adapter (adapter_config.json) beside the model, which counts where peft is installed only. "
        f"To merge it, move its files into a directory of their own, here ADAPTER: precast export {copy} -o OUT --lora "
        f"ADAPTER. Or move adapter_config.json away to export the model without it."
    )
    assert "--lora ADAPTER" in _of(copy, "no json")


def test_what_precast_does_not_merge_is_refused_with_what_does(copy):
    assert (
        "Merge it, and export what that saves: from peft import AutoPeftModelForSequenceClassification; model = "
        f"AutoPeftModelForSequenceClassification.from_pretrained('{copy}').merge_and_unload(); "
        "model.save_pretrained('mine-merged'). Or move"
    ) in _of(copy, {**LORA, "peft_type": "IA3"})
    assert f"PREFIX_TUNING): export the model that it was tuned for with prefix_tuning='{copy}'" in _of(copy, PROMPTS)
    assert "CPT) and cannot be merged" in _of(copy, {**PROMPTS, "peft_type": "CPT"})
    assert "of another library than peft" in _of(copy, {"config": {"architecture": "lora"}})


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_its_weights_alone_are_one(copy, name):
    (copy / name).write_bytes(b"")
    assert f"holds an adapter ({name}) beside the model" in _refusal(copy)


def test_without_a_model_it_is_called_what_it_is(tmp_path):
    found = _of(tmp_path, LORA)
    assert "is an adapter (adapter_config.json) without the model that it changes" in found
    assert found.endswith(f"Merge it into that model: precast export user/base -o OUT --lora {tmp_path}")


def test_beside_a_gguf_file_too(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    assert "holds an adapter (adapter_config.json) beside the model" in _refusal(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("inner", "prefix"), [("", ""), (".base_layer", ""), (".base_layer", "base_model.model.")], ids=str
)
def test_among_the_weights_it_is_found(copy, inner, prefix):
    """As old releases of peft, new ones, and whoever saved the whole model's state name them."""
    path = copy / "model.safetensors"
    held, module = load_file(path), "model.layers.0.self_attn.q_proj"
    held[f"{module}{inner}.weight"] = held.pop(f"{module}.weight")
    held |= {f"{module}.lora_A.default.weight": torch.ones(4, 64), f"{module}.lora_B.default.weight": torch.ones(64, 4)}
    save_file({prefix + name: value for name, value in held.items()}, path, {"format": "pt"})
    found = _refusal(copy)
    assert "hold an adapter that is not merged into them" in found
    assert "model.merge_and_unload(); model.save_pretrained('mine-merged')" in found
