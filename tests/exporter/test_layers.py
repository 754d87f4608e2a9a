"""Layers that repeat are compiled once: what is taken out of a program, and that its calls compute the same."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from precast.exporter.backends.aoti import layers
from precast.exporter.backends.aoti.layers import extract_layers
from precast.exporter.backends.aoti.standalone import link
from precast.exporter.backends.aoti.workspace import FOLDER

WIDTH, CAPACITY = 4, 6


class Block(nn.Module):
    """A layer with weights of its own, which writes to a cache of its own."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.outer, self.scale = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), scale

    def forward(self, x: Tensor, mask: Tensor, cache: Tensor) -> Tensor:
        cache[:, : x.shape[1]] += x * self.scale
        seen = cache.sum(1, keepdim=True) * mask
        return x + self.outer(torch.relu(self.inner(x + seen)))


class Model(nn.Module):
    """Blocks one after the other. Subclasses connect them otherwise."""

    def __init__(self, *scales: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(5, WIDTH), nn.Linear(WIDTH, 5)
        self.blocks = nn.ModuleList(map(Block, scales or [1.0] * 5))

    def forward(self, ids: Tensor, caches: list[Tensor]) -> Any:
        x = self.embed(ids)
        mask = torch.where(ids > 0, 1.0, 0.5)[..., None]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = self.connect(block, x, mask, cache)
        return self.finish(x, caches)

    def connect(self, block: nn.Module, x: Tensor, mask: Tensor, cache: Tensor) -> Tensor:
        return block(x, mask, cache)

    def finish(self, x: Tensor, caches: list[Tensor]) -> Any:
        return self.head(x)


class Skipping(Model):
    """Every block takes the embeddings, too."""

    def forward(self, ids: Tensor, caches: list[Tensor]) -> Any:
        first = x = self.embed(ids)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x + first, first, cache)
        return self.head(x)


class ReturningAll(Model):
    """What each block returned is an output."""

    def forward(self, ids: Tensor, caches: list[Tensor]) -> Any:
        every = [self.embed(ids)]
        for block, cache in zip(self.blocks, caches, strict=True):
            every.append(block(every[-1], every[0], cache))
        return every


class TwoBack(Model):
    """A block takes the results of the last two."""

    def forward(self, ids: Tensor, caches: list[Tensor]) -> Any:
        before, x = self.embed(ids), self.embed(ids)
        for block, cache in zip(self.blocks, caches, strict=True):
            before, x = x, block(x, before, cache)
        return self.head(x)


class ReadingCaches(Model):
    """A cache is read when all blocks have written."""

    def finish(self, x: Tensor, caches: list[Tensor]) -> Any:
        return self.head(x) + caches[2].sum()


class OneCache(Model):
    """All blocks write to one tensor."""

    def forward(self, ids: Tensor, caches: list[Tensor]) -> Any:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, x, caches[0])
        return self.head(x)


class Scratch(Model):
    """Every block writes to zeros of its own, and to what it made of the result before."""

    def connect(self, block: nn.Module, x: Tensor, mask: Tensor, cache: Tensor) -> Tensor:
        sums = torch.zeros(1, x.shape[1], WIDTH)
        sums += x
        x = block(sums, mask, cache)
        x *= 2
        return x + sums


class InPlace(Model):
    """Every block writes to the result of the one before: so a layer ends with that."""

    def connect(self, block: nn.Module, x: Tensor, mask: Tensor, cache: Tensor) -> Tensor:
        x += 1
        return block(x, mask, cache)


class Rotating(Model):
    """All blocks take parts of complex numbers, which no call can be given: so each computes them."""

    def forward(self, ids: Tensor, caches: list[Tensor]) -> Any:
        turned = torch.polar(self.embed.weight[0], self.embed.weight[1])
        x = self.embed(ids)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x * (turned * turned).real, turned.imag, cache)
        return self.head(x)


class SharedCaches(Model):
    """The last two of five blocks write to caches of the first."""

    def forward(self, ids: Tensor, caches: list[Tensor]) -> Any:
        return super().forward(ids, [*caches[:3], *caches[:2]])


class Calls(fx.Interpreter):
    """Runs a program and the layers that it calls."""

    def __init__(self, module: fx.GraphModule, extracted: list[layers.Layer]) -> None:
        super().__init__(module)
        self.extracted = extracted

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not torch.ops.precast.layer.default:
            return super().call_function(target, args, kwargs)
        inputs, name = args
        (called,) = (each for each in self.extracted if each.name == name)
        return Calls(called.module, self.extracted).run(*inputs)[0]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(layers, "MIN_NODES_SAVED", 10)


def extract(model: nn.Module) -> tuple[fx.GraphModule, list[layers.Layer]]:
    caches = [torch.zeros(1, CAPACITY, WIDTH) for _ in model.blocks]
    length = Dim("length", min=2, max=CAPACITY)
    dynamic = {"ids": {1: length}, "caches": [None] * len(caches)}
    exported = torch.export.export(model, (torch.ones(1, 4, dtype=torch.int64), caches), dynamic_shapes=dynamic)
    module = exported.module(check_guards=False)
    return module, extract_layers(module, "layer")


def check(model: nn.Module, module: fx.GraphModule, extracted: list[layers.Layer]) -> None:
    """The calls give the answer of the model and leave the same in its caches, twice."""
    expected, found = ([torch.zeros(1, CAPACITY, WIDTH) for _ in model.blocks] for _ in range(2))
    for ids in (torch.tensor([[1, 0, 3]]), torch.tensor([[2, 4, 0, 1, 1]])):
        answer = model(ids, expected)
        got = Calls(module, extracted).run(ids, *found)
        torch.testing.assert_close(got, answer)
        torch.testing.assert_close(found, expected)


def called(module: fx.GraphModule) -> list[str]:
    return [node.args[1] for node in module.graph.nodes if node.target is torch.ops.precast.layer.default]


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        (Model(), 5),
        (Model(3.0, 1.0, 1.0, 1.0, 1.0), 4),
        (Model(1.0, 1.0, 1.0, 1.0, 3.0), 4),
        (Skipping(), 5),
        (SharedCaches(), 5),
        (Scratch(), 5),
        (InPlace(), 4),
        (Rotating(), 5),
    ],
)
def test_equal_layers_are_called(model, calls):
    module, extracted = extract(model)
    assert [each.name for each in extracted] == ["layer_0"]
    assert called(module) == ["layer_0"] * calls
    check(model, module, extracted)


def test_layers_within_what_repeats_are_taken_out_as_well():
    """As of models in which every fourth layer sees all tokens, the others a window."""
    model = Model(*[1.0, 1.0, 1.0, 3.0] * 3)
    module, extracted = extract(model)
    assert [each.name for each in extracted] == ["layer_0_0", "layer_0"]
    assert called(module) == ["layer_0"] * 3
    assert called(extracted[1].module) == ["layer_0_0"] * 3
    check(model, module, extracted)


@pytest.mark.parametrize("model", [ReturningAll(), TwoBack(), ReadingCaches(), OneCache(), Model(1.0, 2.0, 3.0, 4.0)])
def test_what_is_connected_otherwise_stays_as_it_is(model):
    module, extracted = extract(model)
    assert extracted == called(module) == []


def test_few_nodes_are_not_worth_two_more_files(monkeypatch):
    monkeypatch.setattr(layers, "MIN_NODES_SAVED", 200)
    assert extract(Model())[1] == []


@pytest.mark.parametrize("lacking", ["objcopy", "nm", "the linker's option"])
def test_every_layer_is_compiled_where_tools_are_others(lacking, monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    which, text = shutil.which, link._linker_help()
    monkeypatch.setattr(shutil, "which", lambda name: None if name == lacking else which(name))
    monkeypatch.setattr(link, "_linker_help", lambda: "" if lacking == "the linker's option" else text)
    with link.Linker("native", tmp_path, has_products=False) as linker:
        assert not linker.can_call_layers
        monkeypatch.undo()
        assert linker.can_call_layers
