"""`precast cache`: what is kept is shown, and removed only when asked for by name."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

from precast.cli import main
from precast.runtime.artifact import read_artifact
from precast.runtime.storage import cache

TIME = 1_700_000_000


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("list")`: exit code, standard output, standard error of `precast cache list`."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["precast", "cache", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def full(home, encoder):
    """A home with one directory of each kind: the last used is the packed one."""
    entry = home / "prepacked" / ("a" * 64)
    entry.mkdir(parents=True)
    manifest = {"manifest": {"model": "tiny", "graph": "decode"}}
    (entry / cache.MANIFEST).write_text(json.dumps(manifest))
    (entry / "model.onnx.data").write_bytes(bytes(2_500_000))
    for folder in ("artifacts", "exports"):
        shutil.copytree(encoder, home / folder / "x", copy_function=shutil.copyfile)
        for path in (home / folder / "x").iterdir():
            os.utime(path, (TIME, TIME))
    return home


def _left(home):
    """The folders that hold something, or what was taken out of sight there."""
    found = [(path.parent.name, path.name.partition("-")[0]) for path in home.glob("*/*")]
    return sorted(".gone" if name == ".gone" else folder for folder, name in found)


def test_nothing_is_kept_at_first(run, home):
    assert run("list") == (0, f"0 kept in {home}, 0.0 MB on disk\n", "")
    assert json.loads(run("list", "--json")[1]) == {"home": str(home), "bytes": 0, "kept": []}
    assert run("clear", "--all") == (0, "0 removed, 0.0 MB\n", "")
    assert not home.exists()


def test_list_shows_every_kind(run, full, encoder):
    code, out, err = run("list")
    first, second, third, last = out.splitlines()
    assert (code, err) == (0, "")
    assert first.split()[:3] == ["prepacked", "tiny,", "decode"]
    assert first.endswith("2.5 MB  made just now, used just now")
    model = read_artifact(encoder).contract.source.model
    assert sorted(line.split()[:2] for line in (second, third)) == [["exports", model], ["hub", model]]
    assert " d ago" in second
    assert last.startswith(f"3 kept in {full}, ")


def test_list_json_is_one_document(run, full):
    document = json.loads(run("list", "--json")[1])
    assert document["kept"][0]["kind"] == "prepacked"
    assert document["bytes"] == sum(each["bytes"] for each in document["kept"])
    for each in document["kept"]:
        assert each.keys() == {"kind", "name", "path", "bytes", "created", "used"}
        assert os.path.isdir(each["path"])
    assert {each["used"] for each in document["kept"][1:]} == {"2023-11-14T22:13:20Z"}


def test_looking_is_not_using(run, full):
    os.utime(full / "prepacked" / ("a" * 64) / cache.MANIFEST, (TIME, TIME))
    for _ in range(3):
        document = json.loads(run("list", "--json")[1])
        assert [each["used"] for each in document["kept"]] == ["2023-11-14T22:13:20Z"] * 3


def test_using_is_seen(run, full):
    os.utime(full / "artifacts" / "x" / "model.onnx.data", (TIME + 3600, TIME))
    first = json.loads(run("list", "--json")[1])["kept"][1]
    assert (first["kind"], first["used"]) == ("hub", "2023-11-14T23:13:20Z")


def test_a_kill_while_removing_leaves_nothing_in_place(run, full, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "rmtree", lambda path, ignore_errors: None)
        run("clear", "--all")
    assert _left(full) == [".gone", ".gone", ".gone"]
    assert run("list")[1].startswith("0 kept")
    run("clear", "--all")
    assert _left(full) == []


def test_shared_files_count_once(run, full):
    before = json.loads(run("list", "--json")[1])["bytes"]
    entry = full / "prepacked" / ("b" * 64)
    entry.mkdir()
    os.link(full / "prepacked" / ("a" * 64) / "model.onnx.data", entry / "model.onnx.data")
    document = json.loads(run("list", "--json")[1])
    assert document["bytes"] == before
    assert len(document["kept"]) == 4


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ([], ["artifacts", "exports"]),
        (["--prepacked"], ["artifacts", "exports"]),
        (["--hub"], ["exports", "prepacked"]),
        (["--exports"], ["artifacts", "prepacked"]),
        (["--compiler"], ["artifacts", "exports", "prepacked"]),
        (["--hub", "--prepacked"], ["exports"]),
        (["--all"], []),
    ],
)
def test_clear_removes_what_was_named(run, full, options, left):
    shown = json.loads(run("clear", "--dry-run", *options, "--json")[1])
    assert _left(full) == ["artifacts", "exports", "prepacked"]
    done = json.loads(run("clear", *options, "--json")[1])
    assert done == {**shown, "dry_run": False}
    assert shown["dry_run"]
    assert len(done["removed"]) == 3 - len(left)
    assert _left(full) == left


def test_clear_says_what_it_did(run, full):
    code, out, err = run("clear", "--dry-run")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "1 to remove, 2.5 MB"
    assert run("clear")[1].splitlines()[-1] == "1 removed, 2.5 MB"
    assert run("clear")[1] == "0 removed, 0.0 MB\n"


def test_clear_takes_what_the_killed_left_and_not_what_is_being_made(run, full):
    folder = full / "prepacked"
    for name in (".stage-dead", ".gone-dead"):
        (folder / name).mkdir()
        (folder / name / "half").write_text("made")
    stage = cache.Stage("prepacked")
    assert not (folder / ".stage-dead").exists()
    (folder / ".stage-dead").mkdir()
    assert "stage" not in run("list")[1]
    run("clear")
    assert list(folder.iterdir()) == [stage.path]
    stage.close()
    assert list(folder.iterdir()) == []


def test_what_cannot_be_read_is_shown_and_cleared(run, full):
    (full / "prepacked" / ("a" * 64) / cache.MANIFEST).write_text("[]")
    (full / "artifacts" / "x" / "config.json").unlink()
    (full / "artifacts" / "a file").write_text("no directory")
    assert run("list")[1].count("unreadable") == 2
    run("clear", "--all")
    assert _left(full) == ["artifacts"]


def test_what_may_not_be_removed_is_one_line(run, full, monkeypatch):
    def refused(*words):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "remove", refused)
    code, out, err = run("clear")
    assert (code, out) == (1, "")
    assert err == f"precast: {full / 'prepacked' / ('a' * 64)} cannot be removed: Permission denied.\n"


def test_an_unknown_kind_is_wrong_usage(run, home):
    assert run("clear", "--everything")[0] == 2
    assert run("drop")[0] == 2
