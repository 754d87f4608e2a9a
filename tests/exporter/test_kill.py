"""A real `precast export`, killed or interrupted at any moment: what stays is the old artifact, the new, or none."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from precast.runtime import CompiledModel
from precast.runtime.artifact import publish

pytestmark = pytest.mark.slow

STEPS = ["resolve", "plan", "load", "trace", "reference", "compile", "validate", "publish"]
KILLS = int(os.environ.get("PRECAST_KILLS", "8"))
"""How often an export is killed at a random moment: more by `make soak`."""


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("llama")


@pytest.fixture
def target(tmp_path):
    """A target in a directory of its own."""
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent" / "out"


def _start(source: Path, target: Path, *words: str, prelude: str = "") -> subprocess.Popen[str]:
    """The command, as the leader of a process group, as a shell would start it."""
    code = f"{prelude}\nfrom precast.cli import main; main()"
    command = [sys.executable, "-c", code, "export", str(source), "-o", str(target), "--sequence-length", "24", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
    )


def _follow(process: subprocess.Popen[str], step: str) -> None:
    """Return when this step is done."""
    for line in process.stderr:
        if line.startswith(f"  {step} "):
            return
    pytest.fail(f"the export ended before {step} was done, with {process.wait()}")


def _digest(target: Path) -> str | None:
    """Of the artifact that loads, every file hashed anew; None where there is nothing."""
    if not target.exists():
        return None
    return CompiledModel.from_pretrained(target, verify=True).artifact.contract.digest


def _sweep(target: Path) -> list[str]:
    """What the next export begins with; then the names beside the target."""
    publish.check_target(target, force=True)
    with publish.staging(target):
        pass
    return [path.name for path in target.parent.iterdir()]


@pytest.fixture(scope="module")
def seconds(source, tmp_path_factory):
    """How long an export takes after its imports."""
    with _start(source, tmp_path_factory.mktemp("timed") / "out") as process:
        _follow(process, "resolve")
        started = time.perf_counter()
        process.communicate()
    return time.perf_counter() - started


@pytest.fixture(scope="module")
def digests(source, tmp_path_factory):
    """Of the new artifact, and where an old one lies."""
    from precast.exporter import ExportOptions, export

    root = tmp_path_factory.mktemp("digests")
    old = export(str(source), root / "old", ExportOptions(sequence_length=(16,), validate=False))
    new = export(str(source), root / "new", ExportOptions(sequence_length=(24,)))
    return old, new.contract.digest


@pytest.mark.parametrize("is_there", [True, False], ids=["replacing", "fresh"])
def test_killed_at_any_moment(source, target, seconds, digests, is_there):
    old, new = digests
    if is_there:
        publish.copy_artifact(old, target, force=False)
    allowed = {old.contract.digest if is_there else None, new}
    moments = random.Random(7)
    for _ in range(KILLS):
        with _start(source, target, "--force") as process:
            _follow(process, "resolve")
            try:
                process.wait(moments.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
        assert _digest(target) in allowed
        assert _sweep(target) == [target.name] * target.exists()
        if _digest(target) == new:
            # Begin again with what there was.
            if is_there:
                publish.copy_artifact(old, target, force=True)
            else:
                shutil.rmtree(target)


PROGRESS = re.compile(
    r"Exporting .+ …$|  \w+ +\d|(task|batch size|sequence length|graphs|weights|cache|memory to export) "
)


@pytest.mark.parametrize("step", ["import", *STEPS[:-1]])
def test_interrupted_after_any_step(source, target, digests, step):
    old, new = digests
    publish.copy_artifact(old, target, force=False)
    with _start(source, target, "--force") as process:
        if step == "import":
            while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
                assert process.poll() is None
        else:
            _follow(process, step)
        # As a terminal does: to the validating child as well.
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    if step == "validate" and process.returncode == 0:
        # Publishing takes a millisecond: it may be over before the signal arrives.
        assert _digest(target) == new
        return
    said = [line for line in err.splitlines() if line and not PROGRESS.match(line)]
    assert (process.returncode, out, said) == (130, "", ["precast: Interrupted."])
    assert _digest(target) == old.contract.digest
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_terminated(source, target):
    with _start(source, target, "-q") as process:
        while not list(target.parent.iterdir()):
            assert process.poll() is None
        process.terminate()
        assert process.communicate() == ("", "")
    assert process.returncode == 143
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("limit", [100, 20_000, 150_000])
def test_a_file_size_limit(source, target, limit):
    """Whoever writes, ours or a library below, what comes out is one line, and nothing stays."""
    prelude = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    with _start(source, target, "-q", prelude=prelude) as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"precast: {target} was not written: a file would be larger than")
    assert err.count("\n") == 1, err
    assert list(target.parent.iterdir()) == []
