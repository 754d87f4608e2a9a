"""The user's key: private, whole, and never silently without effect."""

from __future__ import annotations

import os
import signal
import stat

import pytest

from precast.runtime.artifact import integrity, store
from precast.runtime.errors import TrustError
from precast.runtime.storage import cache


@pytest.fixture
def key(tmp_path, monkeypatch):
    """Where the key lies; there is none yet."""
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "home"))
    store._warn.cache_clear()
    return tmp_path / "home" / "key"


def test_a_key_is_made_once(key, caplog):
    signature = store.sign(b"x")
    assert len(key.read_bytes()) == store.KEY_BYTES
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert store.sign(b"x") == signature
    assert [path.name for path in key.parent.iterdir()] == ["key"]
    assert caplog.messages == []


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 31, b"x" * 33, b"x" * 4096])
def test_a_key_that_is_not_whole_is_made_again_and_said(key, content, caplog):
    key.parent.mkdir()
    key.write_bytes(content)
    key.chmod(0o600)
    signature = store.sign(b"x")
    assert signature is not None
    assert store.sign(b"x") == signature
    assert len(key.read_bytes()) == store.KEY_BYTES
    [message] = caplog.messages
    assert f"The key {key} does not have 32 bytes; a new one is made" in message


def _fifo(key):
    os.mkfifo(key, 0o600)


def _link(key):
    (key.parent / "other").write_bytes(b"x" * 32)
    (key.parent / "other").chmod(0o600)
    key.symlink_to("other")


def _zero(key):
    key.symlink_to("/dev/zero")


def _foreign(key):
    key.write_bytes(b"x" * 32)
    os.chown(key, 65534, 65534)
    key.chmod(0o600)


def _readable(key):
    key.write_bytes(b"x" * 32)
    key.chmod(0o644)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_fifo, "is not a regular file and not used as a key; remove it"),
        (lambda key: key.mkdir(mode=0o700), "is not a regular file and not used as a key; remove it"),
        (_link, "is a symbolic link and not used as a key; remove it"),
        (_zero, "is a symbolic link and not used as a key; remove it"),
        pytest.param(_foreign, "belongs to another user and is not used as a key; remove it",
                     marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")),
        (_readable, "can be read or written by others and is not used as a key; remove it"),
    ],
)  # fmt: skip
def test_a_key_that_must_not_be_used_is_said_once(key, make, message, caplog):
    key.parent.mkdir()
    make(key)
    before = key.lstat()
    assert store.sign(b"x") is None
    assert store.sign(b"y") is None
    [said] = caplog.messages
    assert f"{key} {message}" in said
    assert key.lstat() == before


def test_a_place_where_nothing_can_be_kept_is_no_fault(key, monkeypatch, caplog):
    monkeypatch.setenv("PRECAST_HOME", os.devnull + "/precast")
    assert store.sign(b"x") is None
    assert caplog.messages == []


@pytest.fixture
def limit():
    """A test that waits for a pipe ends."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_pipes_among_what_is_remembered_are_not_waited_for(key, limit, tmp_path):
    digest = "0" * 64
    integrity.vouch(digest)
    assert integrity._built_here(digest)
    (key.parent / "built" / digest).unlink()
    os.mkfifo(key.parent / "built" / digest)
    assert not integrity._built_here(digest)
    stamps = integrity._Stamps(tmp_path)
    stamps.path.parent.mkdir()
    os.mkfifo(stamps.path)
    assert integrity._Stamps(tmp_path).known == {}
    entry = key.parent / "prepacked" / digest
    entry.mkdir(parents=True)
    os.mkfifo(entry / cache.MANIFEST)
    assert [each.name for each in cache.kept("prepacked")] == ["unreadable"]


def test_without_a_key_native_code_is_refused_with_the_reason(key, monkeypatch):
    with pytest.raises(TrustError, match="and it was not built here"):
        integrity.require_trust("out", "0" * 64, sha256=None, trust_native_code=False)
    monkeypatch.setenv("PRECAST_HOME", os.devnull)
    with pytest.raises(TrustError, match="/dev/null has no key that could prove that it was built here"):
        integrity.require_trust("out", "0" * 64, sha256=None, trust_native_code=False)
