"""Run configurations: YAML whose sections are commands and whose keys are their options."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click

__all__ = [
    "SECTIONS", "RunConfig", "Setting", "flag_words", "json_schema", "parse_overrides", "read_yaml",
    "refuse_unknown_keys", "section_params",
]  # fmt: skip

SECTIONS = ("export", "generate", "predict", "compare", "bench")
"""The commands that a configuration may have a section for, in the order in which they are run."""

_MAX_BYTES, _MAX_VALUES = 1_000_000, 10_000
_NOT_KEYS = {"json", "quiet", "help", "push-to-hub", "private", "dry-run"}
"""Options that say how a command talks, or that end it early."""


@dataclass(frozen=True)
class Setting:
    """A value and the line that says it, None for one from the command line."""

    value: Any
    line: int | None = None


@dataclass
class RunConfig:
    """What is to be run.

    Attributes:
        name: of the file, for messages.
        settings: by path, ("generate", "max_new_tokens").
        notes: what is to be said of them, of keys without effect.
    """

    name: str
    settings: dict[tuple[str, ...], Setting] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def get(self, *path: str) -> Any:
        """A value, or None."""
        found = self.settings.get(path)
        return None if found is None else found.value

    def section(self, name: str) -> dict[str, Setting] | None:
        """The options of a command; None where it is not to be run. Those below `option` are one, a dict."""
        own = {path[1:]: found for path, found in self.settings.items() if len(path) > 1 and path[0] == name}
        found = {path[0]: setting for path, setting in own.items() if len(path) == 1}
        if others := {path[1]: setting.value for path, setting in own.items() if len(path) > 1}:
            found["option"] = Setting(others)
        return found if found or (name,) in self.settings else None

    def error(self, path: Sequence[str], message: str) -> click.UsageError:
        """An error about a key, with its line."""
        found = self.settings.get(tuple(path))
        line = f", line {found.line}" if found is not None and found.line else ""
        return click.UsageError(f"{self.name}{line}: {'.'.join(path)}: {message}")


def read_yaml(path: Path) -> dict[tuple[str, ...], Setting]:
    """The values of a YAML file by their paths, lists whole. Raises click.UsageError with the line of what is wrong."""
    import yaml

    try:
        data = path.read_bytes()
        if len(data) > _MAX_BYTES:
            raise click.UsageError(f"{path} has {len(data):,} bytes; a configuration has at most {_MAX_BYTES:,}.")
        loader = yaml.SafeLoader(data.decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise click.UsageError(f"{path} is no configuration: it must consist of keys with values.")
        return dict(_flatten(_Values(path, loader).mapping(node, ())))
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{path} is not UTF-8 text.") from error
    except RecursionError:
        raise click.UsageError(f"{path} is nested too deeply.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise click.UsageError(f"{path}{line}: {getattr(error, 'problem', None) or error}.") from error


class _Values:
    """Makes values of nodes, and counts them: aliases of aliases are more than any memory holds."""

    def __init__(self, path: Path, loader: Any) -> None:
        self._path, self._loader, self._count = path, loader, 0

    def mapping(self, node: Any, path: tuple[str, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if not isinstance(key_node.value, str) or key == "<<":
                raise click.UsageError(f"{self._path}, line {line}: a key is a word.")
            if key in found:
                name = ".".join((*path, key))
                raise click.UsageError(f"{self._path}, line {line}: {name} stands in line {lines[key]} already.")
            lines[key] = line
            found[key] = self.value(value_node, (*path, key), line)
        return found

    def value(self, node: Any, path: tuple[str, ...], line: int) -> Any:
        self._count += 1
        if self._count > _MAX_VALUES:
            raise click.UsageError(f"{self._path}, line {line}: its aliases make more than {_MAX_VALUES:,} values.")
        if node.id == "mapping":
            return self.mapping(node, path) or Setting({}, line)
        if node.id == "sequence":
            return Setting([_bare(self.value(each, path, line)) for each in node.value], line)
        return Setting(self._loader.construct_object(node), line)


def _bare(value: Any) -> Any:
    if isinstance(value, Setting):
        return value.value
    return {name: _bare(each) for name, each in value.items()} if isinstance(value, dict) else value


def _flatten(found: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Setting]]:
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*path, name))
        else:
            yield (*path, name), value


def parse_overrides(words: Sequence[str]) -> dict[tuple[str, ...], Setting]:
    """The values of `--a.b=c` and `--a.b c`, read as YAML; a flag without a value is true. Raises click.UsageError."""
    import yaml

    found: dict[tuple[str, ...], Setting] = {}
    at = 0
    while at < len(words):
        word, at = words[at], at + 1
        if not word.startswith("--") or len(word) < 3:
            raise click.UsageError(f"{word!r} is no option. A key of the configuration is changed by --a.b=value.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            is_flag = at == len(words) or words[at].startswith("--")
            value, at = ("true", at) if is_flag else (words[at], at + 1)
        path = tuple(part.replace("-", "_") for part in name.split("."))
        try:
            found[path] = Setting(yaml.safe_load(value))
        except yaml.YAMLError:
            # Texts with colons, braces or percent signs are texts.
            found[path] = Setting(value)
    return found


def section_params(name: str) -> dict[str, click.Parameter]:
    """The options of a command by their keys: its flags with underscores."""
    from . import SETTINGS

    command: click.Command = import_module(f"precast.cli.{name}").command
    context = click.Context(command, info_name=name, **SETTINGS)
    found: dict[str, click.Parameter] = {}
    for param in command.get_params(context):
        if isinstance(param, click.Option) and not {flag.lstrip("-") for flag in param.opts} & _NOT_KEYS:
            found[max(param.opts, key=len).lstrip("-").replace("-", "_")] = param
    return found


def refuse_unknown_keys(config: RunConfig) -> None:
    """Raise click.UsageError for a key that is neither `model` nor of a section."""
    for path, setting in config.settings.items():
        if path[0] not in ("model", *SECTIONS):
            raise config.error(path, _unknown(path[0], ("model", *SECTIONS)))
        is_value = path[0] == "model" or len(path) > 1
        if is_value and len(path) != (1 if path[0] == "model" else 2) and path[1:2] != ("option",):
            raise config.error(path, "it is nested too deeply: an option of a command is a value.")
        if not is_value and setting.value not in (None, {}):
            raise config.error(path, f"a section has keys of its own; this is {setting.value!r:.60}.")


def flag_words(config: RunConfig, name: str) -> list[str]:
    """A section as a command's options. Raises click.UsageError for keys that the command does not have."""
    params, words = section_params(name), []
    for key, setting in (config.section(name) or {}).items():
        if key == "option" and isinstance(setting.value, dict):
            words += [f"--option={each}={json.dumps(value)}" for each, value in setting.value.items()]
            continue
        if key not in params:
            raise config.error((name, key), _unknown(key, params))
        words += _words_of(params[key], setting.value, partial(config.error, (name, key)))
    return words


def _unknown(key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = "".join(f" Did you mean {each}?" for each in get_close_matches(key, names, n=1))
    return f"there is no such key.{near} There are: {', '.join(names)}."


def _words_of(param: Any, value: Any, error: Any) -> list[str]:
    flag = max(param.opts, key=len)
    if value is None:
        return []
    if param.is_flag:
        if not isinstance(value, bool):
            raise error(f"this is true or false, not {value!r}.")
        off = param.secondary_opts[:1]
        return [flag] if value else list(off)
    if isinstance(value, bool | dict):
        raise error(f"{json.dumps(value)} is no value for it.")
    if isinstance(value, list):
        texts = [str(each) for each in value]
        if param.multiple:
            return [f"{flag}={text}" for text in texts]
        if not param.type.name.startswith("N["):
            raise error("it takes one value, not a list.")
        return [f"{flag}={','.join(texts)}"]
    return [f"{flag}={value}"]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration, for editors."""
    sections = {name: _section_schema(name) for name in SECTIONS}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "precast run",
        "type": "object",
        "properties": {
            "model": {"type": "string", "description": "A checkpoint to export, or an artifact."}, **sections,
        },
        "required": ["model"],
        "additionalProperties": False,
    }  # fmt: skip


def _section_schema(name: str) -> dict[str, Any]:
    from . import COMMANDS

    properties = {key: _param_schema(param) for key, param in section_params(name).items()}
    return {
        "type": ["object", "null"], "description": COMMANDS[name], "properties": properties,
        "additionalProperties": False,
    }  # fmt: skip


def _param_schema(param: Any) -> dict[str, Any]:
    said = {"description": " ".join((param.help or "").split())}
    if param.is_flag:
        return {"type": "boolean", **said}
    if param.name == "settings":
        return {"type": ["object", "array"], **said}
    kind = _type_schema(param.type)
    if param.multiple:
        return {"anyOf": [kind, {"type": "array", "items": kind}], **said}
    return {**kind, **said}


def _type_schema(kind: Any) -> dict[str, Any]:
    if isinstance(kind, click.Choice):
        return {"enum": list(kind.choices)}
    if kind.name.startswith("N["):
        return {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}, {"type": "string"}]}
    found: dict[str, Any] = {"type": {"integer": "integer", "float": "number"}.get(kind.name.split()[0], "string")}
    if isinstance(kind, click.IntRange | click.FloatRange):
        found["type"] = "integer" if isinstance(kind, click.IntRange) else "number"
        lower = "exclusiveMinimum" if kind.min_open else "minimum"
        found |= {} if kind.min is None else {lower: kind.min}
        found |= {} if kind.max is None else {"maximum": kind.max}
    return found
