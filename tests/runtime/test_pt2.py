"""Programs as files: what is written is read back, runs as eager does, and is torch's own format."""

from __future__ import annotations

import io
import json
import shutil
import threading
import zipfile
from itertools import pairwise
from pathlib import Path

import native_programs
import numpy as np
import pytest
import safetensors
import torch
from native_programs import CAPACITY, GRAPH, WORDS, arrays, engine
from safetensors.torch import save_file

from precast.exporter.backends.aten.safetensors import save_weights
from precast.runtime.artifact.pt2.format import pack, parse_program, unpack
from precast.runtime.engines.safetensors_map import open_weights, weight_of
from precast.runtime.engines.torch_views import view_weights
from precast.runtime.errors import ArtifactError, FormatError, IntegrityError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return native_programs.write(tmp_path_factory.mktemp("program"))


def eager(inputs):
    given = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
    with torch.no_grad():
        scores, best = native_programs.Model()(**given)
    return {"scores": scores, "best": best, "new_key": given["key"], "new_value": given["value"]}


@pytest.mark.parametrize("length", [2, 5, CAPACITY - 1])
def test_a_program_gives_what_eager_gives_and_updates_its_caches(folder, length):
    runs = engine(folder)
    inputs, outputs = arrays(length)
    step = runs.bind("model", inputs, outputs)
    for _ in range(2):
        expected = eager(inputs)
        step()
        for name, array in outputs.items():
            np.testing.assert_allclose(array, expected[name].numpy(), atol=1e-5, err_msg=name)


def test_a_cache_is_written_in_place_unless_its_old_rows_are_read(folder):
    runs = engine(folder)
    runs.bind("model", *arrays(3))
    calls = runs._opened["model"]._calls
    assert [call.function for call in calls if call.target.startswith("torch.ops.aten.index_put")] == [
        torch.ops.aten.index_put_.default,
        torch.ops.aten.index_put.default,
    ]


def test_what_layers_repeat_is_computed_once(folder, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(folder, path)
    whole = json.loads(unpack((path / GRAPH.file).read_bytes(), "m"))
    nodes = whole["graph_module"]["graph"]["nodes"]
    again = json.loads(json.dumps(nodes[1]))
    again["outputs"] = [{"as_tensor": {"name": "again"}}]
    nodes.insert(2, again)
    nodes[3] = json.loads(json.dumps(nodes[3]).replace(nodes[1]["outputs"][0]["as_tensor"]["name"], "again"))
    (path / GRAPH.file).write_bytes(pack(json.dumps(whole).encode()))
    pairs = [(engine(each), arrays(5)) for each in (folder, path)]
    for runs, pair in pairs:
        runs.bind("model", *pair)()
    one, other = (runs._opened["model"]._calls for runs, _ in pairs)
    assert [call.target for call in one] == [call.target for call in other]
    np.testing.assert_array_equal(pairs[0][1][1]["scores"], pairs[1][1][1]["scores"])


def test_threads_share_an_engine(folder):
    runs = engine(folder)
    bound = [(arrays(4 + seed % 2, seed), seed) for seed in range(8)]
    expected = [eager(inputs) for (inputs, _), _ in bound]
    steps = [runs.bind("model", *pair) for pair, _ in bound]
    threads = [threading.Thread(target=step) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ((_, outputs), _), right in zip(bound, expected, strict=True):
        np.testing.assert_allclose(outputs["scores"], right["scores"].numpy(), atol=1e-5)


def test_arrays_that_do_not_fit_are_refused_at_once(folder):
    runs = engine(folder)
    inputs, outputs = arrays(5)
    for name, wrong in {
        "ids": np.zeros((2, CAPACITY), np.int64),
        "at": np.zeros(5, np.int32),
        "key": np.asfortranarray(inputs["key"]),
        "value": np.zeros((2, CAPACITY - 1, 8), np.float32),
    }.items():
        changed = {**inputs, name: wrong}
        cached = {"new_key": changed["key"], "new_value": changed["value"]}
        with pytest.raises(ArtifactError, match=rf"^{name} is to be a contiguous array of"):
            runs.bind("model", changed, {**outputs, **cached})


def test_an_index_beyond_its_table_is_an_error_and_no_memory(folder):
    inputs, outputs = arrays(5)
    inputs["ids"][0, 0] = WORDS
    with pytest.raises(ArtifactError, match=r"failed at torch.ops.aten.embedding.default: IndexError"):
        engine(folder).bind("model", inputs, outputs)()


def test_a_file_that_is_replaced_after_it_was_verified_is_not_used(folder, tmp_path):
    copy = native_programs.write(tmp_path / "copy")
    runs = engine(copy)
    content = bytearray((copy / GRAPH.file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / GRAPH.file).unlink()
    (copy / GRAPH.file).write_bytes(content)
    with pytest.raises(IntegrityError, match="was altered: its sha256 is"):
        runs.bind("model", *arrays(3))


def test_the_file_is_an_archive_of_torch_which_torch_reads(folder):
    from torch._export.serde.serialize import ExportedProgramDeserializer, _bytes_to_dataclass, schema
    from torch.export.pt2_archive._package import PT2ArchiveReader, is_pt2_package

    path = folder / GRAPH.file
    assert is_pt2_package(str(path))
    with PT2ArchiveReader(str(path)) as reader:
        program = _bytes_to_dataclass(schema.ExportedProgram, reader.read_bytes("models/model.json"))
    weights = view_weights(open_weights([folder / "model.safetensors"]))
    weights |= {"words.weight": weights["head.weight"]}
    parameters = {name: torch.nn.Parameter(weights[name]) for name in ("words.weight", "head.weight", "mix")}
    persistent = {**parameters, "odd": weights["odd"]}
    others = {name: weights[name] for name in ("steps", "lifted_tensor_0")}
    loaded = ExportedProgramDeserializer().deserialize(program, persistent, others, None)
    inputs, _ = arrays(5)
    given = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
    found = loaded.graph_module(*(_lifted(loaded, persistent | others)), *given.values())
    assert torch.allclose(found[2], eager(inputs)["scores"], atol=1e-5)


def _lifted(program, weights):
    return [weights[spec.target] for spec in program.graph_signature.input_specs if spec.target is not None]


def test_two_files_of_one_program_are_the_same_and_name_nothing_of_the_machine(folder, tmp_path):
    again = native_programs.write(tmp_path / "again")
    for name in (GRAPH.file, "model.safetensors"):
        content = (folder / name).read_bytes()
        assert content == (again / name).read_bytes(), name
        assert b".py" not in content
        assert str(Path.cwd()).encode() not in content
        assert b"stack_trace" not in content


def test_an_archive_is_what_pack_makes_and_nothing_else():
    data = pack(b'{"a": 1}')
    assert unpack(data, "x.pt2") == b'{"a": 1}'
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert archive.read("model/models/model.json") == b'{"a": 1}'
    for index in range(len(data)):
        with pytest.raises(FormatError):
            unpack(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :], "x.pt2")
        with pytest.raises(FormatError):
            unpack(data[:index], "x.pt2")


def test_every_value_of_a_parsed_program_is_plain(folder):
    graph = parse_program(unpack((folder / GRAPH.file).read_bytes(), "m"), "m")
    assert graph.inputs == ["ids", "at", "key", "value"]
    assert set(graph.updates) == {"key", "value"}
    assert set(graph.weights.values()) >= {"head.weight", "mix", "steps", "odd", "lifted_tensor_0"}


# Weights.


def test_weights_are_safetensors_mapped_and_aligned(folder):
    path = folder / "model.safetensors"
    found = view_weights(open_weights([path]))
    with safetensors.safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            stored = file.get_tensor(name)
            assert torch.equal(
                stored.reshape(-1), found[name].T.reshape(-1) if name == "mix" else found[name].reshape(-1)
            )
    assert found["mix"].stride() == (1, 8), "strides are kept, which compiled code relies on"
    assert found["mix"].data_ptr() % 64 == 0
    found["steps"][0] = 7
    assert view_weights(open_weights([path]))["steps"][0] == 0, "a write goes to a copy"


def saved(path, *programs):
    """Programs that hold these tensors: {graph: {name: tensor}}."""
    made = [_program(name, tensors) for each in programs for name, tensors in each.items()]
    return save_weights(made, path)


def _program(graph, tensors):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)

        def forward(self, x):
            return x, *(getattr(self, name).clone() for name in tensors)

    exported = torch.export.export(Holder(), (torch.zeros(1),))
    return native_programs.Lowered(native_programs.GRAPH.__class__(**{**_fields(), "name": graph}), exported)


def _fields():
    return {name: getattr(GRAPH, name) for name in GRAPH.__struct_fields__}


def test_tied_and_overlapping_weights_are_stored_once_and_stay_one_memory(tmp_path):
    base = torch.arange(48.0).view(6, 8)
    saved(
        tmp_path / "w",
        {"one": {"whole": base, "tied": base.view(6, 8), "part": base[2:4], "column": base[:, 1], "turned": base.T}},
    )
    found = view_weights(open_weights([tmp_path / "w"]))
    for name, right in {"tied": base, "part": base[2:4], "column": base[:, 1], "turned": base.T}.items():
        assert torch.equal(found[name], right)
        assert found[name].stride() == right.stride()
        reached = found[name].data_ptr() - found["whole"].data_ptr()
        assert reached == right.data_ptr() - base.data_ptr()
    with safetensors.safe_open(tmp_path / "w", "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == 48  # noqa: SIM118


def test_graphs_with_different_constants_of_one_name_keep_them_apart(tmp_path):
    same = torch.ones(3)
    names = saved(
        tmp_path / "w",
        {"short": {"mask": torch.zeros(2), "w": same}, "long": {"mask": torch.ones(2), "w": same.clone()}},
    )
    found = view_weights(open_weights([tmp_path / "w"]))
    assert names == ["long:mask", "short:mask", "w"]
    assert weight_of(found, "long", "mask").sum() == 2
    assert weight_of(found, "short", "mask").sum() == 0
    assert weight_of(found, "long", "w") is found["w"]
    assert weight_of(found, "long", "absent") is None


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"]
)
def test_every_dtype_comes_back(tmp_path, dtype):
    tensor = torch.arange(7).remainder(2).to(getattr(torch, dtype))
    saved(tmp_path / "w", {"one": {"a": tensor, "none": torch.zeros(0, 3), "scalar": torch.tensor(3.0)}})
    found = view_weights(open_weights([tmp_path / "w"]))
    assert torch.equal(found["a"], tensor)
    assert found["a"].dtype == tensor.dtype
    assert (found["none"].shape, found["scalar"].item()) == ((0, 3), 3.0)


def test_files_of_the_safetensors_library_are_read_too(tmp_path):
    tensors = {"odd": torch.arange(3, dtype=torch.uint8), "w": torch.randn(3, 5), "h": torch.randn(3).half()}
    save_file(tensors, tmp_path / "w", {"format": "pt"})
    found = view_weights(open_weights([tmp_path / "w"]))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_whole_lines_come_first(tmp_path):
    saved(
        tmp_path / "w",
        {"one": {"a": torch.ones(3), "b": torch.ones(32), "c": torch.ones(16), "d": torch.ones(1).double()}},
    )
    found = view_weights(open_weights([tmp_path / "w"]))
    places = [found[name].data_ptr() for name in ("b", "c", "d", "a")]
    assert all(one < other for one, other in pairwise(places))
    assert places[0] % 64 == places[1] % 64 == 0


def test_json_of_another_schema_is_refused_with_both_numbers(folder):
    whole = json.loads(unpack((folder / GRAPH.file).read_bytes(), "m"))
    whole["schema_version"]["major"] = 9
    with pytest.raises(FormatError, match=r"its schema version is 9, where 8 can be read"):
        parse_program(json.dumps(whole).encode(), "m.pt2")
