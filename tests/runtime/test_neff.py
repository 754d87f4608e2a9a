"""NEFF headers read without the SDK, the devices of machines that are folders here, and what does not run where."""

from __future__ import annotations

import json
import struct

import handmade
import pytest
from click.testing import CliRunner
from neffs import machine_at, neff, tarball, torchscript

from precast.cli import cli
from precast.runtime.artifact.publish import hash_files, write_config
from precast.runtime.artifact.schema import Compiler, Host
from precast.runtime.errors import HostError, IntegrityError
from precast.runtime.hosts.neff import HEADER, HEADER_BYTES, NeffHeader, find_headers, parse_header
from precast.runtime.hosts.neuron import ROOT_VARIABLE, NeuronHost, neuron_host
from precast.runtime.hosts.select import Accepted, Machine, choose_variant, judge
from precast.runtime.models.base import CompiledModel

SDK = {"torch-neuronx": "2.9.0.2.11", "torch": "2.9.1"}
INF2 = Machine(
    "linux-x86_64", devices=frozenset({"cpu", "neuron"}), versions=SDK, neuron=NeuronHost(instance="inf2", cores=2)
)


def test_the_layout_is_the_documented_one():
    assert HEADER.size == HEADER_BYTES == 1024
    header = parse_header(neff(2, 1, cores=3, lnc=2, features=0x100))
    assert header == NeffHeader(
        major=2, minor=1, build="2.21.33363.0", cores=3, lnc_size=2, feature_bits=0x100, data_bytes=len(tarball()),
        name="model.neff", uuid=bytes(range(16)).hex(),
    )  # fmt: skip
    assert header.version == "2.1"


def test_all_neffs_of_an_archive_are_found_and_nothing_else(tmp_path):
    path = torchscript(tmp_path / "model.neuron", neff(2, 0), struct.pack("<QQQ", 1, 1024, 7) * 500, neff(1, 3))
    assert [header.version for header in find_headers(path)] == ["2.0", "1.3"]
    plain = torchscript(tmp_path / "plain.neuron", neff(payload=tarball("")))
    assert [header.version for header in find_headers(plain)] == ["2.0"]


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"\0" * 5000, neff()[:1500][:1030], neff(payload=b"no tarball at all" * 40), neff()[:-1]],
    ids=["empty", "short", "zeros", "no data", "no tarball", "cut"],
)
def test_what_is_no_neff_has_no_header(tmp_path, content):
    path = tmp_path / "model.neuron"
    path.write_bytes(content)
    assert find_headers(path) == []


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(IntegrityError, match=r"gone\.neuron cannot be read: No such file"):
        find_headers(tmp_path / "gone.neuron")


def test_devices_are_read_from_the_driver(tmp_path):
    assert neuron_host({ROOT_VARIABLE: str(tmp_path)}) is None
    environment = machine_at(tmp_path, devices=6)
    assert neuron_host(environment) == NeuronHost("inf2", 12)
    assert neuron_host({**environment, "NEURON_RT_VISIBLE_CORES": "0-3"}) == NeuronHost("inf2", 4)
    assert neuron_host({**environment, "NEURON_RT_VISIBLE_CORES": "1,4-5"}) == NeuronHost("inf2", 3)
    assert neuron_host({**environment, "NEURON_RT_VISIBLE_CORES": "0-999999999999"}) == NeuronHost("inf2", 12)
    assert neuron_host({**environment, "NEURON_RT_NUM_CORES": "2"}) == NeuronHost("inf2", 2)
    both = {"NEURON_RT_NUM_CORES": "2", "NEURON_RT_VISIBLE_CORES": "0-4"}
    assert neuron_host({**environment, **both}) == NeuronHost("inf2", 5)


def test_cores_of_a_trn2_are_grouped_in_pairs(tmp_path):
    environment = machine_at(tmp_path, "Trn2", devices=2, cores=8)
    assert neuron_host(environment) == NeuronHost("trn2", 8, lnc_size=2)
    assert neuron_host({**environment, "NEURON_LOGICAL_NC_CONFIG": "1"}) == NeuronHost("trn2", 16, lnc_size=1)


def test_without_the_drivers_files_the_firmware_says_what_it_is(tmp_path):
    environment = machine_at(tmp_path, driver=False)
    assert neuron_host(environment) == NeuronHost("", 2)
    (tmp_path / "sys/devices/virtual/dmi/id").mkdir(parents=True)
    (tmp_path / "sys/devices/virtual/dmi/id/product_name").write_text("inf1.xlarge\n")
    assert neuron_host(environment) == NeuronHost("inf1", 4)


def variant(target="trn1", cores=1, **changes):
    host = Host(platforms=["linux-x86_64"], device="neuron", isa=[], min_versions={"torch-neuronx": "2.5"})
    made = Compiler(
        name="neuronx-cc", version="2.21", options={"instance_type": target, "cores": cores}, torch="2.9",
        transformers="5.23",
    )  # fmt: skip
    graph = handmade.variant().graphs[0]
    graphs = [type(graph)(**{**{name: getattr(graph, name) for name in graph.__struct_fields__}, "file": "m.neuron"})]
    fields = {"backend": "neuron", "host": host, "compiler": made, "graphs": graphs, "weights": [], "trust": "native"}
    return handmade.variant("neuron", **{**fields, **changes})


HEADERS = [parse_header(neff())]


@pytest.mark.parametrize("target", ["inf2", "trn1", "trn1n"])
def test_machines_of_one_architecture_run_each_others_graphs(target):
    assert isinstance(judge(variant(target), INF2, HEADERS), Accepted)


def test_a_machine_that_does_not_say_what_it_is_is_not_refused():
    unnamed = Machine(
        "linux-x86_64", devices=frozenset({"cpu", "neuron"}), versions=SDK, neuron=NeuronHost("", cores=2)
    )
    assert isinstance(judge(variant("trn2"), unnamed, HEADERS), Accepted)


@pytest.mark.parametrize(
    ("made", "headers", "reason"),
    [
        (variant("trn2"), HEADERS, "compiled for trn2, so it runs on trn2; this is inf2"),
        (variant("inf1"), HEADERS, "compiled for inf1, so it runs on inf1; this is inf2"),
        (variant(cores=8), HEADERS, "needs 8 NeuronCores; this process may use 2"),
        (variant(), [parse_header(neff(cores=4))], "needs 4 NeuronCores; this process may use 2"),
        (variant(), [parse_header(neff(3, 1))], "NEFF has version 3.1; Neuron Runtime takes 0.x to 2.x"),
        (variant(), [parse_header(neff(lnc=2))], "wants 2 physical cores to a logical one; here it is 1"),
    ],
)
def test_what_keeps_it_from_running(made, headers, reason):
    assert reason in judge(made, INF2, headers).reason


def test_every_reason_is_listed():
    headers = [parse_header(neff(3))]
    machine = Machine(
        "linux-x86_64", devices=INF2.devices, versions={"torch-neuronx": "1.0"}, neuron=NeuronHost("inf2", 2)
    )
    reason = judge(variant("trn2", cores=8), machine, headers).reason
    for part in ("compiled for trn2", "needs 8 NeuronCores", "version 3.0", "torch-neuronx is 1.0, it needs 2.5"):
        assert part in reason
    assert "--extra-index-url https://pip.repos.neuron.amazonaws.com" in reason


def test_another_variant_is_taken_where_there_is_no_device():
    contract = handmade.contract(variants=[variant(), handmade.variant("onnx")])
    machine = Machine("linux-x86_64", versions={"onnxruntime": "1.31"})
    assert choose_variant(contract, machine).name == "onnx"
    assert choose_variant(contract, INF2).name == "neuron"
    with pytest.raises(HostError, match=r"needs the device neuron; here are cpu \(there is no /dev/neuron0.*; also, "):
        choose_variant(contract, machine, "neuron")


def test_inspect_shows_what_the_header_says(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "nothing"))
    path = torchscript(tmp_path / "out/m.neuron", neff(features=0x100)).parent
    write_config(path, {"model_type": "llama"}, handmade.contract(variants=[variant()], files=hash_files(path)))
    told = CliRunner().invoke(cli, ["inspect", str(path)]).output
    assert "version 2.0, NeuronCores 1, features 0x100, compiler 2.21.33363.0" in told
    assert "no: it needs the device neuron" in told
    document = json.loads(CliRunner().invoke(cli, ["inspect", str(path), "--json"]).output)
    assert document["neffs"][0][0]["major"] == 2
    with pytest.raises(HostError, match="needs the device neuron"):
        CompiledModel.from_pretrained(path)
