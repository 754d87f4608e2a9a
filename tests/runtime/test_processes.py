"""Models that were dropped, and models in forks; native code's are with their artifacts in test_native_backends.py."""

from __future__ import annotations

import processes
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from precast.runtime.engines.aoti_torch import _empty_tensors

pytestmark = pytest.mark.skipif("not __import__('sys').platform.startswith('linux')", reason="looks into /proc")


def test_a_dropped_model_leaves_nothing_open(decoder):
    processes.check_loads(decoder)


def test_a_fork_goes_on_or_is_told_why_not(decoder):
    """Closing a session waits for its threads to end, which a fork has not got: ending must not."""
    processes.check_fork(decoder)


@pytest.mark.parametrize("mode", ["fake tensors", "tracing"])
def test_weights_are_let_go_of_whatever_else_goes_on(mode):
    """Garbage is collected at any time: while a model is traced, say, and is then no part of that."""
    weight = torch.ones(3)
    if mode == "tracing":
        graph = make_fx(lambda x: (_empty_tensors([weight]), x + 1)[1], tracing_mode="fake")(torch.ones(2)).graph
        assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]
    else:
        with FakeTensorMode():
            _empty_tensors([weight])
    assert weight.untyped_storage().nbytes() == 0
