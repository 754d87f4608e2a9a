"""generate(): transformers' tokens, its precedence, its limits; streams and threads that leave nothing behind."""

from __future__ import annotations

import json
import shutil
import threading

import numpy as np
import oracle
import pytest
import torch
import transformers

from precast.runtime import (
    CompiledModel,
    CompiledModelForCausalLM,
    CompiledModelForFeatureExtraction,
    GenerationConfig,
    pipeline,
)
from precast.runtime.errors import HostError, InputError, PrecastError, UsageError

PROMPT = [5, 9, 30, 7, 200, 31]


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("llama")


@pytest.fixture
def model(decoder):
    return CompiledModelForCausalLM.from_pretrained(decoder)


@pytest.fixture(scope="module")
def wide(source, artifact):
    """Batch 3 with slices."""
    return CompiledModelForCausalLM.from_pretrained(artifact(source, batch_size=3, dynamic_batch_size=True))


def new_tokens(model, row=PROMPT, **options):
    return model.generate(np.array([row]), **options)[0, len(row) :].tolist()


GREEDY = [
    {},
    {"max_new_tokens": 1},
    {"max_length": 20},
    {"repetition_penalty": 1.5, "max_new_tokens": 24},
    {"no_repeat_ngram_size": 2, "max_new_tokens": 24},
    {"eos_token_id": 65, "min_new_tokens": 5, "max_new_tokens": 12},
    {"min_length": 12, "max_new_tokens": 24},
    {"eos_token_id": list(range(3, 160)), "max_new_tokens": 24},
    {"eos_token_id": list(range(3, 160)), "min_new_tokens": 6, "max_new_tokens": 24},
]


@pytest.mark.parametrize("options", GREEDY, ids=lambda options: ",".join(options) or "defaults")
def test_greedy_is_transformers_greedy(model, source, options):
    given = options if options.keys() & {"max_new_tokens", "max_length"} else {"max_new_tokens": 20, **options}
    with torch.inference_mode():
        expected = oracle.eager(source).generate(torch.tensor([PROMPT]), do_sample=False, pad_token_id=0, **given)
    assert new_tokens(model, **options) == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    ("options", "longest"),
    [
        ({"max_new_tokens": 9}, None), ({"max_length": 15}, None), ({"max_new_tokens": 9, "num_beams": 3}, None),
        ({"max_new_tokens": 5}, 15), ({"max_new_tokens": 15}, 11), ({}, None),
    ],
)  # fmt: skip
def test_the_last_token_is_forced_where_the_settings_end(wide, source, options, longest):
    """Neither where a criterion ends a row, nor where there is no room for more."""
    asked = {"eos_token_id": 2, "do_sample": False, "pad_token_id": 1, **options}
    criteria = [] if longest is None else [transformers.MaxLengthCriteria(longest)]
    wide.generation_config = {"forced_eos_token_id": 7, "max_length": 1000}
    found = wide.generate([PROMPT], stopping_criteria=criteria, **asked)
    wide.generation_config = None
    theirs = {"forced_eos_token_id": 7, **asked} if options else {**asked, "max_new_tokens": 42}
    with torch.inference_mode():
        expected = oracle.eager(source).generate(torch.tensor([PROMPT]), stopping_criteria=criteria, **theirs)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("end", [None, 2])
def test_rows_that_a_criterion_ended(wide, source, end):
    """They are filled where there is an end-of-sequence token, and otherwise go on with their batch."""
    rows = [[5, 9, 30], [7, 200, 31], [80, 12, 6]]
    asked = {"max_new_tokens": 12, "eos_token_id": end, "pad_token_id": 1, "do_sample": False}
    criteria = [lambda ids, _: ids[:, -1] % 3 == 0]
    with torch.inference_mode():
        expected = oracle.eager(source).generate(
            torch.tensor(rows), attention_mask=torch.ones(3, 3), stopping_criteria=criteria, **asked
        )
    filled = [(row[3:] == 1).any() for row in expected]
    assert any(filled) is (end is not None), "the rows end one after the other"
    assert wide.generate(rows, stopping_criteria=criteria, **asked).tolist() == expected.tolist()


def test_rows_do_not_see_each_other(wide, source):
    """Seven rows of different lengths on a batch of three: each answer is the one it gets alone, ends included."""
    rows = [[(n * n + 7 * k) % 300 + 3 for n in range(1 + 4 * k)] for k in range(7)]
    ids, mask = oracle.padded(rows, "left")
    ends = list(range(3, 60))
    found = wide.generate(ids, mask, max_new_tokens=16, eos_token_id=ends, pad_token_id=0)
    lengths = set()
    for row, values in zip(rows, found, strict=True):
        expected = oracle.greedy(source, row, max_new_tokens=16, eos_token_id=ends)
        answer = values[ids.shape[1] :]
        assert answer[: len(expected)].tolist() == expected
        assert not answer[len(expected) :].any(), "what follows the end is padding"
        lengths.add(len(expected))
    assert len(lengths) > 1, "the rows ended at different steps"


def test_sampling_repeats_with_a_seed_and_not_without(wide):
    ids = np.array([PROMPT, PROMPT])
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 12}
    one, two = (wide.generate(ids, seed=7, **options) for _ in range(2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one[0], one[1]), "rows draw for themselves"
    assert not np.array_equal(one, wide.generate(ids, seed=8, **options))
    assert not np.array_equal(wide.generate(ids, **options), wide.generate(ids, **options))
    assert np.array_equal(one[:1], wide.generate(ids[:1], seed=7, **options)), "a neighbour changes nothing"


def test_settings_take_precedence_in_order(decoder, tmp_path):
    """Arguments over the given configuration over generation_config.json over defaults."""
    from precast.runtime.artifact import read_artifact
    from precast.runtime.artifact.publish import hash_files, write_config

    path = shutil.copytree(decoder, tmp_path / "copy")
    (path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": []}))
    found = read_artifact(decoder)
    from msgspec.structs import replace

    write_config(path, found.config, replace(found.contract, files=hash_files(path)))
    model = CompiledModelForCausalLM.from_pretrained(path)
    assert len(new_tokens(model)) == 3
    assert len(new_tokens(model, generation_config=GenerationConfig(max_new_tokens=4))) == 4
    assert len(new_tokens(model, generation_config={"max_new_tokens": 4}, max_new_tokens=5)) == 5
    assert len(new_tokens(model, generation_config=transformers.GenerationConfig(max_new_tokens=6))) == 6
    assert len(new_tokens(model, max_length=len(PROMPT) + 2)) == 2, "the call's length beats the file's other one"


def test_without_any_length_twenty_tokens_come(model):
    assert len(new_tokens(model, eos_token_id=[])) == 20


def test_processors_criteria_and_streamer(model):
    seen: list = []

    class Streamer:
        def put(self, tokens):
            seen.append(np.array(tokens).reshape(-1).tolist())

        def end(self):
            seen.append("end")

    def only_even(tokens, logits):
        assert (tokens.shape[0], logits.shape) == (1, (1, 320))
        return np.where(np.arange(320) % 2, -np.inf, logits)

    found = new_tokens(
        model, logits_processor=[only_even], streamer=Streamer(), max_new_tokens=20, eos_token_id=[],
        stopping_criteria=[lambda tokens, logits: tokens.shape[1] == len(PROMPT) + 5],
    )  # fmt: skip
    assert len(found) == 5
    assert all(token % 2 == 0 for token in found)
    assert seen == [PROMPT, *([token] for token in found), "end"]


def test_stop_strings_end_a_row(model, source):
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    # Tokens that are not in the text that is decoded would come between the letters of a stop string.
    never = [token for token in range(320) if token < 4 or not (model.tokenizer.token(token) or "Ġ").isascii()]
    asked = {"max_new_tokens": 24, "eos_token_id": [], "suppress_tokens": never, "repetition_penalty": 3.0}
    whole = new_tokens(model, **asked)
    text = model.tokenizer.decode(whole)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    found = new_tokens(model, stop_strings=[stop], **asked)
    expected = oracle.greedy(
        source, PROMPT, stop_strings=[stop], tokenizer=tokenizer, **{**asked, "eos_token_id": None}
    )
    assert found == expected == whole[: len(found)]
    assert stop in model.tokenizer.decode(found)
    assert stop not in model.tokenizer.decode(found[:-1])
    assert len(found) < len(whole)


def test_torch_in_torch_out_numpy_in_numpy_out(model, encoder):
    ids = torch.tensor([PROMPT])
    assert isinstance(model(ids).logits, torch.Tensor)
    assert isinstance(model.generate(ids, max_new_tokens=2), torch.Tensor)
    assert isinstance(model(ids.numpy()).logits, np.ndarray)
    assert torch.equal(model(ids).logits, torch.from_numpy(model(ids.numpy()).logits))
    other = CompiledModel.from_pretrained(encoder)
    assert isinstance(other(ids, torch.ones_like(ids)).last_hidden_state, torch.Tensor)
    assert isinstance(other(ids.numpy())[0], np.ndarray)


def test_results_own_their_memory(model, encoder):
    for opened in (model, CompiledModel.from_pretrained(encoder)):
        first = opened(np.array([PROMPT]))[0]
        kept = first.copy()
        opened(np.array([PROMPT[::-1]]))
        assert np.array_equal(first, kept)
        first.fill(9)
        assert np.array_equal(opened(np.array([PROMPT]))[0], kept), "what a caller does to an answer stays with it"


def test_an_abandoned_stream_leaves_the_next_call_right(model):
    expected = new_tokens(model, max_new_tokens=12)
    stream = model.stream([PROMPT[::-1]], max_new_tokens=12)
    for _ in range(3):
        next(stream)
    assert new_tokens(model, max_new_tokens=12) == expected
    with pytest.raises(PrecastError, match=r"new_session\(\)"):
        next(stream)


def test_streams_on_sessions_of_their_own_run_side_by_side(model):
    expected = [new_tokens(model, row, max_new_tokens=12) for row in (PROMPT, PROMPT[::-1])]
    streams = [model.new_session().stream([row], max_new_tokens=12) for row in (PROMPT, PROMPT[::-1])]
    assert [list(pair) for pair in zip(*zip(*streams, strict=True), strict=True)] == expected


def test_a_step_that_fails_leaves_the_next_call_right(model, monkeypatch):
    expected = new_tokens(model, max_new_tokens=8)

    def interrupt(tokens, logits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_tokens(model, logits_processor=[interrupt])
    assert new_tokens(model, max_new_tokens=8) == expected


@pytest.mark.parametrize("own_session", [False, True])
def test_eight_threads(model, own_session):
    """On one model they wait for each other, on sessions of their own they do not; every answer is right."""
    rows = [[(13 * k + n) % 300 + 3 for n in range(2 + k)] for k in range(8)]
    expected = [new_tokens(model, row, max_new_tokens=10) for row in rows]
    found: list = [None] * 8

    def work(index):
        opened = model.new_session() if own_session else model
        for _ in range(3):
            abandoned = opened.stream([rows[-1 - index]], max_new_tokens=9) if own_session else iter(())
            next(abandoned, None)
            found[index] = new_tokens(opened, rows[index], max_new_tokens=10)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_a_default_length_is_what_fits(model, monkeypatch):
    """Neither the 20 tokens of a call that names none, nor what generation_config.json says, is asked for."""
    prompt = [[5] * 40]
    assert model.generate(prompt, eos_token_id=[]).shape == (1, 48)
    assert len(list(model.stream(prompt, eos_token_id=[]))) == 8
    monkeypatch.setattr(model, "generation_config", GenerationConfig(max_new_tokens=900))
    assert model.generate(prompt, eos_token_id=[]).shape == (1, 48)
    for asked in ({"max_new_tokens": 9}, {"max_length": 49}, {"generation_config": {"max_new_tokens": 9}}):
        with pytest.raises(InputError, match="do not fit"):
            model.generate(prompt, **asked)


BAD_REQUESTS = [
    ({"input_ids": [[5] * 49]}, r"49 prompt tokens.*capacity of 48\. Compile a larger one.*: precast export .*"),
    ({"input_ids": [[5] * 40], "max_new_tokens": 9}, r"40 prompt tokens and 9 new.*48\. Ask for max_new_tokens=8"),
    ({"input_ids": [[5], [6]]}, r"2 rows; the model was compiled for 1.*batch_size=2.*dynamic_batch_size=True"),
    ({"input_ids": [5, 6]}, r"one dimension, \[2\]; give \[batch, length\], for one row \[1, 2\]"),
    ({"input_ids": [[[5]]]}, r"3 dimensions, \[1, 1, 1\]"),
    ({"input_ids": [[0.5]]}, "whole numbers.*float64"),
    ({"input_ids": [[]]}, r"empty: its shape is \[1, 0\]"),
    ({"input_ids": [[5], [6, 7]]}, "different lengths"),
    ({"input_ids": [[320]]}, r"the id 320; the model's vocabulary is 0\.\.319"),
    ({"input_ids": [[-1]]}, "the id -1"),
    ({"input_ids": np.array([[2**63 + 5]], np.uint64)}, f"the id {2**63 + 5}; the model's"),
    ({"input_ids": [[True]]}, "whole numbers.*bool"),
    ({"input_ids": "abc"}, r"must be \[batch, length\]; this has 0 dimensions"),
    ({"input_ids": {"input_ids": [[5]]}}, r"must be \[batch, length\]; this has 0 dimensions"),
    ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, r"shape \[1, 1\], input_ids \[1, 2\]"),
    ({"input_ids": [[5, 6]], "attention_mask": [[[[1, 1]]]]}, r"shape \[1, 1, 1, 2\], input_ids \[1, 2\]"),
    *(
        ({"input_ids": [[5, 6]], "attention_mask": mask}, "0 .padding. and 1")
        for mask in ([[1, 2]], [[0.5, 1]], [[np.nan, 1]], [[0, -np.inf]], [["1", "1"]])
    ),
    ({"input_ids": [[5, 6]], "attention_mask": [[0, 0]]}, "Row 0 of attention_mask has no token"),
    ({"input_ids": [[5]], "num_beams": 4}, r"takes 4 rows .num_beams.*compiled for 1.*batch_size=4"),
    ({"input_ids": [[5]], "max_tokens": 4}, r"does not know\. Did you mean 'max_new_tokens'\? It takes: max_"),
    ({"input_ids": [[5]], "do_sample": True, "temperature": 0.0}, r"must be above 0, not 0\.0.*do_sample=False"),
    ({"input_ids": [[5]], "max_new_tokens": 0, "do_sample": True, "top_p": 2}, "must be .* 1, not 0. top_p must"),
    ({"input_ids": [[5, 6, 7]], "max_length": 2}, "max_length is 2, the prompt alone has 3"),
    ({"input_ids": [[5]], "streamer": object()}, r"no put\(\)"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "message"), BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_bad_requests_are_explained_and_harmless(model, request_, message):
    with pytest.raises(InputError, match=message):
        model.generate(**request_)
    assert model.generate(np.array([PROMPT]), max_new_tokens=2).shape == (1, 8)


@pytest.mark.parametrize(
    "make", [np.ones, torch.ones, lambda shape: np.ones(shape, bool)], ids=["numpy", "torch", "bool"]
)
def test_ids_and_masks_may_be_of_any_type_that_holds_them(model, make):
    expected = new_tokens(model, max_new_tokens=4)
    small = np.array([PROMPT], np.uint8)
    assert model.generate(small, make((1, len(PROMPT))), max_new_tokens=4)[0, len(PROMPT) :].tolist() == expected


def test_an_encoder_explains_bad_requests(encoder):
    model = CompiledModel.from_pretrained(encoder)
    with pytest.raises(InputError, match=r"A row has 49 tokens; the model was compiled for 48.*--sequence-length 49"):
        model(np.ones((1, 49), int))
    with pytest.raises(InputError, match=r"The batch has 4 rows; the model was compiled for 3"):
        model(np.ones((4, 5), int))
    for segment in (2, -1):
        with pytest.raises(InputError, match=rf"token_type_ids holds the id {segment}; .* 0\.\.1"):
            model(np.ones((1, 2), int), token_type_ids=np.array([[0, segment]]))
    with pytest.raises(InputError, match=r"input_ids holds the id 320; .* 0\.\.319"):
        model(np.full((1, 2), 320))
    with pytest.raises(InputError, match=r"0 .padding. and 1"):
        model(np.ones((1, 2), int), np.full((1, 2), 2))
    with pytest.raises(InputError, match="Row 1 of attention_mask has no token"):
        model(np.ones((2, 3), int), np.array([[1, 1, 1], [0, 0, 0]]))
    padded = np.zeros((1, 60), int)
    padded[0, 20:60] = 1
    assert model(np.ones((1, 60), int), padded).last_hidden_state.shape == (1, 60, 64), "padding costs no capacity"


def test_what_the_tokenizer_gives_is_what_the_model_takes(model, encoder):
    batch = model.tokenizer("Water boils")
    assert list(batch) == ["input_ids", "attention_mask"]
    assert np.array_equal(
        model.generate(**batch, max_new_tokens=3), model.generate(batch["input_ids"], max_new_tokens=3)
    )
    torch_batch = model.tokenizer("Water boils", return_tensors="pt")
    assert isinstance(model.generate(**torch_batch, max_new_tokens=3), torch.Tensor)
    vectors = CompiledModel.from_pretrained(encoder)
    assert vectors(**vectors.tokenizer("Water boils")).last_hidden_state.shape[0] == 1


def test_a_model_says_what_it_is(model, encoder):
    assert repr(model) == (
        f"CompiledModelForCausalLM({str(model.artifact.path)!r}, task='text-generation', batch_size=1, "
        f"sequence_length=[48], backend='onnx', device='cpu')"
    )
    pipe = pipeline(model=encoder, pooling="mean")
    assert repr(pipe) == f"FeatureExtractionPipeline({pipe.model!r}, pooling='mean')"
    assert "batch_size=3, sequence_length=[16, 48]" in repr(pipe)


def test_the_wrong_class_is_refused(encoder, decoder):
    with pytest.raises(
        UsageError, match=r"compiled for feature-extraction, which CompiledModelForCausalLM does not do"
    ):
        CompiledModelForCausalLM.from_pretrained(encoder)
    assert type(CompiledModel.from_pretrained(encoder)) is CompiledModelForFeatureExtraction
    with pytest.raises(UsageError, match=r"does not know beams"):
        CompiledModel.from_pretrained(decoder, beams=3)
    with pytest.raises(HostError, match=r"cannot run on the device 'cuda': it was built with .*CPUExecutionProvider"):
        CompiledModel.from_pretrained(decoder, device="cuda")


def test_save_pretrained_copies_all_or_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "copy")
    assert new_tokens(CompiledModelForCausalLM.from_pretrained(tmp_path / "copy")) == new_tokens(model)
    with pytest.raises(PrecastError, match="force=True"):
        model.save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "copy", force=True)


def test_from_pretrained_exports_on_request(source):
    model = CompiledModelForCausalLM.from_pretrained(source, export=True, sequence_length=32)
    assert model.capacity == 32
    assert new_tokens(model, max_new_tokens=8) == oracle.greedy(source, PROMPT, max_new_tokens=8)
