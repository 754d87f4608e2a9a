"""Compiled models in transformers' own pipelines: as the eager model, and without a word of complaint."""

from __future__ import annotations

import re
import sys
import warnings

import oracle
import pytest
import tiny
import transformers
from compare import assert_same, silence

from precast.runtime import CompiledModel
from precast.runtime.inputs.tensors import ModelOutput

NAMES = ["O", "B-人", "I-人"]
NLI = ["contradiction", "neutral", "entailment"]
TASKS = [
    ("text-classification", "bert", "AutoModelForSequenceClassification", tiny.TEXTS, {"top_k": None}),
    ("token-classification", "bert", "AutoModelForTokenClassification", tiny.TEXTS, {"ignore_labels": []}),
    ("fill-mask", "bert", "AutoModelForMaskedLM", ["Water <mask> here", "今天<mask>气"], {}),
    ("feature-extraction", "bert", "AutoModel", tiny.TEXTS, {}),
    ("zero-shot-classification", "bert", "AutoModelForSequenceClassification", tiny.TEXTS[:2],
     {"candidate_labels": ["天气", "water"]}),
    ("text-generation", "llama", "AutoModelForCausalLM", tiny.TEXTS[::2], {"do_sample": False, "max_new_tokens": 6}),
]  # fmt: skip


@pytest.fixture
def quiet():
    """Nothing is logged, and no warning given."""
    with silence():
        yield


def both(task, path, auto, compiled):
    """The pipeline of the eager model and that of the compiled one."""
    pipes = []
    for model in (oracle.eager(path, auto), compiled):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        pipes.append(transformers.pipeline(task, model=model, tokenizer=tokenizer))
    return pipes


@pytest.mark.parametrize(("task", "model_type", "auto", "inputs", "options"), TASKS, ids=lambda value: str(value)[:24])
def test_the_answers_are_those_of_the_eager_model(quiet, checkpoint, artifact, task, model_type, auto, inputs, options):
    labels = {"zero-shot-classification": NLI, "token-classification": NAMES}.get(task)
    changes = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {}
    path = checkpoint(model_type, auto, **changes)
    # As in other tests, which saves exports.
    shapes = {"batch_size": 3, "sequence_length": (16, 48), "dynamic_batch_size": True}
    compiled = artifact(path, **(shapes if model_type == "bert" else {"batch_size": 2}))
    eager, ours = both(task, path, auto, CompiledModel.from_pretrained(compiled))
    assert_same(ours(inputs[0], **options), eager(inputs[0], **options))
    assert_same(ours(inputs, **options), eager(inputs, **options))
    assert repr(ours).startswith(type(eager).__name__)


def test_generation_takes_configurations_and_stop_strings(quiet, checkpoint, artifact):
    path = checkpoint("llama")
    model = CompiledModel.from_pretrained(artifact(path, batch_size=2))
    eager, ours = both("text-generation", path, "AutoModelForCausalLM", model)
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, repetition_penalty=1.3)
    answers = [pipe(tiny.TEXTS[0], generation_config=config)[0]["generated_text"] for pipe in (eager, ours)]
    assert answers[0] == answers[1]
    stop = re.findall("[!-~]{2}", answers[0][len(tiny.TEXTS[0]) :])[-1]
    options = {"max_new_tokens": 8, "do_sample": False, "stop_sequence": stop}
    assert ours(tiny.TEXTS[0], **options) == eager(tiny.TEXTS[0], **options)


def test_configuration_is_a_dict_and_transformers_own(encoder, checkpoint):
    model = CompiledModel.from_pretrained(encoder)
    assert model.config["hidden_size"] == model.config.hidden_size == 64
    assert model.config.id2label[0] == "LABEL_0"
    assert not hasattr(model.config, "nothing")
    assert model.config.get_text_config().model_type == "bert"
    assert (str(model.device), str(model.dtype), model.main_input_name) == ("cpu", "torch.float32", "input_ids")
    assert model.to("cpu").eval() is model
    assert not model.can_generate()


def test_outputs_are_of_both_kinds(encoder):
    model = CompiledModel.from_pretrained(encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model([[5, 6, 7]])
    assert isinstance(output, transformers.utils.ModelOutput)
    assert output[0] is output["last_hidden_state"] is output.last_hidden_state
    with pytest.raises(AttributeError, match=r"has no 'logits'. It has: last_hidden_state"):
        _ = output.logits


@pytest.mark.parametrize("imported", [True, False])
def test_an_output_can_be_replaced_by_either_name(imported, monkeypatch):
    """As one of transformers can, whether that is imported or not."""
    if not imported:
        monkeypatch.delitem(sys.modules, "transformers.utils.generic")
    output = ModelOutput(logits=[1.0], hidden=[2.0])
    assert isinstance(output, transformers.utils.ModelOutput) is imported
    output.logits = [3.0]
    assert output.logits == output["logits"] == output[0] == [3.0]
    output["logits"] = [4.0]
    assert output.logits == [4.0]
    output.note = "mine"
    assert (output.note, list(output)) == ("mine", ["logits", "hidden"])
