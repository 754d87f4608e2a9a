"""A tiny artifact written by hand: the contract and its publishing need no model and no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from precast.runtime.artifact import Artifact, read_artifact
from precast.runtime.artifact.integrity import verify_files
from precast.runtime.artifact.publish import check_target, hash_files, publish, staging, write_config
from precast.runtime.artifact.schema import (
    Accuracy,
    CacheLayer,
    Compiler,
    Contract,
    Dim,
    Graph,
    Host,
    Input,
    Output,
    Shapes,
    Source,
    Variant,
)
from precast.runtime.artifact.strict_json import canonical_digest, dumps
from precast.runtime.storage.hub import locate

HOST = Host(platforms=[], device="cpu", isa=[], min_versions={"onnxruntime": "1.20"})


def variant(name: str = "onnx", **changes: Any) -> Variant:
    """One graph, one cached layer, every field filled in."""
    fields: dict[str, Any] = {
        "name": name,
        "backend": "onnx",
        "dtype": "float32",
        "quantization": None,
        "kv_cache": None,
        "host": HOST,
        "compiler": Compiler(name="onnx", version="1", options={"fused": True}, torch="2.13", transformers="5.23"),
        "trust": "graph",
        "accuracy": Accuracy(status="passed", reason="verglichen, 比较", figures={"max_abs_difference": 1e-06}),
        "weights": ["model.onnx.data"],
        "graphs": [
            Graph(
                name="model", role="decoder", file="model.onnx", batch=1, length=Dim(min=1, max=48), capacity=48,
                inputs=[
                    Input(name="input_ids", dtype="int64", shape=[1, Dim(min=1, max=48)], pad=0),
                    Input(name="past_lengths", dtype="int32", shape=[1], pad=0),
                    Input(name="new_lengths", dtype="int32", shape=[1], pad=1),
                    Input(name="logit_positions", dtype="int64", shape=[1, 1], pad=0),
                    *(Input(name=name, dtype="float32", shape=[1, 2, 48, 16], pad=0) for name in ("key", "value")),
                ],
                outputs=[
                    Output(name="logits", dtype="float32", shape=[1, 1, 320], slice=["batch", "positions", None]),
                    *(
                        Output(name=name, dtype="float32", shape=[1, 2, 48, 16], slice=[None] * 4)
                        for name in ("new_key", "new_value")
                    ),
                ],
                cache=[
                    CacheLayer(
                        layer=0, key_in="key", key_out="new_key", value_in="value", value_out="new_value", heads=2,
                        head_dim=16, dtype="float32", window=8,
                    )
                ],
            )
        ],
    }  # fmt: skip
    return Variant(**{**fields, **changes})


def contract(**changes: Any) -> Contract:
    """A valid contract, but for `files` and `digest`."""
    fields: dict[str, Any] = {
        "format_version": 2,
        "precast_version": "0.1.0",
        "digest": "0" * 64,
        "task": "text-generation",
        "source": Source(model="user/tiny", revision=None, weights_sha256="a" * 64),
        "shapes": Shapes(batch_size=1, sequence_length=[48], prefill_lengths=[], dynamic_batch_size=False),
        "variants": [variant()],
        "files": {},
    }
    return Contract(**{**fields, **changes})


def make(target: Path, note: str = "old", *, force: bool = False, **changes: Any) -> Artifact:
    """Publish an artifact as `write` does, and read it back."""
    write(target, note, force=force, **changes)
    return read_artifact(target)


def write(target: Path, note: str, *, force: bool, **changes: Any) -> None:
    """Publish an artifact step by step, as an export does. `note` is in its config and in every file."""
    check_target(target, force=force)
    with staging(target) as stage:
        for name in ("model.onnx", "model.onnx.data", "sub/tokenizer.json", "README.md"):
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_text(f"{name} of {note}\n" * 50)
        write_config(stage, {"model_type": "llama", "note": note}, contract(files=hash_files(stage), **changes))
        publish(stage, target, force=force)


def load(target: Path) -> str:
    """Open as the runtime does and hash every file anew; the artifact's note."""
    artifact = read_artifact(locate(target))
    verify_files(artifact.path, artifact.contract.files, force=True)
    note: str = artifact.config["note"]
    assert f"of {note}\n" in (target / "README.md").read_text()
    return note


def rewrite(target: Path, change: Any, *, seal: bool = True) -> None:
    """Let `change` edit the parsed config.json, and, as an attacker would, make its digest right again."""
    raw = json.loads((target / "config.json").read_bytes())
    change(raw)
    if seal:
        bare = {key: value for key, value in raw["precast"].items() if key != "digest"}
        raw["precast"]["digest"] = canonical_digest({**raw, "precast": bare})
    (target / "config.json").write_bytes(dumps(raw))


def relist(target: Path) -> None:
    """List the files as they are now, as an attacker would who changed some."""
    artifact = read_artifact(target)
    write_config(target, artifact.config, msgspec.structs.replace(artifact.contract, files=hash_files(target)))


UNPRIVILEGED = """
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
"""
"""Code for a child that gives up root's right to read and write everything."""


def child(code: str, *arguments: object, cwd: str | None = None, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Run `code` in a fresh interpreter that can import what we can; it finds its arguments in sys.argv. It is started
    by the command `prefix`, if there is one."""
    lines = ["import os, sys, pathlib, handmade", "from precast.runtime.artifact import publish", code]
    command = [*prefix, sys.executable, "-c", "\n".join(lines), *map(str, arguments)]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
    )


def last_words(process: subprocess.Popen[str]) -> str:
    """Wait for the end; the last line of standard error."""
    lines = process.communicate()[1].splitlines()
    return lines[-1] if lines else ""
