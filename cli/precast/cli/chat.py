"""The chat that `precast generate` is on a terminal where no prompt is given."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from precast.runtime.arguments import refuse_unknown
from precast.runtime.errors import InputError, PrecastError, UsageError
from precast.runtime.progress import quiet
from precast.runtime.terminal import printable

from .inputs import read_text
from .line_editor import LineEditor, Typed
from .options import in_flags
from .output import echo_answer

__all__ = ["Conversation", "Measured", "read_messages", "run_chat", "write_messages"]

Message = dict[str, Any]
_PROBE: Message = {"role": "user", "content": "?"}
_ROLES = ("system", "user", "assistant", "tool")


class Measured(Protocol):
    """Tokens as they come, and their figures after that."""

    def __iter__(self) -> Iterator[int]:
        """Yield the tokens."""

    def figures(self) -> dict[str, Any]:
        """Counts and times."""


def run_chat(talk: Conversation, system: str | None, needs_template: bool) -> bool:
    """Talk until the user leaves; returns whether anything was answered.

    Args:
        system: what the model is told first.
        needs_template: refuse a model without a chat template, which otherwise goes on with plain text.

    Raises PrecastError where the model cannot answer in this way at all.
    """
    if needs_template:
        talk.check_template()
    talk.set_system(system)
    talk.check()
    # What is told beside it, as when packed weights are saved, would stand in the middle of an answer.
    quiet()
    return _Chat(talk).run()


class Conversation:
    """The messages so far, and the model that answers the next one.

    All turns are read into one cache, so that each costs no more than what is new in it.

    Args:
        asked: arguments of stream(); max_new_tokens is what fits where that is less.
        measure: measures the tokens of an answer that was begun at a time of `time.perf_counter`.
    """

    def __init__(self, model: Any, asked: dict[str, Any], measure: Callable[[Iterator[int], float], Measured]) -> None:
        self.model, self._asked, self._measure = model, asked, measure
        self.messages: list[Message] = []
        self.figures: dict[str, Any] = {}

    @property
    def has_template(self) -> bool:
        """Whether there are turns; without a chat template all is one text."""
        found: bool = self.model.tokenizer.has_chat_template
        return found

    @property
    def is_begun(self) -> bool:
        """Whether there is anything but the system message."""
        return any(message["role"] != "system" for message in self.messages)

    def check_template(self) -> None:
        """Raise InputError without a chat template."""
        if not self.has_template:
            self.model.tokenizer.apply_chat_template([_PROBE])

    def check(self) -> None:
        """Raise PrecastError where a message could not be answered: by this template, with these options."""
        stream, _ = self._start(self._encode([*self.messages, _PROBE]))
        stream.close()

    def set_system(self, text: str | None) -> None:
        """Say what the model is told first; None removes it. Raises InputError where its template takes none."""
        told = [] if text is None else [{"role": "system", "content": text}]
        self.replace([*told, *(message for message in self.messages if message["role"] != "system")])

    def replace(self, messages: list[Message]) -> None:
        """Go on with other messages. Raises InputError where the template refuses them, or they do not fit."""
        if not {message["role"] for message in messages} <= {"user", "assistant"}:
            self.check_template()
        self._check_room(len(self._encode([*messages, _PROBE])), "This conversation")
        self.messages = messages

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def count(self) -> int:
        """Tokens that the messages take."""
        return len(self._encode(self.messages, is_asked=False)) if self.is_begun else 0

    def answer(self, text: str, show: Callable[[str], None]) -> str | None:
        """Answer a message, and tell `show` each piece as it comes; returns why the answer ended early, where it did.

        Ctrl-C ends it, and what was shown by then is what the model has said. Raises PrecastError where there is no
        answer; the message is not kept then.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._encode(asked)
        self._check_room(len(prompt), "With this message the conversation")
        started, (stream, most) = time.perf_counter(), self._start(prompt)
        clock = self._measure(stream, started)
        tokens, pieces, is_stopped = self._follow(clock, show)
        stream.close()
        self.figures = clock.figures()
        if is_stopped and not tokens:
            return "Stopped before the answer began; the message is not kept."
        self.messages = [*asked, self._make_answer(prompt, tokens, pieces)]
        return "Stopped." if is_stopped else self._reason_for_end(tokens, most, len(prompt))

    def _start(self, prompt: list[int]) -> tuple[Any, int]:
        """The stream of the answer to a prompt, and of how many tokens it is at most."""
        most = self._asked.get("max_new_tokens")
        most = 256 if most is None else most
        # What fits becomes less with each turn; what is no number is refused below.
        if isinstance(most, int) and most > 0:
            most = max(1, min(most, self.model.capacity - len(prompt)))
        # All of it is prompt, whatever a special token in it pads elsewhere.
        return self.model.stream([prompt], [[1] * len(prompt)], **{**self._asked, "max_new_tokens": most}), most

    def _follow(self, clock: Measured, show: Callable[[str], None]) -> tuple[list[int], list[str], bool]:
        """Show an answer: its tokens, their text, and whether Ctrl-C has ended it, where the tokens are those shown."""
        from precast.runtime import TextStream

        text, tokens, pieces, shown = TextStream(self.model.tokenizer), [], [], 0
        try:
            for token in clock:
                tokens.append(token)
                if piece := text.put(token):
                    shown = len(tokens)
                    pieces.append(piece)
                    show(piece)
            pieces.append(text.end())
            show(pieces[-1])
        except KeyboardInterrupt:
            return tokens[:shown], pieces, True
        return tokens, pieces, False

    def _make_answer(self, prompt: list[int], tokens: list[int], pieces: list[str]) -> Message:
        if not self.has_template:
            return {"role": "assistant", "content": "".join(pieces)}
        found: Message = self.model.tokenizer.parse_response(tokens, prefix=prompt)
        return found

    def _reason_for_end(self, tokens: list[int], most: int, past: int) -> str | None:
        """Why an answer ended that the model did not end."""
        if len(tokens) < most or tokens[-1] in self.model.generation_config.eos_ids:
            return None
        if past + most >= self.model.capacity:
            return f"Cut off: the capacity of {self.model.capacity} tokens is used up. {self._advice(past + most + 1)}"
        return f"Cut off after {most} tokens; --max-new-tokens asks for more, and you can ask the model to go on."

    def _check_room(self, count: int, what: str) -> None:
        if count >= self.model.capacity:
            raise InputError(
                f"{what} has {count} tokens, and the model was compiled for {self.model.capacity}, answers included. "
                f"{self._advice(count + 1)}"
            )

    def _advice(self, needed: int) -> str:
        """What to do about a conversation that needs more tokens than fit."""
        from precast.runtime.advice import suggest_larger

        artifact, length = self.model.artifact, 2 * self.model.capacity
        most = artifact.config.get("max_position_embeddings")
        if type(most) is int and needed <= most:
            length = min(length, most)
        flags = f"--batch-size {self.model.batch_size} --sequence-length {max(length, needed)}"
        reset = "/reset begins anew. " if self.is_begun else ""
        return f"{reset}{suggest_larger(artifact, flags, needed)}"

    def _encode(self, messages: list[Message], is_asked: bool = True) -> list[int]:
        """The tokens of messages, up to where the next answer begins, or to the end of the last one."""
        tokenizer = self.model.tokenizer
        if self.has_template:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=is_asked)
        else:
            text = "".join(map(_plain_text, messages)).removeprefix("\n")
        found: list[int] = tokenizer.encode(text, add_special_tokens=not self.has_template)
        return found


def _plain_text(message: Message) -> str:
    """A message in a text without turns: an answer goes on where it stands, what a user adds is on a new line."""
    return message["content"] if message["role"] == "assistant" else f"\n{message['content']}"


def read_messages(path: Path) -> list[Message]:
    """Read a conversation that /save has written. Raises PrecastError, or click.UsageError where the file cannot be
    read, which say what is wrong with it."""
    from precast.runtime.artifact.published_json import parse_object

    messages = parse_object(read_text(path, "/load").encode(), str(path)).get("messages")
    if not isinstance(messages, list) or not messages:
        raise UsageError(f'{path} has no list "messages", as /save writes it.')
    for number, message in enumerate(messages, 1):
        if problem := _message_problem(message):
            raise UsageError(f"{path}: message {number} {problem}")
    if any(message["role"] == "system" for message in messages[1:]):
        raise UsageError(f"{path}: a system message stands behind others; there is one at most, the first.")
    if messages[-1]["role"] in ("user", "tool"):
        raise UsageError(f"{path}: the last message has no answer; end with the assistant's.")
    return messages


def _message_problem(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f'is {message!r:.40}, not an object with "role" and "content".'
    if (role := message.get("role")) not in _ROLES:
        return f"has the role {role!r:.40}; there are {', '.join(_ROLES)}."
    if not isinstance(content := message.get("content"), str) and not (content is None and message.get("tool_calls")):
        return f"has the content {content!r:.40}, not a text."
    return None


def write_messages(path: Path, messages: list[Message]) -> None:
    """Write a conversation to a file, all or nothing, that only its owner can read. Raises UsageError."""
    from precast.runtime.artifact.store import write_atomically

    if not messages:
        raise UsageError("There is nothing to save yet.")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file.")
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}.")
    try:
        write_atomically(path, (json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n").encode())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error


class _Command(NamedTuple):
    run: Callable[[_Chat, str], None]
    takes: str
    """What stands after it; in brackets what may be left out; nothing where nothing does."""
    help: str


class _Chat:
    """The screen: what is typed goes to the conversation or is a command, what is answered is shown."""

    def __init__(self, talk: Conversation) -> None:
        from precast.runtime.artifact.store import home

        self._talk, self._is_over, self._was_answered = talk, False, False
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._greet()
        words = [name + (" " if command.takes else "") for name, command in _COMMANDS.items()]
        self._lines = LineEditor(words, home() / "history", self._say, self._console.is_dumb_terminal)

    def run(self) -> bool:
        """Take what is typed until the end; returns whether anything was answered."""
        while not self._is_over and (typed := self._lines.read()) is not None:
            try:
                self._take(typed)
            except PrecastError as error:
                self._say(in_flags(str(error), click.get_current_context().command.params))
            except click.UsageError as error:
                self._say(error.format_message())
            except KeyboardInterrupt:
                self._say("Stopped.")
        return self._was_answered

    def _take(self, typed: Typed) -> None:
        if not typed.is_command:
            self._answer(typed.text)
            return
        name, *after = typed.text.split(maxsplit=1)
        refuse_unknown("The chat", [name], _COMMANDS, " A message that begins with a slash is typed after a space.")
        command, rest = _COMMANDS[name], "".join(after).strip()
        if rest and not command.takes:
            raise UsageError(f"{name} takes nothing after it.")
        if not rest and command.takes and not command.takes.startswith("["):
            raise UsageError(f"{name} needs something after it: {name} {command.takes}")
        command.run(self, rest)

    def _answer(self, text: str) -> None:
        shown: list[str] = []

        def show(piece: str) -> None:
            shown.append(piece)
            echo_answer(piece)

        try:
            reason = self._talk.answer(text, show)
        except PrecastError as error:
            raise UsageError(f"Your message is not kept. {error}") from error
        finally:
            if any(shown):
                click.echo()
        self._was_answered |= self._talk.is_begun
        self._say(reason or ("" if any(shown) else "The model ended its answer at once."))

    def _greet(self) -> None:
        model = self._talk.model
        name = Text(printable(model.artifact.contract.source.model), style="bold")
        self._console.print(name, soft_wrap=True)
        self._say(f"{model.capacity} tokens fit. /help shows the commands, Ctrl-D leaves.")
        if not self._talk.has_template:
            self._say("It has no chat template: it continues your text, and what you add begins a new line.")
        if model.batch_size > 1:
            self._say(
                f"It was compiled for batches of {model.batch_size} and reads the whole conversation at each turn; one "
                f"of --batch-size 1 reads only what is new."
            )

    def _say(self, text: str) -> None:
        """Say something that is not the model's, and leave a blank line after it."""
        if text:
            # The terminal breaks long lines, so that a command in them can be copied.
            self._console.print(Text(printable(text), style="dim"), soft_wrap=True)
        self._console.print()

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, command in _COMMANDS.items():
            table.add_row(f"{name} {command.takes}", command.help)
        for keys, what in _KEYS:
            table.add_row(keys, what)
        self._console.print(table)
        self._console.print()

    def _system(self, text: str) -> None:
        if text:
            self._talk.set_system(None if text == "off" else text)
        told = next((message["content"] for message in self._talk.messages if message["role"] == "system"), None)
        self._say("There is no system message." if told is None else f"The system message: {told}")

    def _reset(self, _: str) -> None:
        self._talk.reset()
        self._say("A new conversation.")

    def _save(self, file: str) -> None:
        if os.path.lexists(Path(file).expanduser()):
            raise UsageError(f"{file} exists; /save! {file} replaces it.")
        self._replace(file)

    def _replace(self, file: str) -> None:
        path = Path(file).expanduser()
        write_messages(path, self._talk.messages)
        self._say(f"Saved as {path}.")

    def _load(self, file: str) -> None:
        path = Path(file).expanduser()
        self._talk.replace(read_messages(path))
        self._say(f"Loaded {path}: {len(self._talk.messages)} messages, {self._describe_room()}")

    def _tokens(self, _: str) -> None:
        count, speed = (self._talk.figures.get(name) for name in ("new_tokens", "decode_tokens_per_second"))
        last = f" The last answer: {count} tokens{f', {speed} tokens/s' if speed else ''}." if count else ""
        self._say(f"{self._describe_room()}{last}")

    def _describe_room(self) -> str:
        return f"{self._talk.count()} of {self._talk.model.capacity} tokens used."

    def _quit(self, _: str) -> None:
        self._is_over = True


_COMMANDS = {
    "/system": _Command(_Chat._system, "[TEXT]", "Tell the model something first; 'off' removes it, nothing shows it."),
    "/reset": _Command(_Chat._reset, "", "Begin a new conversation; the system message stays."),
    "/save": _Command(_Chat._save, "FILE", "Save the conversation as JSON."),
    "/save!": _Command(_Chat._replace, "FILE", "The same, and replace a file that exists."),
    "/load": _Command(_Chat._load, "FILE", "Go on with a conversation that was saved."),
    "/tokens": _Command(_Chat._tokens, "", "Show how many tokens are used, and how fast the last answer came."),
    "/help": _Command(_Chat._help, "", "Show this."),
    "/quit": _Command(_Chat._quit, "", "Leave; Ctrl-D does, too."),
}
_KEYS = (
    ("\\", "At the end of a line: the message goes on in the next."),
    ('"""', "On lines of their own, before and after a message of several lines."),
    ("Ctrl-C", "Stop an answer, or clear the line."),
)
