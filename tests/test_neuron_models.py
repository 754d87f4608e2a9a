"""Real checkpoints on the stand-in for the Neuron SDK: export, save, load, answer; equal to eager transformers."""

from __future__ import annotations

from pathlib import Path

import neuron_machine
import numpy as np
import pytest
import torch
import transformers

from precast.exporter import ExportOptions, export
from precast.exporter.checkpoint.resolve import resolve
from precast.runtime import CompiledModelForCausalLM, CompiledModelForFeatureExtraction
from precast.runtime.artifact.tasks import get_task

MODELS = Path(__file__).parents[1] / "build" / "models"
SMOLLM2 = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = MODELS / "all-MiniLM-L6-v2"
pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(not SMOLLM2.exists() or not MINILM.exists(), reason="`make models` fetches the checkpoints"),
]
SENTENCES = ["A sentence to embed.", "今天天气很好。", "Größe, naïve, façade — and a 🦊.", "x"]
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Die Hauptstadt von Deutschland ist"]


@pytest.fixture(autouse=True)
def sdk(tmp_path, monkeypatch):
    neuron_machine.install(monkeypatch, tmp_path / "machine", cores=2, instance="Inf2")


@pytest.mark.slow
def test_minilm_embeds_as_eager_does(tmp_path):
    options = ExportOptions(
        backend="neuron", instance_type="inf2", batch_size=2, sequence_length=(32,), dynamic_batch_size=True
    )
    made = export(str(MINILM), tmp_path / "out", options)
    assert made.contract.variants[0].accuracy.status == "passed"
    CompiledModelForFeatureExtraction.from_pretrained(made.path).save_pretrained(tmp_path / "saved")
    model = CompiledModelForFeatureExtraction.from_pretrained(tmp_path / "saved", cores="0-1")
    found = model.embed(SENTENCES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    eager = transformers.AutoModel.from_pretrained(MINILM, attn_implementation="eager")
    for sentence, vector in zip(SENTENCES, found, strict=True):
        with torch.inference_mode():
            mean = eager(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].mean(0)
        # Its modules.json says that sentence-transformers normalises.
        assert np.abs(vector - (mean / mean.norm()).numpy()).max() < 1e-4


@pytest.fixture
def first_layers(tmp_path):
    """The first three of SmolLM2's thirty layers, real ones, which compile in a tenth of the time."""
    checkpoint = resolve(str(SMOLLM2), ExportOptions())
    whole = checkpoint.load(get_task("text-generation"), "float32")
    facts = {name: value for name, value in whole.config.to_dict().items() if name != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**facts | {"num_hidden_layers": 3}))
    model.load_state_dict({name: whole.state_dict()[name] for name in model.state_dict()})
    model.save_pretrained(tmp_path / "source")
    checkpoint.tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{}, {"tensor_parallel": 2, "attn_tp": 1}], ids=["trace", "spread"])
def test_smollm2_writes_what_eager_writes(first_layers, tmp_path, strategy):
    """Two cores cannot share its nine heads, so that both have all of them, and half of the rest."""
    options = ExportOptions(
        backend="neuron", instance_type="inf2", sequence_length=(64,), prefill_lengths=(8, 16), **strategy
    )
    made = export(str(first_layers), tmp_path / "out", options)
    assert made.contract.variants[0].accuracy.status == "passed"
    CompiledModelForCausalLM.from_pretrained(made.path).save_pretrained(tmp_path / "saved")
    model = CompiledModelForCausalLM.from_pretrained(tmp_path / "saved")
    eager = transformers.AutoModelForCausalLM.from_pretrained(first_layers, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(first_layers)
    for prompt in PROMPTS:
        row = tokenizer(prompt)["input_ids"]
        asked = {"do_sample": False, "max_new_tokens": 24}
        with torch.inference_mode():
            whole = eager.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), pad_token_id=0, **asked)
        expected = whole[0, len(row) :].tolist()
        assert model.generate(np.array([row]), **asked)[0, len(row) :][: len(expected)].tolist() == expected
