"""Artifacts on the Hub: what is pushed comes back to the byte and gives the same answers; what goes wrong says so.

The Hub is tests/helpers/fakehub.py. Users are child processes with caches of their own, since huggingface_hub reads its
environment when it is imported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fakehub import FakeHub

from precast.runtime import CompiledModel
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.publish import copy_artifact, hash_files, write_config
from precast.runtime.storage import hub as runtime_hub

REPO = "user/model"
IDS = [[5, 6, 7, 8]]
CLI = "from precast.cli import main; main()"
PUSH = """
import sys
from precast.runtime import CompiledModel
CompiledModel.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2])
"""
OPEN = """
import json, sys
import numpy as np
from precast.runtime import CompiledModel
from precast.runtime.errors import PrecastError

try:
    model = CompiledModel.from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
except PrecastError as error:
    sys.exit(f"{type(error).__name__}: {error}")
np.save(sys.argv[3], model(json.loads(sys.argv[4])).logits)
print(model.artifact.path)
"""


@dataclass
class User:
    """Somebody with empty caches; `settings` are more of their environment."""

    hub: FakeHub
    home: Path
    settings: dict[str, str] = field(default_factory=dict)

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """The `precast` command."""
        return self.python(CLI, *words)

    def open(self, model: object = REPO, **options: Any) -> tuple[Path, np.ndarray]:
        """from_pretrained(): where the artifact lies, and its logits."""
        answer = self.home / "logits.npy"
        done = self.python(OPEN, model, json.dumps(options), answer, json.dumps(IDS))
        assert (done.returncode, done.stderr) == (0, "")
        return Path(done.stdout.strip()), np.load(answer)

    def fail(self, model: object = REPO, **options: Any) -> str:
        """The error of from_pretrained(), one line."""
        done = self.python(OPEN, model, json.dumps(options), self.home / "none", json.dumps(IDS))
        assert done.returncode == 1
        return _one_line(done.stderr)

    def python(self, code: str, *words: object) -> subprocess.CompletedProcess[str]:
        self.home.mkdir(exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        places = {"HF_HOME": str(self.home / "hf"), "PRECAST_HOME": str(self.home / "precast"), "NO_PROXY": "127.0.0.1"}
        access = {"HF_ENDPOINT": self.hub.url, "HF_TOKEN": "x", "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, words)], env={**inherited, **places, **access, **self.settings},
            capture_output=True, text=True, check=False, cwd=self.home, timeout=120,
        )  # fmt: skip


@pytest.fixture
def hub():
    with FakeHub(token="x") as hub:
        yield hub


@pytest.fixture
def new_user(hub, tmp_path):
    """`new_user()`: with caches that nobody used before."""
    return lambda **settings: User(hub, tmp_path / f"user-{os.urandom(4).hex()}", settings)


@pytest.fixture
def published(hub, decoder):
    """The decoder is on the Hub; its files."""
    files = files_of(decoder)
    hub.add(REPO, files)
    return files


def files_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def changed(artifact: Path, target: Path, **files: bytes) -> Path:
    """A copy with other `files`; its config.json tells the truth about them."""
    copy_artifact(read_artifact(artifact), target, force=False)
    for name, content in files.items():
        (target / name).write_bytes(content)
    copy = read_artifact(target)
    write_config(target, copy.config, msgspec.structs.replace(copy.contract, files=hash_files(target)))
    return target


def _one_line(text: str) -> str:
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("lfs_threshold", [None, 1000], ids=["regular", "lfs"])
def test_push_and_load_back(hub, new_user, decoder, lfs_threshold):
    hub.lfs_threshold = lfs_threshold
    pushed = new_user().run("push", decoder, REPO, "--json")
    assert (pushed.returncode, pushed.stderr) == (0, ""), "and no bars where there is no terminal"
    assert any("/lfs/" in line for line in hub.requests) == (lfs_threshold is not None)
    sha = hub.repos[REPO].commits[-1][0]
    assert json.loads(pushed.stdout) == {
        "url": f"{hub.url}/{REPO}/commit/{sha}", "digest": read_artifact(decoder).contract.digest,
    }  # fmt: skip
    assert len(hub.repos[REPO].commits) == 2, "the Hub's own first commit, and ours"
    mine = files_of(decoder)
    assert hub.files(REPO) == {**mine, ".gitattributes": hub.files(REPO)[".gitattributes"]}

    path, logits = new_user().open()
    assert {name: content for name, content in files_of(path).items() if name != ".gitattributes"} == mine
    assert np.array_equal(logits, CompiledModel.from_pretrained(decoder)(IDS).logits)


def test_one_commit_however_many_files(hub, new_user, decoder, tmp_path):
    """huggingface_hub's own upload_folder splits large folders into several commits when it can use xet."""
    many = changed(decoder, tmp_path / "many", **{f"extra{number}.json": b"{}" for number in range(300)})
    user = new_user(HF_HUB_DISABLE_XET="0")
    done = user.python(PUSH, many, REPO)
    assert done.returncode == 0, done.stderr
    assert hub.files(REPO).keys() == {*files_of(many), ".gitattributes"}
    assert len(hub.repos[REPO].commits) == 2


PUSH_AS_THERE = """
import sys
from precast.runtime import CompiledModel
from precast.runtime.errors import PrecastError, UsageError

model = CompiledModel.from_pretrained(sys.argv[1])
model.save_pretrained("saved")
print(model.push_to_hub("saved", repository_id="user/first", use_auth_token=True))
print(model.push_to_hub("second", token="x"))
print(model.push_to_hub(repo_id="user/third", use_auth_token="x", endpoint=sys.argv[3]))
CompiledModel.from_pretrained(sys.argv[2]).save_pretrained("other")
for names, options in (
    (["other"], {"repository_id": "user/fourth"}), ([], {}), (["a", "b", "c"], {}), ([], {"repository_id": 5}),
    (["a"], {"repository_id": "b", "repo_id": "c"}), (["a"], {"repositoryid": "b"}),
):
    try:
        model.push_to_hub(*names, **options)
    except UsageError as error:
        print(error)
"""


def test_push_as_optimum_neuron_does(hub, new_user, decoder, encoder):
    """By the directory that was saved, the old names of arguments, and repositories of one's own without a name."""
    done = new_user().python(PUSH_AS_THERE, decoder, encoder, hub.url)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name, line in zip(("first", "second", "third"), lines, strict=False):
        assert line.startswith(f"{hub.url}/user/{name}/commit/")
        assert hub.files(f"user/{name}").keys() == {*files_of(decoder), ".gitattributes"}
    assert len(hub.repos) == 3
    for line, words in zip(
        lines[3:],
        ("other does not hold this model", "it was given neither", "it was given 'a', 'b', 'c'", "it was given 5",
         "repository_id and repo_id, which are names of the same", "Did you mean repo_id"),
        strict=True,
    ):  # fmt: skip
        assert words in line


def test_private(hub, new_user, decoder):
    for repo, flags in {"user/open": [], "user/closed": ["--private"]}.items():
        assert new_user().run("push", decoder, repo, *flags).returncode == 0
        assert hub.repos[repo].private == bool(flags)


def test_export_and_push(hub, new_user, checkpoint, tmp_path):
    done = new_user().run(
        "export", checkpoint("llama"), "-o", tmp_path / "out", "--sequence-length", 16, "--no-validate",
        "--push-to-hub", REPO, "--private", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    repo = hub.repos[REPO]
    assert json.loads(done.stdout)["url"] == f"{hub.url}/{REPO}/commit/{repo.commits[-1][0]}"
    assert repo.private
    assert hub.files(REPO).items() >= files_of(tmp_path / "out").items()


def test_a_second_push_removes_what_is_no_longer_there(hub, new_user, decoder, tmp_path):
    user = new_user()
    old = changed(decoder, tmp_path / "old", **{"extra.json": b"{}", "README.md": b"# Old\n"})
    assert user.run("push", old, REPO).returncode == 0
    old_sha = hub.repos[REPO].commits[-1][0]
    assert user.run("push", decoder, REPO).returncode == 0
    assert hub.files(REPO).keys() == {*files_of(decoder), ".gitattributes"}
    assert len(hub.repos[REPO].commits) == 3

    path, _ = user.open()
    assert not (path / "extra.json").exists()
    path, _ = user.open(revision=old_sha)
    assert (path / "extra.json").read_bytes() == b"{}"
    assert (path / "README.md").read_text() == "# Old\n"


def test_pushing_again_what_is_there_commits_nothing(hub, new_user, decoder):
    user = new_user()
    first, second = (user.run("push", decoder, REPO, "--json").stdout for _ in range(2))
    assert first == second
    assert len(hub.repos[REPO].commits) == 2


def test_a_subfolder_is_all_that_is_downloaded(hub, new_user, decoder):
    files = files_of(decoder)
    hub.add(REPO, {"model.safetensors": b"large", **{f"compiled/{name}": files[name] for name in files}})
    path, _ = new_user().open(subfolder="compiled")
    assert files_of(path) == files
    assert not any("safetensors" in line for line in hub.requests)


def test_without_the_hub_once_it_is_downloaded(hub, new_user, published):
    user = new_user()
    assert "HubError: user/model is neither a local directory nor in the Hub cache" in user.fail(local_files_only=True)
    assert hub.requests == []
    path, logits = user.open()
    asked = len(hub.requests)
    for settings, options in ({}, {"local_files_only": True}), ({"HF_HUB_OFFLINE": "1"}, {}):
        again = User(hub, user.home, settings).open(**options)
        assert again[0] == path
        assert np.array_equal(again[1], logits)
    assert len(hub.requests) == asked


# ---------------------------------------------------------------- the store


def test_a_cache_two_links_deep_opens(new_user, published):
    """What huggingface_hub makes of files that xet carries: snapshots -> blobs -> one store for all repositories."""
    user = new_user()
    _, logits = user.open()
    shutil.rmtree(user.home / "precast")
    cache = user.home / "hf" / "hub"
    for number, blob in enumerate((cache / "models--user--model" / "blobs").iterdir()):
        shared = cache / "blobs" / f"{number:02x}" / blob.name
        shared.parent.mkdir(parents=True)
        blob.rename(shared)
        blob.symlink_to(os.path.relpath(shared, blob.parent))
    (snapshot,) = (cache / "models--user--model" / "snapshots").iterdir()
    # ONNX Runtime before 1.32 refuses to open it from there.
    path, again = user.open(local_files_only=True)
    assert np.array_equal(logits, again)
    assert path.is_relative_to(user.home / "precast")
    for name in published:
        assert not (path / name).is_symlink()
        assert (path / name).samefile(snapshot / name), "linked, not copied"


def test_files_are_copied_where_they_cannot_be_linked(encoder, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    path = runtime_hub._link_into_store(read_artifact(encoder))
    assert files_of(path) == files_of(encoder)
    assert not any((path / name).samefile(encoder / name) for name in files_of(encoder))


def test_another_process_may_be_faster(encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path))
    publish = runtime_hub.publish

    def late(stage, target, *, force):
        shutil.copytree(stage, target)
        publish(stage, target, force=force)

    monkeypatch.setattr(runtime_hub, "publish", late)
    path = runtime_hub._link_into_store(read_artifact(encoder))
    assert files_of(path) == files_of(encoder)
    assert list(path.parent.iterdir()) == [path]


def test_what_was_altered_on_the_hub_is_refused_by_name_and_not_kept(hub, new_user, published):
    user, good = new_user(), published["model.onnx.data"]
    for bad in good[:-1] + bytes([good[-1] ^ 1]), good[:-1]:
        hub.add(REPO, {**published, "model.onnx.data": bad})
        error = user.fail()
        assert error.startswith("IntegrityError: ")
        assert "model.onnx.data" in error
    hub.add(REPO, {name: content for name, content in published.items() if name != "tokenizer.json"})
    assert "tokenizer.json" in user.fail()
    hub.add(REPO, published)
    path, _ = user.open()
    assert files_of(path) == published


def test_force_download_replaces_what_was_altered_here(new_user, published):
    user = new_user()
    path, _ = user.open()
    (path / "model.onnx").write_bytes(b"nothing")
    assert "model.onnx" in user.fail()
    assert files_of(user.open(force_download=True)[0]) == published


# ---------------------------------------------------------------- what goes wrong


def _check_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 1, a JSON document on standard output, the same in one line on standard error."""
    assert done.returncode == 1, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "HubError"
    assert "\n" not in error["message"]
    assert _one_line(done.stderr) == f"precast: {error['message']}"
    for word in words:
        assert word in error["message"]


UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:1"}
LOG_IN = "hf auth login"


@pytest.mark.parametrize(
    ("words", "settings", "fault", "expected"),
    [
        (["user/none"], {}, 0, ["404", "Check the name"]),
        ([REPO, "--revision", "none"], {}, 0, ["404", "Check the name and revision"]),
        (["user/not a name"], {}, 0, ["user/not a name"]),
        ([REPO], {"HF_TOKEN": "wrong"}, 0, ["401", LOG_IN]),
        ([REPO, "--token", "wrong"], {}, 0, ["401", LOG_IN]),
        ([REPO], {}, 403, ["403: injected", LOG_IN]),
        ([REPO], {}, 500, ["500: injected", "Try again"]),
        ([REPO], UNREACHABLE, 0, ["not asked: http://127.0.0.1:1 cannot be reached", "refused"]),
        ([REPO], {"HF_HUB_OFFLINE": "1"}, 0, ["not asked", "HF_HUB_OFFLINE"]),
    ],
)
def test_failed_pulls(hub, new_user, published, words, settings, fault, expected):
    if fault:
        hub.fail("GET /api/models/", fault)
    _check_error(new_user(**settings).run("inspect", *words, "--json"), words[0], *expected)


def test_an_unreachable_hub_is_found_out_once(hub, new_user, published):
    """Its client would say so eleven times in half a minute; what the cache holds is taken, and that is said."""
    user = new_user(**UNREACHABLE)
    done = user.run("tasks", REPO)
    assert (done.returncode, done.stdout) == (1, "")
    assert _one_line(done.stderr).startswith(f"precast: {REPO} is neither a local path nor a checkpoint")
    assert "http://127.0.0.1:1 cannot be reached" in done.stderr
    user.settings.clear()
    assert user.run("inspect", REPO).returncode == 0
    user.settings.update(UNREACHABLE)
    done = user.run("inspect", REPO, "--json")
    assert (done.returncode, json.loads(done.stdout)["task"]) == (0, "text-generation")
    assert re.fullmatch(
        r"precast: http://127.0.0.1:1 cannot be .*; what the Hub's cache holds was taken.\n", done.stderr
    )


def test_an_option_overrides_the_environment(new_user, published):
    assert new_user(HF_TOKEN="wrong").run("inspect", REPO, "--token", "x").returncode == 0


@pytest.mark.parametrize(
    ("settings", "fault", "expected"),
    [
        ({"HF_TOKEN": "wrong"}, None, ["401", LOG_IN]),
        ({}, ("repos/create", 403), ["403", LOG_IN]),
        ({}, ("repos/create", 500), ["500: injected", "Try again"]),
        ({}, ("preupload", 404), ["404"]),
        ({}, ("PUT /lfs/", 400), ["400: injected"]),
        ({}, ("/commit/", 503), ["503"]),
        (UNREACHABLE, None, ["refused"]),
        ({"HF_HUB_OFFLINE": "1"}, None, ["HF_HUB_OFFLINE"]),
    ],
)
def test_failed_pushes(hub, new_user, decoder, settings, fault, expected):
    hub.lfs_threshold = 1000
    if fault:
        hub.fail(*fault, times=9)
    _check_error(new_user(**settings).run("push", decoder, REPO, "--json"), "was not pushed to user/model", *expected)
    assert all(len(repo.commits) == 1 for repo in hub.repos.values())


def test_what_is_not_an_artifact_is_not_pushed(hub, new_user, decoder, checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(decoder, broken)
    (broken / "model.onnx").write_bytes(b"nothing")
    for path, word in (broken, "model.onnx"), (checkpoint("llama"), "not a precast artifact"), (tmp_path / "no", "no"):
        done = new_user().run("push", path, REPO)
        assert done.returncode == 1
        assert word in _one_line(done.stderr)
    assert hub.requests == []


def test_a_repository_without_an_artifact(hub, new_user):
    hub.add(REPO, {"config.json": b"{}", "model.safetensors": b""})
    assert "not a precast artifact" in new_user().fail()


def test_a_path_is_never_asked_of_the_hub(hub, new_user):
    for name in "./none", "/none/at/all", "~/none", "a/b/c":
        assert f"There is no directory {name}" in new_user().fail(name)
    assert hub.requests == []
