"""What do answers of a given form, a draft and a saved session cost, or save?

SmolLM2-135M in 8 bits as native code; the draft is its first four layers, which guess badly: what counts is that it
costs next to nothing where it does not help. The model as its own draft is always right and never quicker.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from harness import HERE, Answer, Contender, Target, alternate, environment, ratios, summary
from plan import PROMPT, Plan
from schemes import PROSE, speed

__all__ = ["measure"]

ROUNDS, COUNT, SESSION = 9, 96, 400
Row = dict[str, Any]


def measure(plan: Plan) -> Answer:
    """All in one process, in turn."""
    artifact = plan.scheme_artifact("aoti-int8")
    draft = plan.artifacts.get("draft") or plan.export(
        "artifact-draft", "--backend", "aoti", "--quantize", "int8", "--no-validate", model=_cut(plan)
    )
    tokenize = _tokenizer(artifact)
    prompt, text = tokenize(PROMPT), tokenize(PROSE.read_text("utf-8"))[:SESSION]
    with Contender("generate", "contenders.precast_generate", artifact, plan.threads, draft) as ours:
        actions = {
            how: partial(ours.ask, {"how": how, "prompt": text if how == "session" else prompt, "count": COUNT})
            for how in ("plain", "form", "draft", "session")
        }
        alternate(actions, 1)
        results = alternate(actions, plan.rounds(ROUNDS), plan.begin)
    return _answer(results)


def _cut(plan: Plan) -> Path:
    checkpoint = plan.work / "draft"
    if not checkpoint.exists():
        plan.note("cutting the draft")
        subprocess.run([sys.executable, "-m", "contenders.cut_layers", plan.model, checkpoint], cwd=HERE,
                       env=environment(), check=True)  # fmt: skip
    return checkpoint


def _tokenizer(artifact: Path) -> Any:
    from precast.runtime.inputs.tokenizer import Tokenizer

    return Tokenizer(artifact).encode


def _answer(results: dict[str, list[Row]]) -> Answer:
    answer = Answer("generate()'s extras, native int8", ["", "tokens/s", "over plain", ""])
    speeds = {how: [speed(each["stamps"]) for each in found] for how, found in results.items() if how != "session"}
    for how, values in speeds.items():
        over = ratios(values, speeds["plain"])
        answer.figures[how] = {"tokens_per_second": summary(values), "over_plain": over}
        answer.rows.append([how, f"{summary(values)['median']:.1f}", f"{over['median']:.3f}", ""])
    guessed, right = (sum(each[key] for each in results["draft"]) for key in ("guessed", "right"))
    is_same = results["draft"][0]["tokens"] == results["plain"][0]["tokens"]
    answer.figures["draft"] |= {"guessed": guessed, "right": right, "same_tokens": is_same}
    opened = [1e3 * each["seconds"] for each in results["session"]]
    answer.figures["session"] = {"tokens": SESSION, "bytes": results["session"][0]["bytes"], "open_ms": summary(opened)}
    answer.rows.append([f"open a session of {SESSION} tokens", "", "", f"{summary(opened)['median']:.1f} ms"])
    answer.targets = [
        Target("a form, over plain", answer.figures["form"]["over_plain"]["median"], 0.95, is_floor=True),
        Target(
            "a draft that guesses badly, over plain",
            answer.figures["draft"]["over_plain"]["median"],
            0.9,
            is_floor=True,
        ),
        Target(f"open a session of {SESSION} tokens", summary(opened)["median"], 50, unit="ms"),
    ]
    return answer
