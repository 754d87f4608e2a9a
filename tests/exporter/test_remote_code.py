"""Checkpoints whose modelling code comes with them: run only on request, compiled through its own attention."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny
import torch
import transformers
from transformers import dynamic_module_utils

from precast.exporter import ExportOptions, export, preview
from precast.runtime import CompiledModelForCausalLM
from precast.runtime.errors import CheckpointError

CODE = Path(__file__).parent / "remote"
CAPACITY = 48
MODELS = {
    "baichuan": ("BaichuanConfig", "BaichuanForCausalLM", {}),
    "baichuan-plain-head": ("BaichuanConfig", "BaichuanForCausalLM", {"has_norm_head": False}),
    "chatglm": ("ChatGLMConfig", "ChatGLMForConditionalGeneration", {}),
}
OPTIONS = {"sequence_length": (CAPACITY,), "batch_size": 3, "trust_remote_code": True}


@pytest.fixture(autouse=True, scope="module")
def _private_modules(tmp_path_factory):
    """transformers copies the code into a folder of its own before it imports it: one of this run. The package there
    is forgotten afterwards: tests of this module may go on, with another folder, after some of others."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path])
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(
    scope="module",
    params=["chatglm", *(pytest.param(each, marks=pytest.mark.slow) for each in ("baichuan", "baichuan-plain-head"))],
)
def remote(request, tmp_path_factory):
    """The directory of a tiny random checkpoint with its own code."""
    return make(tmp_path_factory.mktemp("remote") / request.param, request.param)


def make(path: Path, name: str) -> Path:
    config_class, model_class, changes = MODELS[name]
    family = name.partition("-")[0]
    path.mkdir()
    for kind in ("configuration", "modeling"):
        shutil.copy(CODE / f"{kind}_{family}.py", path)
    auto_map = {
        "AutoConfig": f"configuration_{family}.{config_class}",
        "AutoModelForCausalLM": f"modeling_{family}.{model_class}",
    }
    config = {
        "model_type": family, "architectures": [model_class], "auto_map": auto_map, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, **changes,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    auto = transformers.AutoModelForCausalLM
    loaded = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    torch.manual_seed(0)
    model = auto.from_config(loaded, trust_remote_code=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    transformers.modeling_utils.safe_save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(remote, artifact):
    return CompiledModelForCausalLM.from_pretrained(artifact(remote, prefill_lengths=(16,), **OPTIONS))


@pytest.fixture(scope="module")
def eager(remote):
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(remote, trust_remote_code=True, dtype=torch.float32).eval()


def expected_logits(eager, row: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return eager(input_ids=torch.tensor([row]), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_answers_are_the_codes_own(model, eager, side):
    rows = [[5, 9, 30, 7, 200], [80], [3 + 7 * n % 300 for n in range(20)]]
    ids, mask = oracle.padded(rows, side)
    for row, values, keep in zip(rows, model(ids, mask).logits, mask, strict=True):
        expected = expected_logits(eager, row)
        assert np.abs(values[keep == 1] - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    found = model.generate(ids, mask, max_new_tokens=20, do_sample=False, eos_token_id=None)
    for row, values in zip(rows, found, strict=True):
        answer = values[ids.shape[1] :].tolist()
        chosen = expected_logits(eager, row + answer).argmax(-1)[len(row) - 1 : -1]
        assert answer == chosen.tolist()


def test_it_is_planned_with_fixed_lengths(remote):
    """The code may look at sizes, so each graph has its own."""
    for capacity, graphs in ((48, ["prefill_48", "decode"]), (100, ["prefill_64", "decode"])):
        facts = preview(str(remote), ExportOptions(**{**OPTIONS, "sequence_length": (capacity,)})).as_json()
        assert (facts["graphs"], facts["attention"]) == (graphs, "ordinary operators")


@pytest.mark.slow
def test_a_validated_export(remote, tmp_path):
    found = export(str(remote), tmp_path / "out", ExportOptions(**OPTIONS))
    assert found.contract.variants[0].accuracy.status == "passed"
    assert not list((tmp_path / "out").rglob("*.py")), "no code goes into an artifact"


def test_nothing_runs_without_being_asked_for(tmp_path):
    source = make(tmp_path / "baichuan", "baichuan")
    (source / "configuration_baichuan.py").write_text("raise SystemExit('it ran')")
    (source / "modeling_baichuan.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(CheckpointError, match=r"code of its own \(configuration_baichuan.*trust_remote_code=True"):
        export(str(source), tmp_path / "out", ExportOptions(**{**OPTIONS, "trust_remote_code": False}))
    assert not (tmp_path / "out").exists()
