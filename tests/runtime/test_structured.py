"""Answers of a given form: the tokens that a form leaves are those that a search of all texts leaves."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import threading
from functools import reduce
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import seq2seq

from precast.runtime import CompiledModel, CompiledModelForCausalLM, GenerationConfig
from precast.runtime.errors import InputError, UsageError
from precast.runtime.generation.sequence import StoppingCriteria
from precast.runtime.inputs.tokenizer import Tokenizer
from precast.runtime.structured import grammar as grammars
from precast.runtime.structured.grammar import Grammars
from precast.runtime.structured.structure import STRUCTURES, find_structure

END = 2
some = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
many = settings(some, max_examples=200)


@pytest.fixture(scope="module")
def model(checkpoint, artifact):
    source = checkpoint("llama", max_position_embeddings=256)
    return CompiledModelForCausalLM.from_pretrained(artifact(source, sequence_length=(256,)))


@pytest.fixture(scope="module")
def pieces(model):
    """The bytes of each token; None for those that are no text."""
    tokenizer: Tokenizer = model.tokenizer
    special = tokenizer.special_ids
    found = tokenizer.pieces(range(model._session.vocabulary))
    return [None if index in special else piece or None for index, piece in enumerate(found)]


@pytest.fixture(scope="module")
def compiled(model):
    return Grammars(model.tokenizer, model._session.vocabulary, [END])


def begin(compiled: Grammars, **asked: Any) -> Any:
    structure = find_structure(asked)
    assert structure is not None
    return compiled.begin(structure, 0)


def allowed(row: Any, taken: list[int]) -> set[int]:
    found = row.apply(np.array(taken, np.int64), np.zeros(row._vocabulary, np.float32))
    return {*np.flatnonzero(found == 0).tolist()}


def walk(compiled: Grammars, numbers: np.random.Generator, prefer: dict[int, float], limit: int, **asked: Any) -> Any:
    """The tokens of a random answer, by random logits that prefer some tokens; None where it gets too long."""
    row, taken = begin(compiled, **asked), []
    while not row.is_complete(np.array(taken, np.int64)):
        if len(taken) == limit:
            return None
        logits = numbers.normal(size=row._vocabulary).astype(np.float32)
        for token, value in prefer.items():
            logits[token] += value
        token = int(row.apply(np.array(taken, np.int64), logits).argmax())
        if token == END:
            break
        taken.append(token)
    return taken


def text_of(pieces: list[bytes | None], taken: list[int]) -> str:
    return b"".join(pieces[token] or b"" for token in taken).decode()


FINITE: list[tuple[dict[str, Any], list[str]]] = [
    ({"choices": ["yes", "no", "yesterday", "ünï"]}, ["yes", "no", "yesterday", "ünï"]),
    ({"regex": "a{1,3}(b|cd)?"}, ["a" * n + end for n in (1, 2, 3) for end in ("", "b", "cd")]),
    ({"regex": r"\d[x-z]"}, [f"{n}{c}" for n in range(10) for c in "xyz"]),
    ({"json_schema": {"enum": [1, "a", None, [True]]}}, ["1", '"a"', "null", "[true]"]),
    (
        {"json_schema": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
        ["[]", *(f"[{','.join(each)}]" for n in (1, 2) for each in itertools.product(("true", "false"), repeat=n))],
    ),
    (
        {"json_schema": {"type": "object", "properties": {"a": {"type": "integer", "minimum": -1, "maximum": 12}},
                         "required": ["a"], "additionalProperties": False}},
        [f'{{"a":{n}}}' for n in ("-0", *range(-1, 13))],
    ),
    ({"grammar": 'start: "x" tail\ntail: "1" | "2" tail2\ntail2: "" | "3"'}, ["x1", "x2", "x23"]),
    ({"grammar": 'root ::= "(" ("a" | "bc") ")"'}, ["(a)", "(bc)"]),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "texts"), FINITE, ids=range(len(FINITE)))
def test_masks_are_what_a_search_of_all_texts_finds(compiled, pieces, asked, texts):
    """At every place that can be reached."""
    whole = [text.encode() for text in texts]
    todo, seen = [()], set()
    while todo:
        taken = todo.pop()
        text = b"".join(pieces[token] for token in taken)
        if text in seen:
            continue
        seen.add(text)
        row = begin(compiled, **asked)
        if row.is_complete(np.array(taken, np.int64)):
            assert text in whole
            assert not any(each.startswith(text) and each != text for each in whole)
            continue
        expected = {
            token for token, piece in enumerate(pieces)
            if piece and any(each.startswith(text + piece) for each in whole)
        }  # fmt: skip
        expected |= {END} if text in whole else set()
        found = allowed(row, list(taken))
        # Where only one text can follow, it comes in the tokens that the tokenizer makes of it.
        is_forced = len({each[len(text) : len(text) + 1] for each in whole if each.startswith(text)}) == 1
        assert found == expected or (is_forced and found and found < expected)
        todo += [(*taken, token) for token in found - {END}]
    assert {*whole} <= seen


_atoms = st.sampled_from(["a", "b", "[a-c]", "[^a]", r"\d", ".", "(?:ab|c)", "x{2,3}", r"\w", " "])
_patterns = st.lists(st.tuples(_atoms, st.sampled_from(["", "", "?", "*", "+", "{1,2}"])), min_size=1, max_size=4)


@settings(some, max_examples=100)
@given(parts=_patterns, seed=st.integers(0, 2**32 - 1))
def test_what_matches_a_pattern_so_far_may_come(compiled, pieces, parts, seed):
    """100 patterns: along a random answer, the tokens are those after which the pattern can still match."""
    pattern = "".join(f"(?:{atom}){count}" for atom, count in parts)
    known = regex.compile(pattern.replace(r"\d", "[0-9]"))
    ascii_tokens = [token for token, piece in enumerate(pieces) if piece and piece.isascii()]
    taken = walk(compiled, np.random.default_rng(seed), {END: 3}, 12, regex=pattern)
    taken = [] if taken is None else taken
    row = begin(compiled, regex=pattern)
    for count in range(len(taken) + 1):
        if row.is_complete(np.array(taken[:count], np.int64)):
            assert known.fullmatch(text_of(pieces, taken[:count]))
            return
        try:
            text = text_of(pieces, taken[:count])
        except UnicodeDecodeError:
            # Within a character, which is not for a pattern to say.
            continue
        found = allowed(row, taken[:count])
        assert (END in found) == bool(known.fullmatch(text))
        expected = {token for token in ascii_tokens if known.fullmatch(text + pieces[token].decode(), partial=True)}
        # Where only one text can follow, it comes in the tokens that the tokenizer makes of it.
        assert found & {*ascii_tokens} == expected or (len(found) == 1 and found < expected)
    assert known.fullmatch(text_of(pieces, taken)) or not taken


_names = st.text("abc", min_size=1, max_size=4)
_leaves = st.one_of(
    st.sampled_from([{"type": kind} for kind in ("string", "integer", "number", "boolean", "null")]),
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
              st.integers(-200, 200), st.integers(0, 100)),
    st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
              st.integers(0, 3), st.integers(0, 5)),
    st.sampled_from([{"type": "string", "pattern": "^[a-f]{1,3}$"}, {"type": "string", "format": "date"},
                     {"const": {"a": [1, None]}}, {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5}]),
    st.builds(lambda values: {"enum": values}, st.lists(st.integers(-9, 9) | _names, min_size=1, max_size=4)),
)  # fmt: skip


def _larger(inner: Any) -> Any:
    def build(properties: dict[str, Any], optional: int, more: Any) -> dict[str, Any]:
        required = [*properties][: max(0, len(properties) - optional)]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": more}

    return st.one_of(
        st.builds(build, st.dictionaries(_names, inner, max_size=4), st.integers(0, 2), st.sampled_from([False, True])),
        st.builds(lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
                  inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(lambda both: {"anyOf": both}, st.lists(inner, min_size=1, max_size=3)),
    )  # fmt: skip


schemas = st.recursive(_leaves, _larger, max_leaves=6)


@many
@given(schema=schemas, seed=st.integers(0, 2**32 - 1))
def test_a_random_answer_keeps_to_its_schema(compiled, pieces, schema, seed):
    """200 schemas. Preferred are the tokens that end strings, lists and objects, so that answers do."""
    closing = {token: 4.0 for token, piece in enumerate(pieces) if piece in (b'"', b"]", b"}", b'"}', b'"]')}
    taken = walk(compiled, np.random.default_rng(seed), {END: 8.0, **closing}, 400, json_schema=schema)
    assert taken is not None, "it got no end"
    text = text_of(pieces, taken)
    jsonschema.validate(json.loads(text), schema)
    # No free space: without its strings there is none at all.
    assert not re.search(r"\s", re.sub(r'"(\\.|[^"\\])*"', "", text))


SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yz"]}},
    "required": ["a", "b"], "additionalProperties": False,
}  # fmt: skip
PROMPT = [5, 9, 30, 7, 200, 31]


def test_models_answer_in_form_however_they_generate(model):
    """Greedily and drawn, with a lookup and a draft, streamed; and what may be guessed changes nothing."""
    asked: dict[str, Any] = {"json_schema": SCHEMA, "max_new_tokens": 60, "eos_token_id": END}
    plain = model.generate([PROMPT], **asked)[0, len(PROMPT) :].tolist()
    jsonschema.validate(json.loads(model.tokenizer.decode(plain)), SCHEMA)
    for more in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": model.new_session()}):
        assert model.generate([PROMPT], **asked, **more)[0, len(PROMPT) :].tolist() == plain
    assert list(model.stream([PROMPT], **asked)) == plain
    for seed in range(5):
        drawn = model.generate([PROMPT], **asked, do_sample=True, temperature=5.0, seed=seed)[0, len(PROMPT) :]
        jsonschema.validate(json.loads(model.tokenizer.decode(drawn)), SCHEMA)


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"choices": ["up", "down"]}, "up|down"),
        ({"regex": r"\d{2}:\d{2}"}, "[0-9]{2}:[0-9]{2}"),
        ({"grammar": 'root ::= "<" [a-c]+ ">"'}, "<[a-c]+>?"),
        ({"response_format": {"type": "json_object"}}, r"\{.*"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 7}}}}, "7"),
        ({"json_schema": '{"type": "boolean"}'}, "true|false"),
    ],
)
@pytest.mark.parametrize("end", [END, []])
def test_every_way_to_ask_for_a_form(model, asked, pattern, end):
    """With an end-of-sequence token and without, where an answer ends since nothing can follow."""
    found = model.generate([PROMPT], eos_token_id=end, max_new_tokens=30, **asked)[0, len(PROMPT) :]
    assert re.fullmatch(pattern, model.tokenizer.decode(found), re.DOTALL)


def test_a_class_of_pydantic_is_a_schema(model):
    class Person:
        @staticmethod
        def model_json_schema():
            return SCHEMA

    found = model.generate([PROMPT], json_schema=Person, max_new_tokens=60, eos_token_id=END)[0, len(PROMPT) :]
    jsonschema.validate(json.loads(model.tokenizer.decode(found)), SCHEMA)


def test_rows_of_a_batch_have_forms_of_their_own(model, checkpoint, artifact):
    source = checkpoint("llama", max_position_embeddings=256)
    wide = CompiledModelForCausalLM.from_pretrained(artifact(source, sequence_length=(256,), batch_size=4))
    rows = [[80, 81, 9], [12, 13, 14]]
    asked = {"json_schema": SCHEMA, "max_new_tokens": 60, "eos_token_id": [], "do_sample": True, "temperature": 4.0}
    found = wide.generate(rows, n=2, seed=1, pad_token_id=0, return_dict_in_generate=True, logprobs=True, **asked)
    texts = [wide.tokenizer.decode([token for token in row[3:] if token]) for row in found.sequences]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len({*texts}) > 1


def test_encoder_decoders_answer_in_form(artifact, tmp_path):
    """After the token that they are forced to begin with."""
    source = seq2seq.make(tmp_path / "bart", "bart")
    model = CompiledModel.from_pretrained(artifact(source, decoder_sequence_length=48))
    asked = {"json_schema": SCHEMA, "max_new_tokens": 40, "eos_token_id": END, "forced_bos_token_id": 11}
    found = model.generate([PROMPT], **asked)[0]
    assert found[1] == 11
    jsonschema.validate(json.loads(model.tokenizer.decode(found[2:])), SCHEMA)
    assert list(model.stream([PROMPT], **asked)) == found[1:].tolist()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"regex": "(a"}, "regex cannot be compiled: .* unclosed group"),
    ({"regex": "(?=a)b"}, "regex cannot be compiled: .* look-around"),
    ({"regex": ""}, "regex must be a text that is not empty, not ''"),
    ({"regex": 5}, "regex must be a text that is not empty, not 5"),
    ({"json_schema": {"type": "strng"}}, "json_schema cannot be compiled: Invalid type: strng"),
    ({"json_schema": {"not": {"type": "string"}}}, 'json_schema cannot be compiled: .*"not"'),
    ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 2}}, "minimum .5. is greater than maximum"),
    ({"json_schema": "{"}, "json_schema is no JSON: .* column 2"),
    ({"json_schema": 5}, "json_schema must be a JSON schema, a dict or JSON text, not 5"),
    ({"json_schema": {"const": {1, 2}}}, "json_schema cannot be written as JSON"),
    ({"json_schema": {"const": float("nan")}}, "json_schema cannot be written as JSON"),
    ({"grammar": "start: FOO"}, 'grammar cannot be compiled: .* unknown name: "FOO"'),
    ({"grammar": "root ::= ("}, "grammar cannot be compiled"),
    ({"choices": []}, r"choices must be a list of texts, none of them empty, not \[\]"),
    ({"choices": ["a", ""]}, "choices must be a list of texts"),
    ({"choices": "ab"}, "choices must be a list of texts"),
    ({"response_format": {"type": "xml"}}, "response_format must be .* regex=, grammar= or choices="),
    ({"response_format": {"type": "json_schema"}}, "holds its schema as"),
    ({"response_format": "json_object"}, "response_format must be"),
    ({"regex": "a", "choices": ["b"]}, "regex and choices each give an answer a form; pass one"),
    ({"regex": "a", "num_beams": 2}, "num_beams=2 is not done for answers of a given form; pass num_beams=1"),
    ({"regex": "a" * 1_000_001}, "regex has 1000001 characters; 1000000 are the most"),
    (
        {"regex": "a", "forced_eos_token_id": [END, 9]},
        "forced_eos_token_id=9 is none of eos_token_id.* that regex does",
    ),
    ({"json_schma": {}}, "Did you mean 'json_schema'"),
    ({"regex": "ab", "suppress_tokens": [*range(3, 320)]}, "No token may come next: .* the form of the answer"),
]


@pytest.mark.parametrize(("asked", "message"), BAD, ids=range(len(BAD)))
def test_forms_that_cannot_be_are_explained(model, asked, message):
    before = model.generate([PROMPT], max_new_tokens=4).tolist()
    with pytest.raises(InputError, match=message):
        model.generate([PROMPT], max_new_tokens=9, eos_token_id=END, **asked)
    assert model.generate([PROMPT], max_new_tokens=4).tolist() == before


def test_an_end_that_is_forced_cuts_a_form_off(model):
    found = model.generate([PROMPT], regex="a{9}", max_new_tokens=3, eos_token_id=END, forced_eos_token_id=END)
    assert found.shape == (1, len(PROMPT) + 3)
    assert found[0, -1] == END


@pytest.mark.parametrize("pattern", ["abX", "Xab", "[ab]{2}X"])
def test_where_no_token_fits_is_said(pattern):
    """A vocabulary without a byte that the form needs: an answer does not just end there."""

    class Poor:
        special_ids = frozenset[int]()

        def pieces(self, ids):
            return [[b"a", b"b", None][index] for index in ids]

        def encode(self, text, **_):
            return ["ab".index(char) for char in text if char in "ab"]

        def decode(self, ids, **_):
            return "".join("ab?"[token] for token in ids)

    row = begin(Grammars(Poor(), 3, [2]), regex=pattern)
    with pytest.raises(InputError, match=r"regex leaves no token (at the beginning|after '[ab]+'): "):
        reduce(lambda taken, _: [*taken, min(allowed(row, taken))], range(9), [])


def test_without_the_library_its_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(model, "_grammars", {})
    with pytest.raises(UsageError, match=r"need llguidance.*pip install 'precast\[structured\]'"):
        model.generate([PROMPT], regex="a", eos_token_id=END)
    assert model.generate([PROMPT], max_new_tokens=2).shape == (1, len(PROMPT) + 2)


def test_a_grammar_is_compiled_once(compiled, monkeypatch):
    made = []
    real = Grammars._compile
    monkeypatch.setattr(
        Grammars, "_compile", lambda self, structure: (made.append(structure), real(self, structure))[1]
    )
    for _ in range(3):
        begin(compiled, regex="once[a-z]")
        begin(compiled, json_schema={"const": "once"})
    assert [each.kind for each in made] == ["regex", "json_schema"]
    for index in range(grammars._MOST_KEPT + 5):
        begin(compiled, regex=f"kept{index}")
    assert len(compiled._kept) == grammars._MOST_KEPT


def test_threads_share_grammars(model):
    answers: list[Any] = []

    def ask():
        own = model.new_session()
        asked = {"json_schema": SCHEMA, "max_new_tokens": 60, "eos_token_id": END}
        answers.append(own.generate([PROMPT], **asked).tolist())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    assert all(answer == answers[0] for answer in answers)


def test_a_form_works_in_a_forked_process(compiled):
    """The thread that computes masks is not there."""
    row = begin(compiled, regex="ab+c")
    row.is_complete(np.array([], np.int64))
    if not (child := os.fork()):
        fresh = begin(compiled, regex="ab+c")
        fresh.is_complete(np.array([], np.int64))
        os._exit(0 if fresh.apply(np.array([], np.int64), np.zeros(fresh._vocabulary)).max() == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_calls_form_goes_before_the_models(model):
    own = model.new_session()
    own.generation_config = {"json_schema": SCHEMA, "eos_token_id": END}
    found = own.generate([PROMPT], choices=["ab"])[0, len(PROMPT) :]
    assert own.tokenizer.decode(found) == "ab"
    plain = model.generate([PROMPT], eos_token_id=END, max_new_tokens=9).tolist()
    assert own.generate([PROMPT], response_format={"type": "text"}, max_new_tokens=9).tolist() == plain


def test_ends_beyond_the_vocabulary_end_nothing(model):
    own = model.new_session()
    own.generation_config = {"eos_token_id": [5000, END, 320]}
    found = own.generate([PROMPT], json_schema=SCHEMA, max_new_tokens=60)[0, len(PROMPT) :]
    jsonschema.validate(json.loads(own.tokenizer.decode(found)), SCHEMA)


def test_files_cannot_give_answers_a_form():
    """Only the caller of generate() can."""
    assert GenerationConfig.published(dict.fromkeys(STRUCTURES, "x"), "a file").structure is None
    assert GenerationConfig.of({"regex": "x"}, "a call").structure is not None
    assert StoppingCriteria(GenerationConfig(), None, [], None).has_eos_token is False
