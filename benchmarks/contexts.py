"""What does native decoding cost as the context grows, beside the peers; and how near to the memory's limit is it?

SmolLM2-135M at batch 1 in artifacts for 2,048 tokens: contexts of prose, then 32 greedy tokens, of which the last 31
come from decoding. A context's answer is compared with eager fp32's, token by token. The larger model is Llama-shaped
with half a billion random weights: its text is noise, its speed is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import Answer, Contender, Target, alternate, ratios, summary
from peers.catalog import peers
from plan import NATIVE, Plan
from practice import large_checkpoint
from schemes import PROSE, contender, equal, speed

__all__ = ["measure"]

CONTEXTS = (128, 512, 1024, 1984)
CAPACITY, COUNT, WARM_UP, ROUNDS = 2048, 32, 8, 3
OURS = ("aoti-int8", "aoti-int8-kv16", "aoti-source", "aoti-source-kv16", "aoti-bf16")
RIVALS = ("onnxruntime-genai int8", "OpenVINO GenAI fp32", "OpenVINO GenAI int8", "llama.cpp Q4_1")
LARGE = {"large int8": ("--quantize", "int8", "--method", "rtn")}
Row = dict[str, Any]
Values = dict[str, list[float]]


def measure(plan: Plan) -> Answer:
    """One table: a line for each contender and context, then the larger model."""
    answer = Answer("Contexts and a larger model, native code", ["", "tokens/s", "first token ms", "equal tokens"])
    _contexts(plan, answer)
    _large(plan, answer)
    return answer


def _contexts(plan: Plan, answer: Answer) -> None:
    artifacts = {scheme: _artifact(plan, scheme) for scheme in OURS}
    contenders = {each.name: each for each in (*_ours(plan, artifacts), *_theirs(plan, answer.notes))}
    requests = [_request(context) for context in _texts(artifacts["aoti-int8"])]
    plan.note("eager reference")
    with Contender("eager", "contenders.eager_decode", plan.model, plan.threads) as eager:
        expected = [eager.ask(request)["tokens"] for request in requests]
    actions = {name: partial(_timed, each, requests) for name, each in contenders.items()}
    results = alternate(actions, plan.rounds(ROUNDS), plan.begin)
    for index, context in enumerate(CONTEXTS):
        answers = {name: [each["answers"][index] for each in rounds] for name, rounds in results.items()}
        speeds = {name: [speed(one["stamps"]) for one in each] for name, each in answers.items()}
        found = answer.figures[f"context {context}"] = {}
        for name, each in answers.items():
            found[name] = {
                "decode_tokens_per_second": summary(speeds[name]),
                "first_token_ms": summary([1e3 * one["stamps"][0] for one in each]),
                "equal_tokens": equal(each[0]["tokens"], expected[index]),
            }
            answer.rows.append([f"{name}, context {context}", *_cells(found[name])])
        answer.targets += _targets(context, speeds)


def _artifact(plan: Plan, scheme: str) -> Path:
    name = f"long-{scheme}"
    return plan.artifacts.get(name) or plan.export(name, *NATIVE[scheme], capacity=CAPACITY)


def _ours(plan: Plan, artifacts: dict[str, Path]) -> Iterator[Contender]:
    for scheme, artifact in artifacts.items():
        yield Contender(f"precast {scheme}", "contenders.precast_decode", artifact, plan.threads)


def _theirs(plan: Plan, notes: list[str]) -> Iterator[Contender]:
    for peer in peers(plan.model):
        if peer.name not in RIVALS:
            continue
        if problem := peer.problem():
            notes.append(problem)
        else:
            yield contender(peer, plan)


def _texts(artifact: Path) -> Iterator[list[int]]:
    """Prose of each length; each begins elsewhere, so that nobody can use what it computed for another."""
    from precast.runtime.inputs.tokenizer import Tokenizer

    tokens = Tokenizer(artifact).encode(PROSE.read_text("utf-8"))
    for context in CONTEXTS:
        yield np.resize(np.roll(tokens, -context), context).tolist()


def _request(prompt: list[int]) -> Row:
    return {"prompt": prompt, "count": COUNT, "logits": "", "capacity": CAPACITY}


def _timed(process: Contender, requests: list[Row]) -> Row:
    """In a fresh process that is warm."""
    with process:
        process.ask({**requests[0], "prompt": requests[0]["prompt"][::-1], "count": WARM_UP})
        return {"answers": [process.ask(request) for request in requests]}


def _cells(figures: Row) -> list[str]:
    medians = [figures[key]["median"] for key in ("decode_tokens_per_second", "first_token_ms")]
    return [f"{medians[0]:.1f}", f"{medians[1]:.0f}", f"{figures['equal_tokens']} of {COUNT}"]


def _targets(context: int, speeds: Values) -> Iterator[Target]:
    pairs = (
        ("aoti-int8", "onnxruntime-genai int8", 1.6),
        ("aoti-int8-kv16", "onnxruntime-genai int8", 1.6),
        ("aoti-source", "llama.cpp Q4_1", 1.5),
        ("aoti-source-kv16", "llama.cpp Q4_1", 1.5),
        ("aoti-bf16", "OpenVINO GenAI fp32", 1.3),
    )
    for scheme, rival, bound in pairs:
        ours = f"precast {scheme}"
        value = ratios(speeds[ours], speeds[rival])["median"] if {ours, rival} <= speeds.keys() else None
        yield Target(f"{ours} over {rival}, context {context}", value, bound, is_floor=True)


def _large(plan: Plan, answer: Answer) -> None:
    actions = {}
    for name, options in LARGE.items():
        key = name.replace(" ", "-")
        artifact = plan.artifacts.get(key) or plan.export(
            key, "--backend", "aoti", "--no-validate", *options, model=large_checkpoint(plan)
        )
        size = (artifact / "model.safetensors").stat().st_size
        request = {"prompt": list(range(100, 132)), "count": COUNT, "logits": ""}
        ours = Contender(name, "contenders.precast_decode", artifact, plan.threads)
        actions[name] = partial(_timed, ours, [request])
        limit = Contender(f"limit of {name}", "contenders.read_weights", size, plan.threads)
        actions[f"limit of {name}"] = partial(_timed, limit, [request])
    results = alternate(actions, plan.rounds(ROUNDS), plan.begin)
    speeds = {name: [speed(each["answers"][0]["stamps"]) for each in rounds] for name, rounds in results.items()}
    for name, values in speeds.items():
        found = answer.figures[name] = summary(values)
        answer.rows.append([name, f"{found['median']:.1f}", "", ""])
    for name in LARGE:
        share = ratios(speeds[name], speeds[f"limit of {name}"])["median"]
        answer.targets.append(Target(f"{name} over the limit of reading its weights", share, 0.8, is_floor=True))
