"""The chat: conversations with a tiny model, and one process after the other on a pseudo-terminal."""

from __future__ import annotations

import itertools
import json
import os
import stat
import sys
from functools import partial

import oracle
import pytest
from click import UsageError as ClickError
from hypothesis import given
from hypothesis import strategies as st
from terminals import CTRL_D, UP, Terminal, without_escapes

from precast.cli import generate, main
from precast.cli.chat import Conversation, read_messages, write_messages
from precast.cli.generate import _Clock
from precast.runtime import CompiledModelForCausalLM
from precast.runtime.errors import InputError, PrecastError, UsageError
from precast.runtime.generation.session import Session

CAPACITY = 256


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("llama", max_position_embeddings=CAPACITY)


@pytest.fixture(scope="module")
def talker(source, artifact):
    """A Llama with a chat template: batch 1, capacity 256."""
    return artifact(source, sequence_length=(CAPACITY,))


@pytest.fixture(scope="module")
def plain(source, talker, tmp_path_factory):
    """The same without a chat template."""
    bare = tmp_path_factory.mktemp("plain") / "source"
    bare.mkdir()
    for file in source.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    return bare


@pytest.fixture(scope="module")
def plain_talker(plain, artifact):
    return artifact(plain, sequence_length=(CAPACITY,))


def begin(path, **asked):
    return Conversation(CompiledModelForCausalLM.from_pretrained(path), asked, _Clock)


def ask(talk, text):
    """What is shown, and why it ended."""
    shown = []
    reason = talk.answer(text, shown.append)
    return "".join(shown), reason


# ------------------------------------------------------------ conversations


def test_each_turn_is_answered_as_eager_answers_all_of_it(source, talker):
    talk = begin(talker, max_new_tokens=8)
    talk.set_system("Be brief.")
    for text in ("Hi", "And now?", "Go on."):
        asked = [*talk.messages, {"role": "user", "content": text}]
        shown, _ = ask(talk, text)
        tokenizer = talk.model.tokenizer
        prompt = tokenizer.encode(tokenizer.apply_chat_template(asked), add_special_tokens=False)
        expected = oracle.greedy(source, prompt, max_new_tokens=8)
        assert shown == tokenizer.decode(expected)
        assert talk.messages == [*asked, tokenizer.parse_response(expected, prefix=prompt)]


def test_a_turn_reads_only_what_is_new(talker, monkeypatch):
    read, run = [], Session._run_call

    def count(self, call, rows):
        read.append(int(call.new[0]))
        run(self, call, rows)

    monkeypatch.setattr(Session, "_run_call", count)
    # Letters are tokens of their own, so the answer is read again as it was written.
    talk = begin(talker, choices=["xqz"])
    ask(talk, "A rather long beginning of a conversation about nothing")
    first = len(talk._encode(talk.messages, is_asked=False))
    read.clear()
    prompt = len(talk._encode([*talk.messages, {"role": "user", "content": "And?"}]))
    ask(talk, "And?")
    assert sum(read) <= prompt - first + 2 * len("xqz") < first


def test_an_interrupted_answer_is_what_was_shown(source, talker):
    talk, shown = begin(talker, choices=["xqzvk"]), []

    def show(piece):
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    assert talk.answer("Hi", show) == "Stopped."
    assert talk.messages[-1] == {"role": "assistant", "content": "xqz"}
    assert ask(talk, "More") == ("xqzvk", None)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def test_half_a_character_is_no_part_of_an_interrupted_answer(talker, monkeypatch):
    def stop_within(self):
        yield from itertools.islice(self._tokens, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(_Clock, "__iter__", stop_within)
    talk = begin(talker, choices=["xq🦉"])
    assert ask(talk, "Hi") == ("xq", "Stopped.")
    assert talk.messages[-1]["content"] == "xq"


def test_an_answer_that_is_stopped_before_it_begins_leaves_no_trace(talker, monkeypatch):
    talk = begin(talker)
    with monkeypatch.context() as patch:
        patch.setattr(_Clock, "__iter__", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert "not kept" in ask(talk, "Hi")[1]
    assert talk.messages == []
    assert talk.count() == 0


def test_a_conversation_that_no_longer_fits_says_so(talker):
    talk = begin(talker, regex="x{400}", max_new_tokens=1000)
    _, reason = ask(talk, "Hi")
    assert reason.startswith(f"Cut off: the capacity of {CAPACITY} tokens is used up. /reset begins anew. ")
    before = list(talk.messages)
    with pytest.raises(InputError, match=rf"has \d+ tokens, and .* for {CAPACITY}, answers included\. /reset begins "):
        ask(talk, "More")
    assert talk.messages == before
    talk.reset()
    assert talk.count() == 0
    with pytest.raises(
        InputError, match=rf"This conversation has \d+ tokens, and the model was compiled for {CAPACITY}"
    ):
        talk.set_system("x " * CAPACITY)


def test_an_answer_that_is_cut_off_says_so(talker):
    assert "Cut off after 3 tokens; --max-new-tokens" in ask(begin(talker, max_new_tokens=3), "Hi")[1]
    assert ask(begin(talker, choices=["x"]), "Hi")[1] is None


def test_without_a_chat_template_the_text_goes_on(plain, plain_talker):
    talk = begin(plain_talker, max_new_tokens=8)
    first, _ = ask(talk, "Water boils")
    second, _ = ask(talk, "But ice")
    prompt = talk.model.tokenizer.encode(f"Water boils{first}\nBut ice")
    assert second == talk.model.tokenizer.decode(oracle.greedy(plain, prompt, max_new_tokens=8))
    for refused in (talk.check_template, partial(talk.set_system, "Be brief.")):
        with pytest.raises(InputError, match="has no chat template"):
            refused()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"regex": "(a"}, "regex cannot be compiled"),
        ({"num_beams": 2}, "cannot be streamed"),
        ({"max_new_tokens": "all"}, "max_new_tokens='all' is of the wrong type"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"nonsense": 1}, "has 'nonsense', which"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_typed(talker, asked, said):
    with pytest.raises(UsageError, match=said):
        begin(talker, **asked).check()


def test_a_chat_cuts_nothing(talker, monkeypatch, capsys):
    monkeypatch.setattr(generate, "_is_at_terminal", lambda: True)
    monkeypatch.setattr(sys, "argv", ["precast", "generate", str(talker), "--max-input-tokens", "9"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "a chat forgets nothing by itself" in capsys.readouterr().err


# ------------------------------------------------------------ conversations in files

texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(system=st.none() | texts, turns=st.lists(st.tuples(texts, texts), min_size=1))
def test_what_is_saved_is_loaded(tmp_path_factory, system, turns):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, said in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    path = tmp_path_factory.getbasetemp() / "talk.json"
    write_messages(path, messages)
    assert read_messages(path) == messages
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


USER, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("{", "is not valid JSON"),
        ("[" * 5000, "deep"),
        ([USER, SAID], "not an object"),
        ({"message": [USER, SAID]}, 'has no list "messages"'),
        ({"messages": []}, 'has no list "messages"'),
        ({"messages": [USER, "Hello"]}, "message 2 is 'Hello', not an object"),
        ({"messages": [{**USER, "role": "robot"}, SAID]}, "message 1 has the role 'robot'; there are system, user"),
        ({"messages": [{"content": "Hi"}, SAID]}, "message 1 has the role None"),
        ({"messages": [USER, {**SAID, "content": 5}]}, "message 2 has the content 5, not a text"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 has the content None, not a text"),
        ({"messages": [USER]}, "the last message has no answer"),
        ({"messages": [USER, SAID, {**SAID, "role": "system"}]}, "a system message stands behind others"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(tmp_path, held, said):
    path = tmp_path / "talk.json"
    path.write_text(held if isinstance(held, str) else json.dumps(held))
    with pytest.raises(PrecastError, match=said):
        read_messages(path)


def test_files_that_cannot_be_read_or_written_are_refused(tmp_path):
    with pytest.raises(ClickError, match=r"/load: .*missing cannot be read: No such file"):
        read_messages(tmp_path / "missing")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ClickError, match="not UTF-8 text"):
        read_messages(tmp_path / "latin")
    for path, said in ((tmp_path, "is not a regular file"), (tmp_path / "no" / "talk.json", "there is no folder")):
        with pytest.raises(UsageError, match=said):
            write_messages(path, [USER, SAID])
    with pytest.raises(UsageError, match="nothing to save"):
        write_messages(tmp_path / "talk.json", [])


# ------------------------------------------------------------ on a terminal

HOLDS = """
import signal
from precast.cli import chat, main
answer = chat.Conversation.answer
def hold(talk, text, show):
    return answer(talk, text, (lambda piece: (show(piece), signal.pause())) if text == "Wait" else show)
chat.Conversation.answer = hold
main()
"""
"""The command line, where the answer to "Wait" waits after its first piece for a signal."""
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""What is typed in UTF-8 is decoded to halves of characters."""
SIGN = "\x1b[1m> \x1b[0m"


def on_terminal(model, home, *words, settings=None, **options):
    env = {**os.environ, "PRECAST_HOME": str(home), "TERM": "xterm", "INPUTRC": os.devnull, **(settings or {})}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        env.pop(name, None) if name not in (settings or {}) else None
    return Terminal([sys.executable, "-c", HOLDS, "generate", str(model), *words], env, **options)


def test_a_chat_on_a_terminal(talker, tmp_path):
    said, saved = "Yes, of course.", tmp_path / "talk.json"
    with on_terminal(talker, tmp_path / "home", "--choice", said, columns=200) as screen:

        def enter(*lines):
            """Type lines; returns what is shown up to the next prompt."""
            for line in lines:
                screen.type(f"{line}\r")
            return without_escapes(screen.read_until(SIGN))

        def type_slowly(keys, until):
            screen.type(keys)
            screen.read_until(until)

        def roles():
            saved.unlink(missing_ok=True)
            enter(f"/save {saved}")
            return "".join(message["role"][0] for message in json.loads(saved.read_text())["messages"])

        assert f"{CAPACITY} tokens fit. /help shows" in screen.read_until(SIGN)
        assert "0 of 256 tokens used." in enter("/tokens")
        assert said in enter("Hi")
        assert "of 256 tokens used. The last answer: " in enter("/tokens")
        # Two lines up is what was said before the command.
        assert f"Hi\n\r{said}" in enter(UP + UP)
        assert said in enter("One \\", "two")
        assert said in enter('"""', "/quit", "three \\", '"""')
        assert roles() == "uauauaua"
        held = json.loads(saved.read_text())["messages"]
        assert [message["content"] for message in held[4::2]] == ["One \ntwo", "/quit\nthree \\"]
        # Commands, right and wrong.
        assert "exists; /save!" in enter(f"/save {saved}")
        assert "Saved as" in enter(f"/save! {saved}")
        assert "The chat does not know /tokns. Did you mean /tokens?" in enter("/tokns")
        assert "/load needs something after it: /load FILE" in enter("/load")
        assert "/quit takes nothing after it" in enter("/quit now")
        assert "The system message: Be brief." in enter("/system Be brief.")
        assert "A new conversation." in enter("/reset")
        assert roles() == "s"
        assert "There is no system message." in enter("/system off")
        saved.write_text(json.dumps({"messages": held}))
        assert "talk.json: 8 messages, " in enter(f"/load {saved}")
        saved.write_text("{")
        assert "is not valid JSON" in enter(f"/load {saved}")
        # Tab completes a command.
        type_slowly("/to\t", "/tokens")
        assert "tokens used." in enter("")
        # Lines that are pasted are one message.
        enter("/reset")
        enter("\x1b[200~five\rsix\x1b[201~")
        assert roles() == "ua"
        assert json.loads(saved.read_text())["messages"][0]["content"] == "five\nsix"
        # Ctrl-C ends an answer, which stays, and clears a line.
        enter("/reset")
        screen.type("Wait\r")
        screen.read_until("Y")
        screen.interrupt()
        assert "Stopped." in screen.read_until(SIGN)
        assert roles() == "ua"
        assert "Yes,".startswith(json.loads(saved.read_text())["messages"][-1]["content"])
        type_slowly("/quit", "/quit")
        screen.interrupt()
        assert "again leaves" not in screen.read_until(SIGN)
        # Ctrl-D drops a message of several lines.
        type_slowly('"""\r', "| ")
        screen.type(CTRL_D)
        assert "That message is dropped." in screen.read_until(SIGN)
        # It has another size.
        assert max(map(len, enter("/help").splitlines())) > 60
        screen.resize(30)
        screen.read_until(SIGN)
        assert max(map(len, enter("/help").splitlines())) <= 30
        screen.interrupt()
        assert "Ctrl-C again leaves" in screen.read_until(SIGN)
        screen.interrupt()
        assert screen.wait()[0] == 0
    history = tmp_path / "home" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert history.read_text().splitlines()[:2] == ["/tokens", "Hi"]


def test_a_chat_on_a_small_terminal_without_colours(plain_talker, tmp_path):
    """History is found again, whoever could read it; text goes on; what a terminal would obey is shown."""
    (tmp_path / "home").mkdir()
    history = tmp_path / "home" / "history"
    history.write_text("Once\n")
    history.chmod(0o644)
    words, settings = ("--regex", "\x1b\\[2J"), {"TERM": "dumb", "NO_COLOR": "1", **C_LOCALE}
    with on_terminal(plain_talker, tmp_path / "home", *words, settings=settings, columns=10) as screen:
        banner = screen.read_until("\n> ")
        assert "It has no chat template: it continues your text" in banner
        screen.type(UP)
        screen.read_until("Once")
        screen.type("\r")
        assert "\\x1b[2J" in screen.read_until("\n> ")
        screen.type("天气\r")
        assert "\\x1b[2J" in screen.read_until("\n> ")
        screen.type("/help\r")
        screen.read_until("\n> ")
        screen.type("/system x\r")
        assert "has no chat template" in screen.read_until("\n> ")
        screen.type(CTRL_D)
        code, rest = screen.wait()
        assert (code, "\x1b" in banner + rest) == (0, False)
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_is_said_and_a_session_is_saved(talker, tmp_path):
    (tmp_path / "history").mkdir()
    session = tmp_path / "talk.session"
    with on_terminal(talker, tmp_path, "--choice", "你好", "--session", str(session), columns=300) as screen:
        assert "is remembered for this chat alone" in screen.read_until(SIGN)
        screen.type("今天天气很好\r")
        assert "你好" in screen.read_until(SIGN)
        screen.type("/quit\r")
        assert screen.wait()[0] == 0
    assert session.exists()


def test_an_answer_that_goes_elsewhere_is_to_one_prompt(talker, tmp_path):
    with (tmp_path / "answer").open("w+") as file:
        with on_terminal(talker, tmp_path, "--choice", "Yes.", "-q", stdout=file.fileno()) as screen:
            screen.read_until("Type the prompt; Ctrl-D on a line of its own ends it.")
            screen.type(f"Hi\n{CTRL_D}")
            assert screen.wait()[0] == 0
        file.seek(0)
        assert file.read() == "Yes.\n"
