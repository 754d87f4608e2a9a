"""A contract whose numbers do not fit each other is a FormatError that names the tensor, before any memory is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from precast.runtime import CompiledModel
from precast.runtime.artifact import read_artifact, strict_json
from precast.runtime.artifact.graphs import graph_problem
from precast.runtime.errors import ArtifactError, FormatError, OutOfMemoryError


@pytest.fixture
def changed(tmp_path):
    """`changed(artifact, change)`: a copy whose contract `change(config, contract, graph)` has altered."""

    def make(artifact, change):
        path = shutil.copytree(artifact, tmp_path / "copy")
        config = json.loads((path / "config.json").read_text())
        contract = config["precast"]
        change(config, contract, contract["variants"][0]["graphs"][0])
        del contract["digest"]
        contract["digest"] = strict_json.canonical_digest(config)
        (path / "config.json").write_text(json.dumps(config))
        return path

    return make


def _caches(**changes):
    def change(config, contract, graph):
        for spec in (*graph["inputs"], *graph["outputs"]):
            if spec["name"].startswith(("past_key", "present")):
                spec.update(changes)

    return change


def _first(kind, **changes):
    return lambda config, contract, graph: graph[kind][0].update(changes)


def _graph(**changes):
    return lambda config, contract, graph: graph.update(changes)


def _logits(shape):
    return _first("outputs", shape=shape)


DECODERS = {
    "caches of petabytes": (_caches(shape=[1, 2**31, 2**31, 16]), "more than 8 dimensions, or than"),
    "more than 64 bits": (_caches(shape=[2**31] * 4), "more than 8 dimensions, or than"),
    "no heads": (_caches(shape=[1, 0, 48, 16]), r"\[1, 0, 48, 16\], whose sizes are not all 1 or more"),
    "another capacity": (_caches(shape=[1, 2, 47, 16]), r"not \[1, heads, 48, head_dim\] in and out"),
    "free dimensions": (_caches(shape=[1, 2, {"min": 1, "max": 48}, 16]), "not .* in and out"),
    "other dtypes": (lambda c, p, g: g["inputs"][4].update(dtype="int8"), "in and out"),
    "no batch": (_graph(batch=0), "has a batch of 0, not of 1 to 65536"),
    "too large a batch": (_graph(batch=2**31), f"has a batch of {2**31}"),
    "two batches": (lambda c, p, g: p["shapes"].update(batch_size=5), "a batch of 1, the model one of 5"),
    "no vocabulary": (_logits([1, 1, 0]), "whose sizes are not all 1"),
    "bounds the wrong way": (_logits([1, {"min": 5, "max": 2}, 320]), "5 to 2"),
    "whole logits": (_first("outputs", dtype="int64"), "does not give logits"),
    "bfloat16 logits": (_first("outputs", dtype="bfloat16"), "does not give logits"),
    "logits of another batch": (_logits([2, 1, 320]), r"the batch 1, its logits the shape \[2, 1, 320\]"),
    "a padding of more than 64 bits": (_first("inputs", pad=2**70), "pads input_ids, int64, with"),
    "a broken padding": (_first("inputs", pad=0.5), "pads input_ids, int64, with 0.5"),
    "a negative padding": (_first("inputs", pad=-7), "with -7, which is none of the model's 320 tokens"),
    "a padding beyond the vocabulary": (_first("inputs", pad=320), "with 320, which is none of"),
    "two of one name": (lambda c, p, g: g["inputs"][5].update(name=g["inputs"][4]["name"]), "two tensors of one name"),
    "logits as a cache": (lambda c, p, g: g["cache"][0].update(key_out="logits"), "lacks the cache tensors of layer 0"),
    "no tokens": (_graph(length={"min": 0, "max": 0}), "takes 0 to 0 tokens at a time, not 1 or more"),
    "no tokens in one size": (_graph(length=0), "takes 0 to 0 tokens"),
    "lengths the wrong way": (_graph(length={"min": 5, "max": 2}), "takes 5 to 2 tokens"),
    "values as keys": (
        lambda c, p, g: g["cache"][0].update(key_in=g["cache"][0]["value_in"]), "no encoder .* makes the input",
    ),
    "ids as a cache": (lambda c, p, g: g["cache"][0].update(key_in="input_ids"), "lacks the cache tensors of layer 0"),
    "no graphs": (lambda c, p, g: p["variants"][0].update(graphs=[]), "the roles none"),
    "another task": (lambda c, p, g: p.update(task="fill-mask"), "the roles decoder, which do not do fill-mask"),
}  # fmt: skip
ENCODERS = {
    "no batch": (_first("inputs", axes=[None, None]), "inputs of None rows, the model a batch of 3"),
    "too few names": (_first("inputs", axes=["batch"]), "names 1 dimensions of input_ids, which has 2"),
    "swapped names": (_first("inputs", axes=["length", "batch"]), "has inputs of"),
    "two lengths": (_first("inputs", shape=[3, 8]), "has inputs of 16 and of 8 along length"),
    "frames that stand still": (_graph(frames={"size": 1, "step": 0, "fewest": 0}), "frames that do not get on"),
    "too many cuts": (_first("outputs", slice=["batch"] * 9), "along 9 dimensions where it has 3"),
    "cuts along nothing": (_first("outputs", slice=["batch", "choices", None]), "along choices, which no input has"),
    "too many dimensions": (_first("outputs", shape=[1] * 65, slice=[None] * 65), "more than 8 dimensions"),
    "the mask first": (lambda c, p, g: g["inputs"].insert(0, g["inputs"].pop(1)), "has the mask for its first input"),
    "a free dimension": (_first("inputs", shape=[3, {"min": 1, "max": 16}]), "has inputs of|a free dimension"),
}


@pytest.mark.parametrize(("change", "message"), DECODERS.values(), ids=DECODERS)
def test_a_decoders_shapes_fit_each_other(changed, decoder, change, message):
    with pytest.raises(FormatError, match=message):
        read_artifact(changed(decoder, change))


@pytest.mark.parametrize(("change", "message"), ENCODERS.values(), ids=ENCODERS)
def test_an_encoders_shapes_fit_each_other(changed, encoder, change, message):
    with pytest.raises(FormatError, match=message):
        read_artifact(changed(encoder, change))


def test_an_encoder_may_have_several_batches(changed, encoder):
    """As by --batch-size 1,3; the model's is the largest."""

    def one_row(config, contract, graph):
        for spec in graph["inputs"] + graph["outputs"]:
            spec["shape"][0] = 1

    assert read_artifact(changed(encoder, one_row)).contract.shapes.batch_size == 3


def test_a_free_batch_is_said_and_not_run(changed, decoder):
    """Format 3 has a place for it."""
    free = changed(decoder, lambda config, contract, graph: graph.update(batch={"min": 1, "max": 4}))
    with pytest.raises(FormatError, match="has a free batch, of 1 to 4, which this precast does not run"):
        read_artifact(free)


def test_what_fits_has_no_problem(decoder, encoder):
    for path in (decoder, encoder):
        graphs = read_artifact(path).contract.variants[0].graphs
        assert [graph_problem(graph, 320) for graph in graphs] == [None] * len(graphs)


def test_too_much_memory_is_said_with_how_much(changed, decoder):
    def large(config, contract, graph):
        _caches(shape=[1, 2, 2**31, 64])(config, contract, graph)
        graph["capacity"] = 2**31

    with pytest.raises(OutOfMemoryError, match=r"no memory for a buffer of the model of [\d,]+\.0 GiB"):
        CompiledModel.from_pretrained(changed(decoder, large), prepack=False)


def test_a_contract_that_does_not_fit_its_graph_is_an_artifacts_error(changed, decoder):
    model = CompiledModel.from_pretrained(changed(decoder, _logits([1, {"min": 1, "max": 48}, 100])), prepack=False)
    with pytest.raises(ArtifactError, match=r"ONNX Runtime .* cannot run the graph: .*invalid dimensions"):
        model.generate(np.array([[5]]), max_new_tokens=2)


@pytest.mark.parametrize("wrong", [True, "320", -5, 0, [1]])
def test_a_configuration_without_a_vocabulary_is_the_logits(changed, decoder, wrong):
    path = changed(decoder, lambda config, contract, graph: config.update(vocab_size=wrong))
    model = CompiledModel.from_pretrained(path, prepack=False)
    with pytest.raises(ValueError, match=r"the id -3; the model's vocabulary is 0\.\.319"):
        model.generate(np.array([[5, -3]]))


OLD = Path(__file__).parents[1] / "artifacts" / "0.1.0"
TOGETHER = {
    "one name": ("decoder", lambda second: second.update(name="model"), "two graphs of one name among model, model"),
    "other caches": (
        "decoder",
        lambda second: [second["inputs"][4].update(name="x"), second["cache"][0].update(key_in="x")],
        "decoders among model, second that differ in their caches or vocabulary",
    ),
    "another vocabulary": (
        "decoder", lambda second: second["outputs"][0]["shape"].__setitem__(2, 7), "differ in their caches",
    ),
    "other outputs": (
        "encoder", lambda second: second["outputs"][0].update(name="x"), "encoders among model, second that differ",
    ),
}  # fmt: skip


def test_a_later_graph_that_does_not_keep_to_its_own_shapes_is_refused_for_that(changed, encoder):
    """How graphs go together is asked only then."""
    longer = changed(
        encoder,
        lambda config, contract, graph: contract["variants"][0]["graphs"][1]["inputs"][0].update(axes=["batch"]),
    )
    with pytest.raises(FormatError, match="names 1 dimensions of input_ids, which has 2"):
        read_artifact(longer)


@pytest.mark.parametrize("name", TOGETHER)
def test_graphs_of_a_variant_go_together(name, changed):
    kind, differ, words = TOGETHER[name]

    def add(config, contract, graph):
        second = json.loads(json.dumps(graph)) | {"name": "second"}
        differ(second)
        contract["variants"][0]["graphs"].append(second)

    with pytest.raises(FormatError, match=words):
        read_artifact(changed(OLD / kind, add))
