"""On a real device with the real SDK: `pytest -m neuron`. The same questions that the stand-in is asked."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from precast.exporter import ExportOptions, export
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.hosts.neff import find_headers
from precast.runtime.hosts.neuron import neuron_host

pytestmark = pytest.mark.neuron
ROW = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


@pytest.fixture(scope="module")
def instance():
    """What this machine is."""
    host = neuron_host()
    assert host is not None, "there is no /dev/neuron0"
    assert host.instance, "the driver does not say what instance this is"
    return host.instance


@pytest.mark.parametrize("changes", [{}, {"inline_weights": True}, {"strategy": "model-builder"}])
def test_a_decoder_generates_eagers_tokens(checkpoint, tmp_path, instance, changes):
    source = checkpoint("llama")
    asked = {"backend": "neuron", "instance_type": instance, "sequence_length": (48,), "prefill_lengths": (16,)}
    made = export(str(source), tmp_path / "out", ExportOptions(**asked, **changes))
    assert made.contract.variants[0].accuracy.status == "passed"
    model = CompiledModelForCausalLM.from_pretrained(made.path)
    found = model.generate(np.array([ROW]), max_new_tokens=12, do_sample=False)[0, len(ROW) :].tolist()
    assert found == oracle.greedy(source, ROW, max_new_tokens=12)


def test_an_encoders_file_holds_a_neff_of_a_known_version(checkpoint, tmp_path, instance):
    asked = {"backend": "neuron", "instance_type": instance, "batch_size": 2, "sequence_length": (16, 48)}
    made = export(str(checkpoint("bert", "AutoModel")), tmp_path / "out", ExportOptions(**asked))
    (variant,) = made.contract.variants
    assert variant.accuracy.status == "passed"
    headers = [header for graph in variant.graphs for header in find_headers(made.path / graph.file)]
    assert len(headers) == len(variant.graphs)
    assert all(header.major <= 2 and header.cores >= 1 for header in headers)
    assert CompiledModel.from_pretrained(made.path, cores="0")
