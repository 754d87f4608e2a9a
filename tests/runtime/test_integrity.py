"""No altered file is opened, no native code without proof, and nothing is hashed twice without need."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

import handmade
import pytest

from precast.runtime import CompiledModel
from precast.runtime.artifact import backends, integrity, read_artifact
from precast.runtime.artifact.integrity import require_trust, verify_files, vouch
from precast.runtime.errors import ArtifactError, IntegrityError, TrustError, UsageError

FILES = [
    "model.onnx", "model.onnx.data", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
]  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user who has verified and built nothing yet."""
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def copied(decoder, tmp_path):
    """A copy of the Llama, loaded once, so that its files have stamps."""
    shutil.copytree(decoder, tmp_path / "copy")
    CompiledModel.from_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were hashed since."""
    names = []

    def counting(file, root, name, *rest, check_hash=integrity.check_hash):
        names.append(name)
        check_hash(file, root, name, *rest)

    monkeypatch.setattr(integrity, "check_hash", counting)
    return names


def _refused(path: Path, name: str, **options: object) -> str:
    with pytest.raises(IntegrityError) as caught:
        CompiledModel.from_pretrained(path, **options)
    assert name in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- files


def test_these_are_the_files(decoder):
    assert set(read_artifact(decoder).contract.files) == set(FILES)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused(copied, name, place):
    data = bytearray((copied / name).read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[place]] ^= 1
    (copied / name).write_bytes(data)
    assert "was altered: its sha256 is" in _refused(copied, name)


@pytest.mark.parametrize("name", FILES)
def test_whatever_else_happens_to_a_file_is_refused(copied, name, tmp_path):
    path, outside = copied / name, tmp_path / "outside"
    size = path.stat().st_size
    path.rename(outside)
    assert "lacks the file" in _refused(copied, name)
    path.write_bytes(outside.read_bytes()[:-1])
    assert f"has {size - 1:,} bytes where config.json says {size:,}" in _refused(copied, name)
    path.write_bytes(outside.read_bytes() + b"\n")
    assert f"has {size + 1:,} bytes where config.json says {size:,}" in _refused(copied, name)
    path.unlink()
    path.symlink_to(outside)
    assert "not a regular file inside the artifact" in _refused(copied, name)
    path.unlink()
    path.symlink_to(name)
    _refused(copied, name)
    path.unlink()
    path.mkdir()
    assert "not a regular file" in _refused(copied, name)
    path.rmdir()
    os.mkfifo(path)
    assert "not a regular file" in _refused(copied, name)
    path.unlink()
    shutil.copy(outside, path)
    assert CompiledModel.from_pretrained(copied)


def test_a_folder_replaced_by_a_file_or_a_link(tmp_path):
    made = handmade.make(tmp_path / "out")
    (tmp_path / "out" / "sub").rename(tmp_path / "sub")
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "sub")
    with pytest.raises(IntegrityError, match=r"sub/tokenizer\.json .* not a regular file inside"):
        verify_files(made.path, made.contract.files)
    (tmp_path / "out" / "sub").unlink()
    (tmp_path / "out" / "sub").write_text("")
    with pytest.raises(IntegrityError, match=r"sub/tokenizer\.json .* cannot be read"):
        verify_files(made.path, made.contract.files)


def test_a_file_that_may_not_be_read():
    # Not one of pytest's folders, which are closed to other users.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        made = handmade.make(Path(folder) / "out")
        (made.path / "model.onnx").chmod(0)
        load = "handmade.load(pathlib.Path(sys.argv[1]))"
        said = handmade.last_words(handmade.child(handmade.UNPRIVILEGED + load, made.path))
    assert said.endswith(f"IntegrityError: model.onnx in {made.path} cannot be read: Permission denied.")


# ---------------------------------------------------------------- stamps


def test_what_was_verified_is_not_hashed_again(copied, hashed):
    CompiledModel.from_pretrained(copied)
    assert hashed == []
    CompiledModel.from_pretrained(copied, verify=True)
    assert hashed == sorted(FILES)


def test_the_stamps_are_of_one_place_only(copied, hashed, tmp_path):
    copied.rename(tmp_path / "elsewhere")
    CompiledModel.from_pretrained(tmp_path / "elsewhere")
    assert hashed == sorted(FILES)


def _alter(path: Path) -> os.stat_result:
    """Flip a bit in place, keeping size and times, once the clock has moved on since the file was stamped."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        with path.open("r+b") as file:
            file.write(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return before


@pytest.mark.parametrize("name", FILES)
def test_touched_up_content_is_still_caught(copied, hashed, name):
    before = _alter(copied / name)
    after = (copied / name).stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (before.st_mtime_ns, before.st_size, before.st_ino)
    assert "was altered" in _refused(copied, name)
    assert hashed == [name]


@pytest.mark.parametrize("name", FILES)
def test_a_file_swapped_for_another_of_its_age_is_caught(copied, name):
    path = copied / name
    before = path.stat()
    (copied / "other").write_bytes(bytes(before.st_size))
    os.utime(copied / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(copied / "other", path)
    assert "was altered" in _refused(copied, name)


def _stamps(home: Path) -> Path:
    [path] = (home / "stamps").iterdir()
    return path


def test_a_forged_stamp_is_ignored(copied, home, hashed):
    """Someone who can write the stamps but does not have the key."""
    path = _stamps(home)
    known = json.loads(path.read_text())
    _alter(copied / "model.onnx")
    forgeries = [
        dict.fromkeys(known, "0" * 64),
        dict.fromkeys(known, "é"),
        dict.fromkeys(known),
        {**known, "model.onnx": known["tokenizer.json"]},
        {**known, "model.onnx": ["a", "list"]},
        known,
        [],
        None,
    ]
    for forged in forgeries:
        path.write_text(json.dumps(forged))
        _refused(copied, "model.onnx")
    path.write_bytes(b"\xff not json")
    _refused(copied, "model.onnx")


def test_stamps_under_another_key_are_ignored(copied, home, hashed):
    (home / "key").unlink()
    CompiledModel.from_pretrained(copied)
    assert hashed == sorted(FILES)


def test_the_key_is_private(copied, home, hashed):
    key = home / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert len(key.read_bytes()) == 32
    for mode in (0o640, 0o604, 0o660):
        key.chmod(mode)
        CompiledModel.from_pretrained(copied)
        assert hashed == sorted(FILES), oct(mode)
        hashed.clear()
    key.chmod(0o600)
    CompiledModel.from_pretrained(copied)
    assert hashed == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_key_is_ones_own(copied, home, hashed):
    os.chown(home / "key", 65534, 65534)
    CompiledModel.from_pretrained(copied)
    assert hashed == sorted(FILES)


@pytest.mark.parametrize("place", ["a file", "below a file", "no home"])
def test_without_a_place_to_keep_anything_each_load_hashes(copied, hashed, monkeypatch, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    if place == "no home":
        # An arbitrary user id, as some containers have: not in the list of users, and HOME is not set.
        monkeypatch.delenv("PRECAST_HOME")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    else:
        monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "file" / ("below" if place == "below a file" else "")))
    for _ in range(2):
        CompiledModel.from_pretrained(copied)
        assert hashed == sorted(FILES)
        hashed.clear()
    vouch("d" * 64)
    _alter(copied / "model.onnx")
    _refused(copied, "model.onnx")


def test_only_what_a_variant_needs_is_hashed(tmp_path, hashed):
    """An artifact may hold compiled forms for other machines; they are checked when they are used."""
    made = handmade.make(tmp_path / "out")
    needed = {name: file for name, file in made.contract.files.items() if name != "model.onnx"}
    _alter(made.path / "model.onnx")
    verify_files(made.path, needed)
    assert "model.onnx" not in hashed


# ---------------------------------------------------------------- native code


DIGEST, OTHER = "d" * 64, "e" * 64


def _opens(**options: object) -> bool:
    try:
        require_trust("x", DIGEST, **{"sha256": None, "trust_native_code": False, **options})
    except TrustError:
        return False
    return True


def test_native_code_needs_proof(home):
    assert not _opens()
    vouch(OTHER)
    assert not _opens()
    vouch(DIGEST)
    assert _opens()


def test_a_pin_or_ones_word_is_proof():
    assert _opens(sha256=DIGEST)
    assert _opens(trust_native_code=True)
    assert not _opens(sha256=OTHER)
    assert not _opens(sha256=OTHER, trust_native_code=True)


def test_a_forged_voucher_is_none(home):
    vouch(OTHER)
    for claim in ((home / "built" / OTHER).read_bytes(), b"", b"0" * 64, b"\xff"):
        (home / "built" / DIGEST).write_bytes(claim)
        assert not _opens()
    vouch(DIGEST)
    (home / "key").chmod(0o644)
    assert not _opens()
    (home / "key").unlink()
    assert not _opens()


def test_an_export_does_not_fail_where_nothing_can_be_kept(home):
    vouch(OTHER)
    shutil.rmtree(home / "built")
    (home / "built").write_text("a full disk would do the same")
    vouch(DIGEST)
    assert not _opens()


def test_the_refusal_says_what_to_do():
    with pytest.raises(TrustError) as caught:
        require_trust("user/model", DIGEST, sha256=None, trust_native_code=False)
    for words in ("user/model holds native code", f"sha256='{DIGEST}'", "trust_native_code=True"):
        assert words in str(caught.value)


@pytest.fixture
def native(copied, monkeypatch):
    """The ONNX engine under the name of a backend whose files are native code."""
    row = backends.BACKENDS["onnx"]
    monkeypatch.setitem(backends.BACKENDS, "aot", backends.Backend("aot", "native", row.compiler, row.engine))
    handmade.rewrite(copied, lambda raw: raw["precast"]["variants"][0].update(backend="aot", trust="native"))
    return copied


@pytest.mark.parametrize("claim", ["native", "graph", "data"])
def test_a_claim_in_the_file_is_no_proof(native, claim):
    handmade.rewrite(native, lambda raw: raw["precast"]["variants"][0].update(trust=claim))
    digest = read_artifact(native).contract.digest
    with pytest.raises(TrustError, match=digest):
        CompiledModel.from_pretrained(native)
    assert CompiledModel.from_pretrained(native, sha256=digest)
    assert CompiledModel.from_pretrained(native, trust_native_code=True)
    vouch(digest)
    assert CompiledModel.from_pretrained(native)


@pytest.mark.parametrize("name", ["os:system", "precast.runtime.engines.onnx:OnnxEngine", "evil"])
def test_an_artifact_names_no_code(copied, name):
    """Its backend is one that is known here."""
    handmade.rewrite(copied, lambda raw: raw["precast"]["variants"][0].update(backend=name))
    with pytest.raises(UsageError, match=rf"There is no backend '{name}'\. The backends are: onnx, aoti"):
        CompiledModel.from_pretrained(copied)


def test_the_native_tier_counts_for_any_backend(copied):
    handmade.rewrite(copied, lambda raw: raw["precast"]["variants"][0].update(trust="native"))
    with pytest.raises(TrustError):
        CompiledModel.from_pretrained(copied)


def test_a_pin_holds_for_every_artifact(copied):
    with pytest.raises(ArtifactError, match=f"not {OTHER} as pinned"):
        CompiledModel.from_pretrained(copied, sha256=OTHER)
    assert CompiledModel.from_pretrained(copied, sha256=read_artifact(copied).contract.digest)


def test_what_was_altered_after_it_was_built_here_is_refused(native):
    """Rewriting config.json changes its digest, which nobody vouched for."""
    vouch(read_artifact(native).contract.digest)
    assert CompiledModel.from_pretrained(native)
    handmade.rewrite(native, lambda raw: raw["precast"]["source"].update(model="someone/else"))
    with pytest.raises(TrustError):
        CompiledModel.from_pretrained(native)
