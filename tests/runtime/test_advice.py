"""What is proposed about a request that is larger than compiled for can be pasted, and then works."""

from __future__ import annotations

import msgspec
import pytest

import precast.runtime
from precast.runtime.advice import suggest_larger
from precast.runtime.artifact import Artifact, read_artifact


@pytest.fixture
def made(decoder):
    """`made(model="a b", model_type="bert")`: the decoder's artifact, with another source and configuration."""
    artifact = read_artifact(decoder)

    def make(model, revision=None, **config):
        source = msgspec.structs.replace(artifact.contract.source, model=model, revision=revision)
        contract = msgspec.structs.replace(artifact.contract, source=source)
        return Artifact(artifact.path, {**artifact.config, **config}, contract)

    return make


def test_a_hub_model_is_named_and_a_local_one_is_not_where_it_was(made):
    command = "--task text-generation --batch-size 2 -o OUT"
    assert suggest_larger(made("user/tiny", "abc"), "--batch-size 2") == (
        f"Compile a larger one: precast export user/tiny {command}"
    )
    assert suggest_larger(made("my model"), "--batch-size 2") == (
        f"Compile a larger one, where CHECKPOINT is my model: precast export CHECKPOINT {command}"
    )


def test_no_length_is_proposed_that_the_model_does_not_have(made):
    assert "--sequence-length 64 " in suggest_larger(made("user/tiny", "abc"), "--sequence-length 64", 64)
    assert suggest_larger(made("user/tiny", "abc"), "--sequence-length 65", 65) == (
        "None for so many can be compiled: the model was made for 64 tokens."
    )
    for config in ({"max_position_embeddings": "many"}, {"max_position_embeddings": None}, {"model_type": "roberta"}):
        assert "--sequence-length 65 " in suggest_larger(made("user/tiny", "abc", **config), "--sequence-length 65", 65)


def test_the_package_knows_its_version():
    assert precast.runtime.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute '__author__'"):
        precast.runtime.__author__  # noqa: B018
