"""Programs for NeuronCores by the plan that divides a model: cores together give the model's logits."""

from __future__ import annotations

import pytest
import torch
from divided import FAMILIES, Group, model_of

from precast.exporter import ExportOptions
from precast.exporter.backends.aten.lowering import lower
from precast.exporter.backends.neuron.collectives import COLLECTIVES
from precast.exporter.backends.neuron.compiler import _give_own_memory
from precast.exporter.backends.neuron.xla_program import (
    NEURON_LOWERING,
    build_body,
    cache_inputs,
    example_inputs,
    step_inputs,
)
from precast.exporter.backends.program_hash import hash_programs
from precast.exporter.checkpoint.resolve import resolve
from precast.exporter.kinds.plan import make_plan
from precast.exporter.kinds.trace import trace
from precast.exporter.parallel.division import divide
from precast.exporter.parallel.local_model import first_rank, local_model
from precast.runtime.artifact.ranks import OWN_NUMBER

LENGTH = 6
IDS = torch.randint(1, 64, (1, LENGTH + 1), generator=torch.Generator().manual_seed(1))
FAST = ("llama", "qwen2", "gpt2", "mixtral")
KINDS = [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in FAMILIES]
WHOLE = ("granitemoe", "olmo2", "olmoe", "phi3")
"""Whose plans gather keys and values before they are cached."""
CHANGES = {"num_hidden_layers": 1, "n_layer": 1}


class Cores:
    """The graphs of a model as its cores run them: a prompt, then steps, over caches of each core's own heads."""

    def __init__(self, model, folder, ranks: int, **options) -> None:
        model.save_pretrained(folder)
        asked = ExportOptions(
            backend="neuron", instance_type="trn1", tensor_parallel=ranks, sequence_length=16,
            prefill_lengths=(LENGTH,), **options,
        )  # fmt: skip
        checkpoint = resolve(str(folder), asked)
        plan = make_plan(checkpoint, asked, first_rank)
        self.model = checkpoint.load(plan.task, "float32")
        self.division = divide(self.model, plan.degrees)
        first = local_model(self.model, self.division, 0)
        self.lowered = [lower(program, NEURON_LOWERING) for program in trace(first, plan)]
        self.bodies = [build_body(each) for each in self.lowered]
        self._whole = dict(
            [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers(remove_duplicate=False)]
        )

    def weights(self, body, rank: int):
        """Those of a rank: its number, and its parts of what the division names."""
        for name, tensor in body.weights.items():
            own = name.removeprefix("model.")
            if name == OWN_NUMBER:
                yield torch.tensor([rank], dtype=tensor.dtype)
            elif own in self.division.splits:
                yield self.division.take_part(own, self._whole[own].detach(), rank)
            else:
                yield tensor

    def run(self) -> list[torch.Tensor]:
        """Of each rank the logits after the prompt, and after one more token, [2, vocabulary]."""
        return Group(self.division.ranks).run(self._run_rank)

    def _run_rank(self, rank: int) -> torch.Tensor:
        caches = [torch.zeros_like(each) for each in example_inputs(cache_inputs(self.bodies[0].graph))]
        found = []
        for body, begin, end in zip(self.bodies, (0, LENGTH), (LENGTH, LENGTH + 1), strict=True):
            given = {"input_ids": IDS[:, begin:end], "past_lengths": begin, "new_lengths": end - begin}
            given["logit_positions"] = end - begin - 1
            specs = step_inputs(body.graph)
            inputs = [
                blank.copy_(torch.as_tensor(given[spec.name]))
                for spec, blank in zip(specs, example_inputs(specs), strict=True)
                if spec.name in given
            ]
            assert len(inputs) == len(specs)
            logits, *caches = body.module(*self.weights(body, rank), *caches, *inputs)
            found.append(logits[0, 0])
        return torch.stack(found)

    def check(self) -> None:
        found = self.run()
        with torch.no_grad():
            right = self.model(IDS).logits[0, [LENGTH - 1, LENGTH]]
        for each in found:
            assert torch.equal(each, found[0]), "all cores have the same bits"
        assert float((found[0] - right).abs().max()) <= 1e-5 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_cores_together_give_the_models_logits(kind, tmp_path):
    cores = Cores(model_of(kind, **CHANGES), tmp_path, 2)
    cores.check()
    with torch.no_grad():
        whole = cores.model(IDS).past_key_values.layers[0].keys.shape[1]
    assert [layer.heads for layer in cores.bodies[0].graph.cache] == [whole if kind in WHOLE else whole // 2]
    check_own_memory(cores.lowered[0].exported)


def check_own_memory(exported) -> None:
    """A rank's program goes to the compiler without the other ranks' weights, and is the same still."""
    before = hash_programs([exported])
    _give_own_memory(exported)
    assert hash_programs([exported]) == before
    for tensor in exported.state_dict.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(
    "fewer",
    [
        {"attn_tp": 2, "o_proj_tp": 4, "moe_tp": 2, "embed_tp": 2, "lmhead_tp": 2},
        pytest.param({"attn_tp": 4, "o_proj_tp": 1, "embed_tp": 1, "lmhead_tp": 4}, marks=pytest.mark.slow),
        pytest.param({"attn_tp": 1, "o_proj_tp": 2, "moe_tp": 1}, marks=pytest.mark.slow),
        pytest.param({"moe_ep": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_degrees_need_no_groups_of_fewer_cores(fewer, tmp_path):
    """NxD's collectives are over all cores."""
    cores = Cores(model_of("mixtral", **CHANGES), tmp_path, 4, **fewer)
    cores.check()
    calls = {node.args[1:] for node in cores.bodies[0].module.graph.nodes if node.target in COLLECTIVES}
    assert calls == {(4, 1)}
