"""The mixture of bits keeps to its budget and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch

from precast.exporter.quantize.linear import Packed
from precast.exporter.quantize.methods import METHODS, Method, Scheme
from precast.exporter.quantize.mixture import (
    DivergenceMeter,
    _count_bits,
    _quantized_weights,
    choose_mixture,
    group_families,
)
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


def test_a_larger_budget_takes_fewer_bits(model):
    """Of several sizes of groups, too; and the embeddings are families of their own."""
    layers = list(find_layers(model, ()))
    schemes = [EIGHT, *(Scheme(4, group, "integer") for group in (16, 32, 64))]
    rows, sizes, kinds = [torch.arange(3, 40)], [], set()
    for budget in (1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 100.0):
        found = choose_mixture(model, layers, schemes, METHODS["rtn"], rows, budget)
        assert found.keys() == {layer.name for layer in layers}
        sizes.append(sum(_count_bits(layer, found[layer.name]) for layer in layers))
        kinds |= set(found.values())
        assert measured(model, layers, found, rows) <= budget
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    assert len(kinds) > 2
    assert ["lm_head"] in [[layer.name for layer in family] for family in group_families(layers)]


def test_a_method_that_loses_less_gets_fewer_bits(model):
    """But in the table, where it does not."""
    layers, rows, schemes = list(find_layers(model, ())), [torch.arange(3, 40), torch.arange(40, 60)], [EIGHT, FOUR]
    exact = Method("exact", lambda weight, _, hessian: METHODS["rtn"].quantize(weight, EIGHT, None), is_calibrated=True)
    all_but_table = sum(measured(model, [layer], {layer.name: FOUR}, rows) for layer in layers if layer.linear)
    plain, gaining = (
        choose_mixture(model, layers, schemes, METHODS["rtn"], rows, all_but_table / 4, rounding=rounding)
        for rounding in (None, exact)
    )
    assert list(plain.values()).count(FOUR) < list(gaining.values()).count(FOUR)


def measured(model, layers, found, rows) -> float:
    """The divergence of 4-bit layers alone, which is what the budget is for."""
    meter = DivergenceMeter(model, [{"input_ids": rows[0][None], "use_cache": False}])
    with _quantized_weights([layer for layer in layers if found[layer.name] != EIGHT], found, METHODS["rtn"]):
        return meter.divergence()


def test_bits_are_those_of_the_files(model):
    """Codes, scales and zero points, with the columns of offsets."""
    for layer in find_layers(model, ()):
        for scheme in (EIGHT, FOUR, Scheme(4, 32, "float"), Scheme(4, 16, "integer")):
            packed = Packed(METHODS["rtn"].quantize(layer.weight, layer.fit_scheme(scheme), None))
            assert abs(_count_bits(layer, scheme) - 8 * packed.nbytes) <= 4 * len(layer.weight), "a half byte per row"


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
