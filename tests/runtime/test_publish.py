"""All or nothing: whatever fails, dies, or runs beside it, the target holds a complete artifact or what it held."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import handmade
import pytest

from precast.runtime import CompiledModel
from precast.runtime.artifact import publish, read_artifact
from precast.runtime.errors import ArtifactError, IntegrityError, PublishError
from precast.runtime.storage.hub import locate


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch, tmp_path):
    """Both ways to replace a directory."""
    if request.param == "two renames":
        monkeypatch.setattr(publish, "_rename_exchange", lambda one, other: False)
    else:
        one, other = tmp_path / "one", tmp_path / "other"
        one.mkdir(), other.mkdir()
        if not publish._rename_exchange(one, other):
            pytest.skip("this file system cannot exchange two directories")
        one.rmdir(), other.rmdir()
    return request.param


@pytest.fixture
def parent(tmp_path):
    """A directory of its own for targets."""
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _note(target: Path) -> str | None:
    """What loads from `target`, None where nothing is; anything torn raises."""
    try:
        locate(target)
    except ArtifactError:
        return None
    return handmade.load(target)


class _Steps:
    """Stands in for `publish.fault`: counts the steps, and acts at one of them."""

    def __init__(self, at: int = -1, act=lambda: None) -> None:
        self.names, self.at, self.act = [], at, act

    def __call__(self, step: str) -> None:
        self.names.append(step)
        if len(self.names) == self.at + 1:
            self.act()


def _steps(monkeypatch, target: Path, **options) -> list[str]:
    """The names of all steps of one run."""
    steps = _Steps()
    with monkeypatch.context() as patch:
        patch.setattr(publish, "fault", steps)
        handmade.make(target, **options)
    return steps.names


def _raise(error: BaseException) -> None:
    raise error


ERRORS = [OSError(28, "No space left on device"), KeyboardInterrupt()]


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("error", ERRORS, ids=["OSError", "KeyboardInterrupt"])
def test_a_failure_at_any_step_leaves_no_new_target(parent, monkeypatch, error):
    steps = _steps(monkeypatch, parent / "first")
    assert {"hash", "config", "fsync model.onnx", "fsync config.json", "rename", "fsync parent"} <= set(steps)
    shutil.rmtree(parent / "first")
    for index, step in enumerate(steps):
        monkeypatch.setattr(publish, "fault", _Steps(index, lambda: _raise(error)))
        with pytest.raises((PublishError, KeyboardInterrupt)):
            handmade.make(parent / "out", "new")
        if step == "fsync parent":
            assert handmade.load(parent / "out") == "new"
            shutil.rmtree(parent / "out")
        assert _names(parent) == [], step


@pytest.mark.parametrize("error", ERRORS, ids=["OSError", "KeyboardInterrupt"])
def test_a_failure_at_any_step_leaves_the_old_artifact(parent, monkeypatch, way, error):
    handmade.make(parent / "out", "older")
    steps = _steps(monkeypatch, parent / "out", note="old", force=True)
    assert steps[-2] == ("exchange" if way == "exchange" else "rename")
    assert ("set aside" in steps) == (way == "two renames")
    for index, step in enumerate(steps):
        monkeypatch.setattr(publish, "fault", _Steps(index, lambda: _raise(error)))
        with pytest.raises((PublishError, KeyboardInterrupt)):
            handmade.make(parent / "out", "new", force=True)
        # Before a reader could have recovered it.
        assert _names(parent) == ["out"], step
        assert handmade.load(parent / "out") == ("new" if step == "fsync parent" else "old"), step


DYING = """
target, note, index, way = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
left = [index]
def fault(step):
    if left[0] == 0:
        os._exit(9)
    left[0] -= 1
publish.fault = fault
if way == "two renames":
    publish._rename_exchange = lambda one, other: False
handmade.make(target, note, force=True)
"""


def _dies(target: Path, index: int, way: str = "") -> bool:
    """Does an export of "new" get as far as the step with this index, and die there?"""
    process = handmade.child(DYING, target, "new", index, way)
    handmade.last_words(process)
    return process.returncode == 9


def test_death_at_any_step_leaves_no_torn_target(parent, monkeypatch):
    steps = _steps(monkeypatch, parent / "first")
    shutil.rmtree(parent / "first")
    for index, step in enumerate(steps):
        assert _dies(parent / "out", index), step
        assert _note(parent / "out") == ("new" if step == "fsync parent" else None), step
        handmade.make(parent / "out", "next", force=True)
        assert _names(parent) == ["out"], step
        shutil.rmtree(parent / "out")


def test_death_at_any_step_leaves_the_old_artifact(parent, monkeypatch, way):
    handmade.make(parent / "out", "older")
    steps = _steps(monkeypatch, parent / "out", note="old", force=True)
    for index, step in enumerate(steps):
        assert _dies(parent / "out", index, way), step
        assert _note(parent / "out") == ("new" if step == "fsync parent" else "old"), step
        handmade.make(parent / "out", "old", force=True)
        assert _names(parent) == ["out"], step


def test_the_next_export_recovers_too(parent, monkeypatch):
    """Killed between the two renames, and nobody has read since."""
    handmade.make(parent / "out[1]", "old")
    os.rename(parent / "out[1]", parent / ".out[1].old-abcd")
    with pytest.raises(PublishError, match="not empty"):
        publish.check_target(parent / "out[1]", force=False)
    assert handmade.load(parent / "out[1]") == "old"


def test_a_full_disk_is_named(parent, monkeypatch):
    monkeypatch.setattr(publish, "fault", _Steps(0, lambda: _raise(OSError(28, "No space left on device"))))
    with pytest.raises(PublishError, match=r"/out was not written: the disk is full\. Nothing was changed there\."):
        handmade.make(parent / "out")


def test_a_file_size_limit_is_named(parent):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
    process = handmade.child(limit + "handmade.make(pathlib.Path(sys.argv[1]))", parent / "out")
    reason = "a file would be larger than this process or file system allows"
    assert f"PublishError: {parent / 'out'} was not written: {reason}." in handmade.last_words(process)
    assert _names(parent) == []


# ---------------------------------------------------------------- targets


def test_a_full_target_needs_force(parent):
    handmade.make(parent / "out", "old")
    with pytest.raises(PublishError, match=r"/out exists and is not empty.*force=True"):
        handmade.make(parent / "out", "new")
    assert handmade.load(parent / "out") == "old"
    handmade.make(parent / "out", "new", force=True)
    assert handmade.load(parent / "out") == "new"


def test_an_empty_directory_is_a_target(parent, monkeypatch):
    (parent / "out").mkdir()
    handmade.make(parent / "out", "new")
    assert handmade.load(parent / "out") == "new"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", [".", "../out"])
def test_the_current_directory_is_none(parent, monkeypatch, name, force):
    """A rename would leave the user's shell in a directory that is gone."""
    (parent / "out").mkdir()
    monkeypatch.chdir(parent / "out")
    with pytest.raises(PublishError, match="is the current directory"):
        handmade.make(Path(name), force=force)


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"config.json": '{"model_type": "llama"}', "w": ""}])
def test_force_replaces_artifacts_only(parent, content):
    """Not the user's notes, and not a checkpoint, which has a config.json as well."""
    (parent / "out").mkdir()
    for name, text in content.items():
        (parent / "out" / name).write_text(text)
    with pytest.raises(PublishError, match="force=True replaces artifacts only"):
        handmade.make(parent / "out", force=True)
    assert _names(parent / "out") == sorted(content)


@pytest.mark.parametrize("force", [False, True])
def test_impossible_targets(parent, force):
    (parent / "file").write_text("mine")
    (parent / "nowhere").symlink_to("none")
    (parent / "loop").symlink_to("loop")
    for name, message in {
        "file": "is a file",
        "file/out": "cannot be written",
        "nowhere": "symbolic link to nothing",
        "loop": "symbolic link to nothing",
        "n" * 300: "File name too long",
        "n" * 240: "File name too long",
    }.items():
        with pytest.raises(PublishError, match=message) as caught:
            handmade.make(parent / name, force=force)
        assert str(parent / name) in str(caught.value)
    assert _names(parent) == ["file", "loop", "nowhere"]


@pytest.mark.parametrize("force", [False, True])
def test_a_link_to_a_directory_stays_a_link(parent, way, force):
    (parent / "disk").mkdir()
    (parent / "disk" / "out").mkdir()
    if force:
        handmade.make(parent / "disk" / "out", "old", force=True)
    (parent / "link").symlink_to("disk/out")
    handmade.make(parent / "link", "new", force=force)
    assert os.readlink(parent / "link") == "disk/out"
    assert handmade.load(parent / "link") == "new"
    assert _names(parent) == ["disk", "link"]
    assert _names(parent / "disk") == ["out"]


@pytest.fixture
def public():
    """A directory that every user can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        os.chmod(folder, 0o700)


@pytest.mark.parametrize("name", ["out", "new/er/out", "closed/out"])
def test_a_target_that_may_not_be_written(public, name):
    (public / "closed").mkdir(mode=0o000)
    public.chmod(0o555)
    check = "publish.check_target(pathlib.Path(sys.argv[1]), force=False)"
    process = handmade.child(handmade.UNPRIVILEGED + check, public / name, cwd="/")
    assert f"PublishError: {public / name} cannot be written: " in handmade.last_words(process)
    assert _names(public) == ["closed"]


def test_a_reader_need_not_be_able_to_recover(public):
    handmade.make(public / "out", "old")
    os.rename(public / "out", public / ".out.old-abcd")
    public.chmod(0o555)
    load = "handmade.load(pathlib.Path(sys.argv[1]))"
    process = handmade.child(handmade.UNPRIVILEGED + load, public / "out", cwd="/")
    assert "ArtifactError: There is no directory" in handmade.last_words(process)
    public.chmod(0o755)
    assert handmade.load(public / "out") == "old"


# ---------------------------------------------------------------- others at work


@pytest.mark.parametrize("name", ["out", "out[1]"])
def test_stages_of_dead_processes_are_swept(parent, name):
    handmade.make(parent / name)
    kept = [".other.stage-aaaa", f".{name}.x"]
    # Process ids, which earlier releases had in these names, say nothing: this one is alive, in this container.
    gone = [f".{name}.stage-aaaa", f".{name}.stage-{os.getpid()}-aaaa", f".{name}.old-aaaa"]
    for folder in (*kept, *gone):
        (parent / folder / "deep").mkdir(parents=True)
    with publish.staging(parent / name) as stage:
        handmade.make(parent / name, force=True)
        assert _names(parent) == sorted([name, *kept, stage.name])


def test_who_recovers_too_early_does_not_make_the_writer_fail(parent, monkeypatch):
    """Between the two renames someone looks for the target, and puts the old artifact back."""
    monkeypatch.setattr(publish, "_rename_exchange", lambda one, other: False)
    handmade.make(parent / "out", "old")
    found: list[str] = []

    def look(step: str) -> None:
        if step == "rename" and not found:
            found.append(handmade.load(parent / "out"))

    monkeypatch.setattr(publish, "fault", look)
    handmade.make(parent / "out", "new", force=True)
    assert (found, handmade.load(parent / "out")) == (["old"], "new")
    assert _names(parent) == ["out"]


def test_a_stage_may_vanish_while_we_look(parent, monkeypatch):
    stage = parent / ".out.stage-aaaa"
    stage.mkdir()
    flock = fcntl.flock
    monkeypatch.setattr("fcntl.flock", lambda *asked: (stage.exists() and stage.rmdir(), flock(*asked))[1])
    handmade.make(parent / "out")
    assert _names(parent) == ["out"]


def test_of_two_who_make_one_target_one_wins(parent, monkeypatch):
    """Both have found it free, and both rename now."""
    together = threading.Barrier(2)
    monkeypatch.setattr(publish, "fault", lambda step: together.wait(60) if step == "rename" else None)
    results: list[object] = []

    def make(note: str) -> None:
        try:
            results.append(handmade.make(parent / "out", note).config["note"])
        except PublishError as error:
            results.append(error)

    threads = [threading.Thread(target=make, args=(note,)) for note in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [result for result in results if isinstance(result, str)]
    [loser] = [result for result in results if isinstance(result, PublishError)]
    assert handmade.load(parent / "out") == winner
    assert "not empty" in str(loser)
    assert _names(parent) == ["out"]


REPLACING = """
target, way, errors = pathlib.Path(sys.argv[1]), sys.argv[2], []
if way == "two renames":
    publish._rename_exchange = lambda one, other: False
for index in range(int(sys.argv[3])):
    if (target.parent / "enough").exists():
        break
    try:
        # Not read back: another writer may be between its two renames.
        handmade.write(target, f"{os.getpid()} {index}", force=True)
    except publish.PublishError as error:
        errors.append(error)
print(len(errors), *errors[:1])
"""


def test_several_who_replace_one_target_leave_it_whole(parent, way):
    handmade.make(parent / "out")
    for process in [handmade.child(REPLACING, parent / "out", way, 25) for _ in range(3)]:
        assert handmade.last_words(process) == ""
        assert process.returncode == 0
    assert handmade.load(parent / "out").endswith(" 24")
    handmade.make(parent / "out", force=True)
    assert _names(parent) == ["out"]


def test_a_reader_never_sees_a_torn_artifact(parent, way):
    handmade.make(parent / "out")
    seen, missed = set(), []
    with handmade.child(REPLACING, parent / "out", way, 10_000) as writer:
        while writer.poll() is None and len(seen) < 30:
            try:
                seen.add(CompiledModel.from_pretrained(parent / "out", verify=True).config["note"])
            except ArtifactError as error:
                missed.append(type(error))
        (parent / "enough").touch()
        assert writer.stdout.read().strip() == "0", "a reader must not make a writer fail"
    assert len(seen) == 30
    # Between two renames there is a moment without a target.
    assert set(missed) <= ({ArtifactError} if way == "two renames" else set())


def test_a_file_replaced_after_it_was_verified_is_not_opened(decoder, artifact, checkpoint, parent):
    """A session opens its graph when first used, perhaps long after loading."""
    import numpy as np

    another = artifact(checkpoint("llama", num_hidden_layers=2))
    publish.copy_artifact(read_artifact(decoder), parent / "out", force=False)
    model = CompiledModel.from_pretrained(parent / "out")
    publish.copy_artifact(read_artifact(another), parent / "out", force=True)
    with pytest.raises(IntegrityError, match=r"model\.onnx was replaced after it was verified"):
        model(np.array([[1, 2, 3]]))
    assert CompiledModel.from_pretrained(parent / "out")(np.array([[1, 2, 3]])).logits.shape == (1, 3, 320)


# ---------------------------------------------------------------- copies


def test_a_copy_is_an_artifact(parent):
    made = handmade.make(parent / "out", "old")
    publish.copy_artifact(made, parent / "copy", force=False)
    assert read_artifact(parent / "copy").contract == made.contract
    assert handmade.load(parent / "copy") == "old"
    with pytest.raises(PublishError, match="is the artifact itself"):
        publish.copy_artifact(made, parent / "copy" / ".." / "out", force=True)


def test_a_spoiled_artifact_is_not_copied(parent):
    made = handmade.make(parent / "out", "old")
    (parent / "out" / "sub" / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"sub/tokenizer\.json in .*/out has 2 bytes where config\.json says"):
        publish.copy_artifact(made, parent / "copy", force=False)
    (parent / "out" / "model.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"out lacks the file model\.onnx"):
        publish.copy_artifact(made, parent / "copy", force=False)
    assert _names(parent) == ["out"]


# ---------------------------------------------------------------- mount points


def _mount(folder: Path, *options: str) -> None:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"no mounting here: {done.stderr.strip()}")


@pytest.fixture
def mounted(tmp_path):
    """An empty file system of its own, mounted at `mnt`."""
    folder = tmp_path / "mnt"
    _mount(folder)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_mount_point_is_filled_config_last(mounted, monkeypatch):
    steps = _steps(monkeypatch, mounted, note="new")
    moves = [step for step in steps if step.startswith("move")]
    assert moves[-1] == "move config.json"
    assert len(moves) == 5
    assert handmade.load(mounted) == "new"
    assert _names(mounted) == ["README.md", "config.json", "model.onnx", "model.onnx.data", "sub"]
    with pytest.raises(PublishError, match="not empty"):
        handmade.make(mounted)
    with pytest.raises(PublishError, match="is a mount point, which cannot be exchanged; empty it first"):
        handmade.make(mounted, force=True)
    assert handmade.load(mounted) == "new"


@pytest.mark.parametrize("error", ERRORS, ids=["OSError", "KeyboardInterrupt"])
def test_a_failure_leaves_a_mount_point_empty(mounted, monkeypatch, error):
    steps = [*_steps(monkeypatch, mounted)]
    for path in mounted.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for index, step in enumerate(steps[:-1]):
        monkeypatch.setattr(publish, "fault", _Steps(index, lambda: _raise(error)))
        with pytest.raises((PublishError, KeyboardInterrupt)):
            handmade.make(mounted)
        assert _names(mounted) == [], step


def test_death_leaves_no_artifact_at_a_mount_point(mounted):
    for index in range(100):
        died = _dies(mounted, index)
        assert died == (not (mounted / "config.json").exists()) or _note(mounted) == "new"
        if not died:
            break
        if not [name for name in _names(mounted) if ".stage-" not in name]:
            # Before anything was moved the place still counts as empty, and the stage is swept.
            handmade.make(mounted, "next")
            assert handmade.load(mounted) == "next"
        for path in mounted.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert _note(mounted) == "new"
    assert index > 10


def test_a_disk_that_fills_up(tmp_path):
    _mount(tmp_path / "mnt", "-o", "size=64k")
    try:
        (tmp_path / "mnt" / "ballast").write_bytes(bytes(54 * 1024))
        with pytest.raises(PublishError, match="the disk is full"):
            handmade.make(tmp_path / "mnt" / "out")
        assert _names(tmp_path / "mnt") == ["ballast"]
    finally:
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
