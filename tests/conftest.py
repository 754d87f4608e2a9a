"""Fixtures: an isolated home, tiny checkpoints and their artifacts, each made once per run."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

# Before huggingface_hub is imported: no test reaches the network, and its xet client only speaks to the real Hub.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false"
)


if "PYTEST_XDIST_WORKER" in os.environ:
    # A core for each worker, and a thread for each core: threads of several pools that wait for each other by spinning
    # would slow the other worker tenfold. Child processes and ONNX Runtime go by the cores that they are given.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new folder, which all workers of this run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(autouse=True, scope="session")
def _shared_folders_stay_as_made(run_folder: Path) -> None:
    """Another worker may be reading them: who changes a checkpoint or an artifact takes a copy (dots: being made)."""
    shared = re.compile(rf"{re.escape(str(run_folder))}/(checkpoints|artifacts)/[^/.]+/")
    written = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            paths = arguments[:1] if isinstance(arguments[2], int) and arguments[2] & written else ()
        elif event in {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate"}:
            paths = arguments[:2]
        elif event in {"os.link", "os.symlink"}:
            paths = arguments[1:2]
        else:
            return
        for path in paths:
            if isinstance(path, str | os.PathLike) and shared.match(os.fspath(path)):
                raise AssertionError(f"{event} of {path}, which other tests read: copy it first")

    sys.addaudithook(refuse)


@pytest.fixture(autouse=True, scope="session")
def _private_home(tmp_path_factory: pytest.TempPathFactory, run_folder: Path) -> Iterator[None]:
    """Keys, stamps and pulled artifacts go to a folder of this run, also for child processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRECAST_HOME", str(run_folder / "precast-home"))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf-home")))
        # Otherwise each process that compiles asks its compiler anew what it can.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(run_folder / "inductor"))
        yield


@pytest.fixture(scope="session")
def checkpoint(run_folder: Path) -> Callable[..., Path]:
    """`checkpoint("llama", num_hidden_layers=2)`: the directory of a tiny random checkpoint."""
    import tiny
    import transformers

    def make(model_type: str, auto: str = "AutoModelForCausalLM", **changes: Any) -> Path:
        path = run_folder / "checkpoints" / f"{model_type}-{_digest(model_type, auto, repr(sorted(changes.items())))}"
        with _made_once(path) as staged:
            if staged:
                tiny.save_checkpoint(staged, tiny.config_for(model_type, **changes), getattr(transformers, auto))
        return path

    return make


@pytest.fixture(scope="session")
def artifact(run_folder: Path) -> Callable[..., Path]:
    """`artifact(checkpoint, batch_size=2, sequence_length=(48,))`: the directory of its (unvalidated) export.

    Named by what the checkpoint's files hold and by the options, so that whichever worker asks first makes it for all,
    and a checkpoint that changes has another.
    """
    from precast.exporter import ExportOptions, export, quiet_libraries

    quiet_libraries()

    def make(source: Path, **options: Any) -> Path:
        settings = {"sequence_length": (48,), "validate": False, **options}
        held = [f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}" for file in sorted(source.iterdir())]
        path = run_folder / "artifacts" / _digest(*held, repr(sorted(settings.items())))
        with _made_once(path) as staged, pytest.MonkeyPatch.context() as patch:
            if staged:
                # Its code is vouched for by the user of this run, whoever the test at hand pretends to be.
                patch.setenv("PRECAST_HOME", str(run_folder / "precast-home"))
                export(str(source), staged, ExportOptions(**settings))
        return path

    return make


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@contextmanager
def _made_once(path: Path) -> Iterator[Path | None]:
    """Gives a path to write to, which becomes `path`; or None where that is there. Other workers wait."""
    path.parent.mkdir(exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            yield None
            return
        staged = path.with_name(f"{path.name}.part")
        yield staged
        staged.rename(path)


@pytest.fixture(scope="session")
def decoder(checkpoint: Callable[..., Path], artifact: Callable[..., Path]) -> Path:
    """A Llama: batch 1, capacity 48."""
    return artifact(checkpoint("llama"))


@pytest.fixture(scope="session")
def encoder(checkpoint: Callable[..., Path], artifact: Callable[..., Path]) -> Path:
    """A BERT for feature extraction: batch 3, lengths 16 and 48."""
    return artifact(checkpoint("bert", "AutoModel"), batch_size=3, sequence_length=(16, 48))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What installing toy_backend.py would do: its row under the entry point group, its module importable."""
    metadata = tmp_path / "site" / "toy_backend-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-backend\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[precast.backends]\ntoy = toy_backend:ROW\n")
    monkeypatch.syspath_prepend(str(metadata.parent))
    folders = [str(metadata.parent), str(Path(__file__).parent / "helpers")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="Write the goldens instead of comparing with them.")
    parser.addoption("--part", metavar="K/N", help="Of N equal parts of the tests, run the K-th, counted from 1.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is left alone with it."""
    items.sort(key=lambda item: item.get_closest_marker("models") is None)
    if part := config.getoption("--part"):
        number, count = map(int, part.split("/"))
        parts = [(item, zlib.crc32(_group_of(item.nodeid).encode()) % count + 1) for item in items]
        items[:] = [item for item, its in parts if its == number]
        config.hook.pytest_deselected(items=[item for item, its in parts if its != number])


def _group_of(nodeid: str) -> str:
    """What belongs together, in a part and on a worker: the tests of a file that have the same parameters, the side of
    padding apart, as they share what takes long to make. Those without parameters are one group."""
    file, _, test = nodeid.partition("::")
    return file + re.sub(r"-?\b(left|right|middle)\b", "", test.partition("[")[2])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadgroup`: tests of a group go to the same worker. (The marks of xdist for that have no effect with
    pytest 9.2.)"""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group_of(nodeid)

    return ByGroup(config, log)


def pytest_collection_finish() -> None:
    """Nothing that was imported is garbage: without this, a sixth of the time goes into looking for it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def golden_text(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`golden_text(path, text)`: the file holds this text; with `between`, the part between two lines does."""
    update = request.config.getoption("--update-goldens")

    def check(path: Path, text: str, between: tuple[str, str] | None = None) -> None:
        held = path.read_text("utf-8") if path.exists() else ""
        expected = text
        if between is not None:
            before, _, rest = held.partition(between[0] + "\n")
            _, _, after = rest.partition(between[1])
            expected = f"{before}{between[0]}\n{text}\n{between[1]}{after}"
        if update:
            path.parent.mkdir(exist_ok=True)
            path.write_text(expected, "utf-8")
        assert path.read_text("utf-8") == expected, f"{path.name} is stale: pytest --update-goldens"

    return check
