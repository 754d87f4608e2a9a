"""Is our decoding as fast as ONNX Runtime lets it be, faster than onnxruntime-genai's, and right?

SmolLM2-135M in fp32, batch 1, capacity 512: 107 prompt tokens, then 128 greedy ones, of which 127 come from decoding.
Our runtime is measured through its public API, beside a bare loop over the very same graph.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import Answer, Contender, Target, alternate, ratios, summary
from plan import PEER_MODEL, PEER_PYTHON, PROMPT, Plan

__all__ = ["measure"]

COUNT = 128
WARM_UP = 16
ROUNDS = 10
GENERATE, STREAM, BARE, GENAI = "precast generate()", "precast stream()", "bare loop", "onnxruntime-genai"
LIMIT = "limit: reading the weights"
Request = dict[str, Any]
Results = dict[str, list[dict[str, Any]]]
Checked = dict[str, dict[str, Any]]


def measure(plan: Plan) -> Answer:
    """Compare all contenders with the reference, then let them take turns."""
    artifact = plan.ready_artifact()
    request: Request = {"prompt": _prompt(artifact), "count": COUNT, "logits": ""}
    contenders = _contenders(plan, artifact)
    plan.note("eager reference")
    reference = _checked(Contender("eager", "contenders.eager_decode", plan.model, plan.threads), request, plan.work)
    checks = {each.name: _agreement(_checked(each, request, plan.work), reference) for each in contenders}
    size = (artifact / "model.onnx.data").stat().st_size
    limit = Contender(LIMIT, "contenders.read_weights", size, plan.threads)
    actions = {each.name: partial(_timed, each, request) for each in (*contenders, limit)}
    answer = _answer(alternate(actions, plan.rounds(ROUNDS), plan.begin), checks)
    answer.figures |= {"prompt_tokens": len(request["prompt"]), "new_tokens": COUNT, "weight_bytes": size}
    answer.figures["peer_packages"] = contenders[-1].facts.get("packages", {})
    answer.notes += [problem] if (problem := plan.peer_problem()) else []
    return answer


def _prompt(artifact: Path) -> list[int]:
    from precast.runtime.inputs.tokenizer import Tokenizer

    return Tokenizer(artifact).encode(PROMPT)


def _contenders(plan: Plan, artifact: Path) -> list[Contender]:
    ours = "contenders.precast_decode"
    found = [
        Contender(GENERATE, ours, artifact, plan.threads, "generate"),
        Contender(STREAM, ours, artifact, plan.threads, "stream"),
        Contender(BARE, "contenders.bare_decode", artifact / "model.onnx", plan.threads),
    ]
    if plan.peer_problem() is None:
        found.append(Contender(GENAI, "peers.genai", PEER_MODEL, plan.threads, python=PEER_PYTHON))
    return found


def _timed(contender: Contender, request: Request) -> dict[str, Any]:
    """In a fresh process, after a few tokens that touch all memory and start all threads.

    Where its weights happen to lie in physical memory makes a process faster or slower by a tenth for as long as it
    lives, so a process that stayed for all rounds would be measured once, however often it was asked.
    """
    with contender:
        contender.ask({**request, "count": WARM_UP})
        return contender.ask(request)


def _checked(contender: Contender, request: Request, work: Path) -> dict[str, Any]:
    """An answer that is not timed, with the logits of every step."""
    file = work / "logits.npy"
    with contender:
        answer = contender.ask({**request, "logits": str(file)})
    answer["logits"] = np.load(file)
    file.unlink()
    return answer


def _agreement(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Equal tokens up to the first that differs, and how far logits are apart as long as the text before is equal."""
    differing = np.flatnonzero(np.array(found["tokens"]) != np.array(reference["tokens"]))
    equal = int(differing[0]) if len(differing) else COUNT
    steps = slice(0, min(equal + 1, COUNT))
    difference = np.abs(found["logits"][steps].astype(np.float64) - reference["logits"][steps]).max()
    return {
        "equal_tokens": equal,
        "tokens": COUNT,
        "max_logit_difference": float(f"{difference:.2g}"),
        "max_logit": float(f"{np.abs(reference['logits'][steps]).max():.3g}"),
    }


def _answer(results: Results, checks: Checked) -> Answer:
    speeds = {name: [_speed(each["stamps"]) for each in rounds] for name, rounds in results.items()}
    firsts = {name: [1e3 * each["stamps"][0] for each in rounds] for name, rounds in results.items()}
    answer = Answer(
        "Decoding, fp32, batch 1",
        ["", "tokens/s", "over bare loop", "first token ms", "equal tokens", "max |logit difference|"],
    )
    for name in results:
        figures = answer.figures[name] = {
            "decode_tokens_per_second": summary(speeds[name]),
            "over_bare_loop": ratios(speeds[name], speeds[BARE]),
        }
        if name != LIMIT:
            figures |= {"first_token_ms": summary(firsts[name]), "agreement": checks[name]}
        answer.rows.append(_row(name, figures))
    answer.targets = _targets(speeds, checks)
    return answer


def _speed(stamps: list[float]) -> float:
    """Tokens per second after the first token, which waits for the prompt."""
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    compared = figures["over_bare_loop"]
    row = [
        name,
        f"{figures['decode_tokens_per_second']['median']:.1f}",
        f"{compared['median']:.3f} ({compared['min']:.2f}–{compared['max']:.2f})",
    ]
    if (check := figures.get("agreement")) is None:
        return [*row, "", "", ""]
    return [
        *row,
        f"{figures['first_token_ms']['median']:.0f}",
        f"{check['equal_tokens']} of {check['tokens']}",
        f"{check['max_logit_difference']:.1e} of {check['max_logit']:.1f}",
    ]


def _targets(speeds: dict[str, list[float]], checks: Checked) -> list[Target]:
    def over(name: str, other: str) -> float | None:
        return ratios(speeds[name], speeds[other])["median"] if other in speeds else None

    equal = min(checks[name]["equal_tokens"] for name in (GENERATE, STREAM))
    return [
        Target("generate() over the bare loop, tokens/s", over(GENERATE, BARE), 0.9, is_floor=True),
        Target("stream() over the bare loop, tokens/s", over(STREAM, BARE), 0.9, is_floor=True),
        Target("generate() over onnxruntime-genai, tokens/s", over(GENERATE, GENAI), 1.4, is_floor=True),
        Target("greedy tokens equal to eager fp32", equal, COUNT, is_floor=True),
    ]
