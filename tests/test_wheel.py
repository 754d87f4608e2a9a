"""The wheel: what is in it, and that it runs artifacts where only its base dependencies are installed.

The environment is made without a network: a fresh venv gets the wheel, and links to the installed packages that the
wheel's own metadata asks for, and to nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from fakehub import FakeHub
from packaging.requirements import Requirement

from precast.cli import COMMANDS
from precast.runtime import CompiledModel, pipeline

ROOT = Path(__file__).parent.parent
IDS = [[5, 6, 7, 8]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """A venv with the wheel and its base dependencies."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    _run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", wheel])
    (packages,) = home.glob("lib/python*/site-packages")
    for name in sorted(_closure(_requirements(wheel))):
        distribution = metadata.distribution(name)
        tops = {Path(file).parts[0] for file in distribution.files or () if not str(file).startswith((".", "__"))}
        for top in tops:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    return home


@pytest.fixture
def run(bare, tmp_path):
    """`run("python", "-c", …)`: a program of the bare environment, far from the repository."""
    inherited = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TZ") if name in os.environ}
    env = {**inherited, "HOME": str(tmp_path), "PATH": f"{bare / 'bin'}:/usr/bin:/bin"}

    def call(program: str, *words: object, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [bare / "bin" / program, *map(str, words)], cwd=tmp_path, env={**env, **settings}, capture_output=True,
            text=True, check=False, timeout=120,
        )  # fmt: skip

    return call


def _run(words: list[object], **options: object) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr


def _requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return [Requirement(line) for line in message_from_bytes(archive.read(name)).get_all("Requires-Dist")]


def _closure(requirements: list[Requirement], extras: frozenset[str] = frozenset({""})) -> Iterator[str]:
    """The distributions that these requirements, without extras of ours, lead to."""
    for asked in requirements:
        if asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in extras):
            yield asked.name
            inner = [Requirement(line) for line in metadata.requires(asked.name) or ()]
            yield from _closure(inner, frozenset({"", *asked.extras}))


def test_it_holds_three_parts_and_the_module_that_calls_one(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    version = metadata.version("precast")
    parts = {name.split("/")[1] for name in names if name.startswith("precast/")}
    assert parts == {"exporter", "runtime", "cli", "__main__.py"}, "and no precast/__init__.py"
    info = f"precast-{version}.dist-info/"
    others = {name for name in names if not name.startswith(("precast/", info))}
    assert others == {"optimum/commands/register/register_precast.py", "optimum/exporters/precast.py"}
    assert names >= {f"precast/{part}/py.typed" for part in parts - {"__main__.py"}}
    assert f"{info}licenses/LICENSE" in names
    on_disk = {
        path.relative_to(ROOT / part).as_posix()
        for part in parts
        for path in (ROOT / part / "precast").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if name.startswith("precast/")} == on_disk
    assert on_disk >= {"precast/exporter/kinds/texts.txt", "precast/exporter/companions/card.md.jinja"}


def test_the_base_environment_lacks_what_only_the_exporter_needs(run):
    code = """
import importlib.util as util, json, sys
import precast.runtime, precast.cli
names = ["torch", "transformers", "onnx", "onnxscript", "onnx_ir", "optimum", "requests", "safetensors", "gguf"]
found = [name for name in names if (spec := util.find_spec(name)) and spec.origin]
print(json.dumps([found, precast.runtime.__file__, list(precast.__path__)]))
"""
    done = run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    found, file, path = json.loads(done.stdout)
    assert found == []
    assert not file.startswith(str(ROOT))
    assert len(path) == 1


@pytest.mark.parametrize("words", [[], *([name] for name in sorted(COMMANDS))], ids=" ".join)
def test_help(run, words):
    for flag in "--help", "-h":
        done = run("precast", *words, flag)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"Usage: {' '.join(['precast', *words])} ")
        assert done.stderr == ""


@pytest.mark.parametrize(
    "words", [["export", "x", "-o", "y"], ["export", "x", "--dry-run"], ["validate", "x", "--reference", "y"]]
)
def test_what_needs_an_extra_says_so_in_one_line(run, words):
    done = run("precast", *words)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("precast: ")
    assert "pip install 'precast[export]'" in line


def test_the_library_says_which_extra_it_needs(run):
    code = "from precast.runtime import CompiledModel; CompiledModel.from_pretrained('x', export=True)"
    done = run("python", "-c", code)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'precast[export]'")


def test_env_works(run):
    done = run("precast", "env", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["precast"], facts["torch"]) == (metadata.version("precast"), None)


def test_it_generates(run, decoder):
    words = ["--prompt", "Water boils", "--max-new-tokens", 8, "--json"]
    done = run("precast", "generate", decoder, *words)
    assert done.returncode == 0, done.stderr
    model = CompiledModel.from_pretrained(decoder)
    ids = model.tokenizer.encode("Water boils")
    expected = model.tokenizer.decode(model.generate([ids], max_new_tokens=8)[0, len(ids) :])
    assert json.loads(done.stdout)["text"] == expected


def test_it_talks(run, decoder):
    done = run("precast", "generate", decoder, "--chat", "--prompt", "Hello", "--max-new-tokens", 4, "--json")
    assert done.returncode == 0, done.stderr
    tokenizer = CompiledModel.from_pretrained(decoder).tokenizer
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert json.loads(done.stdout)["prompt_tokens"] == len(tokenizer.encode(text, add_special_tokens=False))


def test_it_predicts(run, encoder):
    done = run("precast", "predict", encoder, "--text", "Water boils", "--json")
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    assert answer == {"input": "Water boils", "answer": pipeline(model=encoder, pooling="mean")("Water boils")}


def test_it_pulls_from_the_hub(run, decoder, tmp_path):
    code = """
import sys, json
import numpy as np
from precast.runtime import CompiledModelForCausalLM
np.save("logits.npy", CompiledModelForCausalLM.from_pretrained("user/model")(json.loads(sys.argv[1])).logits)
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    with FakeHub() as hub:
        hub.add("user/model", {path.name: path.read_bytes() for path in decoder.iterdir()})
        done = run("python", "-W", "error", "-c", code, IDS, HF_ENDPOINT=hub.url)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert np.array_equal(np.load(tmp_path / "logits.npy"), CompiledModel.from_pretrained(decoder)(IDS).logits)
