"""Where an `onnx` artifact runs: with the provider that was asked for, or an error says how to get it."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import handmade
import numpy as np
import onnxruntime
import pytest

from precast.cli import main
from precast.runtime import CompiledModel
from precast.runtime.artifact.schema import Host
from precast.runtime.engines import providers
from precast.runtime.engines.providers import DEVICES, PROVIDERS, ProviderChoice, check_provider, choose_provider
from precast.runtime.errors import ArtifactError, HostError, UsageError
from precast.runtime.hosts.machine import installed_version
from precast.runtime.hosts.select import Machine, choose_variant

EVERYTHING = [each.full_name for each in PROVIDERS.values()]
IDS = np.array([[5, 6, 7, 8, 9, 10, 11]])
RealSession = onnxruntime.InferenceSession


class ElsewhereSession:
    """A session that claims the provider it was asked for, computes on the CPU, and binds nothing."""

    asked = None
    taken = None

    def __init__(self, path, options, *, providers, enable_fallback):
        assert enable_fallback == 0
        type(self).asked.append(providers)
        self._real = RealSession(path, options, providers=["CPUExecutionProvider"])

    def get_providers(self):
        return self.taken or [each if isinstance(each, str) else each[0] for each in self.asked[-1]]

    def run(self, names, feeds):
        return self._real.run(names, feeds)


@pytest.fixture
def wide(checkpoint, artifact):
    """A decoder of batch 3 with static graphs."""
    return artifact(checkpoint("llama"), batch_size=3, prefill_lengths=(8, 16))


@pytest.fixture
def elsewhere(monkeypatch):
    """A build of ONNX Runtime that has every provider."""
    monkeypatch.setattr(ElsewhereSession, "asked", [])
    monkeypatch.setattr(onnxruntime, "InferenceSession", ElsewhereSession)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: EVERYTHING)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("no libcudnn"))
    return ElsewhereSession


# ---------------------------------------------------------------- what is asked for, and what that means


@pytest.mark.parametrize(
    ("device", "provider", "available", "expected"),
    [
        ("cpu", None, EVERYTHING, "cpu"),
        ("cuda", None, EVERYTHING, "cuda"),
        ("cuda", "tensorrt", EVERYTHING, "tensorrt"),
        ("cuda", "TensorrtExecutionProvider", EVERYTHING, "tensorrt"),
        ("cpu", "openvino", EVERYTHING, "openvino"),
        ("gpu", None, ["OpenVINOExecutionProvider", "CPUExecutionProvider"], "openvino"),
        ("gpu", None, ["CoreMLExecutionProvider", "CPUExecutionProvider"], "coreml"),
    ],
)
def test_the_first_that_serves_the_device_and_is_there(device, provider, available, expected):
    assert choose_provider(device, provider, available, "1.31.1") == ProviderChoice(PROVIDERS[expected], device)


@pytest.mark.parametrize(
    ("device", "provider", "words"),
    [
        ("cuda", None, ["'cuda'", "onnxruntime-gpu", "cuda with", "tensorrt with", "NVIDIA GPU"]),
        ("cpu", "openvino", ["'openvino'", "onnxruntime-openvino"]),
        ("npu", None, ["'npu'", "openvino with", "coreml with"]),
    ],
)
def test_what_this_build_lacks_is_refused_with_what_it_has(device, provider, words):
    with pytest.raises(HostError) as refused:
        choose_provider(device, provider, ["AzureExecutionProvider", "CPUExecutionProvider"], "1.31.1")
    for word in [*words, "1.31.1", "AzureExecutionProvider, CPUExecutionProvider", "pip install"]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("device", "provider", "message"),
    [
        ("tpu", None, r"no device 'tpu'\. The devices are: cpu, cuda, gpu, npu, coreml\."),
        (None, "rocm", r"no provider 'rocm'\. The providers are: cpu, cuda, tensorrt, openvino, coreml\."),
        ("cpu", "cuda", r"'cuda' does not run on the device 'cpu', but on: cuda"),
        ("cuda", "openvino", r"'openvino' does not run on the device 'cuda', but on: cpu, gpu, npu"),
    ],
)
def test_names_that_there_are_not(device, provider, message):
    with pytest.raises(UsageError, match=message):
        check_provider(device, provider)


def test_a_device_that_a_variant_was_compiled_for_is_known():
    check_provider("neuron", None, ["neuron"])


def test_every_name_of_the_table_is_one_that_onnxruntime_knows():
    assert {each.full_name for each in PROVIDERS.values()} <= set(onnxruntime.get_all_providers())
    assert {name for each in PROVIDERS.values() for name in each.helpers} <= PROVIDERS.keys()
    assert set(DEVICES) == {device for each in PROVIDERS.values() for device in each.devices}


# ---------------------------------------------------------------- what reaches ONNX Runtime


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["CPUExecutionProvider"]),
        ({"device": "cpu", "provider": "cpu"}, ["CPUExecutionProvider"]),
        ({"device": "cuda"}, [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]),
        (
            {"provider": "tensorrt"},
            [("TensorrtExecutionProvider", {}), ("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
        ),
        (
            {"provider": "openvino", "threads": 3},
            [
                ("OpenVINOExecutionProvider", {"device_type": "CPU", "precision": "FP32", "num_of_threads": "3"}),
                "CPUExecutionProvider",
            ],
        ),
        (
            {"device": "gpu", "threads": 3},
            [("OpenVINOExecutionProvider", {"device_type": "GPU", "precision": "FP32"}), "CPUExecutionProvider"],
        ),
        ({"provider": "coreml"}, [("CoreMLExecutionProvider", {"MLComputeUnits": "ALL"}), "CPUExecutionProvider"]),
    ],
)
def test_providers_and_options_reach_the_session(elsewhere, decoder, options, expected, capfd):
    model = CompiledModel.from_pretrained(decoder, **options)
    if expected == ["CPUExecutionProvider"]:
        with pytest.raises(AttributeError, match="io_binding"):
            model(IDS)
    else:
        model(IDS)
    assert elsewhere.asked[0] == expected
    assert capfd.readouterr().out == ""


def test_a_decoder_elsewhere_gives_the_same_tokens(wide, decoder, elsewhere, monkeypatch):
    """Prefill, steps, a continued prompt and beams, with caches that are copied there and back."""
    for path, beams in ((decoder, 1), (wide, 1), (wide, 3)):
        answers = []
        for options in ({}, {"device": "cuda"}):
            monkeypatch.setattr(onnxruntime, "InferenceSession", elsewhere if options else RealSession)
            model = CompiledModel.from_pretrained(path, **options)
            first = model.generate(IDS, max_new_tokens=8, do_sample=False, num_beams=beams)
            longer = np.concatenate([first, IDS[:, :2]], 1)
            answers.append(model.generate(longer, max_new_tokens=8, do_sample=False, num_beams=beams).tolist())
        assert answers[0] == answers[1]
    assert elsewhere.asked


def test_an_encoder_elsewhere_gives_the_same_answers_and_packs_nothing(elsewhere, encoder, monkeypatch):
    monkeypatch.setattr("precast.runtime.engines.onnx.Entry", None)
    found = CompiledModel.from_pretrained(encoder, provider="openvino")(IDS).last_hidden_state
    monkeypatch.setattr(onnxruntime, "InferenceSession", RealSession)
    expected = CompiledModel.from_pretrained(encoder, prepack=False)(IDS).last_hidden_state
    assert np.array_equal(found, expected)


# ---------------------------------------------------------------- never another


def test_a_provider_that_did_not_start_is_refused(elsewhere, decoder, monkeypatch):
    """ONNX Runtime writes a line, goes on without it, and answers from the CPU."""
    monkeypatch.setattr(elsewhere, "taken", ["CPUExecutionProvider"])
    with pytest.raises(HostError, match=r"could not start it on cuda; it would have run on CPUExecutionProvider"):
        CompiledModel.from_pretrained(decoder, device="cuda")(IDS)


@pytest.mark.parametrize("moment", ["__init__", "run"])
def test_a_provider_that_fails_is_no_reason_to_go_elsewhere(elsewhere, decoder, monkeypatch, moment):
    def fail(*words, **options):
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL :\nno code for this")

    monkeypatch.setattr(elsewhere, moment, fail)
    with pytest.raises(ArtifactError, match=r"CUDAExecutionProvider on cuda: .*FAIL : no code for this\. Leave device"):
        CompiledModel.from_pretrained(decoder, device="cuda")(IDS)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this build has CUDA")
def test_this_build_says_what_it_has(decoder, monkeypatch, capsys):
    words = ["precast", "generate", str(decoder), "--prompt", "Water", "--device", "cuda", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "HostError"
    assert ", ".join(onnxruntime.get_available_providers()) in error["message"]
    assert "onnxruntime-gpu" in error["message"]


def test_an_unknown_device_is_wrong_usage(encoder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["precast", "predict", str(encoder), "--text", "x", "--device", "tpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "There is no device 'tpu'. The devices are: cpu, cuda" in capsys.readouterr().err


# ---------------------------------------------------------------- variants, and builds under other names


def test_other_backends_run_where_they_were_compiled_to_run():
    machine = Machine("linux-x86_64", devices=frozenset({"cpu", "cuda"}), versions={"onnxruntime": "1.31"})
    hosts = {device: Host(platforms=[], device=device, isa=[], min_versions={}) for device in ("cpu", "cuda")}
    cpu, cuda = (handmade.variant(f"aoti-{device}", backend="aoti", host=hosts[device]) for device in hosts)
    both, onnx = handmade.contract(variants=[cpu, cuda]), handmade.variant("onnx")
    assert choose_variant(both, machine) == cpu
    assert choose_variant(both, machine, device="cuda") == cuda
    with pytest.raises(HostError, match="aoti-cpu: it was compiled for the device cpu, not for npu"):
        choose_variant(both, machine, device="npu")
    with pytest.raises(HostError, match="aoti-cpu: providers are ONNX Runtime's, and its backend is aoti"):
        choose_variant(both, machine, provider="openvino")
    mixed = handmade.contract(variants=[cpu, onnx])
    assert choose_variant(mixed, machine, provider="openvino") == onnx
    assert choose_variant(mixed, machine, device="cuda") == onnx


@pytest.mark.parametrize(("backend", "told"), [({}, {}), ({"backend": "aoti"}, {"device": "cuda"})])
def test_an_export_is_told_the_device_where_it_is_compiled_for_one(decoder, monkeypatch, backend, told):
    asked = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(
        "precast.runtime.models.base.export_once", lambda model, **options: asked.append(options) or decoder
    )
    with pytest.raises(HostError):
        CompiledModel.from_pretrained("user/model", export=True, device="cuda", provider="cuda", **backend)
    assert asked == [{"revision": None, "token": None, **backend, **told}]


def test_a_build_under_another_name_counts(monkeypatch):
    def version(name):
        if name == "onnxruntime-openvino":
            return "1.24.1"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert installed_version("onnxruntime") == "1.24.1"
    assert installed_version("torch") is None


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_the_same_answers_on_a_gpu(encoder, decoder, provider):
    if PROVIDERS[provider].full_name not in onnxruntime.get_available_providers():
        pytest.skip(f"this build of ONNX Runtime has no {provider}: {PROVIDERS[provider].install}")
    near, far = (CompiledModel.from_pretrained(encoder, **each) for each in ({}, {"provider": provider}))
    assert np.abs(near(IDS).last_hidden_state - far(IDS).last_hidden_state).max() < 1e-3
    near, far = (CompiledModel.from_pretrained(decoder, **each) for each in ({}, {"provider": provider}))
    tokens = [model.generate(IDS, max_new_tokens=12, do_sample=False).tolist() for model in (near, far)]
    assert tokens[0] == tokens[1]
    assert providers.default_device(provider) == "cuda"
