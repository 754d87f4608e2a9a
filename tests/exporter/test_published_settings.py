"""Generation settings of checkpoints, on their way into artifacts."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path

import pytest
import transformers
from corpus import PUBLISHED, needs_corpus

from precast.exporter import ExportOptions
from precast.exporter.checkpoint.checkpoint import Checkpoint
from precast.exporter.checkpoint.resolve import resolve
from precast.exporter.companions.files import write_companions
from precast.runtime import GenerationConfig
from precast.runtime.artifact.tasks import get_task
from precast.runtime.errors import CheckpointError, InputError


def written(generation, path):
    plain = types.SimpleNamespace(processor_files={})
    write_companions(path, None, plain, types.SimpleNamespace(generation_config=generation))
    return json.loads((path / "generation_config.json").read_text())


def test_all_that_a_configuration_holds_is_written(tmp_path):
    said = {"watermarking_config": {"bias": 2.5}, "sequence_bias": [[[5], -1.0]], "chat_format": "raw", "top_k": 7}
    found = written(transformers.GenerationConfig(**said), tmp_path)
    assert found["watermarking_config"]["bias"] == 2.5
    assert {name: found[name] for name in said if name != "watermarking_config"} == {
        name: said[name] for name in said if name != "watermarking_config"
    }


def test_settings_that_transformers_refuses_are_named(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint("llama"), tmp_path / "copy")
    (path / "generation_config.json").write_text(json.dumps({"num_return_sequences": 3}))
    found = resolve(str(path), ExportOptions())
    with pytest.raises(
        CheckpointError, match=r"The generation settings of copy cannot be used: .*num_return_sequences"
    ):
        found.load(get_task("text-generation"), "float32")


def test_a_configuration_of_several_texts_is_the_decoders():
    """As MusicGen's; what transformers then makes no model of is refused by its name."""
    config = transformers.MusicgenConfig(
        text_encoder={"model_type": "t5"}, audio_encoder={"model_type": "encodec"}, decoder={"vocab_size": 77}
    )
    found = Checkpoint("music", "music", Path("music"), None, None, False)
    vars(found)["config"] = config
    assert found.vocabulary == 77
    with pytest.raises(CheckpointError, match=r"cannot make a model for text-generation of the configuration of music"):
        found.skeleton(get_task("text-generation"))


NOT_DONE = {
    "musicgen": "guidance_scale=3.0",
    "neuroreasoner-gpt2": "output_scores=True",
    "noinstruct-small-embedding-v0": "output_hidden_states=True",
}
"""Folders that ask for what this runtime does not do, and its name."""


@pytest.mark.slow
@needs_corpus
def test_published_settings_are_read_as_by_transformers(tmp_path):
    """Each folder's settings, in whichever file, are transformers' own; what is not done is refused by its name."""
    for folder in sorted(PUBLISHED.iterdir()):
        if not (folder / "generation_config.json").exists() and not (folder / "config.json").exists():
            continue
        theirs = Checkpoint(str(folder), folder.name, folder, None, None, False)._generation_config()
        ours = GenerationConfig.published(written(theirs, tmp_path), "generation_config.json")
        for name in {*GenerationConfig.settings()} - {"seed", "output_scores"}:
            assert getattr(ours, name) == getattr(theirs, name), (folder.name, name)
        if folder.name in NOT_DONE:
            with pytest.raises(InputError, match=NOT_DONE[folder.name]):
                ours.check()
        else:
            ours.check()
