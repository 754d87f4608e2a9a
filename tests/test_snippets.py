"""The documents' snippets do what they say, with tiny models in place of those on the Hub.

A block that cannot be run says why in a comment before it, `<!-- not run: … -->`; how many there are is counted here.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import wave
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import adapters
import click
import gguf
import neuron_machine
import numpy as np
import pieces
import pytest
import snippets
import speech
import tiny
import transformers
from fakehub import FakeHub
from prefixes import random_prefix
from snippets import ROOT, Reader, SnippetError, blocks
from test_docs import DOCUMENTS

from precast.cli import SETTINGS, cli

README, USAGE = ROOT / "README.md", ROOT / "docs/usage.md"
NOT_RUN = {"README.md": 1, "docs/many-machines.md": 1, "docs/neuron.md": 1, "examples/README.md": 1}
SHAPES = {"batch_size": 1, "sequence_length": (64,)}


@pytest.fixture(scope="module")
def local(checkpoint, artifact, tmp_path_factory):
    """What stands for models on the Hub and for placeholders: called when it is needed."""
    root = tmp_path_factory.mktemp("published")

    def llama():
        # Of one layer: int8 keeps within its floor, though random weights make every answer a close one.
        return checkpoint("llama", max_position_embeddings=512)

    def ner():
        labels = {0: "O", 1: "B-人", 2: "B-Ort"}
        named = {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
        return checkpoint("bert", "AutoModelForTokenClassification", **named)

    makers = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": llama,
        "sentence-transformers/all-MiniLM-L6-v2": lambda: _sentences(root / "minilm"),
        "Helsinki-NLP/opus-mt-de-en": lambda: _marian(root / "marian"),
        "openai/whisper-tiny": lambda: speech.whisper(root / "whisper"),
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english": lambda: _sentiment(checkpoint),
        "uer/roberta-base-finetuned-dianping-chinese": lambda: _sentiment(checkpoint),
        "user/ner": ner,
        "build/models/SmolLM2-135M-Instruct.Q4_1.gguf": llama,
        "user/style:0.5": lambda: f"{_adapter(llama(), root / 'style')}:0.5",
        "MODEL": llama,
        "OTHER": lambda: artifact(llama(), **SHAPES),
        "ENCODER": lambda: checkpoint("bert", "AutoModel"),
        "model.gguf": lambda: _gguf(llama(), root / "model.gguf"),
        "PACKED": lambda: _packed(llama(), root / "packed"),
        "ner-out": lambda: artifact(ner(), **SHAPES),
    }
    return {name: cache(maker) for name, maker in makers.items()}


def _adapter(source: Path, path: Path) -> Path:
    return adapters.make_adapter(path, source, "AutoModelForCausalLM", target_modules=["q_proj"])


def _sentiment(checkpoint) -> Path:
    return checkpoint("bert", "AutoModelForSequenceClassification", max_position_embeddings=128)


def _sentences(path: Path) -> Path:
    tiny.save_checkpoint(path, tiny.config_for("bert", max_position_embeddings=128), transformers.AutoModel)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for index, (folder, kind) in enumerate(kinds.items())
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


def _marian(path: Path) -> Path:
    layers = {f"{part}_{what}": size for part in ("encoder", "decoder")
              for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    config = transformers.MarianConfig(
        vocab_size=tiny.VOCABULARY, d_model=32, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=0, forced_eos_token_id=None, **layers,
    )  # fmt: skip
    if not path.exists():
        tiny.save_checkpoint(path, config, transformers.AutoModelForSeq2SeqLM)
        # Marian's own, in the files that Marian has.
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (path / name).unlink()
        pieces.marian(path)
    return path


def _gguf(source: Path, path: Path) -> Path:
    _module("exporter/test_gguf.py").write_gguf(source, path, gguf.GGMLQuantizationType.Q8_0)
    return path


def _packed(source: Path, path: Path) -> Path:
    packed = _module("exporter/test_packed.py")
    packed.quantized(source, path, packed.gptq_pack())
    return path


def _module(name: str):
    spec = spec_from_file_location("borrowed", Path(__file__).parent / name)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reader(local, tmp_path):
    """Somebody in a folder with a few files, who may push to a Hub."""
    (tmp_path / "texts.txt").write_text("\n".join(tiny.TEXTS), "utf-8")
    (tmp_path / "rounds.jsonl").write_text(
        '{"src": "Water boils", "tgt": "at 100"}\n{"src": ["a", "b"], "tgt": ["c"]}\n'
    )
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes((np.sin(np.arange(12000) / 9) * 9000).astype("<i2").tobytes())
    with FakeHub(token="x") as hub:
        yield Reader(tmp_path, local, hub.url)


def test_the_first_minute(reader):
    """README's, up to its first lines of Python."""
    found = [block for block in blocks(README) if not block.reason]
    first = next(index for index, block in enumerate(found) if block.language == "python")
    for block in found[: first + 1]:
        reader.run(block)


@pytest.mark.slow
@pytest.mark.models
def test_the_first_minute_answers_what_the_readme_says(reader):
    """With the checkpoint that it names, which is no tiny one."""
    source = "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    reader.local, reader.compares = {**reader.local, source: lambda: ROOT / source}, True
    (block,) = (block for block in blocks(README) if source in block.text)
    reader.run(block)


@pytest.mark.slow
@pytest.mark.parametrize("document", [path for path in DOCUMENTS if blocks(path)], ids=lambda path: path.name)
def test_all_snippets_of_a_document(reader, document, tmp_path, monkeypatch):
    if document.name in ("neuron.md", "parallel.md"):
        neuron_machine.install(monkeypatch, tmp_path / "neuron", cores=2)
    if document.name == "neuron.md":
        digest = {"DIGEST": lambda: json.loads((tmp_path / "smollm2/config.json").read_text())["precast"]["digest"]}
        reader.local = {**reader.local, **digest}
    if document.name == "usage.md":
        _adapter(reader.local["MODEL"](), tmp_path / "adapters/style")
        random_prefix(tmp_path / "adapters/prefix")
    if document.name == "CONTRIBUTING.md":
        exec(CONTRIBUTING, reader.names)
    snippets.run(document, reader)


# What its snippets are pieces of.
CONTRIBUTING = """
from dataclasses import dataclass, field
import torch
from precast.exporter.architectures.bloom import BloomAttention, _get_alibi_slopes, attend, dropout_add, replace_method
from precast.exporter.options import BackendOptions, describe
from precast.runtime.artifact.backends import Backend
from precast.runtime.artifact.tasks import Task
from precast.runtime.models.encoder_base import Encoder
"""


def test_contributing_shows_the_code_that_is_there():
    text = {block.line: block.text for block in blocks(ROOT / "CONTRIBUTING.md") if block.language == "python"}
    shown = {name: dumped for each in text.values() for name, dumped in _definitions(ast.parse(each)).items()}
    bloom = ROOT / "exporter/precast/exporter/architectures/bloom.py"
    there = _definitions(ast.parse(bloom.read_text("utf-8")))
    assert {name: there.get(name) for name in shown if name in there} == {
        name: shown[name] for name in ("use_cached_attention", "_make_attention")
    }


def _definitions(tree: ast.Module) -> dict[str, str]:
    """Functions without their annotations and docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            if ast.get_docstring(node) is not None:
                del node.body[0]
    return {node.name: ast.dump(node) for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_blocks_that_are_not_run_are_counted():
    counted = {str(path.relative_to(ROOT)): sum(bool(block.reason) for block in blocks(path)) for path in DOCUMENTS}
    assert {name: count for name, count in counted.items() if count} == NOT_RUN


# ------------------------------------------------------------ what you want, and what you say

TABLE = re.compile(r"^\| you want \| you say \|\n.*\n((?:\|.*\n)+)", re.MULTILINE)
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split(" | ", 1))
    for line in TABLE.search(USAGE.read_text("utf-8"))[1].splitlines()
]
SMALL = "--sequence-length 48 --no-validate"
NEURON = "--backend neuron --instance-type inf2"
# By how a wish begins, the commands around options that are named alone; whole commands are run as they are.
TYPED = {
    "a GGUF file": ["precast export model.gguf -o grid --sequence-length 48 --quantize source"],
    "a smaller and faster model": [
        *(f"precast export MODEL -o {name} {SMALL} --quantize {name}" for name in ("int8", "int4", "auto")),
        "precast export PACKED -o source --sequence-length 48 --no-validate --quantize source",
    ],
    "a quantized graph that OpenVINO": [f"precast export MODEL -o qdq {SMALL} --quantize int8 --format qdq"],
    "a smaller key/value cache": [
        f"precast export MODEL -o codes {SMALL} --kv-cache int8",
        f"precast export MODEL -o half {SMALL} --backend export --kv-cache float16",
    ],
    "every dimension fixed, the decode step too": [
        "precast export MODEL -o fixed --sequence-length 512 --no-validate --prefill-lengths 64,256"
    ],
    "native code instead of a graph": [f"precast export MODEL -o native {SMALL} --backend aoti"],
    "native code for CPUs of several kinds": [
        f"precast export MODEL -o levels {SMALL} --backend aoti --isa avx2,avx512"
    ],
    "the fastest backend for this machine": [f"precast export MODEL -o fastest {SMALL} --backend auto"],
    "bfloat16 or float16, in all or in products of matrices only": [
        f"precast export MODEL -o narrow {SMALL} --backend export --dtype bfloat16",
        f"precast export MODEL -o products {SMALL} --backend export --auto-cast matmul",
    ],
    "AWS Inferentia or Trainium": [f"precast export MODEL -o cores {SMALL} {NEURON} --prefill-lengths 8"],
    "the same artifact for hosts without that device": [
        f"precast export MODEL -o both {SMALL} {NEURON} --prefill-lengths 8 --also onnx"
    ],
    "to move from or to optimum-neuron": [
        f"precast export ENCODER -o theirs --batch-size 1 {SMALL} {NEURON} --layout optimum-neuron --inline-weights"
    ],
    "to know how fast it is here": ["precast bench out --compare OTHER"],
    "machine-readable answers": ["precast inspect out --json"],
    "completion in your shell": ["bash -c 'eval \"$(precast completion bash)\" && complete -p precast'"],
}
# The device's own tests are tests/runtime/test_providers.py.
ELSEWHERE = ["to run an ONNX graph on a GPU, or by OpenVINO"]


def _typed(wish: str, said: str) -> list[str]:
    """The commands of a row; the options that it names are in one of them."""
    spans = re.findall(r"`([^`]+)`", said)
    whole = [span.replace("…", "--prompt 'Water boils'") for span in spans if span.startswith("precast ")]
    commands = [*whole, *(command for start, own in TYPED.items() if wish.startswith(start) for command in own)]
    named = [piece.strip() for span in spans if span[0] == "-" for piece in span.split("…")]
    assert all(any(piece in command for command in commands) for piece in named), f"{wish}: {named} in {commands}"
    return commands


@pytest.mark.slow
@pytest.mark.parametrize(("wish", "said"), ROWS, ids=[wish for wish, _ in ROWS])
def test_you_get_what_you_want(reader, wish, said, tmp_path, monkeypatch):
    if wish in ELSEWHERE:
        pytest.skip("it needs a GPU, or OpenVINO")
    neuron_machine.install(monkeypatch, tmp_path / "neuron", cores=2)
    if "PTQ" in wish:
        reader.local = {**reader.local, "MODEL": reader.local["PACKED"]}
    commands = _typed(wish, said)
    if not any("-o out" in command for command in commands):
        (tmp_path / "out").symlink_to(reader.local["OTHER"]())
    for command in commands:
        reader.type(command, wish)


def test_every_row_has_its_commands():
    for wish, said in ROWS:
        assert wish in ELSEWHERE or _typed(wish, said), wish
    assert all(any(wish.startswith(start) for wish, _ in ROWS) for start in TYPED)


# ------------------------------------------------------------ commands within sentences

INLINE = [
    (path.name, span)
    for path in DOCUMENTS
    for span in re.findall(r"(?<!`)`((?:precast|make) [^`\n]+)`", path.read_text("utf-8"))
]


@pytest.mark.parametrize(("place", "command"), dict.fromkeys(INLINE))
def test_commands_within_sentences_exist(place, command):
    """Names and options; what is in place of arguments may be anything."""
    program, name, *words = shlex.split(command.replace("|", " ").replace("\\", ""))
    if program == "make":
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    elif not name.startswith("-"):
        found = cli.get_command(None, name)
        assert found is not None
        context = click.Context(cli, **SETTINGS)
        options = {option for param in found.get_params(context) for option in param.opts}
        if "…" not in words and words:
            found.make_context(name, words, parent=context, resilient_parsing=True)
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options


# ------------------------------------------------------------ the checks themselves


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```console\n$ precast inspect nothing\n```", "answers 1"),
        ("```console\n$ precast inspect --nonsense\n```", "answers 2"),
        ("```console\nmake nonsense\n```", "No rule to make target"),
        ("```console\n$ rm -r nothing\n```", "What runs rm"),
        ("```console\n$ precast env\n$ precast tasks nothing/here/there\n```", "answers"),
        ("\n\n```python\nx = 1\nassert x == 2\n```", "here.md:4: AssertionError"),
        ("```python\nundefined\n```", "NameError"),
        ("```\nprecast\n```", "what runs a block of no language"),
    ],
)
def test_a_broken_snippet_is_found(tmp_path, text, said):
    document = tmp_path / "here.md"
    document.write_text(text + "\n")
    with pytest.raises(SnippetError, match=said):
        snippets.run(document, Reader(tmp_path, {}))


@pytest.mark.parametrize(
    ("shown", "is_answered"),
    [
        ("  fill-mask…", False),
        ("…\n  fill-mask…", True),
        ("…\n  fill-mask", False),
        ("…\n  fill-mask…\n  multiple-choice…", False),
        ("…\n  fill-mask…\n…\n  multiple-choice…", True),
    ],
)
def test_an_answer_is_compared_with_what_is_shown(tmp_path, shown, is_answered):
    document = tmp_path / "here.md"
    document.write_text(f"```console\n$ precast tasks bert\n{shown}\n```\n")
    reader = Reader(tmp_path, {}, compares=True)
    if is_answered:
        snippets.run(document, reader)
    else:
        with pytest.raises(SnippetError, match="the document has"):
            snippets.run(document, reader)


def test_a_mark_belongs_to_the_next_block(tmp_path):
    document = tmp_path / "here.md"
    document.write_text("<!-- not run: AWS -->\n```console\n$ x\n```\n\n```python\n1\n```\n")
    assert [
        (block.reason, block.language, [command for command, _ in block.commands()])
        for block in snippets.blocks(document)
    ] == [
        ("AWS", "console", ["x"]),
        (None, "python", ["1"]),
    ]
