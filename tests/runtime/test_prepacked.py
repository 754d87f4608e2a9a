"""Packed weights are saved once, used only as they were saved, and never change an answer or stop a load."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import tempfile
import threading
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import handmade
import numpy as np
import pytest

from precast.runtime import CompiledModel, progress
from precast.runtime.artifact import integrity, locks, read_artifact
from precast.runtime.artifact.store import sign
from precast.runtime.engines import Settings, onnx, onnx_prepack, open_engine
from precast.runtime.engines.onnx_prepack import DATA, GRAPH
from precast.runtime.errors import IntegrityError, UsageError
from precast.runtime.storage import cache

MANIFEST = cache.MANIFEST
IDS = np.arange(30).reshape(3, 10) + 5


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home, in which models of any size are packed, and all constants but the smallest saved outside."""
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(onnx_prepack, "MIN_BYTES", 0)
    monkeypatch.setattr(onnx, "SHARED_BYTES", 1024)
    return tmp_path / "home"


@pytest.fixture
def opened(monkeypatch):
    """The paths of the graphs that ONNX Runtime opened since."""
    paths = []

    def recording(path, options, *place, start=onnx._start_session):
        paths.append(path)
        return start(path, options, *place)

    monkeypatch.setattr(onnx, "_start_session", recording)
    return paths


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were hashed since."""
    names = []

    def checking(file, root, name, *rest, check_hash=integrity.check_hash):
        names.append(name)
        check_hash(file, root, name, *rest)

    def counting(path, sha256_of=onnx_prepack.sha256_of):
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(integrity, "check_hash", checking)
    monkeypatch.setattr(onnx_prepack, "sha256_of", counting)
    return names


def answer(path: Path, **options: object) -> bytes:
    """What the encoder says, once everything that it saves is saved."""
    given = CompiledModel.from_pretrained(path, **options)(IDS).last_hidden_state.tobytes()
    settle()
    return given


def settle() -> None:
    for thread in threading.enumerate():
        if thread.name == onnx_prepack.THREAD:
            thread.join()


def entries(home: Path) -> list[Path]:
    folder = home / "prepacked"
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.fixture
def packed(encoder, home):
    """The entry that a first load of the encoder made; it opens one of its two graphs."""
    answer(encoder)
    [entry] = entries(home)
    return entry


@pytest.fixture
def expected(encoder):
    return answer(encoder, prepack=False)


# ---------------------------------------------------------------- the same answers, opened from the cache


# Zero points and quantized embeddings are what ONNX Runtime 1.31 opened to NaN or zeros.
QUANTIZED = [
    {"quantize": "int4", "group_size": 32, "symmetric": False},
    *(
        pytest.param(options, marks=pytest.mark.slow)
        for options in (
            {"quantize": "int4", "group_size": 16, "symmetric": True},
            {"quantize": "int8"},
            {"quantize": "int8", "group_size": 32, "symmetric": False},
        )
    ),
]


@pytest.fixture(params=QUANTIZED, ids=lambda options: "-".join(map(str, options.values())))
def codes(request, checkpoint, artifact):
    """A decoder whose weights are codes."""
    return artifact(checkpoint("llama"), sequence_length=(16,), accept_loss=True, max_kl=9.0, **request.param)


@pytest.mark.skipif(not onnx._opens_packed_codes(version("onnxruntime")), reason="this ONNX Runtime cannot open them")
def test_codes_that_were_saved_give_the_same_bits(codes, home, opened):
    plain = _decoded(codes, prepack=False)
    assert np.isfinite(np.frombuffer(plain[0], np.float32)).all()
    assert any(any(each) for each in plain)
    assert _decoded(codes) == _decoded(codes) == plain
    [entry] = entries(home)
    assert [path.parent for path in opened] == [codes, codes, entry]
    assert b"prepacked_0" in (entry / GRAPH).read_bytes()


@pytest.mark.parametrize("codes", QUANTIZED[:1], indirect=True, ids=["int4"])
def test_codes_are_not_saved_where_they_would_be_opened_to_nan(codes, home, monkeypatch):
    monkeypatch.setattr(onnx.onnxruntime, "__version__", "1.31.2")
    assert _decoded(codes) == _decoded(codes) == _decoded(codes, prepack=False)
    assert entries(home) == []
    assert onnx._opens_packed_codes("1.32.0")
    assert not onnx._opens_packed_codes("1.4")


def test_the_first_load_saves_what_later_ones_map(encoder, home, opened, expected):
    opened.clear()
    assert answer(encoder) == expected
    [entry] = entries(home)
    assert sorted(path.name for path in entry.iterdir()) == [MANIFEST, GRAPH, DATA]
    assert b"prepacked_0" in (entry / GRAPH).read_bytes()
    for threads in (0, 1, 3):
        assert answer(encoder, threads=threads) == expected
    assert [path.parent for path in opened] == [encoder, entry, entry, entry]
    assert entries(home) == [entry]


def test_the_weights_are_mapped(encoder, packed):
    model = CompiledModel.from_pretrained(encoder)
    model(IDS)
    assert str(packed / DATA) in Path("/proc/self/maps").read_text()


def _decoded(path: Path, **settings: object) -> list[bytes]:
    """All that the graphs of a decoder write, each given a row of five tokens, or one if it takes no more."""
    artifact = read_artifact(path)
    [variant] = artifact.contract.variants
    engine = open_engine(artifact, variant, Settings(**settings))
    written = []
    for graph in variant.graphs:
        inputs = {spec.name: _array(spec) for spec in graph.inputs}
        count = min(5, inputs["input_ids"].shape[1])
        inputs["input_ids"][:], inputs["new_lengths"][:] = 7, count
        caches = {layer.key_out: layer.key_in for layer in graph.cache}
        caches |= {layer.value_out: layer.value_in for layer in graph.cache}
        outputs = {spec.name: inputs.get(caches.get(spec.name, ""), _array(spec)) for spec in graph.outputs}
        engine.bind(graph.name, inputs, outputs)()
        written += [array.tobytes() for array in outputs.values()]
    settle()
    return written


def _array(spec: object) -> np.ndarray:
    return np.zeros([size if isinstance(size, int) else 5 for size in spec.shape], spec.dtype)


def test_a_decoder_computes_the_same_bits(decoder, home, opened):
    plain = _decoded(decoder, prepack=False)
    assert any(any(each) for each in plain)
    assert _decoded(decoder) == plain
    assert _decoded(decoder) == plain
    assert [path.parent for path in opened] == [decoder, decoder, *entries(home)]


def test_threads_do_not_change_what_is_saved(encoder, home):
    saved = set()
    for threads in (1, 2, 5):
        answer(encoder, threads=threads)
        [entry] = entries(home)
        saved.add(hashlib.sha256((entry / GRAPH).read_bytes() + (entry / DATA).read_bytes()).hexdigest())
        cache.remove(entry)
    assert len(saved) == 1


def test_graphs_of_one_artifact_share_their_weights(checkpoint, artifact, home, opened, hashed):
    static = artifact(checkpoint("llama"), prefill_lengths=(8, 16))
    first = _decoded(static)
    one, *others = entries(home)
    assert len(others) == 2
    assert {(entry / DATA).stat().st_ino for entry in others} == {(one / DATA).stat().st_ino}
    assert len({(entry / GRAPH).read_bytes() for entry in (one, *others)}) == 3
    opened.clear(), hashed.clear()
    assert _decoded(static) == first == _decoded(static, prepack=False)
    assert {path.parent for path in opened} == {one, *others, static}
    assert hashed == []
    assert cache.total_bytes(cache.kept()) < sum(each.size for each in cache.kept())
    cache.remove(one)
    opened.clear()
    assert _decoded(static) == first
    assert {path.parent for path in opened} == {static, *others}


def test_graphs_that_share_nothing_are_saved_only_up_to_a_multiple(encoder, home, opened, monkeypatch):
    """Each of many buckets would else keep another copy of the weights."""

    def both() -> list[np.ndarray]:
        model = CompiledModel.from_pretrained(encoder)
        found = [model(np.tile(IDS, times)).last_hidden_state for times in (1, 3)]
        settle()
        return found

    expected = both()
    one, other = entries(home)
    assert (one / DATA).stat().st_ino != (other / DATA).stat().st_ino
    cache.clear("prepacked")
    monkeypatch.setattr(onnx_prepack, "MOST", 0.1)
    assert all(map(np.array_equal, both(), expected))
    [entry] = entries(home)
    opened.clear()
    assert all(map(np.array_equal, both(), expected))
    assert [path.parent for path in opened] == [entry, encoder], "what has no room is not packed again and again"
    assert entries(home) == [entry]


def test_where_weights_were_saved_is_said_on_a_terminal(encoder, home, monkeypatch, capsys):
    monkeypatch.setattr(progress, "wanted", lambda: True)
    answer(encoder)
    [entry] = entries(home)
    size = sum(path.stat().st_size for path in entry.iterdir() if path.name != MANIFEST)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "Packed" in line]
    assert f"(model_16) saved: {size / 1e6:,.1f} MB in {home / 'prepacked'}, for faster loading" in line
    answer(encoder)
    assert "Packed" not in capsys.readouterr().err


def test_graphs_opened_together_are_published_in_turn(encoder, monkeypatch):
    """Else none would find the others, and each keep its own copy."""
    held = []

    def looking(data, holders=onnx_prepack._entries_with):
        held.append(onnx_prepack._one_at_a_time.locked())
        return holders(data)

    monkeypatch.setattr(onnx_prepack, "_entries_with", looking)
    answer(encoder)
    assert held == [True]


def test_without_hard_links_each_has_its_own(checkpoint, artifact, home, monkeypatch):
    def unsupported(*words):
        raise OSError(errno.EPERM, "Operation not permitted")

    static = artifact(checkpoint("llama"), prefill_lengths=(8, 16))
    assert sign(b"") is not None, "the key itself is made with a link"
    monkeypatch.setattr(os, "link", unsupported)
    monkeypatch.setattr(onnx_prepack, "MOST", 9)
    first = _decoded(static)
    assert len({(entry / DATA).stat().st_ino for entry in entries(home)}) == 3
    assert _decoded(static) == first


def test_different_weights_are_not_shared(encoder, checkpoint, artifact, home):
    answer(encoder)
    answer(artifact(checkpoint("bert", "AutoModel", num_hidden_layers=2), batch_size=3, sequence_length=(16,)))
    one, other = entries(home)
    assert (one / DATA).stat().st_ino != (other / DATA).stat().st_ino


# ---------------------------------------------------------------- the key


def _key(path: Path, build: str = "1.0") -> str:
    artifact = read_artifact(path)
    [variant] = artifact.contract.variants
    return onnx_prepack.Entry(artifact, variant, variant.graphs[0], build).key


def test_the_key_is_the_content_not_the_place(encoder, home, opened, packed, tmp_path):
    shutil.copytree(encoder, tmp_path / "copy")
    opened.clear()
    answer(tmp_path / "copy")
    assert [path.parent for path in opened] == [packed]


def test_the_key_holds_all_that_the_form_depends_on(encoder, monkeypatch, tmp_path):
    shutil.copytree(encoder, tmp_path / "copy")
    keys = {_key(encoder), _key(tmp_path / "copy")}
    assert len(keys) == 1
    keys.add(_key(encoder, build="1.1"))
    for name in read_artifact(encoder).contract.variants[0].weights:
        changed = tmp_path / "copy"
        handmade.rewrite(changed, lambda raw, name=name: raw["precast"]["files"][name].update(sha256="a" * 64))
        keys.add(_key(changed))
    monkeypatch.setattr(onnx_prepack, "FORMAT", 99)
    keys.add(_key(encoder))
    monkeypatch.setattr(onnx_prepack, "_cpu_features", lambda: ["model name: another"])
    keys.add(_key(encoder))
    assert len(keys) == 5


def test_the_cpu_is_known_by_what_does_not_change():
    facts = onnx_prepack._cpu_features()
    assert facts == onnx_prepack._cpu_features()
    assert facts
    assert not any("MHz" in fact for fact in facts)


# ---------------------------------------------------------------- corrupt, edited, foreign


def _zero(path: Path) -> None:
    """Empty the file's content behind the back of whoever looks at name, size and modification time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _link(path: Path) -> None:
    path.rename(path.parent.parent / ".elsewhere")
    path.symlink_to(path.parent.parent / ".elsewhere")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [GRAPH, DATA, MANIFEST])
@pytest.mark.parametrize("damage", [_zero, _truncate, _flip, _link, Path.unlink])
def test_what_is_not_as_it_was_saved_is_made_anew(encoder, packed, expected, opened, caplog, damage, name):
    if (damage, name) == (_link, MANIFEST):
        pytest.skip("The manifest is signed: where it lies does not matter.")
    damage(packed / name)
    opened.clear()
    assert answer(encoder) == expected
    assert opened == [encoder / path.name for path in opened]
    [record] = caplog.records
    assert "are not used" in record.getMessage()
    caplog.clear(), opened.clear()
    assert answer(encoder) == expected
    assert [path.parent for path in opened] == [packed]
    assert caplog.records == []


def test_onnx_runtime_itself_would_not_notice(encoder, packed, expected, monkeypatch):
    """Why all this is checked: where it is not, zeroed weights give another answer and no error."""
    _zero(packed / DATA)
    monkeypatch.setattr(onnx_prepack, "verify_files", lambda root, files, force=False: None)
    assert answer(encoder) != expected


def _sealed(entry: Path, **changes: object) -> None:
    """Change the manifest and sign it anew, as only this user can."""
    manifest = json.loads((entry / MANIFEST).read_bytes())["manifest"] | changes
    signed = onnx_prepack._Signed(manifest=onnx_prepack.msgspec.convert(manifest, onnx_prepack._Manifest), signature="")
    onnx_prepack._write_manifest(entry, signed.manifest)


@pytest.mark.parametrize("claim", ["0" * 64, "", "é", "\ud800"])
def test_a_forged_signature_is_none(encoder, packed, expected, caplog, opened, claim):
    data = json.loads((packed / MANIFEST).read_bytes())
    (packed / MANIFEST).write_text(json.dumps({**data, "signature": claim}))
    opened.clear()
    assert answer(encoder) == expected
    assert [path.parent for path in opened] == [encoder]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"manifest": {}, "signature": ""}'])
def test_a_damaged_manifest_is_none(encoder, packed, expected, caplog, content):
    (packed / MANIFEST).write_bytes(content)
    assert answer(encoder) == expected
    assert "is damaged" in caplog.text


def test_an_entry_of_another_user_is_foreign(encoder, packed, expected, home, opened, caplog):
    (home / "key").unlink()
    opened.clear()
    assert answer(encoder) == expected
    assert [path.parent for path in opened] == [encoder]
    assert "not signed with this user's key" in caplog.text


def test_an_entry_under_another_key_is_foreign(encoder, packed, expected, checkpoint, artifact, home, opened, caplog):
    """Signed by this user, but for another model."""
    other = artifact(checkpoint("bert", "AutoModel", num_hidden_layers=2), batch_size=3, sequence_length=(16,))
    answer(other)
    [foreign] = set(entries(home)) - {packed}
    shutil.rmtree(packed)
    foreign.rename(packed)
    opened.clear()
    assert answer(encoder) == expected
    assert [path.parent for path in opened] == [encoder]
    assert "holds the entry" in caplog.text


def test_what_onnx_runtime_cannot_open_is_made_anew(encoder, packed, expected, opened, caplog):
    (packed / GRAPH).write_bytes(b"signed, but no graph")
    (packed / DATA).unlink()
    _sealed(packed, files={GRAPH: onnx_prepack.msgspec.to_builtins(onnx_prepack._describe_file(packed / GRAPH))})
    opened.clear()
    assert answer(encoder) == expected
    assert [path.parent for path in opened] == [packed, encoder]
    assert "cannot open" in caplog.text
    assert answer(encoder) == expected
    assert opened[-1].parent == packed


def test_an_entry_that_changes_while_it_is_opened_is_not_used(encoder, packed, expected, monkeypatch, caplog):
    def zeroing(path, options, *place, start=onnx._start_session):
        if path.parent == packed:
            _zero(packed / DATA)
        return start(path, options, *place)

    with monkeypatch.context() as patch:
        patch.setattr(onnx, "_start_session", zeroing)
        assert answer(encoder) == expected
    assert "are not used" in caplog.text
    assert answer(encoder) == expected


def test_an_artifact_that_changes_after_it_was_verified_is_not_packed(encoder, home, tmp_path):
    shutil.copytree(encoder, tmp_path / "copy")
    model = CompiledModel.from_pretrained(tmp_path / "copy")
    _zero(tmp_path / "copy" / DATA)
    with pytest.raises(IntegrityError, match="was replaced after it was verified"):
        model(IDS)
    settle()
    assert entries(home) == []


def test_what_was_saved_or_verified_is_not_hashed_again(encoder, packed, hashed):
    answer(encoder)
    assert hashed == []
    answer(encoder, verify=True)
    assert hashed.count(DATA) == 2, "the artifact's and the cache's"
    hashed.clear()
    os.utime(packed / DATA)
    answer(encoder)
    assert hashed == [DATA]
    answer(encoder)
    assert hashed == [DATA]


# ---------------------------------------------------------------- nowhere to keep it, no wish to keep it


def test_who_says_no_gets_none(encoder, home, expected, monkeypatch):
    assert answer(encoder, prepack=False) == expected
    assert entries(home) == []
    monkeypatch.setenv("PRECAST_PREPACK", "0")
    assert answer(encoder) == expected
    assert entries(home) == []
    monkeypatch.setenv("PRECAST_PREPACK", "1")
    answer(encoder)
    assert len(entries(home)) == 1
    monkeypatch.setenv("PRECAST_PREPACK", "0")
    monkeypatch.setattr(onnx_prepack.Entry, "find", lambda self: pytest.fail("looked"))
    assert answer(encoder) == expected


def test_small_models_are_not_worth_it(encoder, home, monkeypatch):
    size = sum(read_artifact(encoder).contract.files[name].size for name in (_opened_graph(encoder), DATA))
    monkeypatch.setattr(onnx_prepack, "MIN_BYTES", size + 1)
    answer(encoder)
    assert entries(home) == []
    monkeypatch.setattr(onnx_prepack, "MIN_BYTES", size)
    answer(encoder)
    assert len(entries(home)) == 1


def _opened_graph(path: Path) -> str:
    """The file of the graph that `answer` runs: the shortest that fits."""
    return min(read_artifact(path).contract.variants[0].graphs, key=lambda graph: graph.length).file


def test_without_a_home_models_load_as_ever(encoder, expected, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path(os.devnull) / "precast"):
        monkeypatch.setenv("PRECAST_HOME", str(place))
        assert answer(encoder) == expected
    assert caplog.records == []


def test_in_a_home_that_cannot_be_written_what_is_there_is_used(encoder, packed, expected, home, opened, monkeypatch):
    """As on a read-only file system, which root can be refused by, too."""

    def refused(*words, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    opened.clear()
    for name in ("mkdir", "utime", "rename", "replace", "unlink"):
        monkeypatch.setattr(os, name, refused)
    monkeypatch.setattr(integrity, "write_atomically", refused)
    assert answer(encoder) == expected
    assert [path.parent for path in opened] == [packed]
    (packed / GRAPH).write_bytes(b"damaged")
    opened.clear()
    assert answer(encoder) == expected
    assert [path.parent for path in opened] == [encoder]


def test_another_user_is_no_obstacle(encoder, packed, expected):
    """Someone who may read the home, but neither its key nor the entries: root's, opened without root's rights."""
    # Not one of pytest's folders, which are closed to other users.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(encoder, Path(folder) / "copy")
        shutil.copytree(os.environ["PRECAST_HOME"], Path(folder) / "home")
        lines = [
            f"CompiledModel.from_pretrained({str(encoder)!r}, prepack=False)(np.ones((3, 10), int))  # to import",
            handmade.UNPRIVILEGED,
            f"os.environ['PRECAST_HOME'] = {str(Path(folder) / 'home')!r}",
        ]
        said = _child(Path(folder) / "copy", "\n".join(lines)).communicate()
    assert said == (hashlib.sha256(expected).hexdigest(), "")


@pytest.fixture
def file_limit():
    """`file_limit(bytes)`: no file of this process may grow beyond; a disk that is full behaves alike."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_models_load_as_ever(encoder, home, expected, file_limit, opened):
    opened.clear()
    file_limit(100_000)
    assert answer(encoder) == expected
    assert [path.parent for path in opened] == [encoder, encoder], "once to pack, once more without"
    assert entries(home) == []


def test_a_disk_that_fills_up_while_saving(encoder, home, expected, monkeypatch):
    monkeypatch.setattr(cache, "fsync", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    assert answer(encoder) == expected
    assert entries(home) == []


def test_a_file_system_without_locks(encoder, home, expected, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    assert answer(encoder) == expected
    assert len(entries(home)) == 1


def test_a_disk_that_is_nearly_full_is_left_alone(encoder, home, expected, monkeypatch, opened):
    size = sum(read_artifact(encoder).contract.files[name].size for name in (_opened_graph(encoder), DATA))
    usage = namedtuple("usage", "free")
    opened.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(3 * size - 1))
    assert answer(encoder) == expected
    assert (entries(home), len(opened)) == ([], 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(3 * size))
    assert answer(encoder) == expected
    assert len(entries(home)) == 1


def test_without_another_thread_nothing_is_saved(encoder, home, expected, monkeypatch):
    def refused(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert answer(encoder) == expected
    assert entries(home) == []


# ---------------------------------------------------------------- limits


def _others(checkpoint, artifact) -> list[Path]:
    changes = [{"num_hidden_layers": 2}, {"num_hidden_layers": 2, "intermediate_size": 72}]
    return [artifact(checkpoint("bert", "AutoModel", **each), batch_size=3, sequence_length=(16,)) for each in changes]


def test_what_was_not_used_for_longest_makes_room(encoder, checkpoint, artifact, home, packed, monkeypatch):
    one, two = _others(checkpoint, artifact)
    answer(one)
    [second] = set(entries(home)) - {packed}
    os.utime(packed / MANIFEST, (1000, 1000))
    os.utime(second / MANIFEST, (2000, 2000))
    answer(encoder)
    cache.kept(), cache.kept()
    assert [each.path for each in cache.kept("prepacked")] == [packed, second], "looking is not using"
    room = cache.total_bytes(cache.kept()) + 1000
    monkeypatch.setenv("PRECAST_PREPACK_GB", str(room / 1e9))
    answer(two)
    [third] = set(entries(home)) - {packed, second}
    assert set(entries(home)) == {packed, third}


def test_what_was_just_saved_stays(encoder, home, packed):
    """Even if it came out larger than expected: else each load would save it again."""
    cache.trim("prepacked", 0, packed)
    assert entries(home) == [packed]
    cache.trim("prepacked", 0, home)
    assert entries(home) == []


def test_what_is_larger_than_the_limit_is_not_saved(encoder, home, expected, monkeypatch):
    for limit in ("0", "0.0001", "-1"):
        monkeypatch.setenv("PRECAST_PREPACK_GB", limit)
        assert answer(encoder) == expected
    assert entries(home) == []


@pytest.mark.parametrize("limit", ["much", "nan", "inf"])
def test_a_limit_is_a_number(encoder, monkeypatch, limit):
    monkeypatch.setenv("PRECAST_PREPACK_GB", limit)
    with pytest.raises(UsageError, match=f"PRECAST_PREPACK_GB={limit} is not a number"):
        answer(encoder)


# ---------------------------------------------------------------- several at once, and death


_CHILD = """
import hashlib, signal
import numpy as np
from precast.runtime import CompiledModel
from precast.runtime.engines import onnx, onnx_prepack as prepacked
from precast.runtime.storage import cache
prepacked.MIN_BYTES, onnx.SHARED_BYTES = 0, 1024
die = lambda *words, **options: os.kill(os.getpid(), signal.SIGKILL)
FAULT
ids = np.arange(30).reshape(3, 10) + 5
print(hashlib.sha256(CompiledModel.from_pretrained(PATH)(ids).last_hidden_state.tobytes()).hexdigest(), end="")
"""


def _child(path: Path, fault: str = ""):
    return handmade.child(_CHILD.replace("PATH", repr(str(path))).replace("FAULT", fault))


def test_a_process_that_ends_at_once_still_saves(encoder, home, expected):
    assert _child(encoder).communicate()[0] == hashlib.sha256(expected).hexdigest()
    assert len(entries(home)) == 1


def test_two_processes_at_once(encoder, home, expected):
    children = [_child(encoder) for _ in range(2)]
    said = [child.communicate() for child in children]
    assert [out for out, _ in said] == [hashlib.sha256(expected).hexdigest()] * 2, said
    assert [path.name[0] == "." for path in entries(home)] == [False]


def test_of_two_that_pack_one_is_kept(encoder, home, expected, monkeypatch):
    waiting = []

    def wait(packing):
        waiting.append(packing)

    monkeypatch.setattr(onnx_prepack.Packing, "keep", wait)
    assert answer(encoder) == expected
    assert answer(encoder) == expected
    assert len(entries(home)) == 2, "no stage in use is swept"
    for packing in waiting:
        packing._publish_in_turn()
    [entry] = entries(home)
    assert not entry.name.startswith(".")
    assert answer(encoder) == expected


DEATHS = {
    "while ONNX Runtime writes": "onnx._start_session = lambda *w, start=onnx._start_session: (start(*w), die())",
    "before anything is hashed": "prepacked.verify_files = die",
    "before the manifest": "prepacked._write_manifest = die",
    "before it is on disk": "cache.fsync = die",
    "before the rename": "cache.os.rename = die",
    "before the stamps": "prepacked.remember = die",
    "before the others are trimmed": "cache.trim = die",
}


@pytest.mark.parametrize("fault", DEATHS.values(), ids=DEATHS)
def test_a_kill_leaves_nothing_that_is_half_made(encoder, home, expected, fault, caplog):
    child = _child(encoder, fault)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert len(entries(home)) == 1
    for _ in range(2):
        assert answer(encoder) == expected
        assert [path.name[0] == "." for path in entries(home)] == [False]
    assert caplog.records == []


def test_an_interrupt_leaves_nothing(encoder, home, monkeypatch):
    def interrupted(path, options, *place, start=onnx._start_session):
        start(path, options, *place)
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx, "_start_session", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(encoder)
    assert entries(home) == []


def test_what_is_open_outlives_its_removal(encoder, packed, expected, home):
    model = CompiledModel.from_pretrained(encoder)
    assert model(IDS).last_hidden_state.tobytes() == expected
    cache.clear("prepacked")
    assert entries(home) == []
    assert model(IDS).last_hidden_state.tobytes() == expected
