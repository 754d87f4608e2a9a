"""Artifacts on the Hub: what is pushed comes back to the byte and gives the same answers; what goes wrong says so.

The Hub is tests/fakehub.py. Users are child processes with caches of their own, since huggingface_hub reads its
environment when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakehub import FakeHub

from precast.runtime import CompiledModel
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.publish import copy_artifact, hash_files, write_config

REPO = "user/model"
IDS = [[5, 6, 7, 8]]
CLI = "from precast.cli import main; main()"
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
        return self._python(CLI, *words)

    def open(self, model: object = REPO, **options: Any) -> tuple[Path, np.ndarray]:
        """from_pretrained(): where the artifact lies, and its logits."""
        answer = self.home / "logits.npy"
        done = self._python(OPEN, model, json.dumps(options), answer, json.dumps(IDS))
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip()), np.load(answer)

    def fail(self, model: object = REPO, **options: Any) -> str:
        """The error of from_pretrained(), one line."""
        done = self._python(OPEN, model, json.dumps(options), self.home / "none", json.dumps(IDS))
        assert done.returncode == 1
        return _one_line(done.stderr)

    def _python(self, code: str, *words: object) -> subprocess.CompletedProcess[str]:
        self.home.mkdir(exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        places = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home / "hf"), "PRECAST_HOME": str(self.home / "own")}
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=self.home, timeout=120,
            env={**inherited, **places, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "x", **self.settings},
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
    """A copy with other `files`; those with no content are left out. Its config.json tells the truth."""
    copy_artifact(read_artifact(artifact), target, force=False)
    for name, content in files.items():
        (target / name).write_bytes(content) if content else (target / name).unlink()
    copy = read_artifact(target)
    contract = copy.contract
    write_config(target, copy.config, type(contract)(**{**_fields(contract), "files": hash_files(target)}))
    return target


def _fields(contract: Any) -> dict[str, Any]:
    return {name: getattr(contract, name) for name in contract.__struct_fields__}


def _one_line(text: str) -> str:
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("lfs_threshold", [None, 1000], ids=["regular", "lfs"])
def test_push_and_load_back(hub, new_user, decoder, lfs_threshold):
    hub.lfs_threshold = lfs_threshold
    pushed = new_user().run("push", decoder, REPO, "--json")
    assert pushed.returncode == 0, pushed.stderr
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
