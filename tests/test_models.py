"""Real checkpoints, as `make models` fetches them: SmolLM2-135M-Instruct (GGUF) and all-MiniLM-L6-v2."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import oracle
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

PROMPTS = [
    "The capital of France is", "Once upon a time", "To make bread you need", "Water boils at", "def fibonacci(n):",
    "The three laws of robotics are", "In 1969", "My favourite colour is blue because", "Dear Sir or Madam,",
    "Q: What is 7 times 8?\nA:", "The opposite of hot is", "A haiku about rain:\n", "Photosynthesis is the process by",
    "Die Hauptstadt von Deutschland ist", "SELECT name FROM users WHERE", "Roses are red,", "The largest planet is",
    "If it rains tomorrow,", "Our meeting notes:\n1.", "She opened the letter and",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2():
    """The eager model and its tokenizer."""
    checkpoint = resolve(str(SMOLLM2), ExportOptions())
    return checkpoint.load(get_task("text-generation"), "float32"), checkpoint.tokenizer


@pytest.fixture(scope="module")
def expected(smollm2):
    """Of every other prompt its ids and the 48 tokens that eager transformers appends."""
    model, tokenizer = smollm2
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[::2]]
    answers = []
    for row in rows:
        with torch.inference_mode():
            whole = model.generate(
                torch.tensor([row]), attention_mask=torch.ones(1, len(row)), do_sample=False, max_new_tokens=48,
                pad_token_id=0,
            )  # fmt: skip
        answers.append(whole[0, len(row) :].tolist())
    return rows, answers


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The artifact by batch size; one of them validated, which takes as long as the export."""
    root, made = tmp_path_factory.mktemp("smollm2"), {}

    def make(batch):
        if batch not in made:
            options = ExportOptions(batch_size=batch, sequence_length=(128,), validate=batch == 4)
            made[batch] = export(str(SMOLLM2), root / str(batch), options).path
        return CompiledModelForCausalLM.from_pretrained(made[batch])

    return make


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_smollm2_writes_what_eager_writes(expected, compiled, batch):
    """Greedy tokens: alone, and in batches of rows of different lengths padded on either side."""
    rows, answers = expected
    model, length = compiled(batch), max(map(len, answers))
    assert [model.tokenizer.encode(prompt) for prompt in PROMPTS[::2]] == rows
    for start in range(0, len(rows), batch):
        for side in ("left", "right") if batch > 1 else ("left",):
            ids, mask = oracle.padded(rows[start : start + batch], side)
            found = model.generate(ids, mask, max_new_tokens=length, do_sample=False)
            for values, answer in zip(found, answers[start : start + batch], strict=True):
                assert values[ids.shape[1] :][: len(answer)].tolist() == answer


@pytest.mark.slow
def test_smollm2_speaks_as_in_the_demo(smollm2, compiled):
    """The whole prompt of a conversation is transformers' own, and the answer is right."""
    _, theirs = smollm2
    model = compiled(1)
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = model.tokenizer.apply_chat_template(talk)
    assert prompt == theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    ids = model.tokenizer.encode(prompt, add_special_tokens=False)
    assert "Paris" in model.tokenizer.decode(list(model.stream([ids], max_new_tokens=24)))


def test_minilm_embeds_as_eager_does(tmp_path):
    """12 sentences of up to 3 lines in smaller and larger batches on a model compiled for 4."""
    lines = resources.files("precast.exporter.kinds").joinpath("texts.txt").read_text("utf-8").splitlines()
    sentences = [" ".join([lines[index % 20], *lines[: index // 4]]) for index in range(12)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    eager = transformers.AutoModel.from_pretrained(MINILM, attn_implementation="eager")
    truth = []
    for sentence in sentences:
        batch = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=128)
        with torch.inference_mode():
            mean = eager(**batch).last_hidden_state[0].mean(0)
        # Its modules.json says that sentence-transformers normalises.
        truth.append((mean / mean.norm()).numpy())
    options = ExportOptions(batch_size=4, sequence_length=(128,), dynamic_batch_size=True)
    export(str(MINILM), tmp_path / "out", options)
    model = CompiledModelForFeatureExtraction.from_pretrained(tmp_path / "out")
    for size in (1, 4, 9):
        found = np.concatenate(
            [model.embed(sentences[start : start + size]) for start in range(0, len(sentences), size)]
        )
        assert np.abs(found - np.stack(truth)).max() < 1e-4
