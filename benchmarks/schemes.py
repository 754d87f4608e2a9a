"""What does each scheme of quantization give and cost, here and with the peers: speed beside accuracy.

SmolLM2-135M, batch 1, capacity 512: 107 prompt tokens, then 128 greedy ones, of which 127 come from decoding. Accuracy
is measured on prose that no quantizer has seen, against the checkpoint in eager fp32: every contender is given the
text's own tokens, one after the other as when it decodes (eager PyTorch and CTranslate2: all at once), and its logits
are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from contenders import memory
from harness import HERE, Answer, Contender, ContenderError, Target, alternate, ratios, summary
from peers.catalog import Peer, peers
from plan import CAPACITY, NATIVE, PROMPT, Plan

__all__ = ["PROSE", "compare", "contender", "equal", "forced", "mean_accuracy", "measure", "speed"]

COUNT, WARM_UP, ROUNDS = 128, 16, 5
SCHEMES = ("fp32", "source", "int8", "int4", *NATIVE)
PROSE = HERE / "prose.txt"
# Each is as many tokens as the artifact holds; the last of them is only predicted.
PASSAGES = 2
Row = dict[str, Any]
Values = dict[str, list[float]]


@dataclass(frozen=True)
class Entrant:
    """Who takes part: ours where `library` is `precast`.

    Attributes:
        disk: bytes of what it loads.
        weights: bytes that it reads for a token, where that is known.
    """

    contender: Contender
    library: str
    scheme: str
    disk: int
    weights: int | None = None

    @property
    def name(self) -> str:
        """As in the table."""
        return self.contender.name

    @property
    def limit(self) -> str:
        """The name of its limit."""
        return f"limit: reading {self.weights / 1e6:.0f} MB" if self.weights else ""


def measure(plan: Plan) -> Answer:
    """Check everybody's accuracy first, then let them take turns."""
    answer = Answer("Schemes, batch 1, beside the peers", _HEADER)
    exact = plan.scheme_artifact("fp32")
    plan = replace(plan, artifacts={"fp32": exact, **plan.artifacts})
    entrants = [*_ours(plan, answer.notes), *_theirs(plan, answer.notes)]
    tokenize = _tokenizer(exact)
    request: Row = {"prompt": tokenize(PROMPT), "count": COUNT, "logits": ""}
    passages = _passages(tokenize(PROSE.read_text("utf-8")), 1 if plan.is_quick else PASSAGES)
    accuracy, reference = _checks(plan, entrants, request, passages, answer.notes)
    entrants = [each for each in entrants if each.name in accuracy]
    actions = {each.name: partial(_timed, each.contender, request) for each in entrants}
    limits = {each.limit: each.weights for each in entrants if each.weights}
    actions |= {name: partial(_timed, _limit(name, size, plan), request) for name, size in limits.items()}
    results = alternate(actions, plan.rounds(ROUNDS), plan.begin)
    answer.figures |= {"prompt_tokens": len(request["prompt"]), "new_tokens": COUNT,
                       "predicted_tokens": sum(len(passage) - 1 for passage in passages)}  # fmt: skip
    _report(answer, entrants, results, accuracy, reference)
    return answer


def _ours(plan: Plan, notes: list[str]) -> Iterator[Entrant]:
    for scheme in dict.fromkeys((*SCHEMES, *plan.artifacts)):
        if any(part in f"precast {scheme}" for part in plan.without):
            continue
        try:
            artifact = plan.scheme_artifact(scheme)
        except ContenderError as error:
            notes.append(f"precast {scheme} is missing: {error}")
            continue
        contender = Contender(f"precast {scheme}", "contenders.precast_decode", artifact, plan.threads)
        weights = sum(file.stat().st_size for name in ("*.data", "*.safetensors") for file in artifact.glob(name))
        yield Entrant(contender, "precast", scheme, _disk(artifact), weights)


def _theirs(plan: Plan, notes: list[str]) -> Iterator[Entrant]:
    for peer in peers(plan.model):
        if any(part in peer.name for part in plan.without):
            notes.append(f"{peer.name}: left out by --without")
        elif problem := peer.problem():
            notes.append(problem)
        else:
            yield Entrant(contender(peer, plan), peer.library, peer.scheme, _disk(peer.model))


def contender(peer: Peer, plan: Plan) -> Contender:
    """The process that a peer runs in."""
    return Contender(peer.name, peer.module, peer.model, plan.threads, *peer.arguments, python=peer.python)


def _limit(name: str, size: int, plan: Plan) -> Contender:
    return Contender(name, "contenders.read_weights", size, plan.threads)


def _disk(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def _tokenizer(artifact: Path) -> Any:
    from precast.runtime.inputs.tokenizer import Tokenizer

    return Tokenizer(artifact).encode


def _passages(tokens: list[int], count: int) -> list[list[int]]:
    return [tokens[index * CAPACITY : (index + 1) * CAPACITY] for index in range(count)]


def _timed(contender: Contender, request: Row) -> Row:
    """In a fresh process, after a few tokens that touch all memory and start all threads.

    They come after another prompt: some libraries keep what they computed for a prompt, and the first token of the same
    one would be a matter of looking it up.
    """
    started = time.perf_counter()
    with contender:
        loaded = time.perf_counter() - started
        contender.ask({**request, "prompt": request["prompt"][::-1], "count": WARM_UP})
        answer = contender.ask(request)
        process = contender.process_id
        return answer | {"load": loaded, "peak": memory.peak(process), "pss": memory.proportional(process)}


def _checks(
    plan: Plan, entrants: Sequence[Entrant], request: Row, passages: list[list[int]], notes: list[str]
) -> tuple[dict[str, Row], list[int]]:
    """Everybody's accuracy, and the reference's greedy tokens; who fails is left out, with the reason in `notes`."""
    file = plan.work / "logits.npy"
    plan.note("eager reference")
    with Contender("eager", "contenders.eager_decode", plan.model, plan.threads) as eager:
        tokens: list[int] = eager.ask(request)["tokens"]
        reference = [forced(eager, passage, file) for passage in passages]
    found: dict[str, Row] = {}
    for each in entrants:
        plan.note(f"accuracy of {each.name}")
        try:
            with each.contender as contender:
                given = zip(passages, reference, strict=True)
                parts = [compare(text, logits, forced(contender, text, file)) for text, logits in given]
            found[each.name] = mean_accuracy(parts)
        except ContenderError as error:
            notes.append(f"left out: {error}")
    file.unlink()
    return found, tokens


def forced(contender: Contender, passage: list[int], file: Path) -> Any:
    """The logits that predict each token of the passage but the first, float32 `[len(passage) - 1, vocabulary]`."""
    contender.ask({"text": passage[:-1], "logits": str(file)})
    return np.load(file)


def compare(passage: list[int], reference: Any, found: Any) -> Row:
    """Per predicted token: negative log likelihood in both, divergence in nats, whether the likeliest is the same."""
    size = reference.shape[1]
    theirs, ours = _log_softmax(reference), _log_softmax(found[:, :size])
    following = (np.arange(len(theirs)), passage[1:])
    return {
        "loss": -ours[following],
        "reference_loss": -theirs[following],
        "divergence": (np.exp(theirs) * (theirs - ours)).sum(-1),
        "equal": theirs.argmax(-1) == ours.argmax(-1),
    }


def _log_softmax(logits: Any) -> Any:
    """In float64: some contenders differ from the reference by rounding only."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mean_accuracy(parts: Sequence[Row]) -> Row:
    means = {key: float(np.concatenate([part[key] for part in parts]).mean()) for key in parts[0]}
    return {
        "perplexity": round(float(np.exp(means["loss"])), 3),
        "reference_perplexity": round(float(np.exp(means["reference_loss"])), 3),
        "kl_divergence": float(f"{max(means['divergence'], 0):.3g}"),
        "top_1_agreement": round(means["equal"], 4),
    }


_HEADER = ["", "tokens/s", "of limit", "first token ms", "load s", "peak MB", "PSS MB", "disk MB", "perplexity", "KL",
           "top-1", "equal tokens"]  # fmt: skip


def _report(
    answer: Answer, entrants: Sequence[Entrant], results: dict[str, list[Row]], accuracy: dict[str, Row],
    reference: list[int],
) -> None:  # fmt: skip
    speeds = {name: [speed(each["stamps"]) for each in rounds] for name, rounds in results.items()}
    firsts = {name: [1e3 * each["stamps"][0] for each in rounds] for name, rounds in results.items()}
    contenders = answer.figures["contenders"] = {}
    for each in entrants:
        rounds = results[each.name]
        figures = contenders[each.name] = {
            "library": each.library,
            "scheme": each.scheme,
            "packages": each.contender.facts.get("packages", {}),
            "decode_tokens_per_second": summary(speeds[each.name]),
            "first_token_ms": summary(firsts[each.name]),
            "load_s": summary([one["load"] for one in rounds]),
            "peak_bytes": summary([one["peak"] for one in rounds], 6),
            "pss_bytes": summary([one["pss"] for one in rounds], 6),
            "disk_bytes": each.disk,
            "accuracy": {**accuracy[each.name], "equal_tokens": equal(rounds[0]["tokens"], reference)},
        }
        if each.weights:
            figures["of_limit"] = ratios(speeds[each.name], speeds[each.limit])
        answer.rows.append(_row(each.name, figures))
    _report_limits(answer, speeds, {each.limit: each.weights for each in entrants if each.weights})
    answer.targets = list(_Judge(speeds, firsts, accuracy).targets())
    answer.targets += _limit_targets(contenders)


def _report_limits(answer: Answer, speeds: Values, limits: dict[str, int]) -> None:
    found = answer.figures["limits"] = {}
    for name, size in limits.items():
        found[name] = {"weight_bytes": size, "decode_tokens_per_second": summary(speeds[name])}
        median = found[name]["decode_tokens_per_second"]["median"]
        answer.rows.append([name, f"{median:.1f}", *[""] * (len(_HEADER) - 2)])


def _limit_targets(contenders: Row) -> list[Target]:
    share = contenders.get("precast fp32", {}).get("of_limit", {}).get("median")
    return [Target("precast fp32 over the limit that reading its weights sets", share, 0.9, is_floor=True)]


def speed(stamps: list[float]) -> float:
    """Tokens per second after the first token, which waits for the prompt."""
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])


def equal(tokens: list[int], reference: list[int]) -> int:
    """How many come before the first that differs."""
    differing = np.flatnonzero(np.array(tokens) != np.array(reference))
    return int(differing[0]) if len(differing) else len(reference)


def _row(name: str, figures: Row) -> list[str]:
    accuracy = figures["accuracy"]
    return [
        name,
        f"{figures['decode_tokens_per_second']['median']:.1f}",
        f"{figures['of_limit']['median']:.2f}" if "of_limit" in figures else "",
        f"{figures['first_token_ms']['median']:.0f}",
        f"{figures['load_s']['median']:.2f}",
        *(f"{figures[key]['median'] / 1e6:.0f}" for key in ("peak_bytes", "pss_bytes")),
        f"{figures['disk_bytes'] / 1e6:.0f}",
        f"{accuracy['perplexity']:.2f}",
        f"{accuracy['kl_divergence']:.2g}",
        f"{accuracy['top_1_agreement']:.3f}",
        f"{accuracy['equal_tokens']}",
    ]


class _Judge:
    """Compares one of ours with the best of the peers that took part; without either there is no value."""

    def __init__(self, speeds: Values, firsts: Values, accuracy: dict[str, Row]) -> None:
        self._speeds, self._firsts, self._accuracy = speeds, firsts, accuracy

    def targets(self) -> Iterator[Target]:
        """Those of the README, in its order."""
        source, llama = "precast source", "llama.cpp Q4_1"
        yield self._speed(source, [llama], 1.1)
        yield self._loss(source, "kl_divergence", 0.006, "")
        for scheme, bound in (("int4", 1.6), ("int8", 1.4)):
            rivals = [f"{library} {scheme}" for library in ("onnxruntime-genai", "OpenVINO GenAI", "CTranslate2")]
            yield self._speed(f"precast {scheme}", rivals, bound)
            yield from self._losses_beside(f"precast {scheme}", self._best(self._speeds, rivals, max))
        for rival in ("onnxruntime-genai fp32", "CTranslate2 fp32"):
            yield self._speed("precast fp32", [rival], 1.5)
        yield from self._native()
        for scheme in ("int4", "int8"):
            yield self._first(f"precast {scheme}", [llama, f"onnxruntime-genai {scheme}"], 1.0)
            yield self._first(f"precast {scheme}", [f"OpenVINO GenAI {scheme}"], 1.5)

    def _native(self) -> Iterator[Target]:
        source, libraries = "precast aoti-source", ("onnxruntime-genai", "OpenVINO GenAI", "CTranslate2")
        for ours in (source, f"{source}-kv16", "precast aoti-int8"):
            yield self._speed(ours, ["llama.cpp Q4_1"], 1.5)
            yield self._loss(ours, "kl_divergence", 0.0036, "")
        for int8 in ("precast aoti-int8", "precast aoti-int8-64", "precast aoti-int8-kv16"):
            yield self._speed(int8, [f"{library} int8" for library in libraries], 1.6)
            yield self._loss(int8, "kl_divergence", 0.001, "")
        yield self._speed("precast aoti-bf16", ["OpenVINO GenAI fp32"], 1.3)
        for ours, theirs in (("aoti-int8", "int8"), ("aoti-source", "int8"), ("aoti-bf16", "fp32")):
            yield self._first(f"precast {ours}", [f"OpenVINO GenAI {theirs}"], 1.3)

    def _speed(self, ours: str, rivals: list[str], bound: float) -> Target:
        name, value = self._over(self._speeds, ours, rivals, max)
        return Target(f"{name}, tokens/s", value, bound, is_floor=True)

    def _first(self, ours: str, rivals: list[str], bound: float) -> Target:
        name, value = self._over(self._firsts, ours, rivals, min)
        return Target(f"{name}, first token", value, bound)

    def _losses_beside(self, ours: str, rival: str | None) -> Iterator[Target]:
        for figure in ("perplexity", "kl_divergence") if rival else ():
            yield self._loss(ours, figure, self._accuracy[rival][figure], f" (that of {rival})")

    def _loss(self, ours: str, figure: str, bound: float, whose: str) -> Target:
        name = f"{ours}, {figure.replace('_', ' ')}{whose}"
        return Target(name, self._accuracy.get(ours, {}).get(figure), bound)

    def _over(self, values: Values, ours: str, rivals: list[str], best: Callable[..., str]) -> tuple[str, float | None]:
        rival = self._best(values, rivals, best)
        if rival is None or ours not in values:
            return f"{ours} over {rival or ' or '.join(rivals)}", None
        return f"{ours} over {rival}", ratios(values[ours], values[rival])["median"]

    def _best(self, values: Values, rivals: list[str], best: Callable[..., str]) -> str | None:
        present = [name for name in rivals if name in values]
        return best(present, key=lambda name: summary(values[name])["median"]) if present else None
