"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

__all__ = [
    "LENGTHS",
    "cast_options",
    "hub_options",
    "in_flags",
    "json_option",
    "model_options",
    "neuron_options",
    "quantize_options",
    "quiet_option",
]

F = TypeVar("F", bound=Callable[..., Any])


if TYPE_CHECKING:
    _LengthsType = click.ParamType[tuple[int, ...]]
else:
    # Generic only since click 8.4.
    _LengthsType = click.ParamType


class _Lengths(_LengthsType):
    """One whole number, or several with commas."""

    name = "N[,N…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a whole number, nor several separated by commas.", param, ctx)


LENGTHS = _Lengths()

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")


def hub_options(function: F) -> F:
    """--revision and --token."""
    function = click.option("--token", metavar="TOKEN", help="Hub token, if not logged in (HF_TOKEN).")(function)
    return click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")(function)


def cast_options(function: F) -> F:
    """What is computed in, and on what."""
    for option in reversed(
        [
            click.option("--dtype", default="float32", show_default=True, metavar="DTYPE",
                         help="Of weights and computation: float32, bfloat16, float16. Results are float32."),
            click.option("--auto-cast", default="none", show_default=True, metavar="WHAT",
                         help="Compute in less than float32: matmul (products and their weights), all."),
            click.option("--auto-cast-type", metavar="TYPE",
                         help="What --auto-cast casts to: bf16 (default), fp16; neuron: tf32."),
            click.option("--isa", default="native", show_default=True, metavar="LEVEL",
                         help="Native code for CPUs with: avx2, avx512, or what this one has."),
            click.option("--device", default="cpu", show_default=True, metavar="DEVICE",
                         help="Native code for: cpu, cuda."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


def neuron_options(function: F) -> F:
    """What --backend neuron compiles for, and how."""
    for option in reversed(
        [
            click.option("--instance-type", metavar="TYPE", help="Neuron: compile for inf2, trn1, trn1n or trn2."),
            click.option("--strategy", metavar="NAME",
                         help="Neuron: trace, or model-builder (one set of weights, several cores)."),
            click.option("--tensor-parallel", "--num-cores", type=int, default=1, metavar="N",
                         help="Neuron: spread each layer's weights over N NeuronCores."),
            click.option("--inline-weights/--no-inline-weights", default=False,
                         help="Neuron: weights within each graph, or once beside them (default)."),
            click.option("-O", "optlevel", type=int, metavar="1|2|3", help="Neuron: how hard to optimise; 2."),
            click.option("--compiler-arg", "compiler_args", multiple=True, metavar="ARG",
                         help="Neuron: passed to neuronx-cc, as --compiler-arg=--verbose=info; repeatable."),
            click.option("--compiler-workdir", type=click.Path(path_type=Path), metavar="DIR",
                         help="Neuron: keep neuronx-cc's files and log here."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


def quantize_options(function: F) -> F:
    """How weights and caches are rounded, and what that may cost."""
    for option in reversed(
        [
            click.option("--quantize", default="none", show_default=True, metavar="SCHEME",
                         help="Weights as: none, int8, int4, source (the grid they lie on already), auto."),
            click.option("--method", "quantize_method", metavar="NAME",
                         help="How weights are rounded: rtn, search, gptq, awq. int8: rtn (aoti: awq), int4: search."),
            click.option("--group-size", type=int, help="Weights that share a scale: 32, or a row (aoti's int8)."),
            click.option("--symmetric/--asymmetric", default=None,
                         help="Zero in the middle of the grid, or anywhere. int8: symmetric (aoti: not), int4: not."),
            click.option("--skip", multiple=True, metavar="PATTERN",
                         help="Layers that stay as they are, as 'model.layers.0.*'; repeatable."),
            click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
                         help="Text for methods that look at activations, instead of the built-in one."),
            click.option("--kv-cache", default="float32", show_default=True, metavar="DTYPE",
                         help="Keys and values as: float32, float16 (aoti, export), int8."),
            click.option("--max-kl", type=float, metavar="X",
                         help="Largest KL divergence from fp32 on held-out text. int4: 0.1, others: 0.01."),
            click.option("--min-agreement", type=float, metavar="X",
                         help="Smallest share of equal likeliest tokens. int4: none, others: 0.95."),
            click.option("--accept-loss", is_flag=True, help="Write the artifact even below these floors."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


def model_options(function: F) -> F:
    """How to open an artifact."""
    for option in reversed(
        [
            click.option("--subfolder", metavar="DIR", help="Where in MODEL the artifact lies."),
            click.option("--local-files-only", is_flag=True, help="Do not ask the Hub."),
            click.option("--device", metavar="NAME", help="Where to run: cpu, cuda, gpu, npu, coreml."),
            click.option("--provider", metavar="NAME", help="ONNX Runtime's: cpu, cuda, tensorrt, openvino, coreml."),
            click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads; 0 is one per core."),
            click.option(
                "--cores", metavar="N[-N]", help="Neuron: which NeuronCores, as 0-3; several copies run at once."
            ),
            click.option("--variant", metavar="NAME", help="Which compiled form to use."),
            click.option("--verify", is_flag=True, help="Hash every file again."),
            click.option("--sha256", metavar="DIGEST", help="Open only the artifact with this digest."),
            click.option("--trust-native-code", is_flag=True, help="Run native code that was built elsewhere."),
        ]
    ):
        function = option(function)
    return hub_options(function)


def in_flags(message: str, params: Iterable[click.Parameter]) -> str:
    """The message with keywords as these options are typed: `force=True` is `--force`, `max_new_tokens=47` is
    `--max-new-tokens 47`, and `top_p must …` is `--top-p must …`."""
    message = message.replace("do_sample=False", "--temperature 0")
    for param in params:
        if not isinstance(param, click.Option):
            continue
        name, flag = rf"(?<![-\w/.]){param.name}", max(param.opts, key=len)
        message = re.sub(rf"{name}=True\b", flag, message)
        message = re.sub(rf"{name}=(?=[\w'\"])", f"{flag} ", message)
        # A single word without a sign may be plain English, unless the message begins with it.
        bare = rf"{name}=?(?![\w/-])" if "_" in (param.name or "") else rf"{name}=|^{param.name}\b"
        message = re.sub(bare, flag, message)
    return message
