"""What does an export cost beyond PyTorch's own two steps, in time and in memory?

Time: everything but validation, beside `torch.export` and `torch.onnx.export` of the same model. Loading the
checkpoint counts on our side only, which is the stricter reading; with it on both sides stands beside.
Memory: the most that the process held beyond what its imports took, in multiples of the fp32 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness import Answer, Contender, Target, alternate, ratios, summary
from plan import CAPACITY, Plan

__all__ = ["measure"]

ROUNDS = 3
OURS, TORCH = "precast export", "torch.export + torch.onnx.export"
# These steps are validation: the reference's answers, and the comparison with them.
VALIDATION = ("reference", "validate")
Step = dict[str, Any]


def measure(plan: Plan) -> Answer:
    """Alternate in fresh processes, then export once with validation for its memory."""
    common = (CAPACITY, plan.threads)
    ours = Contender(OURS, "contenders.precast_export", plan.model, plan.work / "artifact", *common)
    torch = Contender(TORCH, "contenders.torch_export", plan.model, plan.work / "torch.onnx", *common)
    actions: dict[str, Callable[[], dict[str, Any]]] = {
        OURS: lambda: _once(ours, {"validate": False}),
        TORCH: lambda: _once(torch, {}),
    }
    results = alternate(actions, plan.rounds(ROUNDS), plan.begin)
    for file in plan.work.glob("torch.onnx*"):
        file.unlink()
    plan.note("with validation")
    validated = _once(ours, {"validate": True})
    weights = (plan.work / "artifact" / "model.onnx.data").stat().st_size
    return _answer(results, validated, weights)


def _once(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: a second export in the same one would find caches warm and memory taken."""
    with contender:
        return contender.ask(request)


def _answer(results: dict[str, list[dict[str, Any]]], validated: dict[str, Any], weights: int) -> Answer:
    ours = [_merged(each["steps"]) for each in results[OURS]]
    memory, base = _merged(validated["steps"]), validated["base_bytes"]
    answer = Answer("Export, fp32, capacity 512", ["step", "seconds", "peak beyond imports, MB", "of weights"])
    for name, step in memory.items():
        seconds = summary([each[name]["seconds"] for each in ours] if name in ours[0] else [step["seconds"]])
        extra = step["peak_bytes"] - base
        answer.figures.setdefault("steps", {})[name] = {"seconds": seconds, "peak_bytes": extra}
        answer.rows.append([name, f"{seconds['median']:.1f}", f"{extra / 1e6:.0f}", f"{extra / weights:.2f}"])
    highest = max(memory, key=lambda name: memory[name]["peak_bytes"])
    share = (memory[highest]["peak_bytes"] - base) / weights
    answer.notes.append(f"The memory's peak is at the step {highest!r}.")
    answer.figures |= {"weight_bytes": weights, "peak_step": highest, "base_bytes": base}
    strict = _times(answer, ours, results[TORCH])
    answer.targets = [
        Target("export without validation over torch.export + torch.onnx.export, time", strict, 2.0),
        Target("peak memory beyond imports over the fp32 weights", round(share, 3), 2.5),
    ]
    return answer


def _merged(steps: list[Step]) -> dict[str, Step]:
    """Steps by name; what lies between steps is one step."""
    found: dict[str, Step] = {}
    for step in steps:
        known = found.setdefault(step["step"], {"seconds": 0.0, "peak_bytes": 0})
        known["seconds"] += step["seconds"]
        known["peak_bytes"] = max(known["peak_bytes"], step["peak_bytes"])
    return found


def _times(answer: Answer, ours: list[dict[str, Step]], theirs: list[dict[str, Any]]) -> float:
    """Fill in whole times and their ratios; returns the stricter ratio."""
    whole = [sum(step["seconds"] for name, step in each.items() if name not in VALIDATION) for each in ours]
    alone = [each["seconds"]["torch.export"] + each["seconds"]["torch.onnx"] for each in theirs]
    loaded = [time + each["seconds"]["load"] for time, each in zip(alone, theirs, strict=True)]
    strict, both = ratios(whole, alone), ratios(whole, loaded)
    for name, times in ((OURS, whole), (TORCH, alone), (f"{TORCH} + load", loaded)):
        answer.rows.append([name, f"{summary(times)['median']:.1f}", "", ""])
        answer.figures[name] = {"seconds": summary(times)}
    answer.figures |= {"over_torch": strict, "over_torch_with_load": both}
    answer.figures["torch_peak_bytes"] = max(each["peak_bytes"] - each["base_bytes"] for each in theirs)
    answer.notes.append(f"With loading counted on both sides the ratio is {both['median']:.2f}.")
    median: float = strict["median"]
    return median
