"""Attention that a model writes in operators becomes one call of a kernel, and what only looks like it does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import native_code
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from precast.exporter.backends.aoti import library
from precast.exporter.backends.aoti.fuse_attention import fuse_attention

BATCH, HEADS, QUERIES, KEYS, WIDTH, VALUE = 2, 3, 70, 90, 12, 20
FUSED = torch.ops.precast.attention.default


def bert(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    return torch.matmul(nn.functional.dropout(scores.softmax(-1), 0.1, training=False), v).transpose(1, 2).contiguous()


def t5(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += bias + mask
    return torch.matmul(nn.functional.softmax(scores.float(), dim=-1).type_as(scores), v)


def scaled_before(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    scores = torch.matmul(q / math.sqrt(WIDTH), k.mT)
    return torch.matmul(torch.softmax(scores, dim=3, dtype=torch.float32).to(q.dtype), v)


def biased_before_scaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    return ((mask + (bias + q @ k.mT) / 4.0).softmax(-1)) @ v


def viewed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) @ v).view(BATCH * HEADS, QUERIES, VALUE)


FORMS = [bert, t5, scaled_before, biased_before_scaled, viewed]


def shared(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT + mask).softmax(-1)
    return weights @ v, weights


def over_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT).softmax(2) @ v


def gated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT) * bias).softmax(-1) @ v


def one_head_of_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    return (q @ k[:, :1].mT).softmax(-1) @ v


def biased_by_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias[..., :1]).softmax(-1) @ v


def masked_anew(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    hidden = mask + 0.0
    scores = q @ k.mT + hidden
    hidden.add_(1.0)
    return scores.softmax(-1) @ v + hidden.sum()


def wide(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v.repeat(1, 1, 1, 30)


class Each(nn.Module):
    """Every form's result."""

    def __init__(self, forms: list[Callable[..., Tensor]]) -> None:
        super().__init__()
        self.forms = forms

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(form(*given) for form in self.forms)


def tensors(seed: int, masked: float = -3.4e38) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(BATCH, HEADS, *size) for size in ((QUERIES, WIDTH), (KEYS, WIDTH), (KEYS, VALUE)))
    hidden = torch.rand(BATCH, 1, 1, KEYS) > 0.7
    # Whole blocks of keys are hidden, too.
    hidden[0, :, :, : 64 if seed % 2 else KEYS - 1] = True
    hidden[..., -1] = False
    return q, k, v, hidden * 0.0 + torch.where(hidden, masked, 0.0), torch.randn(1, HEADS, QUERIES, KEYS)


def module_of(*forms: Callable[..., Tensor]):
    return library.make_module(torch.export.export(Each(list(forms)), tensors(0)))


@pytest.mark.parametrize("form", FORMS)
def test_attention_in_operators_is_found(form):
    module = module_of(form)
    fuse_attention(module)
    called = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert called.count(FUSED) == 1
    assert not {torch.ops.aten.matmul.default, torch.ops.aten.softmax.int} & set(called)
    assert all("val" in node.meta for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("form", [shared, over_queries, gated, one_head_of_keys, biased_by_queries, masked_anew, wide])
def test_what_the_kernel_would_not_compute_stays_as_it_is(form):
    module = module_of(form)
    before = str(module.graph)
    fuse_attention(module)
    assert str(module.graph) == before


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return native_code.compiled(Each(FORMS), tensors(0), tmp_path_factory.mktemp("fused"))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), masked=st.sampled_from([-3.4e38, -math.inf, -1e4]), threads=st.integers(1, 5))
def test_the_kernel_computes_what_the_operators_mean(compiled, seed, masked, threads):
    given = tensors(seed, masked)
    with native_code.threads_set_to(threads):
        found = compiled(*given)
    for form, one, other in zip(FORMS, found, Each(FORMS)(*given), strict=True):
        assert torch.allclose(one, other, atol=3e-5), form.__name__


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_not_lost(compiled, wrong):
    given = tensors(0)
    given[0][0, 1, 2, 3] = wrong
    # So small that a large number in the place of what is none would not overflow.
    given[2].mul_(1e-4)
    for form, one, other in zip(FORMS, compiled(*given), Each(FORMS)(*given), strict=True):
        assert torch.allclose(one, other, atol=3e-5, equal_nan=True), form.__name__


def test_rows_in_which_all_is_hidden_are_eagers(compiled):
    """An average of all values where the mask is finite, else no number."""
    for masked in (-3.4e38, -math.inf):
        given = list(tensors(0, masked))
        given[3] = torch.full_like(given[3], masked)
        for form, one, other in zip(FORMS, compiled(*given), Each(FORMS)(*given), strict=True):
            assert torch.allclose(one, other, atol=3e-5, equal_nan=True), (form.__name__, masked)
