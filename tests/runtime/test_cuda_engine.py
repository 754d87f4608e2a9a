"""Native code for a GPU. The way of weights, inputs, caches and outputs over a device is run on a pretended one.

The pretended device lies in the host's memory, and what it runs is code for the CPU; all else is what a GPU is given.
What needs a real one is marked `gpu`.
"""

from __future__ import annotations

import gc
import shutil
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import handmade
import numpy as np
import oracle
import pytest
import torch
from msgspec.structs import replace
from zoo import seq2seq as zoo

from precast.exporter import ExportOptions, export
from precast.exporter.backends.aoti.standalone import link
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.integrity import vouch
from precast.runtime.artifact.publish import write_config
from precast.runtime.artifact.schema import Input
from precast.runtime.engines import aoti_torch
from precast.runtime.engines.device import Device
from precast.runtime.engines.gpu import Gpu
from precast.runtime.errors import HostError, UsageError
from precast.runtime.hosts import cuda
from precast.runtime.hosts import select as selecting
from precast.runtime.hosts.cuda import CudaHost

CAPACITY = 48
HERE = CudaHost("12.8", "9.0")
ROWS = [[5, 9, 30, 7, 200], [80], [11, 12, 13, 14, 15, 16, 17, 18, 19]]


class Pretended:
    """A place whose memory is not the session's. It counts what was recorded."""

    def __init__(self):
        self.device, self.recorded = torch.device("cpu"), 0

    def open(self, path):
        return torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)

    @contextmanager
    def stream(self):
        yield

    def record(self, compute):
        """Outputs then lie where they lay when it was recorded."""
        self.recorded += 1
        kept = []

        def replay():
            found = compute()
            if not kept:
                kept.extend(found)
            for backend, value in zip(kept, found, strict=True):
                backend.copy_(value)
            return kept

        return replay


@pytest.fixture(autouse=True)
def _pretended(monkeypatch, request):
    if "gpu" not in request.keywords:
        monkeypatch.setattr(aoti_torch, "Gpu", Pretended)
        monkeypatch.setattr(selecting, "cuda_host", lambda: HERE)


def said_to_be_for_cuda(native, target, capability="9.0", release="12.8"):
    """A copy of an artifact for the CPU that says it is for a GPU."""
    shutil.copytree(native, target)
    artifact = read_artifact(target)
    (variant,) = artifact.contract.variants
    options = {**variant.compiler.options, "compute_capability": capability, "cuda": release}
    changed = replace(
        variant, host=replace(variant.host, device="cuda"), compiler=replace(variant.compiler, options=options)
    )
    written = write_config(target, artifact.config, replace(artifact.contract, variants=[changed]))
    vouch(written.contract.digest)
    return target


def export_with_torch(source, target, **options):
    """An artifact for the CPU whose libraries PyTorch's runner opens, as it does those for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link.Linker, "_link_alone", lambda linker, _: linker.missing.add("a test"))
        return export(str(source), target, ExportOptions(backend="aoti", validate=False, **options)).path


@pytest.fixture(scope="module")
def native(checkpoint, tmp_path_factory):
    options = {"batch_size": 3, "sequence_length": (CAPACITY,), "dynamic_batch_size": True}
    return export_with_torch(checkpoint("llama"), tmp_path_factory.mktemp("native") / "llama", **options)


@pytest.fixture(scope="module")
def on_device(native, tmp_path_factory):
    return said_to_be_for_cuda(native, tmp_path_factory.mktemp("cuda") / "llama")


@pytest.fixture
def model(on_device):
    return CompiledModelForCausalLM.from_pretrained(on_device)


@pytest.fixture
def source(checkpoint):
    return checkpoint("llama")


def check_greedy(model, source, rows, count):
    ids, mask = oracle.padded(rows, "left")
    found = model.generate(ids, mask, max_new_tokens=count, do_sample=False)
    for row, values in zip(rows, found, strict=True):
        expected = oracle.greedy(source, row, max_new_tokens=count)
        assert values[ids.shape[1] :][: len(expected)].tolist() == expected


def place_of(model):
    return model._engine._device.backend


def test_greedy_tokens_are_transformers_own_before_and_after_recording(model, source):
    for _ in range(2):
        check_greedy(model, source, ROWS, 20)
    assert place_of(model).recorded


def test_logits_of_every_token(model, source):
    for row in ROWS:
        found, expected = model(np.array([row])).logits[0], oracle.logits(source, row)
        assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def test_beams_move_what_is_on_the_device(model, source):
    row = ROWS[0]
    asked = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        ids = torch.tensor([row])
        expected = oracle.eager(source).generate(ids, attention_mask=torch.ones_like(ids), **asked)[0]
    assert model.generate(np.array([row]), **asked)[0].tolist() == expected.tolist()


def test_sessions_take_turns(model, source):
    other = model.new_session()
    streams = [each.stream(np.array([row]), max_new_tokens=8) for each, row in ((model, ROWS[0]), (other, ROWS[2]))]
    found = list(zip(*streams, strict=False))
    for row, tokens in zip((ROWS[0], ROWS[2]), zip(*found, strict=True), strict=True):
        assert oracle.greedy(source, row, max_new_tokens=8)[: len(tokens)] == list(tokens)


def test_sessions_in_threads(model, source):
    sessions = [model.new_session() for _ in range(3)]
    found = {}

    def answer(index):
        found[index] = sessions[index].generate(np.array([ROWS[index]]), max_new_tokens=12, do_sample=False)[0]

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, row in enumerate(ROWS):
        expected = oracle.greedy(source, row, max_new_tokens=12)
        assert found[index][len(row) :][: len(expected)].tolist() == expected


def test_a_conversation_goes_on_and_another_begins(model, source):
    row = list(ROWS[0])
    for question in ([7, 8], [9]):
        check_greedy(model, source, [row], 5)
        row += [*oracle.greedy(source, row, max_new_tokens=5), *question]
    check_greedy(model, source, [row], 5)
    check_greedy(model, source, [ROWS[2]], 5)


def test_caches_are_on_the_device_alone_and_go_with_their_session(model, source):
    check_greedy(model, source, ROWS, 4)
    session, device = model._session, model._engine._device
    for name, cache in session._caches.items():
        assert not cache.any(), name
        assert device._device_copies[cache.ctypes.data].any(), name
    held = len(device._device_copies)
    other = model.new_session()
    check_greedy(other, source, ROWS, 4)
    assert len(device._device_copies) > held
    del other
    gc.collect()
    assert len(device._device_copies) == held


def test_weights_are_copied_once_for_all_graphs(model, source):
    check_greedy(model, source, ROWS, 4)
    device = model._engine._device
    count = len(device._weights)
    assert count
    assert len(model._engine._opened) == 2
    model.new_session().generate(np.array([[5]]), max_new_tokens=2)
    assert len(device._weights) == count
    addresses = {each.data_ptr() for each in device._weights.values()}
    assert len(addresses) == count
    assert not addresses & {each.data_ptr() for each in model._engine._weights.values()}


def test_what_an_encoder_made_is_brought_when_it_changes():
    """A context is copied for the first token after `reset`, and not at every step."""
    shapes = {"encoder_keys": "float32", "bias": "float32"}
    (variant,) = handmade.contract(variants=[handmade.variant()]).variants
    graph = variant.graphs[0]
    context = [Input(name=name, dtype=dtype, shape=[1, 4], pad=0) for name, dtype in shapes.items()]
    graph = replace(graph, inputs=[*graph.inputs, *context])
    inputs = {
        spec.name: np.zeros([each if isinstance(each, int) else 1 for each in spec.shape], spec.dtype)
        for spec in graph.inputs
    }
    outputs = {"logits": np.zeros((1, 1, 320), np.float32), "new_key": inputs["key"], "new_value": inputs["value"]}
    device = Device(Pretended())
    step = device.bind(lambda given: [given[-1].sum() + torch.zeros(1, 1, 320)], graph, inputs, outputs)
    for past, value, seen in [(0, 1, 4), (1, 2, 4), (2, 2, 4), (0, 3, 12), (1, 5, 12)]:
        inputs["past_lengths"][0], inputs["bias"][:] = past, value
        step()
        assert outputs["logits"][0, 0, 0] == seen


@pytest.mark.slow
def test_encoder_decoders_look_at_what_is_on_the_device(tmp_path):
    source = zoo.make(tmp_path / "bart", "bart", zoo.TEXT)
    made = export_with_torch(source, tmp_path / "native", task=zoo.TEXT, **zoo.OPTIONS[zoo.TEXT])
    model = CompiledModel.from_pretrained(said_to_be_for_cuda(made, tmp_path / "cuda"))
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    for beams in (1, 3):
        for row in (ROWS[0], ROWS[2], ROWS[0]):
            with torch.inference_mode():
                eager = oracle.eager(source, "AutoModelForSeq2SeqLM")
                expected = eager.generate(torch.tensor([row]), num_beams=beams, **asked)[0].tolist()
            assert model.generate(np.array([row]), num_beams=beams, **asked)[0].tolist() == expected
    assert place_of(model).recorded


@pytest.mark.parametrize(
    ("made_for", "here", "message"),
    [
        ({}, CudaHost("12.8", "8.6"), "of compute capability 9.0; the one here has 8.6"),
        ({"capability": "8.0"}, CudaHost("12.8", "8.6"), "of compute capability 8.0; the one here has 8.6"),
        ({}, CudaHost("13.0", "9.0"), "with CUDA 12.8; PyTorch here is built for CUDA 13.0"),
        ({}, CudaHost("12.8", "", "nothing to see"), r"needs the device cuda; here are cpu \(nothing to see\)"),
    ],
)
def test_what_does_not_run_here_is_said_before_a_library_is_opened(
    native, tmp_path, monkeypatch, made_for, here, message
):
    monkeypatch.setattr(selecting, "cuda_host", lambda: here)
    target = said_to_be_for_cuda(native, tmp_path / "out", **made_for)
    for library in target.glob("*.so"):
        library.unlink()
    with pytest.raises(HostError, match=message):
        CompiledModel.from_pretrained(target)


def test_another_minor_release_of_cuda_is_no_hindrance(native, tmp_path, source):
    model = CompiledModel.from_pretrained(said_to_be_for_cuda(native, tmp_path / "out", release="12.6"))
    check_greedy(model, source, ROWS[:1], 2)


def test_the_device_is_that_of_the_code(native, on_device):
    with pytest.raises(HostError, match="was compiled for the device cpu, not for cuda"):
        CompiledModel.from_pretrained(native, device="cuda")
    with pytest.raises(HostError, match="was compiled for the device cuda, not for cpu"):
        CompiledModel.from_pretrained(on_device, device="cpu")
    with pytest.raises(UsageError, match="There is no device 'cuda:1'"):
        CompiledModel.from_pretrained(on_device, device="cuda:1")


@pytest.mark.parametrize(
    ("build", "release", "message"),
    [
        ("2.13.0+cpu", None, r"PyTorch 2\.13\.0\+cpu here is built without CUDA \(torch\.version\.cuda is None\)"),
        ("2.13.0", "12.8", r"built for CUDA 12\.8, sees no GPU \(the driver is too old\): nvidia-smi"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, build, release, message):
    def is_available():
        import warnings

        warnings.warn("the driver is too old", stacklevel=1)
        return False

    pretended = SimpleNamespace(
        __version__=build, version=SimpleNamespace(cuda=release), cuda=SimpleNamespace(is_available=is_available)
    )
    monkeypatch.setattr(cuda, "import_module", lambda name: pretended)
    found = cuda.cuda_host()
    assert found.capability == ""
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found.reason)


@pytest.fixture
def recorder(monkeypatch):
    """A Gpu, where PyTorch's own functions do nothing; `recorder.fails` lets recording fail."""
    told = SimpleNamespace(fails=False, replays=0)

    class Graph:
        def replay(self):
            told.replays += 1

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        yield
        if told.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    pretended = {
        "current_device": lambda: 0, "Stream": lambda device: "stream", "graph_pool_handle": lambda: "pool",
        "CUDAGraph": Graph, "graph": capture, "stream": lambda stream: nullcontext(),
    }  # fmt: skip
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)
    told.gpu = Gpu()
    return told


def test_a_recorded_run_is_replayed(recorder):
    found = [torch.ones(2)]
    runs = []
    replay = recorder.gpu.record(lambda: runs.append(1) or found)
    assert replay() is found
    assert (len(runs), recorder.replays) == (1, 1)


def test_what_cannot_be_recorded_runs_all_the_same_and_says_so_once(recorder):
    recorder.fails = True

    def compute():
        return [torch.ones(2)]

    with pytest.warns(RuntimeWarning, match="cannot record.*not permitted when stream is capturing$"):
        assert recorder.gpu.record(compute) is compute
    assert recorder.gpu.record(compute) is compute


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}], ids=str)
def test_an_export_for_the_gpu_answers_as_eager(checkpoint, tmp_path, options):
    """Validation asks it in a fresh process; here greedy tokens and beams."""
    source = checkpoint("llama")
    asked = ExportOptions(
        backend="aoti", device="cuda", batch_size=3, sequence_length=(CAPACITY,), accept_loss=True, **options
    )
    made = export(str(source), tmp_path / "out", asked)
    (variant,) = made.contract.variants
    major, minor = torch.cuda.get_device_capability()
    assert variant.host.device == "cuda"
    assert variant.compiler.options["compute_capability"] == f"{major}.{minor}"
    assert variant.accuracy.status in ("passed", "accepted")
    model = CompiledModelForCausalLM.from_pretrained(made.path)
    if not options:
        for _ in range(2):
            check_greedy(model, source, ROWS, 20)
        test_beams_move_what_is_on_the_device(model, source)


@pytest.mark.gpu
@needs_gpu
def test_encoders_on_the_gpu(checkpoint, tmp_path):
    source = checkpoint("bert", "AutoModel")
    asked = ExportOptions(backend="aoti", device="cuda", batch_size=2, sequence_length=(16, 48))
    assert export(str(source), tmp_path / "out", asked).contract.variants[0].accuracy.status == "passed"
