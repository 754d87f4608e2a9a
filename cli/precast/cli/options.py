"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

__all__ = [
    "LENGTHS",
    "InSection",
    "Sections",
    "adapter_options",
    "adapter_slot_options",
    "cast_options",
    "hub_options",
    "in_flags",
    "json_option",
    "model_options",
    "option_in",
    "parse_settings",
    "quantize_options",
    "quiet_option",
    "setting_option",
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


def setting_option(help_: str) -> Callable[[F], F]:
    """--option, for what has no flag of its own."""
    return click.option("--option", "settings", multiple=True, metavar="NAME=VALUE", help=help_)


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """The values of `--option NAME=VALUE`: JSON where it is some, else a text. Raises click.UsageError."""
    found = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--option {text!r} is not NAME=VALUE.")
        if name in found:
            raise click.UsageError(f"--option {name}=… was given twice; give one of them.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


class Sections(click.Command):
    """A command whose help has its options in sections: those that `in_section` names, and before them all others."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click.Command."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class InSection(click.Option):
    """An option with a place in the help of `Sections`."""

    def __init__(self, *args: Any, section: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.section = section


def option_in(section: str) -> Callable[..., Callable[[F], F]]:
    """click.option for that section."""
    return partial(click.option, cls=InSection, section=section)


_adapters, _precision, _quantization = map(option_in, ("Adapters", "Precision", "Quantization"))


def hub_options(function: F) -> F:
    """--revision and --token."""
    function = click.option("--token", metavar="TOKEN", help="Hub token, if not logged in (HF_TOKEN).")(function)
    return click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")(function)


def adapter_options(function: F) -> F:
    """What is merged into the model."""
    for option in reversed(
        [
            _adapters("--lora", multiple=True, metavar="PATH_OR_REPO[:WEIGHT]",
                      help="Merge this adapter of peft (LoRA and its kin) into the weights; repeatable."),
            _adapters("--force-base", is_flag=True, help="Take adapters that name another base model than MODEL."),
            _adapters("--trust-pickle", is_flag=True, help="Read adapters that are pickled (.bin): tensors only."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


def adapter_slot_options(function: F) -> F:
    """Which adapters can be loaded at run time."""
    for option in reversed(
        [
            _adapters("--lora-slots", type=int, default=0, show_default=False, metavar="N",
                      help="Decoders: room for N LoRA adapters, loaded and switched at run time."),
            _adapters("--lora-rank", type=int, metavar="R", help="With --lora-slots: the largest rank of an adapter."),
            _adapters("--lora-targets", multiple=True, metavar="PATTERN",
                      help="With --lora-slots: layers that adapters may change, by default all linear ones of the "
                           "decoder's blocks; '*.q_proj', say. Repeatable."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


def cast_options(function: F) -> F:
    """The dtype of computation."""
    for option in reversed(
        [
            _precision("--dtype", default="float32", show_default=True, metavar="DTYPE",
                         help="Of weights and computation: float32, bfloat16, float16, or auto, the checkpoint's where "
                              "there are instructions for it. Results are float32."),
            _precision("--auto-cast", default="none", show_default=True, metavar="WHAT",
                         help="Compute in less than float32: matmul (products and their weights), all."),
            _precision("--auto-cast-type", metavar="TYPE",
                         help="What --auto-cast casts to: bf16 (default), fp16; neuron: tf32."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


def quantize_options(function: F) -> F:
    """How weights and caches are rounded, and what that may cost."""
    for option in reversed(
        [
            _quantization("--quantize", default="none", show_default=True, metavar="SCHEME",
                         help="Weights as: none, int8, int4, source (the codes that they have already), auto; with "
                              "activations in 8 bits, too: a8w8, a8w8-dynamic."),
            _quantization("--method", "quantize_method", metavar="NAME",
                         help="How weights are rounded: rtn, search, gptq, awq, llm.int8. "
                              "int8: rtn (aoti: awq), int4: search."),
            _quantization("--group-size", type=int, help="Weights that share a scale: 32, or a row (aoti's int8)."),
            _quantization("--symmetric/--asymmetric", default=None,
                         help="Codes around zero, or around a zero point. int8: symmetric (aoti: not), int4: not."),
            _quantization("--smooth", default="auto", show_default=True, metavar="EXPONENT",
                         help="What a8w8 moves from activations into weights: 0 to 1, auto, none."),
            _quantization("--skip", multiple=True, metavar="PATTERN",
                         help="Layers that stay as they are, as 'model.layers.0.*'; repeatable."),
            _quantization("--calibration", type=click.Path(path_type=Path), metavar="FILE",
                         help="Text for methods that look at activations, instead of the built-in one."),
            _quantization("--kv-cache", default="float32", show_default=True, metavar="DTYPE",
                         help="Keys and values as: float32, float16 (aoti, export), int8."),
            _quantization("--max-kl", type=float, metavar="X",
                         help="Largest KL divergence from fp32 on held-out text. int4: 0.1, a8w8: 0.05, others: 0.01."),
            _quantization("--min-agreement", type=float, metavar="X",
                         help="Smallest share of equal likeliest tokens or labels. int4: none, others: 0.95."),
            _quantization("--min-cosine", type=float, metavar="X",
                         help="Smallest mean cosine of an encoder's outputs with fp32's. int4: 0.98, others: 0.999."),
            _quantization("--accept-loss", is_flag=True, help="Write the artifact even below these floors."),
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
            click.option(
                "--nproc",
                type=click.IntRange(min=1),
                metavar="N",
                help="Processes: as many as the model was compiled for (export --tensor-parallel, …).",
            ),
            click.option(
                "--rank-timeout",
                type=click.FloatRange(min=0, min_open=True),
                metavar="SECONDS",
                help="How long such a process waits for another in a step before all end; 60.",
            ),
            click.option("--log-dir", metavar="DIR", help="Keep here what such processes write: rank_1.log and so on."),
            click.option("--variant", metavar="NAME", help="Which compiled form to use."),
            click.option("--verify", is_flag=True, help="Hash every file again."),
            click.option("--sha256", metavar="DIGEST", help="Open only the artifact with this digest."),
            click.option("--trust-native-code", is_flag=True, help="Run native code that was built elsewhere."),
        ]
    ):
        function = option(function)
    return hub_options(function)


def in_flags(message: str, params: Iterable[click.Parameter], others: Iterable[click.Parameter] = ()) -> str:
    """The message with keywords as these options are typed: `force=True` is `--force`, `max_new_tokens=47` is
    `--max-new-tokens 47`, `dtype='float16'` is `--dtype float16`, and `top_p must …` is `--top-p must …`.

    Those of `others`, another command's options, count where these have none of the name.
    """
    message = message.replace("do_sample=False", "--temperature 0").replace("validate=False", "--no-validate")
    own, further = ([each for each in given if isinstance(each, click.Option)] for given in (params, others))
    for option in own:
        message = _in_flag(message, option)
        # A single word without a sign may be plain English, unless the message begins with it.
        message = re.sub(rf"^{option.name}\b(?![/-])", "/".join([_flag_of(option), *option.secondary_opts]), message)
    known = {option.name for option in own}
    for option in further:
        if option.name not in known:
            message = _in_flag(message, option)
    return message


def _in_flag(message: str, param: click.Option) -> str:
    name, flag = rf"(?<![-\w/.'\"]){param.name}", _flag_of(param)
    message = re.sub(rf"{name}=True\b", flag, message)
    message = re.sub(rf"{name}='(-[\w.,+=-]+)'", rf"{flag}=\1", message)
    message = re.sub(rf"{name}='([\w.,+-]+)'", rf"{flag} \1", message)
    message = re.sub(rf"{name}=(?=[\w'\"/~]|\.[\w/])", f"{flag} ", message)
    # Of a pair nobody knows here which one was typed.
    both = "/".join([flag, *param.secondary_opts])
    return re.sub(rf"{name}={'?' if '_' in (param.name or '') else ''}(?![\w/-])", both, message)


def _flag_of(param: click.Option) -> str:
    return max(param.opts, key=len)
