"""What does native code do beside decoding one prompt: start-up, a batch, busy neighbours, memory?

SmolLM2-135M in 8 bits and as its file has it (4 bits), by libraries that stand alone, beside the same by ONNX Runtime.
A neighbour is a Python program that counts, on one thread. Memory is what is resident after a first answer less what is
mapped of the artifact and of packed weights.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from contenders import memory
from harness import Answer, Contender, Target, alternate, environment, ratios, summary
from plan import PROMPT, Plan
from schemes import speed
from startup import first_token

__all__ = ["measure"]

ROUNDS, COUNT, WARM_UP, BATCH, NEIGHBOURS = 5, 64, 8, 8, 2
SCHEMES = ("aoti-int8", "aoti-source", "int8", "source")
ALONE, BUSY, MANY, START = "alone", "two busy neighbours", "batch 8", "start to first token"
Row = dict[str, Any]


def measure(plan: Plan) -> Answer:
    """Alternate in fresh processes; memory is measured once, since it does not vary."""
    artifacts = {scheme: plan.scheme_artifact(scheme) for scheme in SCHEMES}
    many = plan.export("artifact-aoti-int8-batch-8", "--backend", "aoti", "--quantize", "int8", batch=BATCH)
    tokens = _tokens(artifacts["aoti-int8"])
    actions = {}
    for scheme, artifact in artifacts.items():
        ours = Contender(scheme, "contenders.precast_decode", artifact, plan.threads)
        actions |= {
            f"{scheme}, {ALONE}": partial(_timed, ours, {"prompt": tokens}),
            f"{scheme}, {BUSY}": partial(_beside_neighbours, ours, {"prompt": tokens}),
            f"{scheme}, {START}": partial(first_token, plan, artifact),
        }
    batch = Contender(MANY, "contenders.precast_decode", many, plan.threads)
    actions[f"aoti-int8, {MANY}"] = partial(_timed, batch, {"prompt": tokens, "batch": BATCH})
    alternate({name: action for name, action in actions.items() if name.endswith(START)}, 1)
    results = alternate(actions, plan.rounds(ROUNDS), plan.begin)
    return _answer(results, {scheme: _unmapped(plan, artifact) for scheme, artifact in artifacts.items()})


def _tokens(artifact: Path) -> list[int]:
    from precast.runtime.inputs.tokenizer import Tokenizer

    return Tokenizer(artifact).encode(PROMPT)


def _timed(contender: Contender, request: Row) -> Row:
    """Tokens per second of all rows together after the first token, in a fresh process that is warm."""
    request = {"count": COUNT, "logits": "", **request}
    with contender:
        contender.ask({**request, "prompt": request["prompt"][::-1], "count": WARM_UP})
        stamps = contender.ask(request)["stamps"]
    return {"speed": request.get("batch", 1) * speed(stamps), "first_token": stamps[0]}


def _beside_neighbours(contender: Contender, request: Row) -> Row:
    with ExitStack() as stack:
        for _ in range(NEIGHBOURS):
            stack.enter_context(_neighbour())
        return _timed(contender, request)


@contextmanager
def _neighbour() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"], env=environment()) as process:
        try:
            yield
        finally:
            process.kill()


def _unmapped(plan: Plan, artifact: Path) -> int:
    request = {"prompt": list(range(100, 110)), "count": 8, "logits": ""}
    with Contender(artifact.name, "contenders.precast_decode", artifact, plan.threads) as ours:
        ours.ask(request)
        return memory.beside(ours.process_id, artifact, Path(environment()["PRECAST_HOME"]))


def _answer(results: dict[str, list[Row]], unmapped: dict[str, int]) -> Answer:
    answer = Answer("Native code in practice", ["", "tokens/s", "first token ms", "start to first token s", "MB"])
    speeds = {name: [each["speed"] for each in found] for name, found in results.items() if "speed" in found[0]}
    for scheme in SCHEMES:
        first = [1e3 * each["first_token"] for each in results[f"{scheme}, {ALONE}"]]
        figures = answer.figures[scheme] = {
            "tokens_per_second": summary(speeds[f"{scheme}, {ALONE}"]),
            "first_token_ms": summary(first),
            "start_to_first_token_s": summary([each["seconds"] for each in results[f"{scheme}, {START}"]]),
            "slowdown_beside_neighbours": ratios(speeds[f"{scheme}, {ALONE}"], speeds[f"{scheme}, {BUSY}"]),
            "unmapped_bytes": unmapped[scheme],
        }
        cells = (f"{figures[key]['median']:.3g}" for key in list(figures)[:3])
        answer.rows.append([scheme, *cells, f"{unmapped[scheme] / 1e6:.0f}"])
    answer.figures["batch_over_one"] = ratios(speeds[f"aoti-int8, {MANY}"], speeds[f"aoti-int8, {ALONE}"])
    answer.targets = [
        Target("batch 8 over batch 1, int8", answer.figures["batch_over_one"]["median"], 5, is_floor=True)
    ]
    for scheme in SCHEMES[:2]:
        found = answer.figures[scheme]
        answer.targets += [
            Target(f"{scheme}, {START}", found["start_to_first_token_s"]["median"], 0.45, unit="s"),
            Target(f"{scheme}, slowdown beside {BUSY}", found["slowdown_beside_neighbours"]["median"], 3),
            Target(f"{scheme}, memory over the weights", found["unmapped_bytes"] / 1e6, 90, unit="MB"),
        ]
    return answer
