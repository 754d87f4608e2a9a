"""How fast are encoders, and how near to eager fp32: every backend of ours, eager PyTorch and OpenVINO.

MiniLM at 128 tokens, and two random models of the base size, BERT's at 128 tokens and ViT's at 224 pixels; batches of 1
and 8, all rows full. OpenVINO compiles the graph that torch.onnx.export makes: as it is told to compute in float32, in
bfloat16, and quantized by NNCF on the samples that our own static ranges come from.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import HERE, Answer, Contender, ContenderError, Target, alternate, environment, ratios, summary
from peers.catalog import OPENVINO, PEERS
from plan import Plan

__all__ = ["measure"]

BATCHES = (1, 8)
ROUNDS, CALLS = 3, 9
OURS = {
    "precast onnx": (),
    "precast aoti": ("--backend", "aoti"),
    "precast aoti bf16": ("--backend", "aoti", "--auto-cast", "matmul"),
    **{
        f"precast {backend} {scheme}": ("--backend", backend, "--quantize", scheme)
        for backend in ("onnx", "aoti")
        for scheme in ("a8w8", "a8w8-dynamic")
    },
}
PEER_PYTHON = PEERS / OPENVINO / "bin" / "python"
_HEADER = ["", "ms", "over eager", "largest difference", "least cosine"]


@dataclass(frozen=True)
class Case:
    """A checkpoint's folder, how it is exported, and what it is given, by name [batch, ...]."""

    name: str
    model: Path
    options: tuple[str, ...]
    inputs: dict[str, Any]


def measure(plan: Plan) -> Answer:
    """One table over all models and batches."""
    answer = Answer("Encoders", _HEADER)
    for case in _cases(plan):
        for batch in BATCHES:
            _measure(plan, case, batch, answer)
    return answer


def _cases(plan: Plan) -> Iterator[Case]:
    text = ("--task", "feature-extraction", "--sequence-length", "128")
    minilm = plan.model.parent / "all-MiniLM-L6-v2"
    if minilm.is_dir():
        yield Case("MiniLM", minilm, text, _prose(minilm, 128))
    yield Case("BERT base", _random(plan, "bert"), text, _text(128))
    pixels = np.random.default_rng(0).standard_normal((8, 3, 224, 224), np.float32)
    yield Case("ViT base", _random(plan, "vit"), ("--task", "feature-extraction"), {"pixel_values": pixels})


def _text(length: int) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(1000, 30000, (8, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _prose(model: Path, length: int) -> dict[str, Any]:
    """Eight rows of English, as many as a trained model needs to be itself."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    text = (HERE / "prose.txt").read_text()
    rows = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"][:8]
    return {**_text(length), "input_ids": np.array(rows)}


def _random(plan: Plan, kind: str) -> Path:
    """A checkpoint of random weights of the kind's base size."""
    import torch
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    folder = plan.work / f"random-{kind}"
    if not folder.is_dir():
        plan.note(f"making a random {kind}")
        torch.manual_seed(0)
        model: Any = BertModel(BertConfig()) if kind == "bert" else ViTModel(ViTConfig())
        model.save_pretrained(folder)
    return folder


def _measure(plan: Plan, case: Case, batch: int, answer: Answer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "inputs.npz"
        np.savez(given, **{name: values[:batch] for name, values in case.inputs.items()})
        contenders = _contenders(plan, case, batch, given, answer.notes)
        expected = _outputs(contenders["eager fp32"], given)
        accuracy = {name: _accuracy(expected, _outputs(each, given)) for name, each in contenders.items()}
        request = {"inputs": str(given), "calls": CALLS, "outputs": ""}
        actions = {name: partial(_timed, each, request) for name, each in contenders.items()}
        results = alternate(actions, plan.rounds(ROUNDS), plan.begin)
    _report(answer, f"{case.name}, batch {batch}", results, accuracy)


def _contenders(plan: Plan, case: Case, batch: int, given: Path, notes: list[str]) -> dict[str, Contender]:
    found = {"eager fp32": Contender("eager fp32", "contenders.eager_encode", case.model, plan.threads)}
    for name, options in OURS.items():
        key = f"{case.model.name}-{batch}-{name.replace(' ', '-')}"
        target = plan.artifacts.get(key, plan.work / key)
        try:
            if key not in plan.artifacts:
                plan.export_as(target, case.model, "--batch-size", str(batch), *case.options, *options)
            found[name] = Contender(name, "contenders.precast_encode", target, plan.threads)
        except ContenderError as error:
            notes.append(f"{case.name}: {error}")
    if not PEER_PYTHON.exists():
        notes.append("OpenVINO is not there (`make peers` installs it).")
        return found
    graph = _onnx(plan, case, batch, given)
    int8 = _quantized(plan, case, graph, given)
    for name, file, precision in (
        ("OpenVINO fp32", graph, "f32"),
        ("OpenVINO bf16", graph, "bf16"),
        ("OpenVINO int8", int8, "f32"),
    ):
        found[name] = Contender(name, "peers.ov_encode", file, plan.threads, precision, python=PEER_PYTHON)
    return found


def _onnx(plan: Plan, case: Case, batch: int, given: Path) -> Path:
    """The graph of torch.onnx.export, its shapes fixed."""
    import torch
    from transformers import AutoModel

    graph = plan.work / f"{case.model.name}-{batch}.onnx"
    if not graph.exists():
        plan.note(f"torch.onnx.export of {case.name}, batch {batch}")
        model = AutoModel.from_pretrained(case.model, attn_implementation="sdpa").eval()
        inputs = {name: torch.from_numpy(values) for name, values in np.load(given).items()}
        torch.onnx.export(model, (), str(graph), kwargs=inputs, dynamo=True, verbose=False)
    return graph


def _quantized(plan: Plan, case: Case, graph: Path, given: Path) -> Path:
    """The graph quantized by NNCF, which reads our own calibration samples, padded to the graph's shapes."""
    target = graph.with_suffix(".int8.xml")
    if target.exists():
        return target
    plan.note(f"NNCF of {graph.name}")
    shapes = {name: values.shape for name, values in np.load(given).items()}
    samples = {
        f"{number}/{name}": _fill(sample, name, shape)
        for number, sample in enumerate(_calibration(case))
        for name, shape in shapes.items()
    }
    file = given.with_name("samples.npz")
    np.savez(file, **samples)
    command = [str(PEER_PYTHON), "-m", "peers.ov_quantize", str(graph), str(file), str(target)]
    subprocess.run(command, cwd=HERE, env=environment(), check=True, stdout=subprocess.DEVNULL)
    return target


def _calibration(case: Case) -> list[dict[str, Any]]:
    from precast.exporter import ExportOptions
    from precast.exporter.checkpoint.resolve import resolve
    from precast.exporter.kinds.plan import make_plan
    from precast.exporter.quantize.calls import activation_samples

    sizes = {"sequence_length": (128,)} if "input_ids" in case.inputs else {}
    options = ExportOptions(task="feature-extraction", quantize="a8w8", batch_size=(1,), **sizes)
    checkpoint = resolve(str(case.model), options)
    samples = activation_samples(checkpoint, make_plan(checkpoint, options), options)
    return [{name: each.numpy() for name, each in sample.items()} for sample in samples]


def _fill(sample: dict[str, Any], name: str, shape: tuple[int, ...]) -> Any:
    """A sample's input in the graph's shape: every row the same, texts padded, with the mask that says so."""
    row = np.ones_like(sample["input_ids"]) if name == "attention_mask" else sample[name]
    missing = [(0, 0), *((0, size - had) for size, had in zip(shape[1:], row.shape[1:], strict=True))]
    return np.repeat(np.pad(row, missing), shape[0], axis=0)


def _outputs(contender: Contender, given: Path) -> Any:
    """The last hidden states, float32 [batch, positions, width]."""
    file = given.with_name("outputs.npy")
    with contender:
        contender.ask({"inputs": str(given), "calls": 1, "outputs": str(file)})
    return np.load(file)


def _accuracy(expected: Any, found: Any) -> dict[str, float]:
    one, other = (each.reshape(-1, each.shape[-1]).astype(np.float64) for each in (expected, found))
    cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    return {"difference": float(np.abs(one - other).max() / np.abs(one).max()), "cosine": float(cosines.min())}


def _timed(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    with contender:
        return contender.ask(request)


def _report(answer: Answer, title: str, results: dict[str, Any], accuracy: dict[str, dict[str, float]]) -> None:
    times = {name: [each["milliseconds"] for each in rounds] for name, rounds in results.items()}
    eager = times["eager fp32"]
    for name, values in times.items():
        loss = accuracy[name]
        speed = ratios(eager, values)["median"]
        answer.rows.append([f"{title}: {name}", f"{summary(values)['median']:.4g}", f"{speed:.2f} x",
                            f"{loss['difference']:.1e}", f"{loss['cosine']:.6f}"])  # fmt: skip
    answer.figures[title] = {
        name: {"milliseconds": summary(values), **accuracy[name]} for name, values in times.items()
    }
    for precision, ours in (
        ("fp32", "precast aoti"),
        ("bf16", "precast aoti bf16"),
        ("int8", "precast aoti a8w8"),
        ("int8", "precast onnx a8w8"),
    ):
        if ours in times and (peer := f"OpenVINO {precision}") in times:
            value = ratios(times[ours], times[peer])["median"]
            answer.targets.append(Target(f"{title}: {ours} over {peer}", value, 1.0))
    for backend in ("onnx", "aoti"):
        if (ours := f"precast {backend} a8w8") in times and f"precast {backend}" in times:
            speed = ratios(times[f"precast {backend}"], times[ours])["median"]
            answer.targets.append(Target(f"{title}: precast {backend} over its a8w8", speed, 1.5, is_floor=True))
    if "precast aoti bf16" in times:
        speed = ratios(eager, times["precast aoti bf16"])["median"]
        answer.targets.append(Target(f"{title}: eager fp32 over precast aoti bf16", speed, 3.0, is_floor=True))
