"""Directories in the making are told from those that killed processes left, by a lock and nothing else."""

from __future__ import annotations

import ast
import errno
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import handmade
import pytest

from precast.runtime.artifact import locks
from precast.runtime.artifact.locks import LockedDirectory, Scratch, sweep

MAKERS = ("NamedTemporaryFile", "SpooledTemporaryFile", "TemporaryDirectory", "mkdtemp", "mkstemp")
"""A TemporaryFile has no name, and goes with its process."""
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def without_locks(monkeypatch):
    def flock(*asked):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


HOLD = """
from precast.runtime.artifact.locks import LockedDirectory
held = LockedDirectory(pathlib.Path(sys.argv[1]), "a-")
(held.path / "half").write_text("made")
print(held.path, flush=True)
sys.stdin.read()
"""


def _holder(folder: Path, *prefix: str) -> tuple[subprocess.Popen[str], Path]:
    process = handmade.child(HOLD, folder, prefix=prefix)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_another_process_holds_stays_until_it_is_killed(tmp_path):
    process, path = _holder(tmp_path)
    try:
        sweep([path])
        assert (path / "half").read_text() == "made"
    finally:
        process.kill()
        process.communicate()
    sweep([path])
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs a pid namespace")
def test_what_another_container_holds_stays(tmp_path):
    """There its process may have any number, one of a dead process here, too."""
    process, path = _holder(tmp_path, "unshare", "--pid", "--fork", "--kill-child")
    try:
        if not path.is_absolute():
            pytest.skip("no pid namespace can be made here")
        sweep([path])
        assert path.exists()
    finally:
        process.kill()
        process.communicate()
    sweep([path])
    assert not path.exists()


def test_closing_deletes(tmp_path):
    held = LockedDirectory(tmp_path, "a-")
    assert held.is_locked
    (held.path / "deep").mkdir()
    held.close()
    held.close()
    assert list(tmp_path.iterdir()) == []


def test_a_sweeper_between_the_two_steps_costs_another_try(tmp_path, monkeypatch):
    """It finds a new directory before its maker has locked it."""
    original, swept = locks._lock, []

    def lock(path):
        if not swept:
            swept.append(path)
            os.close(original(path))
            shutil.rmtree(path)
        return original(path)

    monkeypatch.setattr(locks, "_lock", lock)
    held = LockedDirectory(tmp_path, "a-")
    assert swept != [held.path]
    assert list(tmp_path.iterdir()) == [held.path]
    held.close()


def test_a_sweeper_right_after_the_opening_costs_another_try(tmp_path, monkeypatch):
    flock, swept = fcntl.flock, []

    def slow(descriptor, how):
        flock(descriptor, how)
        if not swept:
            swept.extend(tmp_path.iterdir())
            shutil.rmtree(swept[0])

    monkeypatch.setattr(fcntl, "flock", slow)
    held = LockedDirectory(tmp_path, "a-")
    assert swept != [held.path]
    assert held.path.is_dir()
    held.close()


def test_where_there_are_no_locks_age_counts(tmp_path, without_locks):
    held = LockedDirectory(tmp_path, "a-")
    assert not held.is_locked
    for name in ("old", "written"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    os.utime(tmp_path / "old" / "file", (0, 0))
    for name in ("old", "written"):
        os.utime(tmp_path / name, (0, 0))
    sweep(tmp_path.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {held.path.name, "written"}
    held.close()


def test_scratch_sweeps_what_the_killed_left_and_nothing_else(temporary):
    left, foreign = temporary / f"{Scratch.PREFIX}dead", temporary / "precast-mine"
    for folder in (left, foreign):
        folder.mkdir()
        (folder / "file").touch()
    (temporary / f"{Scratch.PREFIX}file").touch()
    (temporary / f"{Scratch.PREFIX}link").symlink_to(foreign)
    with Scratch() as folder, Scratch() as other:
        assert folder.is_dir()
        assert other.is_dir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert not left.exists()
    assert {path.name for path in temporary.iterdir()} == {
        "precast-mine", f"{Scratch.PREFIX}file", f"{Scratch.PREFIX}link",
    }  # fmt: skip
    assert (foreign / "file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_what_others_own_is_left(temporary):
    (temporary / f"{Scratch.PREFIX}theirs").mkdir()
    os.chown(temporary / f"{Scratch.PREFIX}theirs", 65534, 65534)
    with Scratch():
        pass
    assert [path.name for path in temporary.iterdir()] == [f"{Scratch.PREFIX}theirs"]


def test_there_are_no_other_temporary_folders():
    """One that is not locked stays for ever when its process is killed."""
    for path in (path for part in ("exporter", "runtime", "cli") for path in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in MAKERS:
                assert [word.arg for word in node.keywords if word.arg == "dir"], f"{path}, line {node.lineno}"
