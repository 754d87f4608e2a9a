"""`precast run`."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from . import SETTINGS
from .options import in_flags, json_option, quiet_option
from .output import echo, note, print_json
from .run_config import (
    SECTIONS,
    RunConfig,
    Setting,
    flag_words,
    json_schema,
    parse_overrides,
    read_yaml,
    refuse_unknown_keys,
    section_params,
)

__all__ = ["command"]


@click.command(
    "run", epilog="precast run job.yaml --generate.temperature 0.7",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)  # fmt: skip
@click.argument("config", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--compare-modes", is_flag=True,
              help="Compare modes, too, on the prompts of the section generate.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the commands that do the same, and stop.")
@click.option("--print-schema", is_flag=True, help="Print the JSON schema of configurations, for editors.")
@json_option
@quiet_option
@click.pass_context
def command(
    context: click.Context, config: Path | None, compare_modes: bool, dry_run: bool, print_schema: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Export and run a model as the file CONFIG says, in YAML.

    Its key `model` is a checkpoint or an artifact; each section is a command, export, generate, predict, compare or
    bench, and the keys of a section are that command's options. They run in this order on what was exported. Any key
    is changed by --section.key=value or --section.key value. Files of MindFormers and of cann-recipes-infer are
    understood, too.
    """
    if print_schema:
        print_json(json_schema())
        return
    if config is None:
        raise click.UsageError("Missing argument 'CONFIG': a YAML file.")
    found = _read(config, context.args)
    if compare_modes:
        _add_comparison(found)
    for text in found.notes:
        note(f"precast: {text}")
    source = found.get("model")
    steps = {name: flag_words(found, name) for name in SECTIONS if found.section(name) is not None}
    if not isinstance(source, str) or not source:
        raise found.error(("model",), "name a checkpoint or an artifact.")
    if not steps:
        raise click.UsageError(f"{found.name} has no section to run. There are: {', '.join(SECTIONS)}.")
    if dry_run:
        for line in _equal_commands(source, steps):
            echo(line)
        return
    for name, words in steps.items():
        # What is wrong with the last step is said before the first, which may take minutes.
        _check_file(found, name)
        with _in_words_of(found, name):
            import_module(f"precast.cli.{name}").command.make_context(f"precast {name}", [source, *words], **SETTINGS)
    results = _run_steps(found, source, steps, as_json, quiet)
    if as_json:
        print_json(results)


def _run_steps(
    config: RunConfig, source: str, steps: dict[str, list[str]], as_json: bool, quiet: bool
) -> dict[str, Any]:
    """Run the commands one after the other; what each prints as JSON."""
    model, results = source, {}  # type: tuple[str, dict[str, Any]]
    for name, words in steps.items():
        with _in_words_of(config, name):
            if name == "export":
                model, results[name] = _export(source, words, quiet)
                _show_export(results[name], as_json or quiet)
            else:
                results[name] = _run_command(name, _subject(name, source, model, words), as_json, quiet)
    return results


def _add_comparison(config: RunConfig) -> None:
    """Let modes be compared on what the section generate asks."""
    config.settings.setdefault(("compare",), Setting({}))
    for key in ("prompt", "input_file", "max_new_tokens"):
        setting = config.settings.get(("generate", key))
        if setting is not None:
            config.settings.setdefault(("compare", key), setting)


def _subject(name: str, source: str, model: str, words: list[str]) -> list[str]:
    """A command's words with what it is run on: the artifact; the checkpoint in a mode that runs it; or both where
    modes are compared."""
    if name == "compare" and model != source:
        return [source, f"--artifact={model}", *words]
    runs_checkpoint = any(word.startswith("--mode=") and word != "--mode=compiled" for word in words)
    return [source if runs_checkpoint else model, *words]


def _check_file(config: RunConfig, name: str) -> None:
    """Raise click.UsageError for an input file that is not there."""
    file = config.get(name, "input_file")
    if file is not None and file != "-" and not Path(file).is_file():
        raise config.error((name, "input_file"), f"there is no file {file}.")


def _read(path: Path, words: list[str]) -> RunConfig:
    """The configuration with what the command line changes in it."""
    from .run_foreign import translate

    found = RunConfig(str(path), read_yaml(path))
    found.settings |= parse_overrides(words)
    translated = translate(found)
    refuse_unknown_keys(translated)
    return translated


def _equal_commands(model: str, steps: dict[str, list[str]]) -> Iterator[str]:
    """The commands that do the same."""
    source = model
    for name, words in steps.items():
        if name == "export":
            target = next((word[9:] for word in words if word.startswith("--output=")), None)
            rest = [word for word in words if not word.startswith("--output=")]
            model = target or f"{Path(source).name}-precast"
            yield shlex.join(["precast", name, source, *rest, "-o", model])
        else:
            yield shlex.join(["precast", name, *_subject(name, source, model, words)])


def _export(model: str, words: list[str], quiet: bool) -> tuple[str, dict[str, Any]]:
    """Export as these options say, unless that was done before; the artifact's path, and what is to be told of it."""
    from precast.runtime.artifact import read_artifact
    from precast.runtime.artifact.publish import copy_artifact
    from precast.runtime.artifact.store import home

    from .export import command as export
    from .exporting import check_installed, load_exporter

    options = export.make_context("precast export", [model, *words], **SETTINGS).params
    target, options["validate"] = options.pop("target"), not options.pop("no_validate")
    for name in ("model", "push_to_hub", "private", "dry_run", "as_json", "quiet"):
        options.pop(name)
    check_installed()
    from precast.exporter import ExportOptions
    from precast.exporter.checkpoint.early import check_request

    settings = ExportOptions(**options)
    held = _digest_at(target)
    # An artifact that is there may be the one that is asked for.
    check_request(model, None if held else target, settings)
    if not quiet:
        note(f"Exporting {model}, unless that was done before …")
    made = read_artifact(load_exporter().export_once(model, home() / "exports", settings))
    if target is not None:
        if held != made.contract.digest:
            copy_artifact(made, target, force=settings.force)
        made = read_artifact(target)
    first = made.contract.variants[0]
    told = {"path": str(made.path), "digest": made.contract.digest, "accuracy": first.accuracy.status}
    return str(made.path), told


def _digest_at(target: Path | None) -> str | None:
    """The digest of the artifact at a path; None where there is none."""
    from precast.runtime.artifact import read_artifact
    from precast.runtime.errors import ArtifactError

    try:
        return None if target is None else read_artifact(target).contract.digest
    except ArtifactError:
        return None


def _show_export(told: dict[str, Any], is_silent: bool) -> None:
    if not is_silent:
        echo(f"{told['path']}: accuracy {told['accuracy']}")


def _run_command(name: str, words: list[str], as_json: bool, quiet: bool) -> Any:
    """Run a command; what it prints as JSON, or None."""
    command: click.Command = import_module(f"precast.cli.{name}").command
    words = [*words, *(["--quiet"] if quiet else [])]
    if not as_json:
        _check_status(command.main(words, f"precast {name}", standalone_mode=False, **SETTINGS))
        return None
    with redirect_stdout(io.StringIO()) as printed:
        status = command.main([*words, "--json"], f"precast {name}", standalone_mode=False, **SETTINGS)
    _check_status(status)
    return json.loads(printed.getvalue())


def _check_status(status: Any) -> None:
    if isinstance(status, int) and status:
        raise click.exceptions.Exit(status)


@contextmanager
def _in_words_of(config: RunConfig, name: str) -> Iterator[None]:
    """Errors that name a command's options name the configuration's keys instead, and their line."""
    from precast.runtime.errors import PrecastError

    try:
        yield
    except click.UsageError as error:
        param = getattr(error, "param", None)
        key = next((key for key, each in section_params(name).items() if param and each.name == param.name), None)
        message = _in_keys(getattr(error, "message", "") if key else error.format_message(), name)
        raise config.error((name, key) if key else (name,), message) from error
    except PrecastError as error:
        error.args = (_in_keys(str(error), name),)
        raise


def _in_keys(message: str, name: str) -> str:
    """The message with a command's flags as keys of its section."""
    params = section_params(name)
    message = in_flags(message, params.values())
    for key, param in params.items():
        for flag in param.opts:
            message = re.sub(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", f"{name}.{key}", message)
    return message
