"""What is fuzzed: for each kind of file that other people write, valid seeds, a way to change them, and who reads it.

A file lies in a small artifact of an old release, whose hashes are made to fit: what is tried is what a hostile
artifact can hold, not whether its hashes are checked.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from precast.runtime import CompiledModel
from precast.runtime.artifact import KEY
from precast.runtime.artifact.strict_json import canonical_digest

from . import mutate

SEEDS = Path(__file__).parent / "seeds"
_ARTIFACTS = Path(__file__).parents[1] / "artifacts" / "0.1.0"
_IDS = np.array([[5, 6, 7, 8]])
_TEXTS = ("the capital of France", "", "é\u0301 🙂\n\t<s> 12", "a" * 200)
_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi {{ 7 * 7 }} <s>"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    },
]


@dataclass(frozen=True)
class Target:
    """`run` reads a case, and raises what it should not only where precast does. `prepare` is called once before."""

    seeds: Callable[[], Sequence[bytes]]
    change: Callable[[random.Random, bytes], bytes]
    run: Callable[[bytes], object]
    prepare: Callable[[], object] = lambda: None


def _files(name: str) -> list[bytes]:
    """Every case that is kept."""
    found = []
    for path in sorted((SEEDS / name).iterdir()):
        data = path.read_bytes()
        found += data.splitlines() if path.suffix == ".jsonl" else [data]
    return found


@cache
def _folder(kind: str) -> Path:
    """A copy of an artifact, which cases change."""
    path = Path(tempfile.mkdtemp(prefix="precast-fuzz-")) / kind
    shutil.copytree(_ARTIFACTS / kind, path)
    return path


def _opened(kind: str, files: dict[str, bytes]) -> Any:
    """The model of an artifact in which these files are others."""
    folder = _folder(kind)
    config = json.loads((_ARTIFACTS / kind / "config.json").read_text())
    for name, data in files.items():
        (folder / name).write_bytes(data)
        config[KEY]["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _write_config(folder, config)
    return CompiledModel.from_pretrained(folder, prepack=False, threads=1)


def _write_config(folder: Path, config: Any) -> None:
    if isinstance(config, dict) and isinstance(config.get(KEY), dict):
        config[KEY].pop("digest", None)
        try:
            config[KEY]["digest"] = canonical_digest(config)
        except (ValueError, RecursionError):
            # What has no digest is refused before it is asked for.
            config[KEY]["digest"] = "0" * 64
    (folder / "config.json").write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))


def _read_tokenizer(case: bytes) -> None:
    """A case is both of a tokenizer's files, a line each."""
    first, _, second = case.partition(b"\n")
    tokenizer = _opened("decoder", {"tokenizer.json": first, "tokenizer_config.json": second}).tokenizer
    for text in _TEXTS:
        tokenizer.decode(tokenizer.encode(text))
    batch = tokenizer([*_TEXTS[:2]])
    tokenizer.decode(batch["input_ids"][0], skip_special_tokens=False)
    tokenizer.encodings(_TEXTS[3], length=8, stride=2)
    tokenizer.token(2**31)
    tokenizer.token_id("eos")
    tokenizer.apply_chat_template(_TALK[:2])


def _change_tokenizer(chance: random.Random, case: bytes) -> bytes:
    files = list(case.split(b"\n", 1))
    at = chance.randrange(len(files))
    files[at] = mutate.tree(chance, files[at]).replace(b"\n", b" ")
    return b"\n".join(files)


def _read_template(case: bytes) -> None:
    tokenizer = _opened("decoder", {"chat_template.jinja": case}).tokenizer
    tokenizer.apply_chat_template(_TALK)
    tokenizer.apply_chat_template(_TALK[:2], add_generation_prompt=False, tools=[{"type": "function"}])


_PIECES = tuple((Path(__file__).parent / "template_pieces.txt").read_bytes().splitlines())


def _change_template(chance: random.Random, case: bytes) -> bytes:
    """Pieces put in, in place of others, or bytes changed."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(case) + 1)
        if chance.random() < 0.2:
            case = mutate.raw(chance, case)
        elif chance.random() < 0.5:
            ends = [at for at in range(len(case)) if case[at : at + 2] in (b"}}", b"%}")] or [0]
            at = chance.choice(ends) + 2
            case = case[:at] + chance.choice(_PIECES) + case[at:]
        else:
            case = case[:at] + chance.choice(_PIECES) + case[at + chance.choice((0, 2, 10, 40)) :]
    return case


def _read_generation(case: bytes) -> None:
    model = _opened("decoder", {"generation_config.json": case})
    model.generate(_IDS, max_new_tokens=3)
    model.generate(_IDS)


def _read_contract(case: bytes) -> None:
    """A case is the whole config.json, and says by its task which artifact it belongs to."""
    try:
        config = json.loads(case)
    except (ValueError, RecursionError):
        config = None
    folder = _folder("decoder" if b"text-generation" in case else "encoder")
    if config is None or b"NaN" in case or b"Infinity" in case:
        (folder / "config.json").write_bytes(case)
    else:
        _write_config(folder, config)
    model = CompiledModel.from_pretrained(folder, prepack=False, threads=1)
    model(_IDS)
    if hasattr(model, "generate"):
        model.generate(_IDS, max_new_tokens=3)


def _read_weights(case: bytes) -> None:
    from precast.runtime.engines.safetensors_map import open_weights
    from precast.runtime.engines.torch_views import view_weights

    path = _folder("encoder") / "model.safetensors"
    path.write_bytes(case)
    for tensor in view_weights(open_weights([path])).values():
        tensor.sum()


def _change_weights(chance: random.Random, case: bytes) -> bytes:
    """The header as JSON with its length made to fit, or any bytes."""
    if chance.random() < 0.15:
        return mutate.raw(chance, case)
    end = 8 + int.from_bytes(case[:8], "little")
    try:
        header = json.loads(case[8:end])
        if views := header.get("__metadata__", {}).get("precast.views"):
            header["__metadata__"]["precast.views"] = (
                mutate.tree(chance, views.encode()).decode("utf-8", "replace") if chance.random() < 0.5 else views
            )
        text = mutate.tree(chance, json.dumps(header).encode())
    except (ValueError, AttributeError, TypeError, RecursionError):
        return mutate.raw(chance, case)
    return len(text).to_bytes(8, "little") + text + case[end:]


def _read_program(case: bytes) -> None:
    """A case is the JSON in a `.pt2`, or begins with P and is the whole archive."""
    import native_programs

    from precast.runtime.artifact.pt2.format import pack

    folder = _programs()
    (folder / native_programs.GRAPH.file).write_bytes(case if case[:1] == b"P" else pack(case))
    native_programs.engine(folder).bind("model", *native_programs.arrays(3))()


@cache
def _programs() -> Path:
    import native_programs

    folder = _folder("encoder")
    shutil.copy(SEEDS / "weights" / "program.safetensors", folder / native_programs.WEIGHTS)
    return folder


def _change_program(chance: random.Random, case: bytes) -> bytes:
    from precast.runtime.artifact.pt2.format import pack

    if case[:1] == b"P" or chance.random() < 0.05:
        return mutate.raw(chance, case if case[:1] == b"P" else pack(case))
    return mutate.tree(chance, case)


def _load_operators() -> Any:
    from . import operators

    return operators


TARGETS = {
    "tokenizer": Target(partial(_files, "tokenizer"), _change_tokenizer, _read_tokenizer),
    "template": Target(partial(_files, "template"), _change_template, _read_template),
    "generation": Target(partial(_files, "generation"), mutate.tree, _read_generation),
    "contract": Target(partial(_files, "contract"), mutate.tree, _read_contract),
    # Mapping torch's own libraries is no fault of a case.
    "weights": Target(
        partial(_files, "weights"),
        _change_weights,
        _read_weights,
        lambda: import_module("precast.runtime.engines.safetensors_map"),
    ),
    "program": Target(partial(_files, "program"), _change_program, _read_program, lambda: _load_operators().fence()),
    "operators": Target(
        partial(_files, "operators"),
        lambda chance, case: _load_operators().mutated(chance, case),
        lambda case: _load_operators().run(case),
        lambda: _load_operators().fence(),
    ),
}
