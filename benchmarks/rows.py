"""How much faster is a file of rows at batch 8 than at batch 1, and how much of the time is the model's own?

Prompts of 4 to 120 tokens of prose, 16 greedy new tokens each: SmolLM2-135M by ONNX Runtime in float32, and as native
code in 8 bits.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from harness import Answer, Contender, Target, alternate, ratios, summary
from plan import NATIVE, Plan
from schemes import PROSE

__all__ = ["CAPACITY", "COUNT", "measure", "texts"]

ROWS, COUNT, CAPACITY, ROUNDS = 80, 16, 256, 2
SCHEMES: dict[str, tuple[str, ...]] = {
    "onnx fp32": (), "native int8": NATIVE["aoti-int8"],
}  # fmt: skip
Row = dict[str, Any]


def measure(plan: Plan) -> Answer:
    """A line for each scheme."""
    answer = Answer(f"A file of {ROWS} rows", ["", "batch 1, rows/s", "batch 8, rows/s", "over batch 1", "in graphs"])
    for scheme, options in SCHEMES.items():
        _measure(plan, answer, scheme, options)
    return answer


def _measure(plan: Plan, answer: Answer, scheme: str, options: tuple[str, ...]) -> None:
    name = scheme.replace(" ", "-")
    artifacts = {
        batch: plan.artifacts.get(f"{name}-{batch}")
        or plan.export(f"artifact-rows-{name}-{batch}", *options, "--no-validate", batch=batch, capacity=CAPACITY)
        for batch in (1, 8)
    }
    asked = texts(artifacts[1], 40 if plan.is_quick else ROWS)
    contenders = {batch: Contender(name, "contenders.precast_rows", path, plan.threads)
                  for batch, path in artifacts.items()}  # fmt: skip
    request = {"texts": asked, "count": COUNT}
    with contenders[1] as one, contenders[8] as eight:
        actions = {"1": partial(one.ask, request), "8": partial(eight.ask, request)}
        results = alternate(actions, plan.rounds(ROUNDS), plan.begin)
    speeds = {batch: [len(asked) / each["seconds"] for each in found] for batch, found in results.items()}
    over = ratios(speeds["8"], speeds["1"])
    shares = [each["graph_seconds"] / each["seconds"] for each in results["8"]]
    equal = sum(map(str.__eq__, *(found[0]["answers"].splitlines() for found in results.values())))
    answer.figures[scheme] = {
        "batch_1_rows_per_second": summary(speeds["1"]), "batch_8_rows_per_second": summary(speeds["8"]),
        "over_batch_1": over, "graph_share": summary(shares), "equal_rows": equal,
    }  # fmt: skip
    medians = [f"{summary(speeds[batch])['median']:.2f}" for batch in ("1", "8")]
    share = summary(shares)["median"]
    answer.rows.append([scheme, *medians, f"{over['median']:.2f}", f"{share:.1%}"])
    answer.notes.append(f"{scheme}: {equal} of {len(asked)} rows have the same answer at both batch sizes.")
    answer.targets += [
        Target(f"{scheme}: batch 8 over batch 1", over["median"], 2.5, is_floor=True),
        Target(f"{scheme}: time in graph calls", share, 0.95, is_floor=True),
    ]


def texts(artifact: Any, count: int) -> list[str]:
    """Pieces of prose, of 4 to 120 tokens."""
    from precast.runtime.inputs.tokenizer import Tokenizer

    tokenizer, chance = Tokenizer(artifact), random.Random(5)
    ids = tokenizer.encode(PROSE.read_text("utf-8"))
    found = []
    for _ in range(count):
        length = chance.randint(4, 120)
        start = chance.randrange(max(1, len(ids) - length))
        found.append(tokenizer.decode(ids[start : start + length], skip_special_tokens=True))
    return found
