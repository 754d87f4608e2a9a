"""Whatever is wrong with a published file or an argument is a PrecastError that names it, never a library's own."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from precast.runtime import CompiledModel, GenerationConfig, Tokenizer
from precast.runtime.errors import ArtifactError, FormatError, InputError, OutOfMemoryError, PrecastError
from precast.runtime.generation.prompt_lookup import Lookup

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def files(decoder, tmp_path_factory):
    """`files({"tokenizer.json": …})`: the tokenizer's files with some of them changed."""
    made = iter(range(10**6))

    def make(changes):
        path = tmp_path_factory.mktemp("tokenizer") / str(next(made))
        path.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(decoder / name, path)
        for name, content in changes.items():
            raw = content if isinstance(content, str | bytes) else json.dumps(content)
            (path / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
        return path

    return make


@pytest.fixture(scope="module")
def parts(decoder):
    return json.loads((decoder / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def model(decoder):
    return CompiledModel.from_pretrained(decoder, prepack=False, threads=1)


SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
UNKNOWN_TOKEN = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": [],
                 "special_tokens": {}}  # fmt: skip
NO_CHARACTERS = {"type": "Precompiled", "precompiled_charsmap": ""}
LARGE_CHARACTERS = {"type": "Precompiled", "precompiled_charsmap": "AAAA////"}
"""Of 8 GB, by its own account."""
NO_UNKNOWN = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
NO_PATTERN = SPLIT | {"pattern": {"Regex": "(("}}
NO_MODEL = {"type": "Guess", "vocab": {}}
NO_SUCH_PIECE = {"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]], "byte_fallback": False}


@pytest.mark.parametrize(
    "content",
    [
        "", "nonsense", "[]", "[" * 100_000, "\ufeff{}", b"\xff\xfe", {"normalizer": NO_CHARACTERS},
        {"normalizer": LARGE_CHARACTERS},
        {"normalizer": {"type": "Sequence", "normalizers": [LARGE_CHARACTERS]}},
        {"pre_tokenizer": NO_PATTERN}, {"model": NO_MODEL}, {"model": NO_SUCH_PIECE},
    ],
)  # fmt: skip
def test_a_tokenizer_that_the_library_cannot_read_is_named(files, parts, content):
    whole = {**parts, **content} if isinstance(content, dict) else content
    with pytest.raises(FormatError, match=r"tokenizer\.json cannot be read as a tokenizer: \w"):
        Tokenizer(files({"tokenizer.json": whole}))


@pytest.mark.parametrize(
    "change", [{"pre_tokenizer": SPLIT}, {"post_processor": UNKNOWN_TOKEN}, {"model": NO_UNKNOWN}], ids=range(3)
)
def test_a_tokenizer_that_fails_at_work_says_at_which_text(files, parts, change):
    # The first two are panics of the library's Rust code, which are no Exceptions.
    broken = Tokenizer(files({"tokenizer.json": {**parts, **change}}))
    for _ in range(2):
        with pytest.raises(InputError, match=r"The tokenizer of .* cannot encode 'aaaaaaaaaa"):
            broken.encode("a" * 40 + "!")


def test_lengths_that_a_tokenizers_own_file_fixes_do_not_count(files, parts):
    """The compiled model decides."""
    fixed = {"strategy": {"Fixed": 2**31}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
             "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    plain, told = (
        Tokenizer(files({"tokenizer.json": {**parts, **each}})) for each in ({}, {"padding": fixed, "truncation": cut})
    )
    assert told.encode("the capital of France") == plain.encode("the capital of France")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", r"holds \[\], not an object"),
        ("{", "not valid JSON"),
        (b"\xff", "not valid JSON.*utf-8"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "nests more than 100 levels"),
        ('{"padding_side": ' + "9" * 5000 + "}", "not valid JSON"),
        ({"padding_side": "middle"}, 'padding_side: "middle". Invalid enum'),
        ({"model_input_names": 5}, "model_input_names: 5. Expected `array`, got `int`"),
        ({"clean_up_tokenization_spaces": "yes"}, "clean_up_tokenization_spaces.*Expected `bool`"),
        ({"pad_token": 7}, "pad_token: 7. Expected"),
        ({"chat_template": [{"a": 1}]}, "chat_template.*missing required field"),
    ],
)
def test_a_wrong_type_in_tokenizer_config_names_key_value_and_type(files, config, message):
    with pytest.raises(FormatError, match=message):
        Tokenizer(files({"tokenizer_config.json": config}))


def test_what_nobody_reads_in_a_tokenizer_config_may_be_anything(files):
    odd = {"x_token": True, "add_bos_token": 5, "auto_map": [], "pad_token": None, "model_input_names": []}
    assert Tokenizer(files({"tokenizer_config.json": odd}))("abc")["input_ids"].size


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hi \ud83d", r"half a character, U\+D83D, at position 3"),
        (b"bytes", "A text is a str; this is bytes"),
        (None, "A text is a str; this is NoneType"),
    ],
)
def test_what_is_no_text_is_said(model, given, message):
    tokenizer = model.tokenizer
    for use in (
        lambda: tokenizer.encode(given),
        lambda: tokenizer.encode("a", given) if given is not None else tokenizer.encode(given),
        lambda: tokenizer([given]),
        lambda: tokenizer.encodings(given, length=8),
        lambda: tokenizer.vocabulary_id(given),
    ):
        with pytest.raises(InputError, match=message):
            use()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda t: t(5), "a text or a list of texts; this is 5"),
        (lambda t: t(["a", "b"], ["c"]), "2 texts and 1 pairs"),
        (lambda t: t.decode([-1]), "-1 is no token id"),
        (lambda t: t.decode([2**32]), f"{2**32} is no token id"),
        (lambda t: t.decode([1.5]), r"whole numbers; these are \[1.5\]"),
        (lambda t: t.decode(5), "whole numbers; these are 5"),
        (lambda t: t.token(-1), "-1 is no token id"),
        (lambda t: t.encodings("a b c", length=4, stride=4), "stride=4 must be a whole number from 0 to 3"),
        (lambda t: t.encodings("a b c", length=4, stride=-1), "stride=-1 must be"),
        (lambda t: t.encodings("a b c", length=4, stride=1.5), "stride=1.5 must be"),
        (lambda t: t.encodings("a b c", length=0), "length=0 leaves no room"),
        (lambda t: t.encodings("a b c", length=4, strategy="all"), "strategy='all' is not known; .*only_second"),
        (lambda t: t.encodings("abc", "the end " * 9, length=5, stride=4, strategy="only_second"), "cannot cut"),
    ],
    ids=range(13),
)
def test_a_tokenizers_wrong_arguments_are_said(model, use, message):
    with pytest.raises(InputError, match=message):
        use(model.tokenizer)


def test_one_pair_is_a_pair_of_texts_and_not_of_letters(model):
    ids = model.tokenizer("one", "two")["input_ids"][0]
    assert ids.tolist() == model.tokenizer.encode("one", "two")


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1/0 }}", "{{ 1 + 'a' }}", "{{ strftime_now(5) }}", "{{ nosuch|tojson }}", "{{ range|tojson }}",
        "{% for i in range(10**9) %}{% endfor %}", "{% include '/etc/passwd' %}", "{% for %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "{{ (10**100000)|string }}", "{{ messages[9].x.y }}",
    ],
    ids=range(13),
)  # fmt: skip
def test_whatever_a_template_raises_is_its_own_failure(files, template):
    with pytest.raises(InputError, match=r"The chat template of .* (failed|refused this conversation)"):
        Tokenizer(files({"chat_template.jinja": template})).apply_chat_template(HELLO)


def test_a_template_that_fails_says_where(files):
    with pytest.raises(InputError, match="failed in line 3: ZeroDivisionError: division by zero"):
        Tokenizer(files({"chat_template.jinja": "{% set a = 1 %}\n\n{{ a / 0 }}"})).apply_chat_template(HELLO)
    with pytest.raises(OutOfMemoryError, match="no memory") as caught:
        Tokenizer(files({"chat_template.jinja": "{{ 'a' * 10**18 }}"})).apply_chat_template(HELLO)
    assert isinstance(caught.value, MemoryError)
    with pytest.raises(FormatError, match=r"chat_template\.jinja is not text in UTF-8"):
        Tokenizer(files({"chat_template.jinja": b"\xff\xfe"})).apply_chat_template(HELLO)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"), ("top_p", [1]), ("do_sample", "no"), ("max_new_tokens", "5"), ("max_new_tokens", 5.5),
        ("max_new_tokens", True), ("seed", "x"), ("eos_token_id", "x"), ("eos_token_id", [[1], [2]]),
        ("eos_token_id", {"a": 1}), ("eos_token_id", 1.5), ("pad_token_id", "a"), ("pad_token_id", 2**70),
        ("eos_token_id", 2**70), ("stop_strings", 5), ("stop_strings", [5]), ("stop_strings", ""),
        ("stop_strings", ["a", ""]), ("bad_words_ids", 5), ("bad_words_ids", [["a"]]), ("bad_words_ids", [[]]),
        ("suppress_tokens", "abc"), ("forced_eos_token_id", "a"), ("return_dict_in_generate", "x"),
        ("early_stopping", [1]),
    ],
)  # fmt: skip
def test_a_setting_of_another_type_is_named_with_its_value(model, name, value):
    for give in (
        lambda: model.generate([[5]], **{name: value}),
        lambda: model.generate([[5]], generation_config={name: value}),
        lambda: GenerationConfig(**{name: value}),
    ):
        with pytest.raises(InputError, match=rf"{name}=.* is of the wrong type or size: "):
            give()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 1e-40}, "temperature must be at least 1e-30, not 1e-40"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be above 0, not nan"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be at least 1e-30"),
        ({"do_sample": True, "seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"num_beams": 2, "length_penalty": 1e308}, "length_penalty must lie between -20 and 20"),
        ({"forced_eos_token_id": 320}, r"forced_eos_token_id=320 is none of the model's tokens, 0\.\.319"),
        ({"forced_bos_token_id": -3}, "forced_bos_token_id=-3 is none of"),
        ({"suppress_tokens": list(range(320))}, "No token may come next: suppress_tokens, bad_words_ids"),
        ({"suppress_tokens": list(range(320)), "do_sample": True}, "No token may come next"),
        ({"generation_config": [1]}, r"generation_config must be a GenerationConfig or a dict, not \[1\]"),
        (
            {"logits_processor": [lambda tokens, logits: None]},
            r"<lambda> has to return logits.*\[1, 320\]; it returned",
        ),
        ({"logits_processor": [lambda tokens, logits: 5]}, r"returned int64 \[\]"),
        ({"logits_processor": [lambda tokens, logits: logits[:, :5]]}, r"returned float32 \[1, 5\]"),
        ({"logits_processor": [lambda tokens, logits: logits * np.nan]}, "returned NaN"),
        ({"logits_processor": [lambda tokens, logits: logits * 0 - np.inf]}, "No token may come next"),
        ({"logits_processor": 5}, "logits_processor must be a list of functions, not 5"),
        ({"stopping_criteria": [5]}, "stopping_criteria must be a list of functions"),
        ({"stopping_criteria": [lambda tokens, logits: None]}, "has to return whether the row ends; it returned None"),
    ],
    ids=range(18),
)
def test_a_setting_without_an_answer_is_refused(model, options, message):
    before = model.generate([[5, 6, 7]], max_new_tokens=3).tolist()
    with pytest.raises(InputError, match=message):
        model.generate([[5, 6, 7]], **{"max_new_tokens": 3, **options})
    assert model.generate([[5, 6, 7]], max_new_tokens=3).tolist() == before


def test_numbers_of_numpy_and_torch_are_numbers(model):
    import torch

    plain = model.generate([[5, 6]], max_new_tokens=4, eos_token_id=[2, 9], do_sample=True, seed=3, temperature=0.5)
    for whole, several, fraction in ((np.int64, np.array, np.float32), (torch.tensor, torch.tensor, torch.tensor)):
        assert np.array_equal(
            plain,
            model.generate([[5, 6]], max_new_tokens=whole(4), eos_token_id=several([2, 9]), do_sample=True,
                           seed=whole(3), temperature=fraction(0.5)),
        )  # fmt: skip


def test_ids_that_no_token_has_are_never_chosen_and_change_nothing(model, monkeypatch):
    """Published files have such ids; of a call they are refused."""
    plain = model.generate([[5, 6]], max_new_tokens=4).tolist()
    last = {"suppress_tokens": [-1], "bad_words_ids": [[-1]], "eos_token_id": [-5, 2**40], "min_new_tokens": 3}
    monkeypatch.setattr(model, "generation_config", last)
    only_last = model.generate([[5, 6]], max_new_tokens=1, logits_processor=[_only(319)])
    assert only_last[0, -1] == 319
    monkeypatch.setattr(model, "generation_config", {"eos_token_id": [-5], "pad_token_id": -1})
    assert model.generate([[5, 6]], max_new_tokens=4).tolist() == plain


def _only(token):
    def process(tokens, logits):
        tokens[:] = 0
        return np.where(np.arange(logits.shape[1]) == token, logits, -np.inf)

    return process


def test_what_a_processor_does_to_the_tokens_it_is_shown_stays_with_it(model):
    plain = model.generate([[5, 6, 7]], max_new_tokens=6, repetition_penalty=2.0).tolist()

    def spoil(tokens, logits):
        tokens.fill(0)
        return logits

    spoilt = {"logits_processor": [spoil], "stopping_criteria": [lambda tokens, logits: tokens.fill(0) is not None]}
    assert model.generate([[5, 6, 7]], max_new_tokens=6, repetition_penalty=2.0, **spoilt).tolist() == plain


def test_what_a_processor_writes_into_logits_counts_in_its_own_call_alone(model):
    plain = model.generate([[5, 6, 7]], max_new_tokens=4).tolist()

    def only(tokens, logits):
        logits[:] = np.where(np.arange(logits.shape[1]) == 77, 1, 0)
        return logits

    assert model.generate([[5, 6, 7]], max_new_tokens=2, logits_processor=[only])[0, 3:].tolist() == [77, 77]
    for opened in (model, model.new_session()):
        assert opened.generate([[5, 6, 7]], max_new_tokens=4).tolist() == plain


def test_long_matches_cost_no_more_than_short_ones():
    tokens = [1, 2, 3] * 50
    assert Lookup(tokens, 4, 10**12).guess(3) == Lookup(tokens, 4, 5).guess(3) != []


@pytest.mark.parametrize(
    ("rows", "positions", "message"),
    [
        ([[5, 6]], [[2]], r"positions\[0\] must be whole numbers, ascending, from 0 to 1.*these are \[2\]"),
        ([[5, 6]], [[-1]], r"positions\[0\] must be"),
        ([[5, 6]], [[1, 0]], r"positions\[0\] must be"),
        ([[5, 6]], [[]], r"positions\[0\] must be"),
        ([[5, 6]], [[0.5]], r"positions\[0\] must be"),
        ([[5, 6]], [], "1 rows and 0 lists of positions"),
        ([], [], "0 rows"),
        ([[5, 320]], [[0]], r"rows\[0\] holds the id 320"),
        ([[5, -3]], [[0]], r"rows\[0\] holds the id -3"),
        ([[]], [[0]], r"rows\[0\] is empty"),
        ([[[5]]], [[0]], r"rows\[0\] must be \[length\]"),
        ([list(range(5, 54))], [[0]], "49 tokens do not fit into the compiled capacity of 48"),
    ],
    ids=range(12),
)
def test_logits_are_those_of_tokens_that_there_are(model, rows, positions, message):
    with pytest.raises(InputError, match=message):
        model.logits_at([np.array(row) for row in rows], positions)


@pytest.mark.parametrize("given", [[[5, 2**70]], [[5, None]], [["a", "b"]]])
def test_ids_that_are_no_numbers_are_said(model, given):
    with pytest.raises(InputError, match=r"input_ids must be (whole )?numbers"):
        model.generate(given)
    with pytest.raises(InputError, match="attention_mask has rows of different lengths"):
        model.generate([[5, 6]], [[1], [1, 0]])


def test_what_onnx_runtime_cannot_run_is_an_artifacts_error(decoder, monkeypatch):
    fresh = CompiledModel.from_pretrained(decoder, prepack=False, threads=1)
    monkeypatch.setattr(type(fresh), "_vocabulary_size", lambda self: 10**9)
    with pytest.raises(PrecastError, match=r"ONNX Runtime [\d.]+ cannot run the graph: .*out of data bounds"):
        fresh.generate([[5, 10**8]], max_new_tokens=2)


@pytest.mark.parametrize(("said", "message"), [("no memory\nat 0x0", "no memory$"), ("", "no reason given$")])
def test_what_a_library_raises_is_an_artifacts_error(said, message):
    from precast.runtime.engines.aoti_torch import _report_failures

    def fail(inputs):
        raise RuntimeError(said)

    with pytest.raises(ArtifactError, match=f"The graph decode failed: {message}"):
        _report_failures(fail, "decode")([])
