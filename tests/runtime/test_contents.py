"""What was checked is what is used: the same file, the same bytes, whoever opens it, and nothing that is not listed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import handmade
import numpy as np
import onnx
import pytest
import transformers
from onnx import TensorProto, helper

from precast.runtime import CompiledModel
from precast.runtime.artifact import publish, read_artifact
from precast.runtime.artifact.integrity import read_regular
from precast.runtime.artifact.onnx_graph import external_files
from precast.runtime.engines import onnx as engine
from precast.runtime.errors import ArtifactError, FormatError, IntegrityError
from precast.runtime.inputs.companions import companions_of, write_processor_files
from precast.runtime.inputs.tokenizer import Tokenizer
from precast.runtime.storage.hub import _files_to_upload, say_left_out

SHORT, LONG = np.arange(30).reshape(3, 10) + 5, np.arange(90).reshape(3, 30) + 5
IDS = np.array([[5, 6, 7, 8]])
WEIGHTS = "model.onnx.data"


@pytest.fixture
def copied(encoder, tmp_path):
    """A copy of the BERT, which has two graphs over one file of weights."""
    return shutil.copytree(encoder, tmp_path / "copy")


def _rewritten(path: Path, content: bytes) -> None:
    """Give a file another content in place, with its size and time of change as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _exchanged(path: Path, content: bytes) -> None:
    """Let another file of the same size and age take a file's place."""
    before, other = path.stat(), path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


# ---------------------------------------------------------------- graphs and weights


@pytest.mark.parametrize("change", [_rewritten, _exchanged])
@pytest.mark.parametrize("name", ["model_48.onnx", WEIGHTS])
def test_a_second_bucket_is_opened_only_as_it_was_verified(copied, change, name):
    model = CompiledModel.from_pretrained(copied)
    model(SHORT)
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    change(copied / name, bytes(data))
    with pytest.raises(IntegrityError, match=rf"{name} was replaced after it was verified"):
        model(LONG)


def test_the_same_content_under_other_times_is_no_replacement(copied, encoder):
    """A backup that links files, or `chmod`, changes what is known of a file but nothing that matters."""
    model = CompiledModel.from_pretrained(copied)
    (copied / WEIGHTS).chmod(0o600)
    os.link(copied / "model_48.onnx", copied.parent / "backup")
    shutil.copy(copied / WEIGHTS, copied / "again")
    (copied / "again").replace(copied / WEIGHTS)
    found = model(LONG).last_hidden_state
    assert np.array_equal(found, CompiledModel.from_pretrained(encoder)(LONG).last_hidden_state)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_a_folder_that_takes_the_artifacts_place_for_a_moment_is_not_opened(copied, encoder, checkpoint, artifact,
                                                                            monkeypatch):  # fmt: skip
    """Nothing of the artifact's own files changes, not even a time."""
    other = artifact(checkpoint("bert", "AutoModel", num_hidden_layers=2), batch_size=3, sequence_length=(16,))

    def exchanging(path, options, *rest, start=engine._start_session):
        copied.rename(copied.parent / "aside")
        shutil.copytree(other, copied)
        (copied / "model.onnx").rename(copied / path.name)
        try:
            return start(path, options, *rest)
        finally:
            shutil.rmtree(copied)
            (copied.parent / "aside").rename(copied)

    model = CompiledModel.from_pretrained(copied, prepack=False)
    monkeypatch.setattr(engine, "_start_session", exchanging)
    found = model(SHORT).last_hidden_state
    monkeypatch.undo()
    assert np.array_equal(found, CompiledModel.from_pretrained(encoder, prepack=False)(SHORT).last_hidden_state)


def test_a_file_that_changes_while_it_is_opened_is_refused(copied, monkeypatch):
    def changing(path, options, *rest, start=engine._start_session):
        session = start(path, options, *rest)
        _rewritten(copied / WEIGHTS, bytes((copied / WEIGHTS).stat().st_size))
        return session

    model = CompiledModel.from_pretrained(copied, prepack=False)
    monkeypatch.setattr(engine, "_start_session", changing)
    with pytest.raises(IntegrityError, match=rf"{WEIGHTS} was replaced"):
        model(SHORT)


def test_weights_beside_those_that_are_listed_are_not_opened(copied, encoder, tmp_path):
    """What the graph names is not what the contract lists: the hash would be of one file, the answer of another."""

    def renamed(raw):
        [variant] = raw["precast"]["variants"]
        variant["weights"] = ["decoy.data"]
        raw["precast"]["files"]["decoy.data"] = raw["precast"]["files"].pop(WEIGHTS)

    shutil.copy(copied / WEIGHTS, copied / "decoy.data")
    _rewritten(copied / WEIGHTS, bytes((copied / WEIGHTS).stat().st_size))
    handmade.rewrite(copied, renamed)
    with pytest.raises(
        FormatError, match=rf"model_16\.onnx is refused: it takes weights from '{WEIGHTS}'.*decoy\.data"
    ):
        CompiledModel.from_pretrained(copied, verify=True)(SHORT)


def test_an_artifact_may_be_reached_through_a_link(encoder, tmp_path):
    (tmp_path / "link").symlink_to(encoder)
    found = CompiledModel.from_pretrained(tmp_path / "link")(SHORT).last_hidden_state
    assert np.array_equal(found, CompiledModel.from_pretrained(encoder)(SHORT).last_hidden_state)


# ---------------------------------------------------------------- what a graph opens


def _tensor(location: str, name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, dims=[2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in (("offset", "0"), ("location", location), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _graph(*, nodes=(), tensors=(), sparse=()) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "g", [], [], list(tensors), sparse_initializer=list(sparse))


OLD = Path(__file__).parents[1] / "artifacts" / "0.1.0" / "encoder"
"""A BERT of batch 2, length 16 and width 16 in one graph."""
NAMES, STATES = ("input_ids", "attention_mask", "token_type_ids"), ("last_hidden_state", TensorProto.FLOAT, [2, 16, 16])


def _with_graph(path: Path, content: bytes) -> Path:
    """A copy of the old artifact with another graph, whose hash is made to fit."""
    shutil.copytree(OLD, path)
    (path / "model.onnx").write_bytes(content)
    handmade.relist(path)
    return path


def _answering(*tensors, nodes=(), names=NAMES, width=16, output=STATES, operator="Identity", domain="") -> bytes:
    """A graph that answers with the tensor w."""
    given = [helper.make_tensor_value_info(name, TensorProto.INT64, [2, width]) for name in names]
    last = helper.make_node(operator, ["w"], [output[0]], domain=domain)
    graph = helper.make_graph([*nodes, last], "g", given, [helper.make_tensor_value_info(*output)], list(tensors))
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("odd", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()


def _outside(location: str = WEIGHTS, dims: tuple[int, ...] = (2, 16, 16), **entries: object) -> TensorProto:
    """The tensor w, whose values are in another file."""
    tensor = TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": 0, "length": 2048, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def test_a_graph_of_ours_answers(tmp_path):
    """So it is for their reasons alone that those below are refused."""
    found = CompiledModel.from_pretrained(_with_graph(tmp_path / "copy", _answering(_outside())), prepack=False)(IDS)
    expected = np.frombuffer((OLD / WEIGHTS).read_bytes()[:2048], np.float32).reshape(2, 16, 16)
    assert np.array_equal(found.last_hidden_state, expected[:1, :4])


@pytest.mark.parametrize(
    "location",
    ["../private", f"sub/../{WEIGHTS}", "/etc/passwd", "/dev/zero", "/proc/self/environ", "..", ".", "", "config.json",
     "tokenizer.json", "README.md", "unlisted", f"./{WEIGHTS}", f"{WEIGHTS}\0", f"..\\{WEIGHTS}", f"file:{WEIGHTS}",
     "*/_ORT_MEM_ADDR_/*"],
)  # fmt: skip
def test_weights_come_from_the_files_that_are_listed_as_weights(tmp_path, location):
    path = _with_graph(tmp_path / "copy", _answering(_outside(location)))
    for name in ("private", "copy/unlisted"):
        (tmp_path / name).write_bytes(bytes(2048))
    with pytest.raises(FormatError, match=r"model\.onnx is refused: it takes weights from .*lists: model\.onnx\.data"):
        CompiledModel.from_pretrained(path, prepack=False)(IDS)


W = helper.make_tensor("w", TensorProto.FLOAT, [2, 16, 16], np.zeros(512))
TWICE = [helper.make_node("Concat", ["v", "v"], ["w"], axis=0)]
V = helper.make_tensor("v", TensorProto.FLOAT, [2, 16, 16], np.zeros(512))
CYCLE = [helper.make_node("Add", ["a", "v"], ["b"]), helper.make_node("Add", ["b", "v"], ["a"]),
         helper.make_node("Identity", ["a"], ["w"])]  # fmt: skip
FREE = ("last_hidden_state", TensorProto.FLOAT, ["a", "b", "c"])
BROKEN = {
    "nothing": b"",
    "no graph": b"\0\1nonsense" * 100,
    "cut off": _answering(W)[:500],
    "a field of 4 GB": b"\x08\x0a\x3a\xff\xff\xff\xff\x0fabc",
    "values behind the end": _answering(_outside(offset=2**20)),
    "values behind 64 bits": _answering(_outside(offset=2**64)),
    "values before the beginning": _answering(_outside(offset=-8)),
    "more values than there are": _answering(_outside(length=2**62)),
    "fewer values than sizes": _answering(_outside(length=4)),
    "sizes beyond 64 bits": _answering(_outside(dims=(2**33, 2**33))),
    "a negative size": _answering(_outside(dims=(-1, 16, 16))),
    "a tensor of a terabyte": _answering(TensorProto(name="w", dims=[2**38], data_type=TensorProto.FLOAT)),
    "an operator of others": _answering(W, operator="Evil", domain="odd"),
    "a circle": _answering(V, nodes=CYCLE),
    "other inputs": _answering(W, names=("x",)),
    "inputs of another size": _answering(W, width=99),
    "another output": _answering(W, output=("x", *STATES[1:])),
    "an output of another type": _answering(W, output=("last_hidden_state", TensorProto.DOUBLE, [2, 16, 16])),
    "a larger output": _answering(V, nodes=TWICE),
    "a larger output of free sizes": _answering(V, nodes=TWICE, output=FREE),
    "a smaller output": _answering(helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 1], [0]), output=FREE),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_graph_that_is_broken_or_another_is_an_artifacts_error(tmp_path, name):
    path = _with_graph(tmp_path / "copy", BROKEN[name])
    with pytest.raises(ArtifactError, match=r"copy/model\.onnx|cannot (run the graph|bind \w+): \S"):
        CompiledModel.from_pretrained(path, prepack=False, threads=1)(IDS)


def test_all_places_of_external_data_are_found():
    sparse = onnx.SparseTensorProto(values=_tensor("values"), indices=_tensor("indices"), dims=[4])
    inner = _graph(nodes=[helper.make_node("Constant", [], ["c"], value=_tensor("deep"))], tensors=[_tensor("inner")])
    branch = helper.make_node("If", ["c"], ["x"], then_branch=inner, else_branch=_graph(tensors=[_tensor("other")]))
    listed = helper.make_node("Odd", [], ["y"], domain="odd", tensors=[_tensor("one"), _tensor("two")])
    several = helper.make_node("Odd", [], ["z"], domain="odd", graphs=[_graph(sparse=[sparse])])
    function = helper.make_function("f", "F", [], ["c"], [helper.make_node("Constant", [], ["c"], value=_tensor("f"))],
                                    [helper.make_opsetid("", 20)])  # fmt: skip
    model = helper.make_model(_graph(nodes=[branch, listed, several], tensors=[_tensor("top")]), functions=[function])
    model.training_info.add().algorithm.CopyFrom(_graph(tensors=[_tensor("training")]))
    model.doc_string = "location"
    expected = {"values", "indices", "deep", "inner", "other", "one", "two", "f", "top", "training"}
    assert external_files(model.SerializeToString(), "x") == expected


def test_however_an_entry_is_written_it_is_found():
    """Protobuf takes fields in any order, twice, and lengths with idle bytes."""

    def field(number: int, content: bytes, idle: int = 0) -> bytes:
        length = bytes([0x80 | len(content), *[0x80] * (idle - 1), 0]) if idle else bytes([len(content)])
        return bytes([number << 3 | 2]) + length + content

    entries = [
        field(2, b"a") + field(1, b"location"),
        field(1, b"offset") + field(2, b"0") + field(1, b"location", idle=3) + field(2, b"b", idle=2),
    ]
    tensors = b"".join(field(5, field(13, entry), idle=1) for entry in entries)
    assert len(onnx.ModelProto.FromString(field(7, tensors)).graph.initializer) == 2
    # Of a value that stands there twice, the last counts.
    assert external_files(field(7, tensors), "x") == {"a", "0", "b"}


@pytest.mark.parametrize(
    "data", [b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x3a\x05location", b"\x0b", b"\x80"]
)
def test_what_is_no_graph_is_refused(data):
    with pytest.raises(FormatError, match="x is not an ONNX graph"):
        external_files(data, "x")


def test_compiled_code_in_a_node_is_refused():
    node = helper.make_node("EPContext", [], ["y"], domain="com.microsoft", ep_cache_context="engine.bin", embed_mode=0)
    inner = helper.make_node("If", ["c"], ["x"], then_branch=_graph(nodes=[node]), else_branch=_graph())
    for nodes in ([node], [inner]):
        with pytest.raises(FormatError, match="a node EPContext opens compiled code"):
            external_files(helper.make_model(_graph(nodes=nodes)).SerializeToString(), "x")


# ---------------------------------------------------------------- tokenizers, templates, settings

UNLISTED = {
    "special_tokens_map.json": '{"sep_token": "EVIL"}',
    "generation_config.json": '{"max_new_tokens": 1}',
    "chat_template.jinja": "EVIL",
    "additional_chat_templates/tool_use.jinja": "EVIL",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
}


def _talk(model, **options):
    return model.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], **options)


def test_what_is_not_listed_is_not_read(decoder, tmp_path):
    path = shutil.copytree(decoder, tmp_path / "copy")
    handmade.rewrite(path, lambda raw: [raw["precast"]["files"].pop(name, None) for name in UNLISTED])
    for name in UNLISTED:
        (path / name).unlink(missing_ok=True)
    plain = CompiledModel.from_pretrained(path)
    for name, content in UNLISTED.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content)
    model = CompiledModel.from_pretrained(path, verify=True)
    assert model.tokenizer.special_tokens == plain.tokenizer.special_tokens
    assert model.generation_config == plain.generation_config
    for tools in (None, [{}]):
        with pytest.raises(ArtifactError.__base__, match="has no chat template"):
            _talk(model, tools=tools)
    with write_processor_files(companions_of(model.artifact)) as folder:
        assert [each.name for each in folder.iterdir()] == ["config.json"]
        assert "precast" not in json.loads((folder / "config.json").read_text())


def test_companions_are_read_when_the_artifact_is_opened(decoder, tmp_path):
    path = shutil.copytree(decoder, tmp_path / "copy")
    model, expected = CompiledModel.from_pretrained(path), CompiledModel.from_pretrained(decoder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (path / name).write_text("{}")
    assert _talk(model) == _talk(expected)
    assert model.tokenizer.encode("the capital") == expected.tokenizer.encode("the capital")
    assert model.generation_config == expected.generation_config
    with pytest.raises(IntegrityError, match=r"chat_template\.jinja in .* has 2 bytes"):
        CompiledModel.from_pretrained(path)


def test_more_than_can_be_companions_is_not_read(decoder, tmp_path):
    """A listed file of a petabyte is no tokenizer."""
    path = shutil.copytree(decoder, tmp_path / "copy")
    artifact = read_artifact(path)
    artifact.contract.files["tokenizer.json"] = type(artifact.contract.files["tokenizer.json"])(size=2**30, sha256="0")
    with pytest.raises(FormatError, match=r"1,07\d,\d{3},\d{3} bytes of tokenizers, templates and settings"):
        artifact.contents.keep(artifact.companions())


def test_templates_of_their_own_files_are_those_of_transformers(decoder, tmp_path):
    path = shutil.copytree(decoder, tmp_path / "copy", ignore=shutil.ignore_patterns("config.json"))
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ tools | length }}")
    ours, theirs = Tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
    talk = [{"role": "user", "content": "hi"}]
    for tools in (None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]):
        expected = theirs.apply_chat_template(talk, tools=tools, tokenize=False, add_generation_prompt=True)
        assert ours.apply_chat_template(talk, tools=tools) == expected


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "device"])
def test_a_contract_that_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "config.json")
    with pytest.raises(ArtifactError, match=r"config\.json cannot be read: not a regular file"):
        read_artifact(tmp_path)
    make(tmp_path / "tokenizer.json")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read: not a regular file"):
        Tokenizer(tmp_path)


# ---------------------------------------------------------------- copies and uploads


def _sent(artifact) -> dict[str, bytes]:
    found = {}
    for each in _files_to_upload(artifact):
        with each.as_file() as file:
            found[each.path_in_repo] = file.read()
    return found


def _copied(artifact, target: Path) -> dict[str, bytes]:
    publish.copy_artifact(artifact, target, force=False)
    return {each.relative_to(target).as_posix(): each.read_bytes() for each in target.rglob("*") if each.is_file()}


def _copy(artifact, tmp_path: Path) -> dict[str, bytes]:
    return _copied(artifact, tmp_path / "target")


def _send(artifact, tmp_path: Path) -> dict[str, bytes]:
    return _sent(artifact)


@pytest.fixture(params=[_copy, _send], ids=["copied", "sent"])
def given(request, tmp_path):
    """What `save_pretrained` or `push_to_hub` gives of an artifact."""
    return lambda artifact: request.param(artifact, tmp_path)


@pytest.fixture
def made(tmp_path):
    return handmade.make(tmp_path / "out")


def test_what_was_verified_is_given_and_nothing_else(made, given, monkeypatch, capsys):
    (made.path / "bench.json").write_text("{}")
    (made.path / ".gitattributes").write_text("*.data filter=lfs\n")
    expected = {each.relative_to(made.path).as_posix(): each.read_bytes() for each in made.path.rglob("*.*")}
    (made.path / "private.txt").write_text("mine")
    monkeypatch.setattr("precast.runtime.storage.hub.HELD_BYTES", 500)
    assert given(made) == expected
    assert publish.left_out(made) == ["private.txt"]
    monkeypatch.setattr("precast.runtime.progress.wanted", lambda: True)
    say_left_out(made)
    assert "config.json does not list it: private.txt." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "bench.json", ".gitattributes", "model.onnx", "sub/tokenizer.json"])
def test_links_are_not_followed(made, given, tmp_path, name):
    (tmp_path / "private").write_text("mine")
    (made.path / name).unlink(missing_ok=True)
    (made.path / name).symlink_to(tmp_path / "private")
    with pytest.raises(IntegrityError, match=f"{name} in .*out is not a regular file inside the artifact"):
        given(made)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["model.onnx", "sub/tokenizer.json"])
def test_a_damaged_file_is_not_given(made, given, tmp_path, name):
    made.contents.verify()
    _rewritten(made.path / name, b"x" * (made.path / name).stat().st_size)
    with pytest.raises(IntegrityError, match=f"{name} (in .* was altered|was replaced)"):
        given(made)
    assert not (tmp_path / "target").exists()


def test_a_large_model_card_is_none(made, given):
    with (made.path / "README.md").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(IntegrityError, match=r"README\.md in .* has more than 16,777,216 bytes"):
        given(made)


def test_another_artifact_in_its_place_is_not_given(made, given):
    handmade.make(made.path, "new", force=True)
    with pytest.raises(IntegrityError, match="now holds another artifact than the one that was opened"):
        given(made)


def test_a_small_file_takes_little_memory_whatever_the_limit(tmp_path):
    (tmp_path / "small").write_bytes(b"small")
    assert read_regular(tmp_path / "small", 2**60) == b"small"
    assert read_regular(tmp_path / "small", 3) == b"smal", "one byte more than allowed says that it is too large"
