"""Files that attack who opens them: each is refused with an error that says what is wrong, and none runs anything."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import handmade
import msgspec
import native_programs
import pytest
import torch
from native_programs import GRAPH, arrays, engine

from precast.runtime.artifact.pt2.format import pack, unpack
from precast.runtime.artifact.schema import Host
from precast.runtime.engines.aoti_torch import TorchAotiEngine
from precast.runtime.engines.elf import check_library
from precast.runtime.engines.safetensors_map import open_weights
from precast.runtime.errors import ArtifactError, FormatError, HostError
from precast.runtime.hosts.select import Machine, choose_variant

WEIGHTS = native_programs.WEIGHTS
_HELPERS = (Path(__file__).parents[1], Path(native_programs.__file__).parent)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return native_programs.write(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good, tmp_path):
    shutil.copytree(good, tmp_path / "copy")
    return tmp_path / "copy"


class Evil:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def run(folder):
    """Open and run."""
    engine(folder).bind("model", *arrays(3))()


def refused(folder, words):
    """It is refused, for this reason, in words that name the file, and nothing was run meanwhile."""
    with pytest.raises(ArtifactError, match=words) as caught:
        run(folder)
    assert str(folder) in str(caught.value)
    assert not (folder / "pwned").exists()


# The archive.


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(pairs, how=zipfile.ZIP_STORED):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", how) as archive:
        for name, data in pairs:
            archive.writestr(name, data)
    return whole.getvalue()


def with_member(name, content=None):
    def change(data, mark):
        evil = pickle.dumps(Evil(mark)) if content is None else content
        return zipped([*members(data).items(), (name, evil)])

    return change


def saved_by_torch(data, mark, **options):
    whole = io.BytesIO()
    torch.save({"model": Evil(mark)}, whole, **options)
    return whole.getvalue()


def exported_by_torch(data, mark):
    whole = io.BytesIO()
    torch.export.save(native_programs.lowered().exported, whole)
    return whole.getvalue()


def packaged(data, mark):
    whole = io.BytesIO()
    with torch.package.PackageExporter(whole) as exporter:
        exporter.save_source_string("evil", f"import os\nos.mkdir({str(mark)!r})\n")
    return whole.getvalue()


def flagged(data, mark):
    """Says that its first member is encrypted."""
    return data[:6] + b"\1\0" + data[8:]


PICKLED = json.dumps(
    {"config": {"w": {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": None}}}
)
ARCHIVES = {
    "a pickle": (lambda data, mark: pickle.dumps(Evil(mark)), r"it is a pickle"),
    "torch.save": (saved_by_torch, r"it holds 'archive/data.pkl'"),
    "torch.save of old": (
        lambda data, mark: saved_by_torch(data, mark, _use_new_zipfile_serialization=False), r"it is a pickle",
    ),
    "torch.export.save": (exported_by_torch, r"it holds '"),
    "torch.package": (packaged, r"it holds '"),
    "pickled weights": (with_member("model/data/weights/weight_0"), r"holds 'model/data/weights/weight_0'"),
    "legacy weights": (with_member("model/data/weights/model.pt"), r"holds 'model/data/weights/model.pt'"),
    "pickled constants": (with_member("model/data/constants/tensor_0"), r"data/constants/tensor_0"),
    "a custom object": (with_member("model/data/constants/custom_obj_0"), r"data/constants/custom_obj_0"),
    "an opaque object": (with_member("model/data/constants/opaque_obj_0"), r"data/constants/opaque_obj_0"),
    "example inputs": (with_member("model/data/sample_inputs/model.pt"), r"data/sample_inputs/model.pt"),
    "use_pickle": (with_member("model/data/weights/model_weights_config.json", PICKLED), r"weights_config.json"),
    "an extra file": (with_member("model/extra/setup.py", b"import os"), r"holds 'model/extra/setup.py'"),
    "a library": (with_member("model/data/aotinductor/model/model.so", b"\x7fELF"), r"aotinductor/model/model.so"),
    "source": (with_member("model/data/aotinductor/model/model.cpp", b"int main(){}"), r"model.cpp"),
    "traversal": (with_member("../../../pwned", b"x"), r"holds '\.\./\.\./\.\./pwned'"),
    "an absolute name": (with_member("/tmp/pwned", b"x"), r"holds '/tmp/pwned'"),
    "a name of Windows": (with_member("C:\\pwned", b"x"), r"holds 'C:"),
    "a second program": (with_member("model/models/other.json", b"{}"), r"models/other.json"),
    "compressed": (lambda data, mark: zipped(members(data).items(), zipfile.ZIP_DEFLATED), r"a member is compressed"),
    "a bomb": (
        lambda data, mark: zipped([*members(data).items(), ("model/bomb", b"0" * 2**26)], zipfile.ZIP_DEFLATED),
        r"holds 'model/bomb'",
    ),
    "another order": (lambda data, mark: zipped([*members(data).items()][::-1]), r"bytes around its JSON differ"),
    "a member less": (lambda data, mark: zipped([*members(data).items()][1:]), r"it lacks model/models/model.json"),
    "encrypted": (flagged, r"bytes around its JSON differ"),
    "bytes before": (lambda data, mark: b"#!/bin/sh\n" + data, r"not an uncompressed zip"),
    "bytes behind": (lambda data, mark: data + b"\0" * 100, r"bytes around its JSON differ|damaged"),
    "cut off": (lambda data, mark: data[:-1], r"damaged or cut off"),
    "half": (lambda data, mark: data[: len(data) // 2], r"damaged or cut off"),
    "empty": (lambda data, mark: b"", r"not an uncompressed zip"),
    "a library in its place": (lambda data, mark: b"\x7fELF" + b"\0" * 500, r"not an uncompressed zip"),
    "too large": (lambda data, mark: pack(b"[" * (17 * 2**20)), r"more than the 16,777,216 that are read"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_an_archive_with_anything_but_a_graph_is_refused(folder, name):
    change, words = ARCHIVES[name]
    path = folder / GRAPH.file
    path.write_bytes(change(path.read_bytes(), folder / "pwned"))
    refused(folder, words)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_two_members_of_one_name_are_refused(folder):
    path = folder / GRAPH.file
    held = [*members(path.read_bytes()).items()]
    path.write_bytes(zipped([*held, held[0]]))
    refused(folder, "two members of one name")


# The graph.


def node(whole, target):
    return next(each for each in whole["graph_module"]["graph"]["nodes"] if each["target"] == target)


def calling(target):
    return lambda whole: whole["graph_module"]["graph"]["nodes"][3].update(target=target)


def sized(expression):
    def change(whole):
        meta = whole["graph_module"]["graph"]["tensor_values"]["ids"]
        meta["sizes"][1] = {"as_expr": {"expr_str": expression, "hint": {"as_int": 5}}}

    return change


def meta_of(name, **changes):
    return lambda whole: whole["graph_module"]["graph"]["tensor_values"][name].update(changes)


def argument(**value):
    return lambda whole: node(whole, "torch.ops.aten.embedding.default")["inputs"][0].update(arg=value)


def specs(kind, index, **value):
    def change(whole):
        whole["graph_module"]["signature"][f"{kind}_specs"][index] = value

    return change


def at(*path, value):
    def change(whole):
        for key in path[:-1]:
            whole = whole[key]
        whole[path[-1]] = value

    return change


def renamed(name):
    def change(whole):
        node(whole, "torch.ops.aten.embedding.default")["outputs"] = [{"as_tensor": {"name": name}}]

    return change


def _tree(kind):
    return f'[1, {{"type": "{kind}", "context": "null", "children_spec": []}}]'


def _module(in_spec):
    signature = {"inputs": [], "outputs": [], "in_spec": in_spec, "out_spec": "", "forward_arg_names": []}
    return at("graph_module", "module_call_graph", value=[{"fqn": "", "signature": signature}])


SYMPIFY = "__import__('os').mkdir('pwned')"
NOT_ALLOWED = r"is not among the operators that a graph may call"
GRAPHS = {
    "sympify": (sized(SYMPIFY), r"is not plain arithmetic"),
    "sympify by attribute": (sized("Symbol('s0').func.__class__"), r"is not plain arithmetic"),
    "sympify in a symbol": (sized("Symbol('s0; import os')"), r"is not plain arithmetic"),
    "sympify by lambda": (sized("(lambda: 1)()"), r"is not plain arithmetic"),
    "sympify of a power tower": (sized("9**9**9**9"), r"is not plain arithmetic"),
    "sympify at length": (sized("(" * 5000), r"is not plain arithmetic"),
    "sympify of a size": (
        at("graph_module", "graph", "sym_int_values", value={"s": {"as_expr": {"expr_str": SYMPIFY, "hint": None}}}),
        r"is not plain arithmetic",
    ),
    "sympify of a range": (
        at("range_constraints", value={SYMPIFY: {"min_val": 0, "max_val": 1}}), r"is not a name",
    ),
    "guards": (at("guards_code", value=[SYMPIFY]), r"guards_code, which torch would run"),
    "a structure's type": (_module(_tree("os.system")), r"something else than tuples and lists"),
    "a structure's context": (_module('[1, {"type": null, "context": "os.system"}]'), r"than tuples and lists"),
    "a named tuple": (
        at("graph_module", "treespec_namedtuple_fields", value={"os.Evil": {"field_names": []}}), r"run or import",
    ),
    "a custom object": (
        at("graph_module", "graph", "custom_obj_values", value={"x": {"name": "x"}}), r"run or import",
    ),
    "metadata": (
        lambda whole: whole["graph_module"]["graph"]["nodes"][0].update(metadata={"stack_trace": "/home/me"}),
        r"nodes have metadata",
    ),
    **{
        target: (calling(target), NOT_ALLOWED)
        for target in (
            "torch.ops.aten.from_file.default", "torch.ops.aten.set_.source_Storage_storage_offset",
            "torch.ops.aten.resize_.default", "torch.ops.aten.add_.Tensor", "torch.ops.aten.copy_.default",
            "torch.ops.aten.add.out", "torch.ops.aten.sort.values_out", "torch.ops.aten.empty_strided.default",
            "torch.ops.aten.rand.default", "torch.ops.aten.data_ptr.default", "torch.ops.aten.to_sparse.default",
            "torch.ops.aten._embedding_bag.default", "torch.ops.aten._sparse_csr_tensor_unsafe.default",
            "torch.ops.prims.device_put.default", "torch.ops.load_library", "torch.ops.higher_order.cond",
            "torch.ops.higher_order.triton_kernel_wrapper_functional", "torch.ops.precast.materialized.default",
            "torch.load", "torch.hub.load", "torch._C._pickle_load_obj", "torch.classes.load_library", "os.system",
            "builtins.eval", "_operator.attrgetter", "_operator.methodcaller", "_operator.setitem", "_operator.call",
            "math.__loader__", "math.factorial", "#evil:op", "", "torch.ops.aten.add.Tensor\n",
            "torch.ops.aten.__class__.default",
        )
    },
    "an overload that writes": (calling("torch.ops.aten.max.dim_max"), r"dim_max, which changes its arguments"),
    "an overload that is none": (calling("torch.ops.aten.add.__class__"), r"which torch .* lacks"),
    "no name": (calling({"evil": 1}), r"something that has no name"),
    "a subgraph": (argument(as_graph={"name": "g", "graph": {}}), r"argument of the kind 'as_graph'"),
    "an object": (argument(as_custom_obj={"name": "o", "class_fqn": "x"}), r"of the kind 'as_custom_obj'"),
    "an operator as argument": (argument(as_operator="os.system"), r"of the kind 'as_operator'"),
    "a path as argument": (argument(as_string="/etc/passwd"), r"'/etc/passwd' is not a name"),
    "two kinds": (argument(as_int=1, as_float=2.0), r"where one value with its kind should"),
    "a number as list": (argument(as_ints=7), r"'7' stands where a list should"),
    "a huge number": (argument(as_int=2**70), r"stands where a number should"),
    "truth as a number": (argument(as_int=True), r"'True' stands where a number should"),
    "another device": (argument(as_device={"type": "cuda", "index": 0}), r"asks for the device 'cuda'"),
    "no such dtype": (argument(as_scalar_type=99), r"unknown dtype 99"),
    "a value of nobody": (argument(as_tensor={"name": "nobody"}), r"uses nobody before it is defined"),
    "a cycle": (argument(as_tensor={"name": "embedding"}), r"uses embedding before it is defined"),
    "a name with code": (renamed("x); import os; ("), r"is not a name"),
    "a name twice": (renamed("ids"), r"defines ids twice"),
    "a token": (specs("input", -1, token={"arg": {"name": "t"}}), r"input of the kind 'token'"),
    "a constant input": (
        specs("input", -1, constant_input={"name": "c", "value": {"as_int": 1}}), r"of the kind 'constant_input'",
    ),
    "a changed weight": (
        specs("output", 0, buffer_mutation={"arg": {"name": "ids"}, "buffer_name": "odd"}), r"kind 'buffer_mutation'",
    ),
    "a changed nothing": (
        specs("output", 0, user_input_mutation={"arg": {"name": "ids"}, "user_input_name": "odd"}), r"changes 'odd'",
    ),
    "another input changed": (
        specs("output", 0, user_input_mutation={"arg": {"name": "ids"}, "user_input_name": "ids"}),
        r"changes its inputs ids, value, which are not the caches",
    ),
    "an output less": (
        lambda whole: whole["graph_module"]["signature"]["output_specs"].pop(), r"has 1 outputs where .* lists 2",
    ),
    "a weight that is not there": (
        specs("input", 0, parameter={"arg": {"name": "p_words_weight"}, "parameter_name": "../../secret"}),
        r"is not a name",
    ),
    "sparse": (meta_of("ids", layout=1), r"not dense"),
    "on a GPU": (meta_of("ids", device={"type": "cuda", "index": 0}), r"not in the memory of the CPU"),
    "a dtype of another": (meta_of("ids", dtype=7), r"has float32 .* for ids, where config.json says int64"),
    "quantized": (meta_of("ids", dtype=77), r"unknown dtype 77"),
    "a negative size": (meta_of("ids", sizes=[{"as_int": -2}, {"as_int": 5}]), r"has the size -2"),
    "a huge size": (meta_of("ids", sizes=[{"as_int": 2**60}, {"as_int": 5}]), r"has the size 1152921504606846976"),
    "a size that is a text": (meta_of("ids", sizes=[{"as_int": "5"}, {"as_int": 5}]), r"stands where a number"),
    "a size that is no number": (meta_of("ids", sizes=[{"as_float": "NaN"}, {"as_int": 5}]), r"has the size nan"),
    "a rank of its own": (meta_of("ids", strides=[]), r"shape and strides do not go together"),
    "a weight of another shape": (
        meta_of("p_mix", sizes=[{"as_int": 4}, {"as_int": 16}]), r"needs the weight mix as float32 \[4, 16\]",
    ),
    "a weight of other strides": (
        meta_of("p_mix", strides=[{"as_int": 8}, {"as_int": 1}]), r"with strides \[8, 1\]; the weight file has",
    ),
    "a weight of another dtype": (meta_of("p_mix", dtype=6), r"needs the weight mix as float16"),
    "an older schema": (at("schema_version", "major", value=7), r"schema version is 7"),
    "no graph": (at("graph_module", value=3), r"not a program as torch.export writes it"),
    "nothing": (lambda whole: whole.clear(), r"not a program as torch.export writes it \(KeyError"),
}  # fmt: skip


def rewritten(folder, change):
    path = folder / GRAPH.file
    whole = json.loads(unpack(path.read_bytes(), "m"))
    change(whole)
    path.write_bytes(pack(json.dumps(whole).encode()))


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_would_do_anything_but_compute_is_refused(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    change, words = GRAPHS[name]
    rewritten(folder, change)
    refused(folder, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": ' * 3000 + b"1" + b"}" * 3000, r"nests more than 24 levels deep"),
        (b"[" * 10**6, r"nests more than 24 levels deep"),
        (b'{"a": NaN}', r"NaN is not a JSON number"),
        (b'{"a": 1e999}', r"too large a number"),
        (b'{"a": 1, "a": 2}', r"the key 'a' twice"),
        (b'{"a": ' + b"9" * 10000 + b"}", r"not valid JSON"),
        (b"\xff\xfe{\0}\0", r"not valid JSON"),
        (b"\x80\4\x95", r"not valid JSON"),
        (b"[]", r"holds a list, not an object"),
    ],
)
def test_json_that_is_a_bomb_or_none_is_refused(folder, text, words):
    (folder / GRAPH.file).write_bytes(pack(text))
    refused(folder, words)


def _value(value):
    return {"as_tensor": {"name": value}} if isinstance(value, str) else {"as_ints": value} if isinstance(
        value, list
    ) else {"as_int": value}  # fmt: skip


def computing(target, **arguments):
    """Let the embedding be computed by another operator, which is allowed."""

    def change(whole):
        inputs = [{"name": name, "arg": _value(value), "kind": 1} for name, value in arguments.items()]
        node(whole, "torch.ops.aten.embedding.default").update(target=f"torch.ops.aten.{target}", inputs=inputs)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            computing("as_strided.default", self="p_mix", size=[1000, 1000], stride=[1, 1000], storage_offset=0),
            "bounds",
        ),
        (computing("as_strided.default", self="p_mix", size=[2], stride=[1], storage_offset=-100), "storage offset"),
        (computing("as_strided.default", self="p_mix", size=[2], stride=[1], storage_offset=10**9), "bounds"),
        (computing("index_select.default", self="p_mix", dim=0, index="ids"), "index"),
        (computing("gather.default", self="p_mix", dim=0, index="ids"), "index|Index"),
        (computing("view.default", self="p_mix", size=[10**6]), "invalid for input"),
        (computing("expand.default", self="p_mix", size=[2**40, 2**40, 8, 8]), "."),
        (computing("zeros.default", size=[2**45]), "memory|allocate"),
        (computing("zeros.default", size=[2**62, 2**62]), "."),
        (
            computing("_weight_int4pack_mm_for_cpu.default", self="p_mix", mat2="p_mix", qGroupSize=0, scales="p_mix"),
            "int4",
        ),
        (computing("split.Tensor", self="p_mix", split_size=1), "."),
    ],
)
def test_memory_that_is_not_the_graphs_own_cannot_be_reached(folder, change, words):
    rewritten(folder, change)
    refused(folder, words)


# Weights.


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def file_of(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(**changes):
    def change(data):
        header, body = header_of(data)
        header["mix"].update(changes)
        return file_of(header, body)

    return change


def metadata(value):
    def change(data):
        header, body = header_of(data)
        return file_of({**header, "__metadata__": value}, body)

    return change


def view(**changes):
    whole = {"of": "mix", "shape": [2], "strides": [1], "offset": 0, **changes}
    return metadata({"precast.views": json.dumps({"seen": whole})})


def longer(change):
    """What lies between the offsets is moved or stretched."""

    def changed(data):
        header, body = header_of(data)
        first, second = sorted(
            (each for name, each in header.items() if name != "__metadata__"), key=lambda each: each["data_offsets"]
        )[:2]
        return file_of(header, change(first["data_offsets"], second["data_offsets"], body) or body)

    return changed


def overlap(first, second, body):
    second[0] -= 8


def hole(first, second, body):
    second[0] += 8


FILES = {
    "a pickle": (lambda data: pickle.dumps(Evil("pwned")), r"header claims"),
    "empty": (lambda data: b"", r"it has 0 bytes"),
    "seven bytes": (lambda data: data[:7], r"it has 7 bytes"),
    "a header beyond the end": (lambda data: struct.pack("<Q", len(data)) + data[8:], r"header claims .* bytes of"),
    "a header of 8 exabytes": (lambda data: struct.pack("<Q", 2**63) + data[8:], r"9,223,372,036,854,775,808 bytes"),
    "a header of nothing": (lambda data: struct.pack("<Q", 0) + data[8:], r"not valid JSON"),
    "cut off": (lambda data: data[:-1], r"its tensors take"),
    "bytes behind": (lambda data: data + b"\0" * 8, r"its tensors take"),
    "offsets beyond the end": (entry(data_offsets=[0, 2**40]), r"bytes for the shape"),
    "offsets the wrong way round": (entry(data_offsets=[256, 0]), r"lies between the offsets"),
    "offsets below zero": (entry(data_offsets=[-256, 0]), r"sizes or offsets that are no sizes"),
    "three offsets": (entry(data_offsets=[0, 1, 2]), r"lies between the offsets"),
    "offsets that are texts": (entry(data_offsets=["0", "256"]), r"that are no sizes"),
    "an overlap": (longer(overlap), r"begins at .* where the tensor before it ends"),
    "a hole": (longer(hole), r"begins at .* where the tensor before it ends"),
    "a product that overflows": (entry(shape=[2**40, 2**40]), r"more elements than there is memory"),
    "a product of 2**64": (entry(shape=[2**32, 2**32, 4]), r"more elements than there is memory"),
    "a product of nothing": (entry(shape=[0, 2**47, 2**47], data_offsets=[0, 0]), r"more elements than there"),
    "a size of 2**60": (entry(shape=[2**60]), r"that are no sizes"),
    "a negative size": (entry(shape=[-8, -8]), r"that are no sizes"),
    "a size that is true": (entry(shape=[True, 64]), r"that are no sizes"),
    "a size that is a fraction": (entry(shape=[8.0, 8]), r"that are no sizes"),
    "too many dimensions": (entry(shape=[1] * 65), r"that are no sizes"),
    "a dtype that is none": (entry(dtype="PICKLE"), r"has the dtype 'PICKLE'"),
    "a dtype that is no text": (entry(dtype=["F32"]), r"has the dtype"),
    "a dtype of another size": (entry(dtype="F64"), r"bytes for the shape"),
    "a dtype of the same size": (entry(dtype="I32"), r"needs the weight mix as float32"),
    "a key too many": (entry(pickle="x"), r"not described by its dtype, shape and data_offsets"),
    "a size that is no number": (lambda data: file_of(b'{"a": {"shape": [NaN]}}', b""), r"NaN is not a JSON number"),
    "a name twice": (lambda data: file_of(b'{"a": 1, "a": 2}', b""), r"the key 'a' twice"),
    "a nested header": (lambda data: file_of(b'{"a":' * 5000, b""), r"nests more than 24"),
    "a list": (lambda data: file_of(b"[]", b""), r"holds a list"),
    "a number for a tensor": (lambda data: file_of({"mix": 3}, b""), r"not described"),
    "metadata that are a list": (metadata([]), r"metadata are not names with texts"),
    "views that are a list": (metadata({"precast.views": []}), r"metadata are not names with texts"),
    "views that are no JSON": (metadata({"precast.views": "{"}), r"not valid JSON"),
    "a view beyond its end": (view(offset=10**6), r"reaches element 1,000,001 of 64"),
    "a view with long strides": (view(shape=[2], strides=[2**40]), r"reaches element"),
    "a view of nothing": (view(of="absent"), r"is of 'absent', which is not there"),
    "a view of another rank": (view(strides=[1, 1]), r"of another rank"),
    "a view below zero": (view(offset=-1), r"that are no sizes"),
    "a view of one element, 2**40 times": (view(shape=[2**40], strides=[0]), r"more elements than there is memory"),
    "a view beyond 64 bits": (view(shape=[2**47] * 2, strides=[0] * 2), r"more elements than there is memory"),
    "a view of a path": (view(of=["mix"]), r"is not described by"),
    "a weight less": (
        lambda data: file_of({"mine": header_of(data)[0]["mix"] | {"data_offsets": [0, 256]}}, bytes(256)),
        r"which the artifact's weight files lack",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_weights_that_claim_what_is_not_there_are_refused(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    change, words = FILES[name]
    path = folder / WEIGHTS
    path.write_bytes(change(path.read_bytes()))
    refused(folder, words)


def test_truth_values_that_are_neither_are_refused(tmp_path):
    header = {"flags": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}
    (tmp_path / "w").write_bytes(file_of(header, b"\0\1\2"))
    with pytest.raises(FormatError, match=r"truth values that are neither 0 nor 1"):
        open_weights([tmp_path / "w"])


def test_a_graph_with_another_byte_is_refused_or_runs(good, tmp_path):
    """Nothing but an ArtifactError comes out of it, whichever byte it is."""
    for index in range(math.ceil(len((good / GRAPH.file).read_bytes()) / 997)):
        folder = tmp_path / str(index)
        shutil.copytree(good, folder)
        path = folder / GRAPH.file
        text = bytearray(unpack(path.read_bytes(), "m"))
        text[index * 997 % len(text)] ^= 1
        path.write_bytes(pack(bytes(text)))
        try:
            run(folder)
        except ArtifactError:
            continue


# What a load does.

AUDIT = """
import sys
import native_programs
from native_programs import arrays, engine
from pathlib import Path

folder, seen = Path(sys.argv[1]), []
forbidden = ("subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "socket.", "pickle.",
             "marshal.", "exec", "compile", "ctypes.dlopen", "import", "shutil.", "tempfile.", "os.mkdir", "os.remove")

def hook(event, arguments):
    if event.startswith(forbidden):
        seen.append((event, str(arguments)[:200]))
    elif event == "open" and arguments[1] not in ("r", "rb", None):
        seen.append((event, str(arguments)))

native_programs.write(folder)
sys.addaudithook(hook)
inputs, outputs = arrays(5)
engine(folder).bind("model", inputs, outputs)()
found = list(seen)
compile("1", "canary", "eval")
assert len(seen) > len(found), "the hook does not see"
assert outputs["scores"].any()
print(found)
"""


def test_no_load_starts_connects_unpickles_or_compiles_anything(tmp_path):
    paths = os.pathsep.join([*map(str, _HELPERS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AUDIT, str(tmp_path / "made")],
        check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# Native code.

LIBRARY = """
import sys
import native_programs
from native_programs import arrays
from precast.runtime.engines import aoti_torch
from precast.runtime.errors import ArtifactError

try:
    native_programs.engine(sys.argv[1], kind=aoti_torch.TorchAotiEngine).bind("model", *arrays(3))
except ArtifactError as error:
    print(error)
"""


def opened(folder):
    """What opening its library says, from a process that it may take down."""
    paths = os.pathsep.join([*map(str, _HELPERS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIBRARY, str(folder)],
        check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"
    return done.stdout


def test_source_or_an_archive_in_place_of_a_library_is_refused_and_not_compiled(folder):
    library = folder / GRAPH.file
    for content in (b"int main() { return 0; }", b"PK\3\4", b"\x80\4\x95", b"", b"MZ\0\0", b"\xcf\xfa\xed\xfe"):
        library.write_bytes(content)
        before = sorted(folder.iterdir())
        with pytest.raises(FormatError, match=r"model\.pt2 is no shared library"):
            native_programs.engine(folder, TorchAotiEngine).bind("model", *arrays(3))
        assert sorted(folder.iterdir()) == before


def test_a_library_that_is_none_of_ours_is_refused(folder):
    shutil.copy(msgspec._core.__file__, folder / GRAPH.file)
    assert re.search(r"PyTorch [\d.]+.* cannot open .*model\.pt2", opened(folder))


def test_a_library_of_a_few_bytes_is_refused_and_not_a_crash(folder):
    (folder / GRAPH.file).write_bytes(Path(msgspec._core.__file__).read_bytes()[:100])
    assert str(folder) in opened(folder)


def test_a_library_that_is_cut_off_is_seen_before_it_is_opened(tmp_path):
    """Opened, each of these may kill the process."""
    path, whole = tmp_path / "model.so", Path(msgspec._core.__file__).read_bytes()
    path.write_bytes(whole)
    check_library(path)
    for kept in (0, 4, 63, 64, 100, 5000, len(whole) // 2, int(len(whole) * 0.9)):
        path.write_bytes(whole[:kept])
        with pytest.raises(FormatError, match=r"model\.so is (no shared library|cut off)"):
            check_library(path)


def test_a_library_that_claims_too_much_or_is_for_another_processor_is_seen(tmp_path):
    path, whole = tmp_path / "model.so", bytearray(Path(msgspec._core.__file__).read_bytes())
    for place, value, error, words in (
        (4, b"\1", FormatError, "no shared library"),
        (5, b"\2", FormatError, "no shared library"),
        (16, b"\2", FormatError, "cut off or no shared library"),
        (18, b"\x28", HostError, "another processor"),
        (32, b"\xff" * 8, FormatError, "cut off"),
        (54, b"\1\0", FormatError, "cut off"),
        (56, b"\xff\xff", FormatError, "cut off"),
        (56, b"\0\0", FormatError, "cut off"),
    ):
        changed = bytearray(whole)
        changed[place : place + len(value)] = value
        path.write_bytes(changed)
        with pytest.raises(error, match=words):
            check_library(path)


def test_code_for_another_processor_is_refused_before_it_is_opened():
    host = Host(platforms=["linux-x86_64"], device="cpu", isa=["avx2", "avx512f"], min_versions={})
    variant = handmade.variant("aoti", backend="aoti", trust="native", host=host)
    for machine, words in (
        (Machine("linux-x86_64", frozenset({"avx2"})), r"this CPU lacks avx512f"),
        (Machine("linux-aarch64", frozenset({"avx2", "avx512f"})), r"built for linux-x86_64; this is linux-aarch64"),
    ):
        with pytest.raises(HostError, match=words):
            choose_variant(handmade.contract(variants=[variant]), machine)
