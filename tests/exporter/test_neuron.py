"""The `neuron` backend on the stand-in of the SDK: what is compiled gives eager's answers, what fails says why."""

from __future__ import annotations

import shutil
import sys
import threading
from types import SimpleNamespace

import handmade
import msgspec
import neuron_machine
import numpy as np
import oracle
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.cli import main
from precast.exporter import ExportOptions, export
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.publish import hash_files
from precast.runtime.distributed.convert import join, split
from precast.runtime.engines.neuron import _Module, _sharded_by_name
from precast.runtime.errors import ArtifactError, ExportError, FormatError, HostError, TrustError, UsageError
from precast.runtime.hosts.neff import find_headers

CAPACITY = 48
NEURON = {"backend": "neuron", "instance_type": "trn1"}
PLAIN = {**NEURON, "prefill_lengths": (8,), "optlevel": 1, "validate": True}
"""Of what many tests look at: one row, prompts of 8."""
STRATEGIES = {
    "trace": {},
    "inlined": {"inline_weights": True},
    "builder": {"strategy": "model-builder"},
    "spread": {"tensor_parallel": 2},
}
PAIRS = [("llama", "trace")]
SPREAD = ("llama", "mistral", "phi3", "gpt2", "opt", "gemma2")
"""Of which each has something else to split: fewer key heads, packed and transposed projections, biases, soft caps."""
SLOW = [("llama", "inlined"), ("llama", "builder")]
SLOW += [(family, "trace") for family in tiny.DECODERS if family != "llama"]
SLOW += [(family, "spread") for family in SPREAD]


@pytest.fixture(scope="module", autouse=True)
def sdk(tmp_path_factory):
    """The stand-in, on a machine with four cores."""
    with pytest.MonkeyPatch.context() as patch:
        neuron_machine.install(patch, tmp_path_factory.mktemp("neuron"), cores=4)
        yield


@pytest.fixture(
    scope="module", params=[*PAIRS, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)], ids="-".join
)
def pair(request, checkpoint, artifact):
    """One checkpoint and its artifact: batch 2, more rows in slices, prompts in pieces of 8."""
    family, name = request.param
    source = checkpoint(family)
    options = {"batch_size": 2, "dynamic_batch_size": True, "prefill_lengths": (8,), **STRATEGIES[name]}
    return source, CompiledModelForCausalLM.from_pretrained(artifact(source, **NEURON, **options))


rows_of_any_length = st.lists(
    st.lists(st.integers(3, tiny.VOCABULARY - 1), min_size=1, max_size=CAPACITY), min_size=1, max_size=4
)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_of_any_length, side=st.sampled_from(["left", "right", "middle"]))
def test_logits_are_those_of_the_unpadded_row(pair, rows, side):
    source, model = pair
    oracle.check_logits(source, model, rows, side)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_greedy_tokens_are_transformers_own(pair, side):
    source, model = pair
    oracle.check_greedy(source, model, side, 12)


def test_sessions_that_take_turns_have_caches_of_their_own(pair):
    """One set of caches is on the device: the other's is kept meanwhile."""
    source, model = pair
    first, second = [5, 9, 30, 7, 200], [80, 81]
    sessions = ((model, first), (model.new_session(), second))
    streams = [session.stream(np.array([row]), max_new_tokens=8) for session, row in sessions]
    found = list(zip(*streams, strict=False))
    for row, tokens in zip((first, second), zip(*found, strict=True), strict=True):
        assert oracle.greedy(source, row, max_new_tokens=8)[: len(tokens)] == list(tokens)


def test_beams_reorder_what_is_on_the_device(pair):
    source, model = pair
    row = [5, 9, 30, 7, 200]
    found = model.generate(np.array([row]), max_new_tokens=8, num_beams=2, do_sample=False)[0, len(row) :].tolist()
    assert found == oracle.greedy(source, row, max_new_tokens=8, num_beams=2)[: len(found)]


def test_a_cache_filled_to_the_brim(pair):
    source, model = pair
    oracle.check_brim(source, model, CAPACITY)


def test_a_chat_goes_on_from_what_the_device_holds(checkpoint, artifact):
    source = checkpoint("llama")
    model = CompiledModelForCausalLM.from_pretrained(artifact(source, **PLAIN))
    row = [5, 9, 30, 7, 200]
    for _ in range(2):
        row += model.generate(np.array([row]), max_new_tokens=5, do_sample=False)[0, len(row) :].tolist()
        row += [17, 23]
        expected = oracle.greedy(source, row, max_new_tokens=5)
        assert model.generate(np.array([row]), max_new_tokens=5, do_sample=False)[0, len(row) :].tolist() == expected


def test_validation_runs_on_the_device_and_the_contract_says_all(checkpoint, artifact):
    path = artifact(checkpoint("llama"), **PLAIN)
    variant = read_artifact(path).contract.variants[0]
    assert variant.accuracy.status == "passed"
    assert (variant.trust, variant.host.device, variant.host.platforms) == ("native", "neuron", ["linux-x86_64"])
    assert (variant.host.min_versions["torch-neuronx"], variant.compiler.version) == ("2.9", "2.22.1111.0")
    told = variant.compiler.options
    assert (told["instance_type"], told["strategy"], told["cores"], told["optlevel"]) == ("trn1", "trace", 1, 1)
    assert told["arguments"] == "--target trn1 --auto-cast=none -O1 --model-type=transformer"
    assert [graph.file for graph in variant.graphs] == ["prefill_8.neuron", "decode.neuron"]
    for graph in variant.graphs:
        assert all(isinstance(size, int) for spec in [*graph.inputs, *graph.outputs] for size in spec.shape)
        assert len(find_headers(path / graph.file)) == 1


def test_weights_are_stored_once(checkpoint, artifact):
    path = artifact(checkpoint("llama"), **PLAIN)
    weights = (path / "model.safetensors").stat().st_size
    graphs = [each.stat().st_size for each in path.glob("*.neuron")]
    assert len(graphs) == 2
    assert max(graphs) < weights / 4


@pytest.mark.slow
def test_weights_lie_in_every_graph_where_asked(checkpoint, artifact):
    beside = artifact(checkpoint("llama"), **PLAIN)
    within = artifact(checkpoint("llama"), **NEURON, prefill_lengths=(8,), inline_weights=True)
    assert not (within / "model.safetensors").exists()
    weights = (beside / "model.safetensors").stat().st_size
    assert min(each.stat().st_size for each in within.glob("*.neuron")) > 0.9 * weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"auto_cast": "matmul", "auto_cast_type": "tf32"},
        {"auto_cast": "all"},
        {"dtype": "bfloat16"},
        {"quantize": "int8"},
        {"kv_cache": "int8"},
    ],
    ids=str,
)
def test_less_than_float32_passes_validation(checkpoint, tmp_path, options):
    asked = ExportOptions(**NEURON, sequence_length=(CAPACITY,), prefill_lengths=(16,), accept_loss=True, **options)
    variant = export(str(checkpoint("llama")), tmp_path / "out", asked).contract.variants[0]
    assert variant.accuracy.status in ("passed", "accepted")
    cast = options.get("auto_cast")
    words = {"matmul": "--auto-cast=matmult --auto-cast-type=tf32", "all": "--auto-cast=all --auto-cast-type=bf16"}
    assert words.get(cast, "--auto-cast=none") in variant.compiler.options["arguments"]
    # The compiler casts, not the program.
    assert (variant.graphs[0].cache[0].dtype == "float32") == (cast is not None or options.get("quantize") is not None)


# ------------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def encoder(checkpoint, artifact):
    source = checkpoint("bert")
    options = {"batch_size": 2, "sequence_length": (16, 48), "task": "fill-mask", "dynamic_batch_size": True}
    return source, artifact(source, **NEURON, **options)


def _check_masked(source, model, rows):
    for side in ("left", "right"):
        ids, mask = oracle.padded(rows, side)
        for row, values, keep in zip(rows, model(ids, mask).logits, mask, strict=True):
            with torch.inference_mode():
                expected = oracle.eager(source, "AutoModelForMaskedLM")(input_ids=torch.tensor([row])).logits[0].numpy()
            assert np.abs(values[keep == 1] - expected).max() < 1e-4


ROWS = [[5, 9, 30, 7], [80], [(7 * n) % 300 + 3 for n in range(40)], [6] * 16, [7, 8]]


def test_encoders_in_buckets(encoder):
    source, path = encoder
    model = CompiledModel.from_pretrained(path)
    assert [graph.file for graph in model.variant.graphs] == ["model_16.neuron", "model_48.neuron"]
    _check_masked(source, model, ROWS)


def test_an_encoder_is_not_divided_but_copied(encoder, tmp_path):
    words = r"tensor_parallel=2 divides decoders, and 'fill-mask' is done by none\. Leave it out; .* cores='0-1'"
    with pytest.raises(UsageError, match=words):
        _export(encoder[0], tmp_path / "out", task="fill-mask", batch_size=1, tensor_parallel=2, prefill_lengths=())


def test_slices_of_a_batch_run_on_all_cores(encoder):
    import neuron_stand_in
    import torch_neuronx

    source, path = encoder
    model = CompiledModel.from_pretrained(path, cores="1-3")
    torch_neuronx.LOADS.clear()
    assert model.warm_up() > 0
    assert {core for _, core in torch_neuronx.LOADS} == {1, 2, 3}
    assert len(torch_neuronx.LOADS) == 3 * len(model.variant.graphs)
    neuron_stand_in.RUNS.clear()
    _check_masked(source, model, ROWS)
    assert set(neuron_stand_in.RUNS) == {1, 2, 3}


def test_sessions_go_to_the_next_core(checkpoint, artifact):
    import neuron_stand_in

    source = checkpoint("llama")
    first = CompiledModelForCausalLM.from_pretrained(artifact(source, **PLAIN), cores=(0, 2))
    second, row, found = first.new_session(), [5, 9, 30, 7, 200], {}
    neuron_stand_in.RUNS.clear()

    def ask(name, model):
        found[name] = model.generate(np.array([row]), max_new_tokens=8, do_sample=False)[0, len(row) :].tolist()

    threads = [threading.Thread(target=ask, args=each) for each in (("first", first), ("second", second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = oracle.greedy(source, row, max_new_tokens=8)
    assert found == {"first": expected, "second": expected}
    assert set(neuron_stand_in.RUNS) == {0, 2}


@pytest.mark.slow
def test_an_encoder_decoder_answers_token_by_token(tmp_path):
    from zoo import seq2seq as zoo

    from precast.runtime import CompiledModelForSeq2SeqLM

    source = zoo.make(tmp_path / "t5", "t5")
    asked = ExportOptions(
        **NEURON, batch_size=2, sequence_length=(12,), decoder_sequence_length=10, task="text2text-generation"
    )
    made = export(str(source), tmp_path / "out", asked)
    assert made.contract.variants[0].accuracy.status == "passed"
    assert [graph.role for graph in made.contract.variants[0].graphs] == ["encode", "decode"]
    assert CompiledModelForSeq2SeqLM.from_pretrained(made.path)


# ------------------------------------------------------------------- placement and opening


@pytest.mark.parametrize(
    ("cores", "error", "words"),
    [
        ("4", HostError, r"no NeuronCore 4: this process sees 4"),
        ("0,0", UsageError, r"twice"),
        ("a-b", UsageError, r"not understood at 'a-b'"),
    ],
)
def test_cores_that_cannot_be(encoder, cores, error, words):
    with pytest.raises(error, match=words):
        CompiledModel.from_pretrained(encoder[1], cores=cores)


@pytest.mark.slow
def test_a_model_over_several_cores_takes_the_first_ones(checkpoint, artifact):
    path = artifact(checkpoint("llama"), **NEURON, prefill_lengths=(8,), tensor_parallel=2)
    with pytest.raises(UsageError, match=r"3 is no multiple"):
        CompiledModel.from_pretrained(path, cores="0-2")
    with pytest.raises(UsageError, match=r"NEURON_RT_VISIBLE_CORES=2-3"):
        CompiledModel.from_pretrained(path, cores="2-3")
    with pytest.raises(UsageError, match=r"log_dir=logs is for ranks that are processes, and .* are NeuronCores"):
        CompiledModel.from_pretrained(path, log_dir="logs")


def _spread(checkpoint, artifact, **options):
    source = checkpoint("llama")
    return source, artifact(source, **NEURON, batch_size=2, prefill_lengths=(8,), tensor_parallel=2, **options)


@pytest.mark.slow
def test_the_contract_says_how_weights_are_divided_between_cores(checkpoint, artifact, tmp_path, capsys, monkeypatch):
    source, path = _spread(checkpoint, artifact, dynamic_batch_size=True)
    (variant,) = read_artifact(path).contract.variants
    assert (variant.name, variant.ranks.count, variant.ranks.stored) == ("neuron-tp2", 2, 2)
    assert variant.weights == ["model.safetensors", "rank_0/model.safetensors", "rank_1/model.safetensors"]
    assert [layer.heads for layer in variant.graphs[0].cache] == [1]
    whole = join(path, tmp_path / "whole", trust_native_code=True)
    oracle.check_greedy(source, CompiledModelForCausalLM.from_pretrained(whole.path), "left", 8)
    assert split(whole.path, 2, tmp_path / "two").contract.digest == read_artifact(path).contract.digest
    with pytest.raises(UsageError, match="rank has 2 rows or columns, which 4 ranks cannot share equally"):
        split(whole.path, 4, tmp_path / "four")
    monkeypatch.setattr(sys, "argv", ["precast", "inspect", str(path)])
    with pytest.raises(SystemExit):
        main()
    assert "2 NeuronCores, weights in 2 parts" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "int8", "group_size": 16, "accept_loss": True},
        {"dtype": "bfloat16", "accept_loss": True},
        {"online_split": True},
        {"tensor_parallel": 4, "attn_tp": 2, "embed_tp": 1, "lmhead_tp": 2},
        {"tensor_parallel": 4},
    ],
    ids=str,
)
def test_a_model_over_several_cores_passes_validation(checkpoint, tmp_path, options):
    """Key/value heads are fewer than four cores, so that two have the same."""
    made = _export(checkpoint("llama"), tmp_path / "out", **{"tensor_parallel": 2, "validate": True, **options})
    assert made.contract.variants[0].accuracy.status in ("passed", "accepted")


def test_rows_of_an_artifact_of_the_first_release_are_divided_by_name():
    weights = {"sharded.a": torch.arange(4), "whole.b": torch.arange(3)}
    found = _sharded_by_name(weights, 1, 2)
    assert {name: each.tolist() for name, each in found.items()} == {"sharded.a": [2, 3], "whole.b": [0, 1, 2]}


def test_cores_are_for_neuron(decoder):
    with pytest.raises(UsageError, match=r"cores=0 are NeuronCores, and the variant onnx runs on cpu"):
        CompiledModel.from_pretrained(decoder, cores="0")


def test_compiled_code_needs_proof(encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "another-user"))
    with pytest.raises(TrustError, match=r"trust_native_code=True"):
        CompiledModel.from_pretrained(encoder[1])
    assert CompiledModel.from_pretrained(encoder[1], trust_native_code=True)


def test_a_file_that_is_no_graph_is_refused(checkpoint, artifact, tmp_path):
    path = shutil.copytree(artifact(checkpoint("llama"), **PLAIN), tmp_path / "copy")
    (path / "prefill_8.neuron").write_bytes(b"PK not TorchScript")
    listed = msgspec.to_builtins(hash_files(path)["prefill_8.neuron"])
    handmade.rewrite(path, lambda raw: raw["precast"]["files"].update({"prefill_8.neuron": listed}))
    model = CompiledModelForCausalLM.from_pretrained(path, trust_native_code=True)
    with pytest.raises(ArtifactError, match=r"prefill_8.neuron cannot be opened on a Neuron device"):
        model.generate(np.array([[5, 6, 7]]), max_new_tokens=1)


def test_caches_that_are_not_the_contracts_are_refused(checkpoint, artifact):
    path = artifact(checkpoint("llama"), **PLAIN)
    graph = CompiledModelForCausalLM.from_pretrained(path).variant.graphs[-1]
    held = [(f"states.{index}", torch.zeros(1, 2, CAPACITY, 16)) for index in range(2)]
    assert _Module(graph, SimpleNamespace(named_parameters=lambda: held), path)
    for others in (held[:1], [*held[:1], ("states.1", torch.zeros(1, 2, CAPACITY + 1, 16))]):
        with pytest.raises(FormatError, match=r"holds other caches than the artifact says"):
            _Module(graph, SimpleNamespace(named_parameters=lambda others=others: others), path)


# ------------------------------------------------------------------- what goes wrong


def _export(source, path, **options):
    settings = {"sequence_length": (16,), "prefill_lengths": (4,), "validate": False, **options}
    return export(str(source), path, ExportOptions(**{**NEURON, **settings}))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param(
            "error@decode",
            r"could not compile decode for trn1: .*\[NCC_EVRF001\] An unsupported operator was used",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "killed@prefill_4",
            r"could not compile prefill_4 for trn1: it was killed.* -O1.*\[F137\] neuronx-cc was forcibly",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "crash@prefill_4",
            r"could not compile prefill_4 for trn1: it crashed with SIGSEGV",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "lost@prefill_4",
            r"could not compile prefill_4 for trn1: it was killed, as the system does where memory runs out",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_compiler_that_fails_says_where_and_why(checkpoint, tmp_path, monkeypatch, fault, words):
    monkeypatch.setenv("STAND_IN_FAULT", fault)
    with pytest.raises(ExportError, match=words) as caught:
        _export(checkpoint("llama"), tmp_path / "out")
    assert "Traceback" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_compilers_files_are_kept_where_asked(checkpoint, tmp_path, monkeypatch):
    _export(
        checkpoint("llama"), tmp_path / "out", compiler_workdir=tmp_path / "work", compiler_args=("--verbose=info",)
    )
    command = (tmp_path / "work/decode/command.txt").read_text()
    assert command.endswith("--target trn1 --auto-cast=none -O2 --model-type=transformer --verbose=info")
    assert (tmp_path / "work/log.txt").exists()
    monkeypatch.setenv("NEURON_CC_FLAGS", "--target=inf2")
    assert _export(checkpoint("llama"), tmp_path / "again")


def test_an_argument_that_the_compiler_does_not_know(checkpoint, tmp_path):
    source = checkpoint("bert", "AutoModel")
    with pytest.raises(ExportError, match=r"could not compile .*unrecognized arguments: --colour"):
        _export(source, tmp_path / "out", batch_size=1, prefill_lengths=(), compiler_args=("--colour",))


@pytest.mark.parametrize("strategy", ["trace", pytest.param("model-builder", marks=pytest.mark.slow)])
def test_a_host_without_a_device_compiles_for_another(checkpoint, tmp_path, monkeypatch, strategy):
    neuron_machine.devices(monkeypatch, tmp_path / "root", cores=0)
    source, sizes = checkpoint("bert", "AutoModel"), {"batch_size": 1, "prefill_lengths": ()}
    made = _export(source, tmp_path / "out", instance_type="inf2", strategy=strategy, validate=True, **sizes)
    accuracy = made.contract.variants[0].accuracy
    assert (accuracy.status, accuracy.reason[:9]) == ("skipped", "no device")
    with pytest.raises(HostError, match=r"needs the device neuron"):
        CompiledModel.from_pretrained(made.path)
    neuron_machine.devices(monkeypatch, tmp_path / "root", cores=2, instance="Inf2")
    found = CompiledModel.from_pretrained(made.path)([[5, 9, 30]]).last_hidden_state
    with torch.inference_mode():
        expected = oracle.eager(source, "AutoModel")(torch.tensor([[5, 9, 30]])).last_hidden_state.numpy()
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("strategy", ["trace", "model-builder"])
def test_without_the_sdk_nothing_begins(checkpoint, tmp_path, strategy):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "")
        with pytest.raises(ExportError, match=r"torch_neuronx cannot be imported: No module.*pip\.repos\.neuron"):
            _export(tmp_path / "no-checkpoint", tmp_path / "out", strategy=strategy)


def test_pypis_placeholders_are_told_from_the_sdk(checkpoint, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "")
        neuron_machine.install_placeholders(patch, tmp_path / "site")
        words = (
            r"torch_neuronx cannot be imported: what is installed is PyPI's placeholder, which cannot be used\. "
            r"Install it with: pip install --extra-index-url https://pip\.repos\.neuron\.amazonaws\.com 'torch-"
        )
        with pytest.raises(ExportError, match=words):
            _export(tmp_path / "no-checkpoint", tmp_path / "out")


def test_opening_without_the_sdk_says_how_to_get_it(encoder, tmp_path):
    """Its metadata are there and its modules raise: what a lock file with the placeholders brings."""
    with pytest.MonkeyPatch.context() as patch:
        neuron_machine.install_placeholders(patch, tmp_path / "site")
        model = CompiledModel.from_pretrained(encoder[1])
        with pytest.raises(HostError, match=r"torch_neuronx cannot be imported: .*placeholder"):
            model(np.array([[5, 6]]))


def test_graphs_of_an_encoder_decoder_do_not_share_a_signature(tmp_path):
    from zoo import seq2seq as zoo

    source = zoo.make(tmp_path / "t5", "t5")
    with pytest.raises(ExportError, match=r"encode, decode of this model do not. Give strategy='trace'"):
        _export(
            source, tmp_path / "out", strategy="model-builder", task="text2text-generation", prefill_lengths=(),
            decoder_sequence_length=8,
        )  # fmt: skip


# ------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"instance_type": None}, r"give instance_type; the choices are: inf2, trn1, trn1n, trn2\."),
        ({"instance_type": "inf1"}, r"instance_type='inf1' .*torch-neuron, ends with PyTorch 1\.13"),
        ({"instance_type": "p4d"}, r"instance_type='p4d' is not supported; the choices are"),
        ({"strategy": "transformers-neuronx"}, r"ended the support of transformers-neuronx with Neuron SDK 2\.26"),
        ({"strategy": "torch-native"}, r"TorchNeuron, the successor .* closed beta"),
        ({"strategy": "fast"}, r"strategy='fast' is not supported; the choices are: trace, model-builder"),
        ({"strategy": "trace", "tensor_parallel": 2}, r"tensor_parallel=2 .* strategy='trace' compiles for one"),
        ({"tensor_parallel": 0}, r"tensor_parallel must be at least 1, not 0"),
        ({"tensor_parallel": 4, "mlp_tp": 3}, r"mlp_tp=3 does not divide the 4 ranks"),
        (
            {"backend": "onnx", "instance_type": None, "tensor_parallel": 2},
            r"tensor_parallel is not for backend='onnx': one process runs its models, .* take it: aoti, neuron\.",
        ),
        ({"tensor_parallel": 2, "inline_weights": True}, r"inline_weights=True .* Give strategy='trace'"),
        ({"optlevel": 4}, r"optlevel=4 is no level"),
        ({"compiler_args": ("--target=inf2",)}, r"compiler_args='--target=inf2' is said otherwise: by instance_type"),
        ({"compiler_args": ("-O3",)}, r"said otherwise: by optlevel=3"),
        ({"compiler_args": ("verbose",)}, r"'verbose' is no argument of neuronx-cc"),
        ({"isa": "avx2"}, r"isa='avx2' is not for backend='neuron'"),
        ({"auto_cast": "matmul", "dtype": "bfloat16"}, r"nothing is left in it"),
        ({"auto_cast_type": "bf16"}, r"says what auto_cast casts to"),
        ({"backend": "onnx"}, r"instance_type is not for backend='onnx': .*Backends that take it: neuron\."),
        (
            {"backend": "aoti", "instance_type": None, "auto_cast": "all", "auto_cast_type": "tf32"},
            r"auto_cast_type='tf32' is for backend='neuron'",
        ),
    ],
)
def test_only_combinations_that_mean_something(options, words):
    with pytest.raises(UsageError, match=words):
        ExportOptions(**{**NEURON, **options}).check()


def test_the_command_line_has_the_same_options(checkpoint, tmp_path, monkeypatch, capsys):
    words = ["export", checkpoint("llama"), "-o", tmp_path / "out", "-q", "--no-validate", "--backend", "neuron",
             "--instance-type", "trn1", "--num-cores", "2", "-O1", "--batch-size", "2", "--compiler-arg=--verbose=info",
             "--sequence-length", "32", "--prefill-lengths", "4"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["precast", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code, capsys.readouterr().err
    model = CompiledModelForCausalLM.from_pretrained(tmp_path / "out")
    told = model.variant.compiler.options
    assert (told["cores"], told["optlevel"], told["strategy"]) == (2, 1, "model-builder")
    row = [255, 192, 154, 83, 94]
    for beams in ({}, {"num_beams": 2}):
        # Beams that move rows of one core's caches and not of the other's write something else.
        expected = oracle.greedy(checkpoint("llama"), row, max_new_tokens=16, **beams)
        found = model.generate(np.array([row]), max_new_tokens=16, **beams)[0, len(row) :].tolist()
        assert found[: len(expected)] == expected
