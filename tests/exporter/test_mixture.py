"""The mixture of bits keeps to its budget and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch

from precast.exporter.quantize.methods import METHODS, Scheme
from precast.exporter.quantize.mixture import choose_mixture, group_families
from precast.exporter.quantize.recipe import find_layers

EIGHT, FOUR = Scheme(8, 32, "symmetric"), Scheme(4, 32, "symmetric")


@pytest.fixture
def model(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint("llama", num_hidden_layers=2), attn_implementation="eager"
    ).eval()


def chosen(model, budget):
    rows = [torch.arange(3, 40)]
    return choose_mixture(model, list(find_layers(model, ())), [EIGHT, FOUR], METHODS["rtn"], rows, budget)


def test_a_large_budget_takes_all(model):
    names = {layer.name for layer in find_layers(model, ())}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert chosen(model, 100.0) == dict.fromkeys(names, FOUR)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_budget_takes_nothing(model):
    assert set(chosen(model, 0.0).values()) == {EIGHT}


def test_a_budget_between_takes_whole_families_and_keeps_to_it(model):
    some = {}
    for exponent in range(2, 9):
        some = chosen(model, 10.0**-exponent)
        if set(some.values()) == {EIGHT, FOUR}:
            break
    assert set(some.values()) == {EIGHT, FOUR}
    for family in group_families(find_layers(model, ())):
        assert len({some[layer.name] for layer in family}) == 1
