"""Lowers MiniLM and SmolLM2 to HLO with torch_xla, as torch_neuronx.trace does, and looks at what neuronx-cc would get.

    make neuron-hlo        # an environment of its own: torch 2.9's CUDA build and torch_xla, 7 GB, not in CI

The very programs that `--backend neuron` hands to the tracer go to XLA's CPU client, whose dump of each module is read:
which operators, whether any dimension is dynamic, whether every cache is updated in place (`input_output_alias`). XLA
runs them, too: the answers are compared with eager transformers. Writes docs/neuron-hlo.json and docs/neuron-hlo.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

DUMP = Path(tempfile.mkdtemp(prefix="precast-hlo-"))
# Both are read when torch_xla is imported.
os.environ["PJRT_DEVICE"] = "CPU"
os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=SyncTensorsGraph.*"

import torch  # noqa: E402
import torch_xla  # noqa: E402

from precast.exporter.backends.aten.lowering import lower  # noqa: E402
from precast.exporter.backends.neuron.xla_program import (  # noqa: E402
    NEURON_LOWERING,
    Body,
    build_body,
    cache_inputs,
    example_inputs,
    step_inputs,
)
from precast.exporter.checkpoint.resolve import resolve  # noqa: E402
from precast.exporter.kinds.plan import make_plan  # noqa: E402
from precast.exporter.kinds.trace import trace  # noqa: E402
from precast.exporter.options import ExportOptions  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
DYNAMIC = ("get-dimension-size", "set-dimension-size", "pad-to-static", "slice-to-dynamic", "dynamic-reshape")
GIVEN, SCHEDULED = "*.before_optimizations.txt", ".cpu_after_optimizations.txt"
PROMPT = "The capital of France is"
NEW_TOKENS = 8
ALLOWED = 1e-4
"""Of the largest value, as every float32 export is held to."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("minilm", type=Path)
    arguments.add_argument("smollm2", type=Path)
    arguments.add_argument("--output", type=Path, default=ROOT / "docs")
    given = arguments.parse_args()
    try:
        graphs = [*encoder(given.minilm), *decoder(given.smollm2)]
    finally:
        shutil.rmtree(DUMP, ignore_errors=True)
    packages = ("torch", "torch_xla", "transformers")
    found = {"versions": {name: version(name).split("+")[0] for name in packages}, "graphs": graphs}
    write(found, given.output)
    print((given.output / "neuron-hlo.md").read_text())


def programs(model: str, **options: Any) -> tuple[Any, Any, list[Body]]:
    """The checkpoint, the eager model, and what `--backend neuron` compiles of it."""
    asked = ExportOptions(backend="neuron", instance_type="inf2", **options)
    checkpoint = resolve(model, asked)
    plan = make_plan(checkpoint, asked)
    loaded = checkpoint.load(plan.task, plan.dtype)
    return checkpoint, loaded, [build_body(lower(program, NEURON_LOWERING)) for program in trace(loaded, plan, None)]


class OnXla:
    """Programs over one set of weights and of caches on XLA's device."""

    def __init__(self, bodies: list[Body]) -> None:
        self.device, self.bodies = torch_xla.device(), {body.graph.name: body for body in bodies}
        shared = {name: tensor for body in bodies for name, tensor in body.weights.items()}
        self.weights = {name: tensor.to(self.device) for name, tensor in shared.items()}
        self.caches = [each.to(self.device) for each in example_inputs(cache_inputs(bodies[0].graph))]
        for body in bodies:
            body.module.to(self.device)
        torch_xla.sync()
        self.modules: dict[str, Path] = {}

    def __call__(self, name: str, *given: torch.Tensor) -> list[torch.Tensor]:
        """Run a graph once, its caches updated in place; the outputs."""
        body = self.bodies[name]
        weights = [self.weights[each] for each in body.weights]
        results = body.module(*weights, *self.caches, *(each.to(self.device) for each in given))
        first = len(results) - len(self.caches)
        for cache, new in zip(self.caches, results[first:], strict=True):
            cache.copy_(new)
        outputs = results[:first]
        # XLA donates a buffer only where nobody else holds it.
        del results
        known = set(DUMP.glob(GIVEN))
        torch_xla.sync()
        if made := set(DUMP.glob(GIVEN)) - known:
            self.modules[name] = max(made, key=lambda path: path.stat().st_size)
        return [each.cpu() for each in outputs]


def encoder(path: Path) -> list[dict[str, Any]]:
    options = {"task": "feature-extraction", "batch_size": 1, "sequence_length": (32, 128)}
    checkpoint, eager, bodies = programs(str(path), **options)
    device, entries = OnXla(bodies), []
    for body in bodies:
        batch = checkpoint.tokenizer(
            [PROMPT], padding="max_length", max_length=int(body.graph.length), return_tensors="pt"
        )  # fmt: skip
        answers = device(body.graph.name, *(batch[spec.name] for spec in body.graph.inputs))
        with torch.no_grad():
            expected = eager(**batch).last_hidden_state
        seen = batch["attention_mask"].bool()
        difference = float((answers[0][seen] - expected[seen]).abs().max() / max(1.0, float(expected.abs().max())))
        entries.append(looked_at("all-MiniLM-L6-v2", body, device, {"max_relative_difference": difference}))
        assert difference <= ALLOWED, f"{body.graph.name}: XLA differs from eager by {difference:.2g}"
    return entries


def decoder(path: Path) -> list[dict[str, Any]]:
    """A prompt and a few steps, greedy, over one set of weights and caches."""
    checkpoint, eager, bodies = programs(
        str(path), task="text-generation", batch_size=1, sequence_length=(128,), prefill_lengths=(64,)
    )
    device, prefill, step = OnXla(bodies), bodies[0].graph, bodies[-1].graph
    ids = checkpoint.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = eager.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    tokens, worst = [], 0.0
    for number, wanted in enumerate(expected.logits):
        graph, new = (prefill, ids) if number == 0 else (step, torch.tensor([tokens[-1:]]))
        logits = device(graph.name, *_given(graph, new, ids.shape[1] + number - 1 if number else 0))[0][0, 0]
        worst = max(worst, float((logits - wanted[0]).abs().max() / max(1.0, float(wanted.abs().max()))))
        tokens.append(int(logits.argmax()))
    theirs = expected.sequences[0, ids.shape[1] :].tolist()
    figures = {"max_relative_difference": worst, "greedy_tokens_equal": sum(map(int.__eq__, tokens, theirs))}
    assert worst <= ALLOWED, f"SmolLM2: XLA differs from eager by {worst:.2g}"
    assert tokens == theirs, f"SmolLM2: XLA generates {tokens}, eager {theirs}"
    return [looked_at("SmolLM2-135M-Instruct", body, device, figures) for body in bodies]


def _given(graph: Any, ids: torch.Tensor, past: int) -> list[torch.Tensor]:
    """What a session gives a graph for `ids` [1, n] after `past` tokens, padded to the graph's length."""
    count = ids.shape[1]
    values = {
        "input_ids": torch.nn.functional.pad(ids, (0, int(graph.length) - count)),
        "past_lengths": torch.tensor([past], dtype=torch.int32),
        "new_lengths": torch.tensor([count], dtype=torch.int32),
        "logit_positions": torch.tensor([[count - 1]]),
    }
    return [values[spec.name] for spec in step_inputs(graph)]


def looked_at(model: str, body: Body, device: OnXla, figures: dict[str, float]) -> dict[str, Any]:
    """What XLA was given for a graph. Raises AssertionError for what Neuron could not compile as it is meant."""
    path, caches = device.modules[body.graph.name], cache_inputs(body.graph)
    before = path.read_text()
    # A donated buffer becomes an alias when XLA has laid out the module.
    header = Path(str(path).removesuffix(GIVEN[1:]) + SCHEDULED).read_text().partition("\n")[0]
    operators = Counter(re.findall(r"^\s+(?:ROOT )?%[\w.-]+ = \S.*? ([a-z][\w-]*)\(", before, re.MULTILINE))
    dtypes = Counter(re.findall(r" = ([a-z]\w+)\[", before))
    dynamic = [name for name in DYNAMIC if operators[name]] + re.findall(r"\w+\[[\d,]*<=[\d,<=]*\]", before)
    aliases = {pair[1]: pair[0] for pair in re.findall(r"\{(\d*)\}: \((\d+), \{\}", header)}
    assert not dynamic, f"{body.graph.name} has dynamic shapes: {dynamic}"
    assert len(set(aliases.values())) == len(caches), (
        f"{body.graph.name} updates {len(aliases)} of {len(caches)} caches in place"
    )
    assert "f64" not in dtypes, f"{body.graph.name} computes in float64, which NeuronCores do not have"
    return {
        "model": model,
        "graph": body.graph.name,
        "inputs": {spec.name: spec.shape for spec in step_inputs(body.graph)},
        "weights": len(body.weights),
        "caches": len(caches),
        "input_output_aliases": len(aliases),
        "dynamic_dimensions": 0,
        "operators": dict(operators.most_common()),
        "dtypes": dict(dtypes.most_common()),
        "hlo_bytes": len(before),
        **{name: float(f"{value:.2g}") for name, value in figures.items()},
    }


def write(found: dict[str, Any], folder: Path) -> None:
    """The findings as JSON, and as the page that the documentation points to."""
    (folder / "neuron-hlo.json").write_text(json.dumps(found, indent=2) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    rows = [
        f"| {each['model']} | `{each['graph']}` | {each['weights']} | {each['caches']} "
        f"| {each['input_output_aliases']} | {each['dynamic_dimensions']} | {sum(each['operators'].values())} "
        f"| {each['max_relative_difference']:.1e} |"
        for each in found["graphs"]
    ]
    names = sorted({name for each in found["graphs"] for name in each["operators"]})
    counts = [
        f"| {name} | {' | '.join(str(each['operators'].get(name, '')) for each in found['graphs'])} |" for name in names
    ]
    heads = [f"{_short(each['model'])} `{each['graph']}`" for each in found["graphs"]]
    dtypes = "; ".join(
        f"{head}: {', '.join(each['dtypes'])}" for head, each in zip(heads, found["graphs"], strict=True)
    )
    (folder / "neuron-hlo.md").write_text(
        PAGE.format(
            versions=versions, rows="\n".join(rows), heads=" | ".join(heads), lines="|---" * len(heads),
            counts="\n".join(counts), dtypes=dtypes, new=NEW_TOKENS, steps=NEW_TOKENS - 1,
        )
    )  # fmt: skip


def _short(model: str) -> str:
    return next(word for word in model.split("-") if "LM" in word)


PAGE = """# What neuronx-cc is given

Made by `make neuron-hlo` ({versions}, XLA's CPU client); the numbers behind it are in
[neuron-hlo.json](neuron-hlo.json). No Neuron compiler and no device took part: this says that the programs of
`--backend neuron` lower to plain HLO of fixed shapes that updates its caches in place, and that XLA computes the eager
model's answers from it. Whether neuronx-cc compiles it is for `benchmarks/neuron/first_run.sh` to say.

| model | graph | weights | caches | `input_output_alias` | dynamic dimensions | instructions | difference from eager |
|---|---|---|---|---|---|---|---|
{rows}

The difference is relative to the largest value. SmolLM2's prompt and {steps} steps ran over one set of weights and
caches, and gave eager's {new} tokens. Weights and caches are parameters of each module; a cache is the same buffer
before and after. Instructions count those of nested computations, too.

| operator | {heads} |
|---{lines}|
{counts}

Types: {dtypes}. NeuronCores have no float64, and there is none.
"""


if __name__ == "__main__":
    main()
