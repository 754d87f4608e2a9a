"""What do four bits cost a model whose weights were never on a grid, per byte: ours beside the peers'?

Weights only: ours and llama.cpp's are dequantized into the eager float32 model, so that no kernel's rounding of
activations counts; onnxruntime-genai and OpenVINO run with activations in float32. All read the same calibration text,
and are compared with the float32 model on held-out text. Two models: SmolLM2-135M, whose weights come from a Q4_1 file
and lie on that grid, and the small Llama that `train_llama.py` trains in float32, which `make trained` calls.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from gguf_file import mean_squares, tensor_bytes, write_gguf
from harness import HERE, Answer, Contender, ContenderError, environment
from peers.catalog import CHECKPOINT, COMPLETE, GENAI, LLAMA, OPENVINO, PEERS
from plan import BUILD, Plan
from schemes import PROSE, compare, forced, mean_accuracy

__all__ = ["OURS", "measure"]

TRAINED = BUILD / "trained-llama"
METHODS = "exporter/precast/exporter/quantize"
ROW = 512
"""Tokens of a row of text."""
Row = dict[str, Any]


def _int4(group: int, method: str, **more: Any) -> Row:
    return {"quantize": "int4", "group_size": group, "quantize_method": method, **more}


OURS: Mapping[str, Row] = {
    "int8": {"quantize": "int8"},
    "int8 by row, awq": {"quantize": "int8", "backend": "aoti"},
    **{f"int4 {method} {group}": _int4(group, method) for group in (32, 64, 128) for method in ("search", "gptq")},
    **{f"int4 {method} 64": _int4(64, method) for method in ("rtn", "awq")},
    **{f"int4 symmetric gptq {group}": _int4(group, "gptq", symmetric=True) for group in (32, 128)},
    **{f"auto, KL {kl:g}": {"quantize": "auto", "max_kl": kl} for kl in (0.01, 0.001)},
}  # fmt: skip
LLAMA_TYPES = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q4_1", "Q4_0")
_BUILDER = ("-p", "int4", "--extra_options", "accuracy_level=1")
GENAI_WAYS: Mapping[str, Sequence[str]] = {
    "int4 RTN 32": (*_BUILDER, "block_size=32"),
    "int4 RTN 32, asymmetric": (*_BUILDER, "block_size=32", "is_symmetric=false"),
    "int4 k_quant 32": (*_BUILDER, "block_size=32", "algo_config=k_quant"),
    "int4 k_quant_mixed 32": (*_BUILDER, "block_size=32", "algo_config=k_quant_mixed"),
}
_OPTIMUM = ("--task", "text-generation-with-past", "--weight-format", "int4", "--ratio", "1.0", "--group-size", "64")
_OWN_TEXT = ("--dataset", "auto")
OPENVINO_WAYS: Mapping[str, Sequence[str]] = {
    "int4 64": _OPTIMUM,
    "int4 64, awq and scale estimation": (*_OPTIMUM, "--awq", "--scale-estimation", *_OWN_TEXT),
}


@dataclass(frozen=True)
class Subject:
    """A model, the text it is measured on, and the text that methods may look at (None: the built-in one)."""

    name: str
    folder: Path
    held_out: Path
    rows: int
    calibration: Path | None


SUBJECTS = (
    Subject("trained Llama", TRAINED, TRAINED / "heldout.txt", 8, TRAINED / "calibration.txt"),
    Subject("SmolLM2-135M", CHECKPOINT, PROSE, 2, None),
)


def measure(plan: Plan) -> Answer:
    """Every scheme of every model that is there."""
    answer = Answer("Four bits from floats", ["", "MB", "bits/weight", "KL", "top-1", "perplexity", "CPU s"])
    for subject in SUBJECTS:
        if not subject.folder.exists():
            answer.notes.append(f"{subject.name} is not there: `make peers trained` makes it.")
            continue
        bench = _Bench(plan, subject)
        found = bench.all_figures(answer.notes)
        answer.figures[subject.name] = {"weights": bench.weights, "reference_perplexity": bench.perplexity, **found}
        answer.rows.append([subject.name, *[""] * 6])
        answer.rows += [_row(name, each) for name, each in found.items()]
    return answer


def _row(name: str, figures: Row) -> list[str]:
    return [
        f"  {name}",
        f"{figures['bytes'] / 1e6:.2f}",
        f"{figures['bits_per_weight']:.2f}",
        f"{figures['kl_divergence']:.4f}",
        f"{figures['top_1_agreement']:.3f}",
        f"{figures['perplexity']:.2f}",
        f"{figures['cpu_seconds']:.0f}" if "cpu_seconds" in figures else "",
    ]


class _Bench:
    """One model: its reference, and what each scheme makes of it."""

    def __init__(self, plan: Plan, subject: Subject) -> None:
        from transformers import AutoTokenizer

        self._plan, self._subject = plan, subject
        self._work = plan.work / "four-bits" / subject.folder.name
        self._work.mkdir(parents=True, exist_ok=True)
        self._code = machine.revision(METHODS)
        self._tokenizer = AutoTokenizer.from_pretrained(subject.folder)
        rows = 1 if plan.is_quick else subject.rows
        ids = torch.tensor(self._tokenizer(subject.held_out.read_text("utf-8"))["input_ids"])
        self._passages = ids[: rows * ROW].split(ROW)
        model = _load(subject.folder)
        self.weights = sum(parameter.numel() for parameter in model.parameters())
        self._reference = [_logits(model, passage) for passage in self._passages]
        self.perplexity = self._scores(self._reference)["perplexity"]

    def all_figures(self, notes: list[str]) -> dict[str, Row]:
        """By scheme; one that fails is left out, with the reason among the notes.

        It takes an hour or so: what a run that was interrupted has measured is not measured again, ours by the same
        code only.
        """
        found: dict[str, Row] = {}
        for name, figures in self._contenders():
            if any(part in name for part in self._plan.without):
                continue
            self._plan.note(f"{self._subject.name}: {name}")
            key = f"{name} {self._code}" if name.startswith("precast") else name
            try:
                found[name] = self._measured(key, figures)
            except (ContenderError, subprocess.CalledProcessError) as error:
                notes.append(f"{self._subject.name}, {name}: {_last_line(error)}")
        return found

    def _measured(self, key: str, figures: Callable[[], Row]) -> Row:
        kept = self._work / "figures.json"

        def known() -> dict[str, Row]:
            return json.loads(kept.read_text("utf-8")) if kept.exists() else {}

        if key not in known():
            found = figures()
            kept.write_text(json.dumps(known() | {key: found}), "utf-8")
        return known()[key]

    def _contenders(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        for name, options in OURS.items():
            yield f"precast {name}", lambda options=options: self._ours(options)
        for kind in LLAMA_TYPES:
            yield f"llama.cpp {kind}", lambda kind=kind: self._llama(kind, False)
            if "K" in kind:
                yield f"llama.cpp {kind}, imatrix", lambda kind=kind: self._llama(kind, True)
        for name, options in GENAI_WAYS.items():
            yield f"onnxruntime-genai {name}", lambda name=name, options=options: self._genai(name, options)
        for name, options in OPENVINO_WAYS.items():
            yield f"OpenVINO {name}", lambda name=name, options=options: self._openvino(name, options)

    def _ours(self, options: Row) -> Row:
        from precast.exporter.checkpoint.resolve import resolve
        from precast.exporter.kinds.plan import make_plan
        from precast.exporter.options import ExportOptions
        from precast.exporter.quantize.choose import quantize_model
        from precast.exporter.quantize.linear import Packed

        chosen = ExportOptions(**options, calibration=self._subject.calibration, sequence_length=ROW)
        checkpoint = resolve(str(self._subject.folder), chosen)
        model, started = _load(self._subject.folder), time.process_time()
        words = quantize_model(model, checkpoint, make_plan(checkpoint, chosen), chosen)
        seconds = time.process_time() - started
        packed = [module for module in model.modules() if isinstance(module, Packed)]
        size = sum(each.nbytes for each in {id(each): each for each in packed}.values())
        size += sum(parameter.nbytes for parameter in model.parameters())
        return {**self._figures(model, size), "cpu_seconds": round(seconds, 1), "words": words}

    def _llama(self, kind: str, has_importance: bool) -> Row:
        from transformers import AutoModelForCausalLM

        _need(LLAMA)
        source, target = self._source_file(), self._work / f"{kind}.gguf"
        importance = [str(self._importance())] if has_importance else []
        python = PEERS / LLAMA / "bin" / "python"
        _run([python, "-m", "peers.llama_quantize", str(source), str(target), kind, *importance])
        model = AutoModelForCausalLM.from_pretrained(
            target.parent, gguf_file=target.name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        size = tensor_bytes(target)
        target.unlink()
        return self._figures(model, size)

    def _source_file(self) -> Path:
        path = self._work / "source.gguf"
        if not path.exists():
            write_gguf(_load(self._subject.folder), self._subject.folder, path)
        return path

    def _importance(self) -> Path:
        path = self._work / "importance.npz"
        if not path.exists():
            text = (self._subject.calibration or HERE.parent / METHODS / "calibration.txt").read_text("utf-8")
            ids = torch.tensor(self._tokenizer(text)["input_ids"])
            np.savez(path, **mean_squares(_load(self._subject.folder), ids.split(ROW)))
        return path

    def _genai(self, name: str, options: Sequence[str]) -> Row:
        _need(GENAI)
        target = self._work / f"genai-{name.replace(' ', '-')}"
        python = PEERS / GENAI / "bin" / "python"
        command = [python, "-I", "-m", "onnxruntime_genai.models.builder", "-m", str(self._subject.folder), "-e", "cpu",
                   "-o", str(target), "-c", str(self._work), *options]  # fmt: skip
        return self._peer(Contender(name, "peers.genai", target, 1, python=python), target, command, "*.data")

    def _openvino(self, name: str, options: Sequence[str]) -> Row:
        _need(OPENVINO)
        target = self._work / f"openvino-{name.replace(' ', '-')}"
        tools = PEERS / OPENVINO / "bin"
        command = [tools / "optimum-cli", "export", "openvino", "-m", str(self._subject.folder), *options, str(target)]
        contender = Contender(name, "peers.ov", target, 1, "exact", python=tools / "python")
        return self._peer(contender, target, command, "openvino_model.bin")

    def _peer(self, contender: Contender, target: Path, command: Sequence[Any], weights: str) -> Row:
        shutil.rmtree(target, ignore_errors=True)
        _run(command)
        file = self._work / "logits.npy"
        with contender:
            found = [forced(contender, passage.tolist(), file) for passage in self._passages]
        file.unlink()
        size = sum(path.stat().st_size for path in target.glob(weights))
        shutil.rmtree(target)
        return {**self._scores(found), **self._size(size)}

    def _figures(self, model: Any, size: int) -> Row:
        return {**self._scores([_logits(model, passage) for passage in self._passages]), **self._size(size)}

    def _size(self, size: int) -> Row:
        return {"bytes": size, "bits_per_weight": round(8 * size / self.weights, 3)}

    def _scores(self, found: Sequence[Any]) -> Row:
        parts = zip(self._passages, self._reference, found, strict=True)
        result = mean_accuracy([compare(passage.tolist(), exact, logits) for passage, exact, logits in parts])
        return {key: value for key, value in result.items() if key != "reference_perplexity"}


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def _logits(model: Any, passage: torch.Tensor) -> Any:
    """The logits that predict each token of the passage but the first."""
    return model(input_ids=passage[None, :-1], use_cache=False).logits[0].float().numpy()


def _last_line(error: Exception) -> str:
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return lines[-1][-200:] if lines else repr(error)


def _need(library: str) -> None:
    if not (PEERS / library / COMPLETE).exists():
        raise ContenderError(f"{library} is not there (`make peers` installs it)")


def _run(command: Sequence[Any]) -> None:
    """Raises CalledProcessError."""
    subprocess.run(
        [str(part) for part in command], cwd=HERE, env=environment(), check=True, capture_output=True, text=True
    )
