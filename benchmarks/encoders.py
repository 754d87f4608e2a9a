"""How fast are encoders, and how near to eager fp32: every backend of ours, eager PyTorch and OpenVINO.

MiniLM at 128 tokens, and two random models of the base size, BERT's at 128 tokens and ViT's at 224 pixels; batches of 1
and 8, all rows full. OpenVINO compiles the graph that torch.onnx.export makes, once as it is told to compute in float32
and once in bfloat16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import Answer, Contender, ContenderError, Target, alternate, ratios, summary
from peers.catalog import OPENVINO, PEERS
from plan import Plan

__all__ = ["measure"]

BATCHES = (1, 8)
ROUNDS, CALLS = 3, 9
OURS = {
    "precast onnx": (),
    "precast aoti": ("--backend", "aoti"),
    "precast aoti bf16": ("--backend", "aoti", "--auto-cast", "matmul"),
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
        yield Case("MiniLM", minilm, text, _text(128))
    yield Case("BERT base", _random(plan, "bert"), text, _text(128))
    pixels = np.random.default_rng(0).standard_normal((8, 3, 224, 224), np.float32)
    yield Case("ViT base", _random(plan, "vit"), ("--task", "feature-extraction"), {"pixel_values": pixels})


def _text(length: int) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(1000, 30000, (8, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


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
    for name, precision in (("OpenVINO fp32", "f32"), ("OpenVINO bf16", "bf16")):
        found[name] = Contender(name, "peers.ov_encode", graph, plan.threads, precision, python=PEER_PYTHON)
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
    for precision, ours in (("fp32", "precast aoti"), ("bf16", "precast aoti bf16")):
        if ours in times and (peer := f"OpenVINO {precision}") in times:
            value = ratios(times[ours], times[peer])["median"]
            answer.targets.append(Target(f"{title}: {ours} over {peer}", value, 1.0))
    if "precast aoti bf16" in times:
        speed = ratios(eager, times["precast aoti bf16"])["median"]
        answer.targets.append(Target(f"{title}: eager fp32 over precast aoti bf16", speed, 3.0, is_floor=True))
