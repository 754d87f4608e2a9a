"""What does a quantized artifact do beside decoding one prompt: batches, quotes, start-up, memory, a larger model?

SmolLM2-135M in int4 unless said otherwise. A batch is eight times the same prompt; the text that quotes is a passage
that the model is asked to repeat; memory is what the kernel counts, and of an export what it and its children hold
together beyond what its imports took. The larger model is Llama-shaped with half a billion random weights: its text is
noise, its speed is not.
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from contenders import memory
from harness import Answer, Contender, Target, alternate, environment, ratios, summary
from plan import PROMPT, Plan
from startup import first_token

__all__ = ["large_checkpoint", "measure"]

ROUNDS, COUNT, WARM_UP, BATCH = 5, 64, 16, 8
ONE, MANY, QUOTE, LOOKUP = "batch 1", "batch 8", "quoting, plain", "quoting, prompt lookup"
START, LARGE, LIMIT = "start to first token", "Llama of 0.5 billion", "limit: reading its weights"
PASSAGE = (
    "The lighthouse keeper wrote in his journal every evening. He noted the wind, the height of the waves, the ships "
    "that passed, and the names of those that did not come back. On the last page he wrote only that the lamp was lit."
)
Row = dict[str, Any]


def measure(plan: Plan) -> Answer:
    """Alternate in fresh processes; memory is measured once, since it does not vary."""
    artifact = plan.scheme_artifact("int4")
    many = plan.export("artifact-int4-batch-8", "--quantize", "int4", batch=BATCH)
    options = ("--quantize", "int4", "--symmetric", "--method", "rtn", "--group-size", "64", "--no-validate")
    large = plan.export("artifact-large", *options, model=large_checkpoint(plan))
    size = (large / "model.onnx.data").stat().st_size
    tokens, quote = _tokens(artifact, PROMPT), _tokens(artifact, f"Repeat: {PASSAGE}\n\n{PASSAGE}\n\nAgain: ")
    actions = {
        ONE: partial(_speed, _ours(plan, artifact), {"prompt": tokens}),
        MANY: partial(_speed, _ours(plan, many), {"prompt": tokens, "batch": BATCH}),
        QUOTE: partial(_speed, _ours(plan, artifact), {"prompt": quote}),
        LOOKUP: partial(_speed, _ours(plan, artifact), {"prompt": quote, "options": {"prompt_lookup_num_tokens": 10}}),
        START: partial(_start, plan, artifact),
        LARGE: partial(_speed, _ours(plan, large), {"prompt": list(range(100, 132)), "count": 24}),
        LIMIT: partial(_speed, Contender(LIMIT, "contenders.read_weights", size, plan.threads), {"count": 24}),
    }
    alternate({START: actions[START]}, 1)
    results = alternate(actions, plan.rounds(ROUNDS), plan.begin)
    values = {name: [each["value"] for each in rounds] for name, rounds in results.items()}
    return _answer(values, _second_process(plan, artifact), _export_peak(plan), size)


def _answer(values: dict[str, list[float]], private: int, peak: float, size: int) -> Answer:
    answer = Answer("Int4 in practice", ["", "median", "min", "max", "unit"])
    for name, each in values.items():
        figures = answer.figures[name] = summary(each)
        unit = "s" if name == START else "tokens/s"
        answer.rows.append([name, *(f"{figures[key]:.3g}" for key in ("median", "min", "max")), unit])
    answer.figures |= {"second_process_private_bytes": private, "export_peak_of_weights": peak, "large_bytes": size}
    over = {name: ratios(values[name], values[base])["median"] for name, base in
            ((MANY, ONE), (LOOKUP, QUOTE), (LARGE, LIMIT))}  # fmt: skip
    answer.targets = [
        Target("batch 8 over batch 1, tokens/s in total", over[MANY], 3.0, is_floor=True),
        Target("prompt lookup over plain decoding, quoting", over[LOOKUP], 1.8, is_floor=True),
        Target("Llama of 0.5 billion over the limit of reading its weights", over[LARGE], 0.7, is_floor=True),
        Target("start to first token", answer.figures[START]["median"], 0.5, unit="s"),
        Target("private memory of a second process", private / 1e6, 60, unit="MB"),
        Target("peak memory of the export over the fp32 weights", peak, 1.25),
    ]
    return answer


def _tokens(artifact: Path, text: str) -> list[int]:
    from precast.runtime.inputs.tokenizer import Tokenizer

    return Tokenizer(artifact).encode(text)


def _ours(plan: Plan, artifact: Path) -> Contender:
    return Contender(artifact.name, "contenders.precast_decode", artifact, plan.threads)


def _speed(contender: Contender, request: Row) -> Row:
    """Tokens per second of all rows together, after the first token, in a fresh process that is warm."""
    request = {"count": COUNT, "logits": "", **request}
    with contender:
        contender.ask({**request, "prompt": request.get("prompt", [])[::-1], "count": min(WARM_UP, request["count"])})
        answer = contender.ask(request)
    stamps = answer["stamps"]
    steps = len(answer.get("tokens", stamps)) - 1
    return {"value": request.get("batch", 1) * steps / (stamps[-1] - stamps[0])}


def _start(plan: Plan, artifact: Path) -> Row:
    return {"value": first_token(plan, artifact)["seconds"]}


def _second_process(plan: Plan, artifact: Path) -> int:
    """What a second process that serves the same artifact holds for itself alone, after its first answer."""
    request = {"prompt": list(range(100, 110)), "count": 8, "logits": ""}
    with _ours(plan, artifact) as first, _ours(plan, artifact) as second:
        for each in (first, second):
            each.ask(request)
        return memory.private(second.process_id)


def _export_peak(plan: Plan) -> float:
    """The most that an int4 export and its children hold, beyond its imports, in multiples of the fp32 weights."""
    imports = [sys.executable, "-c", "import contenders.precast_export as it, sys; it._import(); sys.stdin.read()"]
    with subprocess.Popen(imports, cwd=Path(__file__).parent, env=environment(), stdin=subprocess.PIPE) as idle:
        base = _settled(idle.pid)
        idle.communicate()
    command = plan.command(plan.work / "artifact-peak", "--quantize", "int4", batch=1)
    highest = 0
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as export:
        while export.poll() is None:
            highest = max(highest, memory.tree(export.pid))
            time.sleep(0.05)
    weights = (plan.ready_artifact() / "model.onnx.data").stat().st_size
    return round((highest - base) / weights, 3)


def _settled(process: int) -> int:
    """What a process holds once it no longer grows."""
    before, now = -1, 0
    while now > before:
        before = now
        time.sleep(3)
        now = memory.tree(process)
    return now


def large_checkpoint(plan: Plan) -> Path:
    """A Llama-shaped checkpoint of half a billion random weights, made at the first call."""
    checkpoint = plan.work / "llama-0.5b"
    if not checkpoint.exists():
        plan.note("making a Llama of half a billion random weights")
        subprocess.run([sys.executable, "-m", "contenders.random_llama", checkpoint], cwd=Path(__file__).parent,
                       env=environment(), check=True)  # fmt: skip
    return checkpoint
