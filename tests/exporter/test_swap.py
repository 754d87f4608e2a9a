"""`swap_weights`: the weights of a fine-tune in an artifact, without compiling; the answers are the fine-tune's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import neuron_machine
import numpy as np
import oracle
import pytest
import tiny
import torch
import transformers
from click.testing import CliRunner
from msgspec.structs import replace
from torch import nn
from zoo import seq2seq

from precast.cli import cli
from precast.exporter import ExportOptions, preview_swap, swap_weights
from precast.exporter.backends.program_hash import hash_programs
from precast.runtime import CompiledModel
from precast.runtime.artifact import publish, read_artifact
from precast.runtime.errors import (
    ArtifactError,
    CheckpointError,
    ExportError,
    IntegrityError,
    PublishError,
    TrustError,
)

ROW = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
CLASSES = "AutoModelForSequenceClassification"
SIZES = {"bert": {"batch_size": 2, "sequence_length": (16,)}, "t5": seq2seq.OPTIONS[seq2seq.TEXT]}
AUTO = {"bert": CLASSES, "t5": "AutoModelForSeq2SeqLM"}
FAST = [("llama", {}), ("bert", {"backend": "export"})]
SLOW = [
    ("llama", {"backend": "export", "quantize": "int4"}),
    ("llama", {"kv_cache": "int8", "prefill_lengths": (8, 16)}),
    ("llama", {"backend": "export", "also": ("onnx",)}),
    ("bert", {}),
    ("t5", {}),
    ("t5", {"backend": "export"}),
]
NATIVE = [
    ("llama", {"backend": "aoti"}),
    ("llama", {"backend": "aoti", "quantize": "int8"}),
    ("llama", {"backend": "aoti", "isa": "avx2", "prefill_lengths": (8,)}),
    ("bert", {"backend": "aoti"}),
    ("t5", {"backend": "aoti"}),
]


def _name(value):
    return value if isinstance(value, str) else "-".join(str(each) for each in value.values()) or "onnx"


every = pytest.mark.parametrize(
    ("family", "options"), [*FAST, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)], ids=_name
)
native = pytest.mark.parametrize(("family", "options"), NATIVE, ids=_name)


@pytest.fixture(scope="module")
def pair(checkpoint, tmp_path_factory):
    """`pair("llama")`: a checkpoint, and a fine-tune of it with other labels, settings and template."""
    root, found = tmp_path_factory.mktemp("tuned"), {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in found:
            if family == "t5":
                source = seq2seq.make(root / "t5-source", family)
            else:
                source = checkpoint(family, AUTO.get(family, "AutoModelForCausalLM"))
            found[family] = source, _fine_tune(source, root / family, AUTO.get(family, "AutoModelForCausalLM"))
        return found[family]

    return make


def _fine_tune(source: Path, path: Path, auto: str, **changes: object) -> Path:
    config = transformers.AutoConfig.from_pretrained(source, **changes)
    config.id2label = {0: "no", 1: "yes"}
    tiny.save_checkpoint(path, config, getattr(transformers, auto), seed=7)
    model = getattr(transformers, auto).from_pretrained(path)
    with torch.no_grad():
        for parameter in model.parameters():
            # Those that begin as zeros or ones, too; a bias of two numbers is what Inductor would write into its code.
            parameter.add_(0.3 * torch.randn_like(parameter) if parameter.ndim == 1 else 0)
    model.save_pretrained(path)
    settings = path / "tokenizer_config.json"
    if (path / "chat_template.jinja").exists():
        (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 47}))
    return path


def _options(family: str, options: dict[str, object]) -> dict[str, object]:
    return {**SIZES.get(family, {"sequence_length": (48,)}), **options}


def _held(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def _answers(family: str, path: Path, variant: str | None = None) -> np.ndarray:
    model = CompiledModel.from_pretrained(path, variant=variant)
    ids = np.array([ROW])
    return model(ids, decoder_input_ids=ids[:, :3]).logits if family == "t5" else model(ids).logits


def _eager(family: str, source: Path) -> np.ndarray:
    ids = torch.tensor([ROW])
    more = {"decoder_input_ids": ids[:, :3]} if family == "t5" else {}
    with torch.no_grad():
        return oracle.eager(source, AUTO.get(family, "AutoModelForCausalLM"))(ids, **more).logits.numpy()


def _check_swapped(family: str, source: Path, tuned: Path, swapped: Path, bound: float) -> None:
    for variant in read_artifact(swapped).contract.variants:
        found, expected = _answers(family, swapped, variant.name), _eager(family, tuned)
        assert variant.accuracy.status == "passed"
        assert np.abs(found - expected).max() < bound * max(1, np.abs(expected).max())
        assert np.abs(found - _eager(family, source)).max() > 0.5 * np.abs(expected).max()


@every
def test_it_is_the_export_of_the_fine_tune(pair, artifact, tmp_path, family, options):
    source, tuned = pair(family)
    asked = _options(family, options)
    old, full = artifact(source, **asked), artifact(tuned, **asked)
    before = _held(old)
    made = swap_weights(old, str(tuned), tmp_path / "out")
    assert _held(old) == before, "the old artifact stays as it is"
    assert made.contract.files == read_artifact(full).contract.files, "byte for byte"
    assert made.contract.source == read_artifact(full).contract.source != read_artifact(old).contract.source
    assert made.contract.digest != read_artifact(old).contract.digest
    assert made.config == read_artifact(full).config
    bound = 0.5 if "quantize" in options or "kv_cache" in options else 1e-4
    _check_swapped(family, source, tuned, made.path, bound)


@pytest.mark.slow
@native
def test_no_compiler_is_called(pair, artifact, tmp_path, monkeypatch, family, options):
    """Compiled files are the old ones, all the rest is that of an export of the fine-tune."""
    source, tuned = pair(family)
    asked = _options(family, options)
    old, full = artifact(source, **asked), artifact(tuned, **asked)
    called, start = [], subprocess.Popen.__init__

    def record(self, args, *rest, **keywords):
        called.append(args[0])
        start(self, args, *rest, **keywords)

    def compiles(*_, **__):
        raise AssertionError("AOTInductor was called")

    monkeypatch.setattr(subprocess.Popen, "__init__", record)
    monkeypatch.setattr(torch._inductor, "aot_compile", compiles)
    made = swap_weights(old, str(tuned), tmp_path / "out")
    assert called == [sys.executable], "validation has a process of its own, and nothing else has"
    monkeypatch.undo()
    (variant,) = made.contract.variants
    libraries = {graph.file for graph in variant.graphs}
    assert variant.graphs == read_artifact(full).contract.variants[0].graphs
    for name, file in made.contract.files.items():
        assert file == read_artifact(old if name in libraries else full).contract.files[name], name
    assert made.contract.files.keys() == read_artifact(full).contract.files.keys()
    _check_swapped(family, source, tuned, made.path, 0.5 if "quantize" in options else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), [("llama", {}), NATIVE[1], NATIVE[3]], ids=_name)
def test_the_program_is_the_same_in_every_process(pair, artifact, tmp_path, family, options):
    """Whatever order sets have there."""
    source, tuned = pair(family)
    old = artifact(source, **_options(family, options))
    words = ["swap-weights", str(old), "--from", str(tuned), "-o", str(tmp_path / "out"), "-q"]
    code = f"from precast.cli import main; import sys; sys.argv[1:] = {words!r}; main()"
    seeded = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=seeded, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_artifact(tmp_path / "out").contract.variants[0].accuracy.status == "passed"


@pytest.mark.slow
def test_native_code_runs_with_proof_only(pair, artifact, tmp_path, monkeypatch):
    source, tuned = pair("bert")
    old = artifact(source, **_options("bert", {"backend": "aoti"}))
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "stranger"))
    with pytest.raises(TrustError, match="it was not built here"):
        swap_weights(old, str(tuned), tmp_path / "out")
    with pytest.raises(TrustError, match="as pinned by sha256="):
        swap_weights(old, str(tuned), tmp_path / "out", sha256="0" * 64)
    assert not (tmp_path / "out").exists()
    digest = read_artifact(old).contract.digest
    assert swap_weights(old, str(tuned), tmp_path / "out", sha256=digest).contract.variants[0].weights


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"strategy": "model-builder", "tensor_parallel": 2}], ids=_name)
def test_graphs_for_neuron_take_other_weights(pair, artifact, tmp_path, monkeypatch, options):
    neuron_machine.install(monkeypatch, tmp_path / "machine", cores=2)
    source, tuned = pair("llama")
    asked = _options("llama", {"backend": "neuron", "instance_type": "trn1", "prefill_lengths": (8,), **options})
    old, full = artifact(source, **asked), artifact(tuned, **asked)
    made = swap_weights(old, str(tuned), tmp_path / "out")
    assert made.contract.files["model.safetensors"] == read_artifact(full).contract.files["model.safetensors"]
    _check_swapped("llama", source, tuned, made.path, 1e-4)


@pytest.mark.slow
def test_weights_within_compiled_files_stay(pair, artifact, tmp_path, monkeypatch):
    neuron_machine.install(monkeypatch, tmp_path / "machine", cores=2)
    source, tuned = pair("llama")
    asked = {"backend": "neuron", "instance_type": "trn1", "prefill_lengths": (8,), "inline_weights": True}
    with pytest.raises(ExportError, match=r"lie within its compiled files .*export the checkpoint instead"):
        swap_weights(artifact(source, **_options("llama", asked)), str(tuned), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 32}, "hidden_size is 32 and not 64. Instead, compile it with precast export"),
        ({"vocab_size": 330}, "vocab_size is 330 and not 320"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2 and not 1"),
        ({"rms_norm_eps": 0.25}, "its program is another one: rms_norm_eps is 0.25 and not 1e-06. Instead, compile"),
        pytest.param(
            {"tie_word_embeddings": True}, "another one: tie_word_embeddings is True and not False",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_another_program_is_refused(checkpoint, decoder, tmp_path, changes, words):
    other = tiny.save_checkpoint(tmp_path / "other", tiny.config_for("llama", **changes))
    with pytest.raises(CheckpointError, match=words):
        swap_weights(decoder, str(other), tmp_path / "sub/out")
    assert not list(tmp_path.glob("sub/*")), "nothing is left"


def test_what_cannot_be_is_refused_before_any_work(checkpoint, decoder, pair, tmp_path, monkeypatch):
    _, tuned = pair("llama")
    out, before = tmp_path / "out", _held(decoder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    damaged = shutil.copytree(decoder, tmp_path / "damaged")
    with next(damaged.glob("*.data")).open("r+b") as file:
        file.seek(100)
        file.write(b"\xff\xff")
    monkeypatch.setattr("precast.exporter.swap.export_variant", lambda *_: pytest.fail("work has begun"))
    cases = [
        (decoder, checkpoint("bert", CLASSES), out, CheckpointError, "of type 'llama', and .* is of type 'bert'"),
        (decoder, tmp_path / "missing", out, CheckpointError, "missing"),
        (tmp_path / "none", tuned, out, ArtifactError, "There is no directory"),
        (decoder, tuned, decoder, PublishError, "is the artifact itself, which stays as it is"),
        (decoder, tuned, tmp_path / "full", PublishError, "exists and is not empty"),
        (damaged, tuned, out, IntegrityError, "was altered"),
    ]
    for old, new, target, kind, words in cases:
        with pytest.raises(kind, match=words):
            swap_weights(old, str(new), target)
    assert _held(decoder) == before
    assert not out.exists()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (None, "does not say with which options it was exported, as those of earlier versions"),
        ('{"backend": "onnx", "calibration": "abc"}', "with calibration= and a text of sha256 abc…, .*export the"),
        ('{"backend": "onnx", "colour": "red"}', "mean nothing to this version of precast: .*colour"),
        ('{"backend": "onnx", "dtype": "float8"}', "mean nothing to this version of precast: dtype='float8' is not"),
        ("[", "mean nothing to this version of precast"),
    ],
    ids=["none", "calibration", "unknown", "wrong", "broken"],
)
def test_an_artifact_that_does_not_say_how_it_was_exported(pair, decoder, told, words, tmp_path):
    _, tuned = pair("llama")
    old = read_artifact(shutil.copytree(decoder, tmp_path / "old"))
    (variant,) = old.contract.variants
    options = {name: said for name, said in variant.compiler.options.items() if name != "request"}
    compiler = replace(variant.compiler, options={**options, **({"request": told} if told else {})})
    publish.write_config(old.path, old.config, replace(old.contract, variants=[replace(variant, compiler=compiler)]))
    with pytest.raises(ExportError, match=words):
        preview_swap(old.path, str(tuned))


_SLOW_MOMENTS = [pytest.param(each, marks=pytest.mark.slow) for each in ("write weights", "hash")]


@pytest.mark.parametrize("moment", ["rename", *_SLOW_MOMENTS])
def test_an_interruption_leaves_nothing(pair, decoder, tmp_path, monkeypatch, moment):
    _, tuned = pair("llama")
    target = tmp_path / "parent/out"

    def reach(name: str) -> None:
        if name == moment:
            raise KeyboardInterrupt

    def on_step(name: str):
        reach(name)
        return publish.suppress()

    monkeypatch.setattr(publish, "fault", reach)
    with pytest.raises(KeyboardInterrupt):
        swap_weights(decoder, str(tuned), target, on_step=on_step)
    assert list(target.parent.iterdir()) == []


def test_the_command_line(pair, decoder, tmp_path):
    _, tuned = pair("llama")

    def run(*words: str):
        return CliRunner().invoke(cli, ["swap-weights", str(decoder), "--from", str(tuned), *words])

    planned = run("--dry-run", "--json", "-q")
    assert json.loads(planned.stdout)["task"] == "text-generation"
    assert "graphs           model" in run("--dry-run").stdout
    assert run("-q").exit_code == 2
    done = run("-o", str(tmp_path / "out"), "--json")
    said = json.loads(done.stdout)
    assert (said["digest"], said["accuracy"]["status"]) == (
        read_artifact(tmp_path / "out").contract.digest, "passed",
    )  # fmt: skip
    assert "  write weights " in done.stderr
    again = run("-o", str(tmp_path / "out"), "-q")
    assert "replace it with --force" in str(again.exception)


class _Scaled(nn.Module):
    def __init__(self, number: float = 1.0, power: float = 2.0, seed: int = 0, is_tied: bool = False) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(seed)
        self.one = nn.Parameter(torch.randn(3, 3, generator=numbers))
        self.other = self.one if is_tied else nn.Parameter(torch.randn(3, 3, generator=numbers))
        self.scale, self.power = nn.Parameter(torch.tensor(number)), power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.one @ self.other * self.scale) ** self.power


def test_the_hash_is_of_all_but_the_weights():
    def of(*, with_numbers: bool = True, **changes: object) -> str:
        exported = torch.export.export(_Scaled(**changes), (torch.ones(2, 3),))
        return hash_programs([exported], with_numbers=with_numbers)

    assert of() == of(seed=1)
    assert len({of(), of(power=3.0), of(number=2.0), of(is_tied=True)}) == 4
    assert of(with_numbers=False) == of(with_numbers=False, number=2.0) != of(with_numbers=False, power=3.0)


def test_the_options_of_an_export_are_in_its_artifact(decoder):
    from precast.exporter.options.request import parse_request, render_request

    (variant,) = read_artifact(decoder).contract.variants
    assert parse_request(variant).as_keywords() == ExportOptions(sequence_length=(48,)).as_keywords()
    given = ExportOptions(
        backend="aoti", isa="avx2", sequence_length=(48,), quantize="int8", skip=("lm_head",), token="secret",
        trust_remote_code=True, force=True, max_kl=0.5,
    )  # fmt: skip
    said = render_request(given)
    assert "secret" not in said
    assert json.loads(said) == {
        "backend": "aoti", "isa": "avx2", "sequence_length": [48], "quantize": "int8", "skip": ["lm_head"],
        "max_kl": 0.5,
    }  # fmt: skip
