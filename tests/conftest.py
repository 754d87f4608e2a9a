"""Fixtures: an isolated home, tiny checkpoints and their artifacts, each made once per run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before huggingface_hub is imported: no test reaches the network, and its xet client only speaks to the real Hub.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false"
)


if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread per worker: torch's would otherwise fight over the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _private_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keys, stamps and pulled artifacts go to a folder of this run, also for child processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRECAST_HOME", str(tmp_path_factory.mktemp("precast-home")))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf-home")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("llama", num_hidden_layers=1)`: the directory of a tiny random checkpoint."""
    import tiny
    import transformers

    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(model_type: str, auto: str = "AutoModelForCausalLM", **changes: Any) -> Path:
        key = (model_type, auto, repr(sorted(changes.items())))
        if key not in made:
            path = root / f"{model_type}-{len(made)}"
            made[key] = tiny.save_checkpoint(path, tiny.config_for(model_type, **changes), getattr(transformers, auto))
        return made[key]

    return make


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`artifact(checkpoint, batch_size=2, sequence_length=(48,))`: the directory of its (unvalidated) export."""
    from precast.exporter import ExportOptions, export, quiet_libraries

    quiet_libraries()
    root, made = tmp_path_factory.mktemp("artifacts"), {}

    def make(source: Path, **options: Any) -> Path:
        key = (source, repr(sorted(options.items())))
        if key not in made:
            path = root / f"{source.name}-{len(made)}"
            settings = {"sequence_length": (48,), "validate": False, **options}
            made[key] = export(str(source), path, ExportOptions(**settings)).path
        return made[key]

    return make


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is left alone with it."""
    items.sort(key=lambda item: item.get_closest_marker("models") is None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="Write the goldens instead of comparing with them.")


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
