"""Messages speak Python to who writes Python, flags to who types them, and what they tell to type can be typed."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
from source_tree import FILES, ROOT

from precast.cli import SETTINGS, cli
from precast.cli.options import in_flags
from precast.exporter import ExportOptions, export, preview
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.advice import suggest_larger
from precast.runtime.artifact import read_artifact
from precast.runtime.errors import PrecastError, UsageError

LIBRARIES = [path for path in FILES if path.relative_to(ROOT).parts[0] in ("runtime", "exporter")]
_FLAG = re.compile(r"(?<![\w`-])--[a-z][a-z-]+")
_COMMAND = re.compile(r"(precast|pip|ray) [a-z]+ .*")
OTHER_PROGRAMS = (
    "backends/aoti/library.py", "backends/aoti/standalone/link.py", "backends/neuron/flags.py", "neuron/compile_job.py",
    "neuron/compile_worker.py", "neuron/options.py", "hosts/neuron_sdk.py", "hosts/select.py",
)  # fmt: skip
"""Files that call, or name flags of, compilers, linkers and pip."""
COMMAND_PARTS = (
    "advice.py", "options/__init__.py", "models/base.py", "models/seq2seq.py", "models/whisper.py",
    "models/encoder_base.py", "bench/compare.py", "options/declaration.py", "options/shapes.py",
    "generation/given_prefix.py", "distributed/opening.py", "distributed/launcher.py",
)  # fmt: skip
"""Files that put commands together of parts."""


def literals(path):
    """Every text of a file that is no docstring and describes no option, those within f-strings, too."""
    tree = ast.parse(path.read_text("utf-8"))
    silent = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for each in body if isinstance(body, list) else ():
            if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
                silent.add(id(each.value))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "describe":
            silent |= {id(each) for each in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            silent |= {id(each) for each in node.values}
            parts = [str(each.value) if isinstance(each, ast.Constant) else "{}" for each in node.values]
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_libraries_name_no_flag_outside_of_a_command(path):
    name = path.as_posix()
    if name.endswith(OTHER_PROGRAMS):
        pytest.skip("speaks to other programs")
    for line, text in literals(path):
        is_part = name.endswith(COMMAND_PARTS) and text.lstrip().startswith("--")
        found = None if is_part else _FLAG.search(_COMMAND.sub("", text))
        assert not found, (
            f"{path.name}:{line} says {found[0]}; messages name keywords, and the command line makes flags"
        )


WRONG = [
    {"batch_size": 0},
    {"sequence_length": (8, 8)},
    {"image_size": (1, 2, 3)},
    {"dtype": "int3"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "backend": "aoti", "kv_cache": "float16"},
    {"auto_cast": "matmul"},
    {"auto_cast_type": "fp16"},
    {"auto_cast": "all", "auto_cast_type": "tf32", "backend": "aoti"},
    {"quantize": "int3"},
    {"quantize_method": "gptq"},
    {"quantize": "source", "symmetric": True},
    {"group_size": 32},
    {"group_size": 33},
    {"skip": ("lm_head",)},
    {"calibration": Path("my text.txt"), "quantize": "int4"},
    {"kv_cache": "float16"},
    {"atol": -1.0},
    {"atol": 0.1, "quantize": "int8"},
    {"max_kl": 0.1},
    {"max_kl": -1.0, "quantize": "int8"},
    {"min_agreement": 2.0, "quantize": "int8"},
    {"accept_loss": True},
    {"backend": "tpu"},
    {"backend": "auto", "also": ("onnx",)},
    {"backend": "auto", "isa": "avx2,avx512"},
    {"also": ("onnx",)},
    {"isa": "avx2"},
    {"isa": "sse2", "backend": "aoti"},
    {"isa": "avx2,avx512", "device": "cuda", "backend": "aoti"},
    {"device": "cuda"},
    {"layout": "optimum-neuron"},
    {"layout": "optimum-neuron", "backend": "neuron", "instance_type": "inf2", "sequence_length": (8, 16)},
    {"instance_type": "inf2"},
    {"backend": "neuron"},
    {"backend": "neuron", "instance_type": "inf1"},
    {"backend": "neuron", "instance_type": "inf2", "optlevel": 4},
    {"backend": "neuron", "instance_type": "inf2", "tensor_parallel": 2, "strategy": "trace"},
    {"backend": "neuron", "instance_type": "inf2", "compiler_args": ("--target=inf2",)},
    {"backend": "neuron", "instance_type": "inf2", "compiler_args": ("verbose",)},
    {"backend": "neuron", "instance_type": "inf2", "strategy": "model-builder", "inline_weights": True},
]


def command_of(name):
    """A command and its parameters, as they are in its group."""
    command = cli.get_command(None, name)
    return command, command.get_params(click.Context(command, parent=click.Context(cli, **SETTINGS)))


def export_command():
    return command_of("export")


def assert_both_languages(message, params):
    """In Python no flag but within a command; typed no keyword, and no flag that the command does not have."""
    plain = _COMMAND.sub("", message)
    spoken = re.sub("'--[^']*'|-- *--target.*", "", plain)
    assert not _FLAG.search(spoken), message
    typed = in_flags(message, params)
    flags = {name for param in params for name in [*param.opts, *param.secondary_opts]}
    keywords = {param.name for param in params if isinstance(param, click.Option)}
    left = {name for name in keywords if re.search(rf"(?<![\w/.'-]){name}=", typed) or ("_" in name and name in typed)}
    assert not left - {"task"}, typed
    unknown = set(_FLAG.findall(typed)) - flags - {"--target", "--verbose"}
    assert not unknown, typed


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_a_refused_option_is_named_as_it_was_given(options):
    with pytest.raises(UsageError) as caught:
        ExportOptions(**options).check()
    assert_both_languages(str(caught.value), export_command()[1])


def test_what_checkpoints_refuse_is_said_in_both(checkpoint, tmp_path):
    """Of a checkpoint in a folder with a space: the commands in these messages can be pasted."""
    here = tmp_path / "my models"
    here.mkdir()
    bert = here / "bert"
    bert.symlink_to(checkpoint("bert", "AutoModel"))
    llama = checkpoint("llama")
    command, params = export_command()
    for model, options in (
        (bert, {}),
        (bert, {"batch_size": 1}),
        (bert, {"batch_size": 1, "sequence_length": 9999}),
        (bert, {"batch_size": 1, "sequence_length": 8, "image_size": 9}),
        (bert, {"batch_size": 1, "sequence_length": 8, "prefill_lengths": 4}),
        (bert, {"batch_size": 1, "sequence_length": 8, "quantize": "auto"}),
        (bert, {"batch_size": 1, "sequence_length": 8, "dtype": "bfloat16", "backend": "export", "max_kl": 0.5}),
        (bert, {"revision": "main"}),
        (llama, {"sequence_length": (8, 16)}),
        (llama, {"sequence_length": 8, "prefill_lengths": 16}),
        (llama, {"num_choices": 2}),
        (llama, {"batch_size": (1, 2), "sequence_length": 8}),
        (here, {"task": "juggling"}),
    ):
        with pytest.raises(PrecastError) as caught:
            preview(str(model), **options)
        message = str(caught.value)
        assert_both_languages(message, params)
        for line in re.findall(r"precast (export .*? -o OUT)", message):
            words = shlex.split(line)
            assert words[1] in (str(model), "MODEL")
            command.make_context("export", words[1:], parent=click.Context(cli, **SETTINGS))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="batch_size=N and sequence_length=N"):
        export(str(bert), tmp_path / "out")


def test_what_a_compiled_model_refuses_is_said_in_both(decoder, encoder):
    params = export_command()[1]
    model, vectors = CompiledModelForCausalLM.from_pretrained(decoder), CompiledModel.from_pretrained(encoder)
    _, own = command_of("generate")
    known = {name for param in [*own, *params] for name in [*param.opts, *param.secondary_opts]}
    for call in (
        lambda: model.generate([[5], [6]]),
        lambda: model.generate([[5]], num_beams=3),
        lambda: model.generate([[5] * 60]),
        lambda: model.generate([[5]], max_new_tokens=99),
        lambda: model.generate([[5]], do_sample=True, top_k=-1),
        lambda: model.generate([[5]], prompt_lookup_num_tokens=-1),
        lambda: vectors([[5]] * 9),
        lambda: vectors([[5] * 60]),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        message = str(caught.value)
        assert not _FLAG.search(_COMMAND.sub("", message)), message
        typed = in_flags(message, own, params)
        assert set(_FLAG.findall(typed)) <= known, typed
        assert not re.search(r"\b(batch_size|dynamic_batch_size|max_new_tokens|top_k)\b", typed), typed


def test_advice_can_be_pasted(decoder):
    """Also for a model whose name a shell would take apart."""
    command, _ = export_command()
    artifact = read_artifact(decoder)
    line = re.search(r"precast export (.*)", suggest_larger(artifact, "--batch-size 2 --sequence-length 48"))[1]
    command.make_context("export", shlex.split(line), parent=click.Context(cli, **SETTINGS))
