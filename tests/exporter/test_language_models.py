"""Text alone of models that read images or sound, too: the language model alone answers as the whole model does."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import transformers
from zoo.shrink import tiny_config

from precast.exporter import ExportOptions, export, preview
from precast.exporter.checkpoint.language_model import keep_language_model
from precast.exporter.checkpoint.resolve import resolve
from precast.runtime import CompiledModelForCausalLM
from precast.runtime.errors import CheckpointError, ExportError

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
SECTIONS = {"text_config": ROPE}
QWEN2 = SECTIONS | {"vision_config": {"embed_dim": 64}}
TYPES = [
    ("qwen2_vl", QWEN2),
    *(
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (
            ("qwen2_5_vl", SECTIONS), ("qwen3_vl", SECTIONS), ("smolvlm", {}), ("idefics3", {}), ("mistral3", {}),
            ("internvl", {}), ("llava", {}), ("llava_next", {}), ("aya_vision", {}), ("paligemma", {}),
            ("qwen2_audio", {}),
        )
    ),
]  # fmt: skip
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def source_of(tmp_path_factory):
    """`source_of("qwen2_vl", changes)`: a tiny checkpoint of that type, image tower and all."""
    root = tmp_path_factory.mktemp("language-models")

    def make(model_type, changes):
        path = root / model_type
        if not path.exists():
            auto = transformers.AutoModelForMultimodalLM
            tiny.save_checkpoint(path, tiny_config(model_type, changes), auto)
        return path

    return make


@pytest.mark.parametrize(("model_type", "changes"), TYPES)
def test_it_answers_texts_as_the_whole_model_does(source_of, tmp_path, model_type, changes):
    source = source_of(model_type, changes)
    made = export(str(source), tmp_path / "out", ExportOptions(task="text-generation", sequence_length=(32,)))
    assert made.contract.variants[0].accuracy.status == "passed"
    model = CompiledModelForCausalLM.from_pretrained(made.path)
    whole = transformers.AutoModelForMultimodalLM.from_pretrained(source).eval()
    prompt = torch.tensor([[5, 9, 30, 7, 200, 11]])
    asked = {"max_new_tokens": 8, "do_sample": False}
    expected = whole.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
    assert model.generate(prompt, **asked).tolist() == expected.tolist()
    held = sum((made.path / name).stat().st_size for name in made.contract.variants[0].weights)
    text = [*whole.get_decoder().parameters(), *whole.get_output_embeddings().parameters()]
    assert held < 1.2 * sum(each.nbytes for each in {each.data_ptr(): each for each in text}.values())


def test_images_are_left_out_by_request_only(source_of):
    source = source_of("qwen2_vl", QWEN2)
    with pytest.raises(CheckpointError, match=r"cannot be inferred.*Give task=, one of: .*text-generation"):
        preview(str(source), ExportOptions(sequence_length=(32,)))


def test_a_type_without_a_language_model_of_its_own_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "florence2"}))
    with pytest.raises(CheckpointError, match=r"'florence2' .* cannot do text-generation"):
        preview(str(tmp_path), ExportOptions(task="text-generation", sequence_length=(32,)))


def test_a_part_that_text_needs_is_missed_aloud():
    whole = transformers.AutoModelForMultimodalLM.from_config(tiny_config("llava"))
    keep_language_model(whole)
    with pytest.raises(ExportError, match="vision_tower is part of how it reads text"):
        whole.model.vision_tower(torch.zeros(1, 3, 32, 32))


def test_the_template_of_an_old_processor_is_the_tokenizers(source_of, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert resolve(str(tmp_path), ExportOptions()).tokenizer.chat_template == TEMPLATE
