"""A small program of the `export` backend, made here: a cache that is updated in place, a free length, tied weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import handmade
import numpy as np
import torch
from torch import nn

from precast.exporter.backends.aten.lowered import Lowered
from precast.exporter.backends.aten.safetensors import save_weights
from precast.exporter.backends.export import WEIGHTS, _archive
from precast.runtime.artifact.integrity import Contents
from precast.runtime.artifact.publish import hash_files
from precast.runtime.artifact.schema import CacheLayer, Dim, Graph, Host, Input, Output
from precast.runtime.engines import Settings
from precast.runtime.engines.export import ExportEngine

CAPACITY, WIDTH, WORDS = 16, 8, 11
GRAPH = Graph(
    name="model", role="decoder", file="model.pt2", batch=2, length=Dim(min=2, max=CAPACITY - 1), capacity=CAPACITY,
    inputs=[
        Input(name="ids", dtype="int64", shape=[2, Dim(min=2, max=CAPACITY - 1)], pad=0),
        Input(name="at", dtype="int64", shape=[Dim(min=2, max=CAPACITY - 1)], pad=0),
        *(Input(name=name, dtype="float32", shape=[2, CAPACITY, WIDTH], pad=0) for name in ("key", "value")),
    ],
    outputs=[
        Output(name="scores", dtype="float32", shape=[2, Dim(min=2, max=CAPACITY - 1), WORDS], slice=[None] * 3),
        Output(name="best", dtype="int64", shape=[2, Dim(min=2, max=CAPACITY - 1), 2], slice=[None] * 3),
        *(
            Output(name=name, dtype="float32", shape=[2, CAPACITY, WIDTH], slice=[None] * 3)
            for name in ("new_key", "new_value")
        ),
    ],
    cache=[
        CacheLayer(
            layer=0, key_in="key", key_out="new_key", value_in="value", value_out="new_value", heads=1,
            head_dim=WIDTH, dtype="float32", window=None,
        )
    ],
)  # fmt: skip


class Model(nn.Module):
    """Words that are the head's weights too; the value cache is read before and after it is written."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH).T)
        self.register_buffer("steps", torch.arange(float(WIDTH)), persistent=False)
        self.register_buffer("odd", torch.arange(WIDTH) % 2 == 1)

    def forward(self, ids: Any, at: Any, key: Any, value: Any) -> Any:
        x = self.words(ids) @ self.mix + torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
        before = value.sum()
        key[:, at] = x
        value[:, at] = x * self.steps
        seen = key.mean(1, keepdim=True) + value.amax(1, keepdim=True) + before
        first, last = (x + seen).split([3, WIDTH - 3], -1)
        y = self.head(torch.cat([last, first], -1).masked_fill(self.odd, 0.5))
        return y.masked_fill(y > 30, float("-inf")), y.topk(2)[1]


def lowered() -> Lowered:
    """The program, its cache functional as the backend gets it."""
    free = torch.export.Dim("free", min=2, max=CAPACITY - 1)
    example = (
        torch.ones(2, 5, dtype=torch.int64),
        torch.arange(5),
        *(torch.zeros(2, CAPACITY, WIDTH) for _ in range(2)),
    )
    with torch.no_grad(), warnings.catch_warnings():
        # torch warns of itself.
        warnings.simplefilter("ignore", FutureWarning)
        exported = torch.export.export(Model(), example, dynamic_shapes=({1: free}, {0: free}, None, None))
        return Lowered(GRAPH, exported.run_decompositions({}))


def write(folder: Path) -> Path:
    """The program's two files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    program = lowered()
    (folder / GRAPH.file).write_bytes(_archive(program))
    save_weights([program], folder / WEIGHTS)
    return folder


def engine(folder: Path | str, kind: Any = ExportEngine) -> Any:
    """What runs them."""
    host = Host(platforms=[], device="cpu", isa=[], min_versions={})
    variant = handmade.variant("export", backend="export", host=host, weights=[WEIGHTS], graphs=[GRAPH])
    contents = Contents(Path(folder), hash_files(Path(folder)))
    return kind(SimpleNamespace(path=Path(folder), contents=contents), variant, Settings(threads=1))


def arrays(length: int, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs for so many tokens."""
    random = np.random.default_rng(seed)
    inputs = {
        "ids": random.integers(0, WORDS, (2, length)),
        "at": np.sort(random.permutation(CAPACITY)[:length]),
        "key": random.normal(size=(2, CAPACITY, WIDTH)).astype(np.float32),
        "value": random.normal(size=(2, CAPACITY, WIDTH)).astype(np.float32),
    }
    outputs = {
        "scores": np.zeros((2, length, WORDS), np.float32),
        "best": np.zeros((2, length, 2), np.int64),
        "new_key": inputs["key"],
        "new_value": inputs["value"],
    }
    return inputs, outputs
