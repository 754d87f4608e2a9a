"""Two ranks with a core each beside one with two: decoding, start, weights of a rank, and what an exchange costs.

Llama-shaped models of half a billion and a billion random weights; native code in float32 and in 8 bits. Both compute
the same tokens, or the figures would mean nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from harness import HERE, Answer, Contender, Target, alternate, environment, ratios, summary
from plan import BUILD, Plan
from schemes import compare, forced, mean_accuracy, speed

from precast.runtime.distributed.shared_memory import GroupMemory

__all__ = ["measure"]

ROUNDS, COUNT, WARM_UP, CAPACITY, RANKS = 5, 48, 8, 256, 2
PROMPT = list(range(100, 164))
SIZES: dict[str, dict[str, int]] = {
    "0.5B": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 24,
             "num_key_value_heads": 8},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4},
}  # fmt: skip
AIMS = {("0.5B", "fp32"): 0.9, ("0.5B", "int8"): 0.8, ("1B", "int8"): 0.9}
"""Decoding by two ranks over decoding by one: on one socket nothing can be gained."""
Row = dict[str, Any]


def measure(plan: Plan) -> Answer:
    """A line for each model and dtype."""
    answer = Answer("Tensor parallel", ["", "one rank, tokens/s", f"{RANKS} ranks", "over one", "MB of a rank"])
    for (size, dtype), aim in AIMS.items():
        _measure(plan, answer, size, dtype, aim)
    answer.figures["exchange"] = _exchange_cost()
    return answer


def _measure(plan: Plan, answer: Answer, size: str, dtype: str, aim: float) -> None:
    name = f"{size}-{dtype}"
    options = ("--backend", "aoti", "--no-validate", *(() if dtype == "fp32" else ("--quantize", dtype)))
    model = _checkpoint(size)
    made = {
        ranks: plan.artifacts.get(f"{name}-{ranks}")
        or plan.export(
            f"artifact-{name}-{ranks}", *options, "--tensor-parallel", str(ranks), model=model, capacity=CAPACITY
        )
        for ranks in (1, RANKS)
    }
    online = _join(made[RANKS], plan.work / f"artifact-{name}-online")
    for artifact in (*made.values(), online):
        _evict(artifact)
    contenders = {
        ranks: Contender(name, "contenders.precast_decode", artifact, plan.threads if ranks == 1 else 0)
        for ranks, artifact in made.items()
    }
    actions = {f"{ranks}": partial(_timed, each) for ranks, each in contenders.items()} | {
        f"start {way}": partial(_start, artifact) for way, artifact in {**made, "online": online}.items()
    }
    actions |= {f"load {ranks}": partial(_load, artifact) for ranks, artifact in made.items()}
    results = alternate(actions, plan.rounds(ROUNDS), plan.begin)
    speeds = {ranks: [each["speed"] for each in results[str(ranks)]] for ranks in made}
    starts = {way: [each["seconds"] for each in results[f"start {way}"]] for way in (1, RANKS, "online")}
    loads = {ranks: [each["seconds"] for each in results[f"load {ranks}"]] for ranks in made}
    tokens = {json.dumps(each["tokens"]) for ranks in made for each in results[str(ranks)]}
    over, weights = ratios(speeds[RANKS], speeds[1]), {ranks: _weight_bytes(each) for ranks, each in made.items()}
    answer.figures[name] = {
        "one_rank_tokens_per_second": summary(speeds[1]), "ranks_tokens_per_second": summary(speeds[RANKS]),
        "over_one": over, "equal_tokens": len(tokens) == 1, "weight_bytes": weights[1], "rank_bytes": weights[RANKS],
        "agreement_with_fp32": _agreement(plan, model, contenders),
        "start_seconds": {str(way): summary(found) for way, found in starts.items()},
        "load_seconds": {str(ranks): summary(found) for ranks, found in loads.items()},
    }  # fmt: skip
    share = weights[RANKS] / weights[1]
    cells = [f"{summary(speeds[ranks])['median']:.2f}" for ranks in made]
    answer.rows.append([name, *cells, f"{over['median']:.2f}", f"{weights[RANKS] / 1e6:.0f} of {weights[1] / 1e6:.0f}"])
    answer.notes.append(
        f"{name}: {'the same' if len(tokens) == 1 else 'NOT the same'} tokens by one rank and by {RANKS}."
    )
    answer.targets += [
        Target(f"{name}: {RANKS} ranks over one", over["median"], aim, is_floor=True),
        Target(f"{name}: weights of a rank over all", share, 0.55),
        Target(f"{name}: load of a rank over load of one", ratios(loads[RANKS], loads[1])["median"], 0.6),
        Target(f"{name}: start online over offline", ratios(starts["online"], starts[RANKS])["median"], 1.3),
    ]


def _checkpoint(size: str) -> Path:
    """A Llama with random weights, made once."""
    folder = BUILD / f"random-llama-{size}"
    if not (folder / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(**SIZES[size], vocab_size=32000, tie_word_embeddings=True, max_position_embeddings=2048)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _agreement(plan: Plan, model: Path, contenders: dict[int, Contender]) -> Row:
    """How far the logits of each are from those of the model in float32, for a text of random tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    text = torch.randint(100, 30000, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        eager = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.tensor([text])).logits[0].numpy()
    found = {}
    for ranks, contender in contenders.items():
        with contender:
            logits = forced(contender, text, plan.work / "logits.npy")
        found[str(ranks)] = mean_accuracy([compare(text, eager[:-1], logits)])
    return found


def _join(artifact: Path, target: Path) -> Path:
    from precast.runtime.distributed.convert import join

    shutil.rmtree(target, ignore_errors=True)
    join(artifact, target, trust_native_code=True)
    return target


def _evict(artifact: Path) -> None:
    """Let the system forget the files, which it keeps in small pages as they were written and in large ones as they are
    read: code of 8 bits is a fifth slower with small ones."""
    for path in artifact.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed(contender: Contender) -> Row:
    request = {"prompt": PROMPT, "count": COUNT, "logits": ""}
    with contender:
        contender.ask({**request, "prompt": PROMPT[::-1], "count": WARM_UP})
        found = contender.ask(request)
    return {"speed": speed(found["stamps"]), "tokens": found["tokens"]}


_START = """
import sys, time
began = time.perf_counter()
from precast.runtime import CompiledModelForCausalLM
model = CompiledModelForCausalLM.from_pretrained(sys.argv[1], trust_native_code=True)
model.generate([list(range(100, 164))], max_new_tokens=1, eos_token_id=[])
print(time.perf_counter() - began)
"""


def _start(artifact: Path) -> Row:
    """From the start of a program to its first token, with files that are in memory."""
    done = subprocess.run(
        [sys.executable, "-c", _START, str(artifact)], env=environment(), capture_output=True, text=True, check=True
    )
    return {"seconds": float(done.stdout)}


_LOAD = """
import mmap, sys, time
from pathlib import Path
import numpy as np
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.ranks import weights_of
from precast.runtime.distributed.shared_memory import GroupMemory
from precast.runtime.engines import Settings, open_engine
from precast.runtime.engines.aoti import Member, StandaloneEngine
artifact = read_artifact(sys.argv[1])
variant, began = artifact.contract.variants[0], time.perf_counter()
memory = GroupMemory.create(variant.ranks.count) if variant.ranks else None
member = Member(memory.address, 0, 60.0, memory) if memory else None
settings = Settings(1)
engine = StandaloneEngine(artifact, variant, settings, member) if member else open_engine(artifact, variant, settings)
open_graph = engine._get_library if variant.abi else engine._get_runner
for graph in variant.graphs:
    open_graph(graph.name)
for name in weights_of(variant, 0):
    with (Path(sys.argv[1]) / name).open("rb") as file:
        np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)[:: mmap.PAGESIZE].sum()
print(time.perf_counter() - began)
"""


def _load(artifact: Path) -> Row:
    """To open the engine of one rank alone and to read a byte of each page of its weights, which are in memory."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(artifact)], env=environment(), capture_output=True, text=True, check=True
    )
    return {"seconds": float(done.stdout)}


def _weight_bytes(artifact: Path) -> int:
    """Of one rank: what all share, and its own."""
    from precast.runtime.artifact import read_artifact
    from precast.runtime.artifact.ranks import weights_of

    found = read_artifact(artifact)
    return sum(found.contract.files[name].size for name in weights_of(found.contract.variants[0], 0))


_STUB = """
#include "standalone.h"
namespace precast {
Status fail(const char*, const char*) { return 1; }
}
"""
_EXCHANGE = """
import ctypes, json, sys, time
import numpy as np
from precast.runtime.distributed.shared_memory import GroupMemory
library, descriptor, rank = ctypes.CDLL(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
memory = GroupMemory(descriptor, 2)
library.precast_join_ranks.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_double]
library.precast_join_ranks(memory.address, rank, 60.0)
library.ranks_all_reduce.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
found = {}
for count in (576, 1536, 2048, 16384, 131072):
    x, y, times = np.full(count, 1.0 + rank, np.float32), np.empty(count, np.float32), []
    for _ in range(2000):
        began = time.perf_counter()
        library.ranks_all_reduce(x.ctypes.data, y.ctypes.data, count, 2, 1)
        times.append(time.perf_counter() - began)
    assert y[0] == y[-1] == 3
    found[count] = sorted(times)[len(times) // 2] * 1e6
print(json.dumps(found))
"""


def _exchange_cost() -> Row:
    """Microseconds of a sum of so many floats over two processes that do nothing else, by the code that libraries
    have; the call from Python is within."""
    sources = HERE.parent / "exporter/precast/exporter/backends/aoti/standalone/cpp"
    with tempfile.TemporaryDirectory() as folder:
        library, stub = Path(folder) / "ranks.so", Path(folder) / "stub.cpp"
        stub.write_text(_STUB)
        subprocess.run(
            ["g++", "-std=c++20", "-O3", "-shared", "-fPIC", f"-I{sources}", str(sources / "ranks.cpp"), str(stub),
             "-o", str(library)], check=True,
        )  # fmt: skip
        memory = GroupMemory.create(RANKS)
        commands = [
            [sys.executable, "-c", _EXCHANGE, str(library), str(memory.descriptor), str(rank)] for rank in range(RANKS)
        ]
        ranks = [
            subprocess.Popen(each, env=environment(), stdout=subprocess.PIPE, pass_fds=[memory.descriptor])
            for each in commands
        ]
        first, *_ = [rank.communicate()[0] for rank in ranks]
    return {f"{count} floats, us": round(found, 2) for count, found in json.loads(first).items()}
