"""Which task a checkpoint is for, and that no option is taken and ignored."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import pytest
import tiny
import transformers
from zoo import seq2seq as zoo

from precast.exporter import ExportOptions, preview
from precast.exporter.checkpoint.resolve import resolve
from precast.exporter.options import SIZES
from precast.exporter.support import choose_task, infer_task, supported_tasks
from precast.runtime.artifact.tasks import TASK_TABLE
from precast.runtime.errors import CheckpointError, UsageError

GIVEN = {
    "sequence_length": (16,),
    "decoder_sequence_length": 16,
    "num_choices": 2,
    "text_batch_size": 2,
    "audio_sequence_length": (400,),
    "image_size": (32,),
    "prefill_lengths": (8,),
}
OWN_SIZES = {"decoder": "prefill_lengths", "seq2seq": "decoder_sequence_length"}
EXAMPLES = {"batch_size": 2, **GIVEN}


def _rows_of_classes():
    """Every class that some task's auto class knows, by model type, with its tasks."""
    found = defaultdict(list)
    for row in TASK_TABLE:
        for model_type, names in getattr(transformers, row.auto)._model_mapping._model_mapping.items():
            for name in names if isinstance(names, tuple) else (names,):
                found[model_type, name].append(row)
    return found


CLASSES = _rows_of_classes()
MEANT = {
    "BartForConditionalGeneration": "text2text-generation",
    "MBartForConditionalGeneration": "text2text-generation",
    "MvpForConditionalGeneration": "text2text-generation",
    "CLIPModel": "zero-shot-image-classification",
    "SiglipModel": "zero-shot-image-classification",
    "ParakeetForCTC": "automatic-speech-recognition",
    "VoxtralForConditionalGeneration": "automatic-speech-recognition",
    "Qwen3ASRForConditionalGeneration": "automatic-speech-recognition",
    "MossTranscribeDiarizeForConditionalGeneration": "text-generation",
    "XLMWithLMHeadModel": "fill-mask",
}


def _checkpoint(path, config):
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return resolve(str(path), ExportOptions())


def test_a_class_of_several_tasks_is_for_the_one_it_is_published_for():
    several = {name: choose_task(rows, {}).name for (_, name), rows in CLASSES.items() if len(rows) > 1}
    assert several.items() >= MEANT.items()
    # Nobody publishes an encoder-decoder to fill masks, or a head to be left out.
    assert not {"fill-mask", "feature-extraction"} & {
        task for name, task in several.items() if name != "XLMWithLMHeadModel"
    }
    xlm = CLASSES["xlm", "XLMWithLMHeadModel"]
    assert choose_task(xlm, {"causal": True}).name == "text-generation"


def test_what_a_name_alone_says_is_what_is_inferred():
    """Read without torch, it decides what is refused early: nothing that is another task's."""
    for (model_type, name), rows in CLASSES.items():
        for causal in (False, True):
            config = {"model_type": model_type, "architectures": [name], "causal": causal}
            if (task := infer_task(config)) in supported_tasks(model_type):
                assert task == choose_task(rows, config).name, config


@pytest.mark.parametrize("model_type", ["bart", "mbart", "mvp"])
def test_an_encoder_decoder_is_inferred_from_its_files(tmp_path, model_type):
    (name,) = {name for kind, name in CLASSES if kind == model_type and name.endswith("ForConditionalGeneration")}
    checkpoint = _checkpoint(tmp_path, {"model_type": model_type, "architectures": [name]})
    assert checkpoint.task().name == "text2text-generation"


def test_a_configuration_that_no_model_can_be_made_of_is_refused(tmp_path):
    """What a model's own code raises there may be of any type."""
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 65, "num_attention_heads": 4}
    _checkpoint(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"cannot make a model for fill-mask of the configuration of .*65"):
        preview(str(tmp_path), ExportOptions(batch_size=1, sequence_length=(8,)))


def test_a_class_that_transformers_does_not_know_is_for_what_its_name_ends_in(tmp_path):
    checkpoint = _checkpoint(tmp_path, {"model_type": "llama", "architectures": ["LLaMAForCausalLM"]})
    assert checkpoint.task().name == "text-generation"
    for name in ("LlamaForDancing", "LlamaForMaskedLM"):
        with pytest.raises(CheckpointError, match=f"names {name}.*Give task=, one of: .*text-generation"):
            _checkpoint(tmp_path, {"model_type": "llama", "architectures": [name]}).task()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint for a task of each kind, with the sizes that it needs."""
    root = tmp_path_factory.mktemp("tasks")
    return {
        "decoder": (tiny.save_checkpoint(root / "llama", tiny.config_for("llama")), {"sequence_length": (16,)}),
        "encoder": (
            tiny.save_checkpoint(root / "bert", tiny.config_for("bert"), transformers.AutoModelForMaskedLM),
            {"batch_size": 1, "sequence_length": (16,)},
        ),
        "seq2seq": (zoo.make(root / "bart", "bart", zoo.TEXT), {"sequence_length": (16,)}),
    }


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("kind", SIZES)
def test_a_size_is_compiled_for_or_refused(sources, kind, name):
    source, needed = sources[kind]
    options = ExportOptions(**{**needed, name: GIVEN[name]})
    if name in needed or OWN_SIZES.get(kind) == name:
        plan = preview(str(source), options)
        found = {"decoder_sequence_length": "capacity", "sequence_length": "lengths"}.get(name, name)
        assert getattr(plan, found) == GIVEN[name]
        return
    with pytest.raises(UsageError, match=f"{name} (is not for the task|fixes nothing)"):
        preview(str(source), options)


@pytest.mark.parametrize("row", TASK_TABLE, ids=lambda row: f"{row.name}-{row.kind}")
def test_every_task_takes_its_own_sizes_alone(row):
    ExportOptions().check_task(row)
    for name, value in EXAMPLES.items():
        options = replace(ExportOptions(), **{name: value})
        is_taken = name in SIZES[row.kind] and (name not in ("num_choices", "text_batch_size") or name in row.axes)
        if is_taken:
            options.check_task(row)
            continue
        with pytest.raises(UsageError, match=f"{name} is not for the task {row.name!r}, which is inferred"):
            options.check_task(row)
        with pytest.raises(UsageError, match=f"is not for the task {row.name!r}. Of such sizes it takes: batch_size"):
            replace(options, task=row.name).check_task(row)


@pytest.mark.parametrize(
    "row", [row for row in TASK_TABLE if row.kind != "decoder"], ids=lambda row: f"{row.name}-{row.kind}"
)
def test_a_bound_that_is_measured_on_text_is_for_decoders(row):
    for bound in ({"max_kl": 0.1}, {"min_agreement": 0.5}):
        with pytest.raises(UsageError, match="has fixed bounds"):
            ExportOptions(dtype="bfloat16", **bound).check_task(row)
    ExportOptions(dtype="bfloat16", accept_loss=True).check_task(row)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 32}, "group_size say"),
        ({"group_size": 32, "kv_cache": "int8"}, "group_size say"),
        ({"skip": ("lm_head",), "kv_cache": "int8"}, "skip= say"),
        ({"atol": 0.1, "quantize": "int8"}, "atol=0.1 bounds"),
        ({"atol": 0.1, "dtype": "bfloat16"}, "atol=0.1 bounds"),
    ],
)
def test_an_option_without_effect_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        ExportOptions(**options).check()


def test_a_revision_is_for_what_is_on_the_hub(sources):
    source, _ = sources["decoder"]
    with pytest.raises(UsageError, match="revision= is for a checkpoint on the Hub"):
        resolve(str(source), ExportOptions(revision="main"))
