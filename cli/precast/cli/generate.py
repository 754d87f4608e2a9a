"""`precast generate`."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from .batch import Files, answer, file_options, read_input
from .inputs import read_standard_input, read_text
from .options import json_option, model_options, parse_settings, quiet_option, setting_option
from .output import echo_answer, note, print_json

__all__ = ["command"]


_MODES = ("compiled", "eager", "torch-compile")
"""As runner.modes.MODES, which imports more than a help text takes."""


@click.command("generate", epilog='precast generate out --chat --prompt "What is the capital of France?"')
@click.argument("model")
@click.option(
    "--prompt", "prompts", multiple=True,
    help="The text to continue; '-' or nothing reads standard input, but nothing on a terminal begins a chat. Several "
    "are answered as the rows of a file.",
)  # fmt: skip
@click.option(
    "--mode", type=click.Choice(_MODES), default=_MODES[0], show_default=True,
    help="How to run MODEL; eager and torch-compile run a checkpoint by transformers, that of an artifact as well.",
)  # fmt: skip
@file_options()
@click.option("--max-input-tokens", type=click.IntRange(min=1), metavar="N", help="Cut longer prompts on the left.")
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@click.option("--system", metavar="TEXT", help="With --chat, or in a chat: what the model is told first.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most so many; by default what fits, up to 256.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Sample, with this temperature; 0 takes the likeliest token.",
)
@click.option("--top-k", type=click.IntRange(min=0), metavar="N", help="Sample among the N likeliest tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1),
    metavar="X",
    help="Sample among the likeliest tokens that reach this probability.",
)
@click.option(
    "--repetition-penalty", type=click.FloatRange(min=0, min_open=True), metavar="X", help="Above 1: repeat less."
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Makes sampling repeatable.")
@click.option(
    "--prompt-lookup", "prompt_lookup_num_tokens", type=click.IntRange(min=0), metavar="N",
    help="Guess up to N tokens from earlier text and check them at once, 10 for example: the same answer, quicker "
    "where it quotes its prompt. In a quantized model rounding may change it.",
)  # fmt: skip
@click.option(
    "--assistant", metavar="MODEL",
    help="A smaller model of the same vocabulary, compiled too: it guesses tokens that are checked at once. The same "
    "answer; in a quantized model rounding may change it.",
)  # fmt: skip
@click.option(
    "--session", metavar="FILE", type=click.Path(path_type=Path),
    help="Keep what was read in FILE: made by the first run, and opened by later ones, which read only what their "
    "prompt has besides. A long system prompt, say.",
)  # fmt: skip
@click.option(
    "--adapter", metavar="NAME=PATH",
    help="Load the LoRA adapter in the directory PATH, and answer with it; of models with slots (export --lora-slots).",
)  # fmt: skip
@click.option(
    "--prefix-tuning", metavar="PATH",
    help="Answer after the prefix in the directory PATH, a PEFT adapter of type PREFIX_TUNING; of models compiled "
    "without one.",
)  # fmt: skip
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End where this text appears; repeatable.")
@click.option(
    "--json-schema", metavar="FILE", type=click.Path(path_type=Path),
    help="Answer in JSON that keeps to the schema in this file. This and the next three need precast[structured].",
)  # fmt: skip
@click.option("--regex", metavar="PATTERN", help="Answer with a text that the whole pattern matches.")
@click.option(
    "--grammar", metavar="FILE", type=click.Path(path_type=Path),
    help="Answer by the grammar in this file, in Lark's form or llama.cpp's (GBNF).",
)  # fmt: skip
@click.option("--choice", "choices", multiple=True, metavar="TEXT", help="Answer with one of these; repeatable.")
@setting_option("Any other of generate(), as num_beams=4; repeatable.")
@model_options
@json_option
@quiet_option
def command(
    model: str,
    prompts: tuple[str, ...],
    chat: bool,
    system: str | None,
    stops: tuple[str, ...],
    assistant: str | None,
    session: Path | None,
    adapter: str | None,
    json_schema: Path | None,
    regex: str | None,
    grammar: Path | None,
    choices: tuple[str, ...],
    settings: tuple[str, ...],
    max_input_tokens: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue a prompt with the compiled decoder MODEL — a directory or a Hub repository.

    A file of rows gives a line of JSON for each, {"input": …, "output": …}, the answer that the row gets alone.
    """
    files, mode = Files.pop(options), options["mode"]
    reads_rows = files.input_file is not None or files.output_file is not None or len(prompts) > 1
    is_chat = not (prompts or as_json or reads_rows or mode != "compiled") and _is_at_terminal()
    if system is not None and not (chat or is_chat):
        raise click.UsageError("--system is part of a conversation; add --chat.")
    if "" in stops:
        raise click.UsageError("--stop is empty, which every text contains; give at least one character.")
    asked = _generate_options({name: options.pop(name) for name in _SAMPLING}, stops, parse_settings(settings))
    form = _form_options(json_schema, regex, grammar, choices)
    _check_mode(mode, {"--session": session, "--assistant": assistant, "--adapter": adapter,
                       "--prefix-tuning": options["prefix_tuning"], "a form of answers": form})  # fmt: skip
    asked |= form
    chats = {"chat": chat, "system": system, "max_input_tokens": max_input_tokens}
    if reads_rows:
        if session is not None:
            raise click.UsageError("--session keeps one prompt, and these are rows of many; leave it out.")
        rows = read_input(files, prompts)
        _answer_rows(model, rows, files, asked, assistant, adapter, chats, as_json, quiet, options)
        return
    if files.column or files.input_format:
        raise click.UsageError("--column and --input-format are of rows; give --input-file, '-' for standard input.")
    if is_chat and max_input_tokens is not None:
        raise click.UsageError("--max-input-tokens cuts prompts, and a chat forgets nothing by itself; leave it out.")
    prompt = None if is_chat else prompts[0] if prompts else "-"
    if prompt == "-":
        prompt = read_standard_input("the prompt")
    if mode != "compiled":
        _answer_at_once(model, prompt or "", asked, chats, as_json, quiet, options)
        return
    _answer_prompt(model, prompt, asked, assistant, adapter, session, chats, as_json, quiet, options)


def _check_mode(mode: str, given: dict[str, Any]) -> None:
    """Raise click.UsageError for what only compiled models do."""
    if wrong := [name for name, value in given.items() if value and mode != "compiled"]:
        raise click.UsageError(f"{wrong[0]} is for compiled models, not for --mode {mode}; leave it out.")


def _is_at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _answer_prompt(
    model: str, prompt: str | None, asked: dict[str, Any], assistant: str | None, adapter: str | None,
    session: Path | None, chats: dict[str, Any], as_json: bool, quiet: bool, options: dict[str, Any],
) -> None:  # fmt: skip
    """Continue one prompt, token by token; None begins a chat."""
    from precast.runtime.generation.config import default_new_tokens

    _check_session(session)
    started = time.perf_counter()
    opened = _open_decoder(model, quiet, options)
    asked = {**asked, **_load_adapter(opened, adapter)}
    is_kept = session is None or session.exists()
    if session is not None and is_kept:
        opened.load_session(session)
    if assistant is not None:
        asked = {**asked, "assistant_model": _open_decoder(assistant, quiet, _of_any(options))}
    if prompt is None:
        if _run_chat(opened, asked, chats) and not is_kept:
            opened.save_session(session)
        return
    ids = _encode_prompt(opened, prompt, **chats)
    asked = {"max_new_tokens": default_new_tokens(opened.capacity - len(ids)), **asked}
    # All of it is prompt, whatever a special token in it pads elsewhere.
    stream = opened.stream([ids], [[1] * len(ids)], **asked)
    clock = _Clock(stream, started)
    pieces = []
    for piece in _decode_pieces(opened.tokenizer, clock):
        pieces.append(piece)
        if not as_json:
            echo_answer(piece)
    figures = clock.figures() | _draft_figures(stream)
    if as_json:
        print_json({"text": "".join(pieces), "prompt_tokens": len(ids), **figures})
    else:
        click.echo()
    # After the answer, which does not depend on it.
    if not is_kept:
        opened.save_session(session)
    if not (quiet or as_json):
        note(_describe_figures(figures))


def _answer_at_once(
    model: str, prompt: str, asked: dict[str, Any], chats: dict[str, Any], as_json: bool, quiet: bool,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Continue one prompt in another mode, whose answer comes as a whole."""
    from precast.runtime.runner.generating import GeneratingWorker
    from precast.runtime.runner.rows import Column, Row

    opened, row = _open_decoder(model, quiet, options), Row(prompt)
    worker = GeneratingWorker(opened, Column([row], None, ()), asked, **chats)
    prepared, started = worker.prepare(0, row), time.perf_counter()
    (found,) = worker.answer([prepared])
    seconds = round(time.perf_counter() - started, 3)
    if as_json:
        print_json({"text": found["output"], "prompt_tokens": prepared.length, "new_tokens": found["new_tokens"],
                    "seconds": seconds, "mode": options["mode"]})  # fmt: skip
        return
    echo_answer(found["output"])
    click.echo()
    if not quiet:
        count = found["new_tokens"]
        note(f"{count} token{'' if count == 1 else 's'} in {seconds} s, {options['mode']}, the prompt included")


def _run_chat(opened: Any, asked: dict[str, Any], chats: dict[str, Any]) -> bool:
    from .chat import Conversation, run_chat

    return run_chat(Conversation(opened, asked, _Clock), chats["system"], needs_template=chats["chat"])


def _answer_rows(
    model: str, rows: list[Any], files: Files, asked: dict[str, Any], assistant: str | None, adapter: str | None,
    chats: dict[str, Any], as_json: bool, quiet: bool, options: dict[str, Any],
) -> None:  # fmt: skip
    """Continue the prompts of many rows."""
    from precast.runtime.runner.files import fingerprint
    from precast.runtime.runner.generating import PROMPT_COLUMNS, GeneratingWorker
    from precast.runtime.runner.rows import Column

    column = Column(rows, files.column, PROMPT_COLUMNS)
    opened = _open_decoder(model, quiet, options)
    asked = {**asked, **_load_adapter(opened, adapter)}
    # Drawn here, so that an interrupted run goes on with it.
    seed = asked.pop("seed", None)
    work = {
        "model": [opened.artifact.contract.digest, opened.variant.name]
        if options["mode"] == "compiled"
        else [opened.name, options["mode"]],
        "options": fingerprint([asked, chats, files.column, assistant, seed, *_loaded_hashes(opened)]),
        "seed": secrets.randbelow(2**31) if seed is None else seed,
    }
    if assistant is not None:
        asked = {**asked, "assistant_model": _open_decoder(assistant, quiet, _of_any(options))}
    workers = []

    def make_worker(seed: int | None) -> GeneratingWorker:
        workers.append(GeneratingWorker(opened, column, {**asked, "seed": seed}, **chats))
        return workers[-1]

    def describe_cuts() -> str:
        cut = sum(each.truncated for each in workers)
        return f"; {cut} cut to {chats['max_input_tokens']} tokens" if cut else ""

    answer(rows, files, work, make_worker, as_json=as_json, quiet=quiet, told=describe_cuts)


def _encode_prompt(
    opened: Any, prompt: str, *, chat: bool, system: str | None, max_input_tokens: int | None
) -> list[int]:
    text = _render_chat(opened, prompt, system) if chat else prompt
    ids: list[int] = opened.tokenizer.encode(text, add_special_tokens=not chat)
    if not ids:
        raise click.UsageError("The prompt is empty, and this model's texts begin with no token of their own.")
    if max_input_tokens is not None and len(ids) > max_input_tokens:
        note(f"The prompt's {len(ids)} tokens were cut to the last {max_input_tokens}.")
        return ids[-max_input_tokens:]
    return ids


def _describe_figures(figures: dict[str, Any]) -> str:
    count, speed = figures["new_tokens"], figures["decode_tokens_per_second"]
    guessed = figures.get("draft_tokens")
    guesses = f"; {figures['accepted_draft_tokens']} of {guessed} guesses were right" if guessed else ""
    return (
        f"{count} token{'' if count == 1 else 's'}{f', {speed} tokens/s' if speed else ''}, first token after "
        f"{figures['first_token_seconds']} s (model loaded and prompt read){guesses}"
    )


_SAMPLING = (
    "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "prompt_lookup_num_tokens",
)  # fmt: skip


def _form_options(
    json_schema: Path | None, regex: str | None, grammar: Path | None, choices: tuple[str, ...]
) -> dict[str, Any]:
    """The arguments of generate() that give its answer a form. Raises click.UsageError."""
    given = {"--json-schema": json_schema, "--grammar": grammar, "--regex": regex, "--choice": list(choices) or None}
    named = {flag: value for flag, value in given.items() if value is not None}
    if len(named) > 1:
        raise click.UsageError(f"{' and '.join(named)} each give the answer a form; give one of them.")
    names = {"--choice": "choices"}
    return {
        names.get(flag, flag[2:].replace("-", "_")): read_text(value, flag) if isinstance(value, Path) else value
        for flag, value in named.items()
    }


def _draft_figures(stream: Any) -> dict[str, int]:
    """How many tokens were guessed, and how many rightly; nothing without guesses."""
    if not stream.draft_tokens:
        return {}
    return {"draft_tokens": stream.draft_tokens, "accepted_draft_tokens": stream.accepted_draft_tokens}


def _check_session(session: Path | None) -> None:
    """Raise click.UsageError where a session could be neither opened nor saved: before anything is answered."""
    if session is not None and not session.exists() and not os.access(session.absolute().parent, os.W_OK):
        raise click.UsageError(f"--session: {session} cannot be written: there is no such folder, or it is not yours.")


def _of_any(options: dict[str, Any]) -> dict[str, Any]:
    """How to open an artifact, without what tells which, or how many processes run it."""
    of_one = ("variant", "sha256", "subfolder", "revision", "prefix_tuning", "nproc", "rank_timeout", "log_dir")
    return {name: value for name, value in options.items() if name not in of_one}


def _open_decoder(model: str, quiet: bool, options: dict[str, Any]) -> Any:
    """Open a decoder; of the options only those are passed on that say something, as modes differ in what they take."""
    from precast.runtime import CompiledModelForCausalLM
    from precast.runtime.errors import UsageError
    from precast.runtime.progress import quiet as no_bars
    from precast.runtime.runner import open_model
    from precast.runtime.terminal import quoted

    if quiet:
        no_bars()
    mode, prefix = options["mode"], options.get("prefix_tuning")
    told = {name: value for name, value in options.items() if value and name not in ("mode", "prefix_tuning")}
    opened = open_model(model, mode, **told)
    if mode == "compiled" and not isinstance(opened, CompiledModelForCausalLM):
        raise UsageError(
            f"{model} was compiled for {opened.artifact.contract.task} and continues no prompts. "
            f"Ask it with: precast predict {quoted(model)} --text …"
        )
    return opened if prefix is None else opened.new_session(prefix=prefix)


def _load_adapter(opened: Any, given: str | None) -> dict[str, str]:
    """Load what --adapter names; returns the arguments of generate() that use it."""
    if given is None:
        return {}
    name, sign, path = given.partition("=")
    if not (name and sign and path):
        raise click.UsageError(f"--adapter {given!r}: give a name and a directory, as in style=./style-lora.")
    opened.load_adapter(name, Path(path).expanduser())
    return {"adapter": name}


def _loaded_hashes(opened: Any) -> list[str]:
    """The hashes of the files of loaded adapters and of a prefix, as a name can stand for others the next time."""
    prefix = getattr(opened, "prefix_sha256", None)
    return [*getattr(opened, "adapters", {}).values(), *([prefix] if prefix else [])]


def _render_chat(opened: Any, prompt: str, system: str | None) -> str:
    turns = [{"role": "system", "content": system}] if system is not None else []
    text: str = opened.tokenizer.apply_chat_template([*turns, {"role": "user", "content": prompt}])
    return text


def _generate_options(sampling: dict[str, Any], stops: tuple[str, ...], others: dict[str, Any]) -> dict[str, Any]:
    """The arguments of generate(): any option of sampling turns it on, temperature 0 turns it off."""
    settings = {name: value for name, value in sampling.items() if value is not None}
    if stops:
        settings["stop_strings"] = list(stops)
    if twice := settings.keys() & others.keys():
        raise click.UsageError(f"--option {min(twice)}=… says again what another option says; give one of them.")
    settings |= others
    if settings.get("temperature") == 0:
        del settings["temperature"]
        settings["do_sample"] = False
    elif settings.keys() & {"temperature", "top_k", "top_p", "seed"}:
        settings.setdefault("do_sample", True)
    return settings


def _decode_pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    from precast.runtime import TextStream

    stream = TextStream(tokenizer)
    for token in tokens:
        yield stream.put(token)
    yield stream.end()


class _Clock:
    """Passes tokens on and measures when they come."""

    def __init__(self, tokens: Iterator[int], started: float) -> None:
        self._tokens, self._started = tokens, started
        self._first = self._last = started
        self._count = 0

    def __iter__(self) -> Iterator[int]:
        for token in self._tokens:
            self._last = time.perf_counter()
            self._first = self._last if not self._count else self._first
            self._count += 1
            yield token

    def figures(self) -> dict[str, Any]:
        """Counts and times; tokens per second count from the first token on, which waits for model and prompt."""
        span = self._last - self._first
        return {
            "new_tokens": self._count,
            "decode_tokens_per_second": round((self._count - 1) / span, 1) if span else None,
            "first_token_seconds": round(self._first - self._started, 3),
        }
