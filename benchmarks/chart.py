"""`python benchmarks/chart.py RESULTS.json CHART.png`: draw what `schemes` found, speed against accuracy; or what
`four_bits` did, loss against size.

Needs matplotlib, which is among the development tools.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

# Below this the difference is rounding; what is exact is drawn there, since a logarithm has no zero.
EXACT = 1e-5
OURS, THEIRS = "#c2410c", "#64748b"
MARKERS = {"precast": "o", "onnxruntime-genai": "s", "openvino-genai": "^", "llama-cpp-python": "D", "ctranslate2": "v",
           "transformers": "P"}  # fmt: skip


def main(results: str, target: str) -> None:
    """Draw one point per contender."""
    document = json.loads(Path(results).read_text("utf-8"))
    draw = _draw_four_bits if "four_bits" in document["questions"] else _draw_schemes
    draw(document).savefig(target)


def _draw_schemes(document: dict[str, Any]) -> Any:
    contenders = document["questions"]["schemes"]["figures"]["contenders"]
    figure, axes = plt.subplots(figsize=(10, 6), dpi=150, layout="constrained")
    points = {name: _point(each) for name, each in contenders.items()}
    for name, (x, y) in points.items():
        _draw(axes, x, y, contenders[name]["library"])
    _frame(axes, document["machine"])
    for name, height in _spread(axes, points).items():
        _label(axes, name, points[name], height, is_ours=contenders[name]["library"] == "precast")
    return figure


# What is drawn beside the others' points: the methods of ours, at sizes that the best of each can be compared at.
LINES = {"precast int4 rtn": "#fdba74", "precast int4 search": "#fb923c", "precast int4 awq": "#ea580c",
         "precast int4 gptq": "#9a3412"}  # fmt: skip
PEER_MARKERS = {"llama.cpp": "D", "onnxruntime-genai": "s", "OpenVINO": "^"}


def _draw_four_bits(document: dict[str, Any]) -> Any:
    """A panel per model."""
    models = document["questions"]["four_bits"]["figures"]
    figure, panels = plt.subplots(1, len(models), figsize=(7 * len(models), 6), dpi=130, layout="constrained")
    for axes, (model, figures) in zip(panels, models.items(), strict=True):
        found = {name: each for name, each in figures.items() if isinstance(each, dict)}
        _draw_loss(axes, found)
        axes.set_title(f"{model}: loss beside size, weights only", loc="left")
        axes.set_xlabel("bits per weight, scales and vocabulary included")
        axes.set_ylabel("KL divergence from float32, nats per token (down is better)")
        axes.grid(color="#e2e8f0", zorder=0, which="both")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def _draw_loss(axes: Any, found: dict[str, Any]) -> None:
    axes.set_yscale("log")
    points = {name: (each["bits_per_weight"], max(each["kl_divergence"], EXACT / 10)) for name, each in found.items()}
    for line, color in LINES.items():
        sizes = sorted(points[name] for name in found if name.rpartition(" ")[0] == line)
        if sizes:
            axes.plot(*zip(*sizes, strict=True), "o-", color=color, label=f"{line} (groups of 128, 64, 32)", zorder=3)
    others = [name for name in found if name.rpartition(" ")[0] not in LINES and "symmetric" not in name]
    heights: dict[str, float] = {}
    for name in sorted(others, key=lambda each: -points[each][1]):
        is_ours, (x, y) = name.startswith("precast"), points[name]
        color, marker = (OURS, "*") if is_ours else (THEIRS, PEER_MARKERS[name.split(" ")[0]])
        axes.scatter(x, y, s=110 if is_ours else 45, color=color, marker=marker, zorder=4)
        near = [heights[other] for other in heights if abs(points[other][0] - x) < 2]
        heights[name] = min([y, *(height / 1.22 for height in near)])
        said = name.removeprefix("precast ")
        axes.annotate(said, (x, y), xytext=(x + 0.13, heights[name]), va="center", fontsize=7.5, color=color)
    axes.set_xlim(min(x for x, _ in points.values()) - 0.4, max(x for x, _ in points.values()) + 2.2)
    axes.legend(frameon=False, fontsize=8)


def _point(figures: dict[str, Any]) -> tuple[float, float]:
    divergence = figures["accuracy"]["kl_divergence"]
    return max(divergence, EXACT), figures["decode_tokens_per_second"]["median"]


def _draw(axes: Any, x: float, y: float, library: str) -> None:
    is_ours = library == "precast"
    axes.scatter(
        x, y, s=90 if is_ours else 55, color=OURS if is_ours else THEIRS, marker=MARKERS.get(library, "o"), zorder=3
    )


def _frame(axes: Any, machine: dict[str, Any]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(EXACT / 1.5, 8)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.08)
    axes.set_xlabel("KL divergence from fp32 eager, nats per token (left is exact)")
    axes.set_ylabel("decoded tokens per second (up is fast)")
    cores = machine["usable_cores"]
    axes.set_title(f"SmolLM2-135M, batch 1, {cores} cores of an {machine['cpu']}: speed beside accuracy", loc="left")
    axes.set_xticks([10.0**power for power in range(-5, 1)])
    axes.set_xticklabels(["≤ 0.00001", "0.0001", "0.001", "0.01", "0.1", "1"])
    axes.minorticks_off()
    axes.grid(color="#e2e8f0", zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _spread(axes: Any, points: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The heights of the labels, moved apart where points lie close together; in data units, from the highest down."""
    gap = (axes.get_ylim()[1] - axes.get_ylim()[0]) / 29
    heights: dict[str, float] = {}
    for name in sorted(points, key=lambda each: -points[each][1]):
        x, y = points[name]
        taken = [heights[other] for other in heights if 1 / 20 < points[other][0] / x < 20]
        heights[name] = min([y, *(height - gap for height in taken)])
    return heights


def _label(axes: Any, name: str, point: tuple[float, float], height: float, is_ours: bool) -> None:
    axes.annotate(
        name,
        point,
        xytext=(point[0] * 1.2, height),
        va="center",
        zorder=2,
        fontsize=9,
        color=OURS if is_ours else "#334155",
        fontweight="bold" if is_ours else "normal",
        arrowprops={"arrowstyle": "-", "color": "#cbd5e1", "lw": 0.8} if height < point[1] else None,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
