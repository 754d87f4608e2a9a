"""Our pipelines beside transformers' own, on the same checkpoint: the same answers, key by key."""

from __future__ import annotations

import copy
import json
import re
import warnings

import numpy as np
import oracle
import pytest
import tiny
import torch
import transformers
from compare import assert_same, assert_steps_are_the_call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.pipelines.pt_utils import KeyDataset
from wordpiece import wordpiece

from precast.runtime import CompiledModel, pipeline
from precast.runtime.errors import InputError, PrecastWarning, UsageError
from precast.runtime.generation.config import GenerationConfig
from precast.runtime.pipelines import PIPELINES

NAMES = ["O", "B-人", "I-人", "B-Ort", "I-Ort"]
NLI = ["contradiction", "neutral", "entailment"]
texts = st.lists(st.sampled_from([*" ".join(tiny.TEXTS).split(), "zzz", "天气"]), min_size=1, max_size=8).map(" ".join)
many = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, artifact):
    """`pairs("AutoModelForMaskedLM", labels=…)`: checkpoint with a WordPiece tokenizer, and its artifact."""
    root, made = tmp_path_factory.mktemp("words"), {}

    def make(auto, labels=(), model_type="bert", **changes):
        key = (auto, tuple(labels), model_type, repr(changes))
        if key not in made:
            if labels:
                changes["id2label"] = dict(enumerate(labels))
                changes["label2id"] = {name: index for index, name in enumerate(labels)}
            path = root / f"checkpoint-{len(made)}"
            tiny.save_checkpoint(path, tiny.config_for(model_type, **changes), getattr(transformers, auto))
            wordpiece().save_pretrained(path)
            choices = {"num_choices": changes["num_choices"]} if "num_choices" in changes else {}
            made[key] = path, artifact(path, batch_size=3, sequence_length=(16, 48), **choices)
        return made[key]

    return make


def theirs(task, path, auto, **options):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return transformers.pipeline(task, model=oracle.eager(path, auto), tokenizer=tokenizer, device="cpu", **options)


@pytest.fixture(scope="module")
def classifiers(pairs):
    auto = "AutoModelForSequenceClassification"
    path, compiled = pairs(auto, ["好评 (4–5)", "差评", "中立"])
    return theirs("text-classification", path, auto), pipeline("text-classification", compiled)


@many
@given(given=st.one_of(texts, st.lists(texts, min_size=1, max_size=7)), top_k=st.sampled_from([..., None, 1, 2]))
def test_text_classification(classifiers, given, top_k):
    eager, compiled = classifiers
    options = {} if top_k is ... else {"top_k": top_k}
    assert_same(compiled(given, **options), eager(given, **options))


def test_text_classification_told_once_or_by_the_call(classifiers):
    """transformers puts a list around one text's labels where it is its pipeline() that was told top_k."""
    eager, compiled = classifiers
    for options in ({"top_k": None}, {"top_k": 1}, {"max_length": 5}):
        told, ours = theirs_with(eager, eager.tokenizer, **options), pipeline(model=compiled.model, **options)
        for each in (tiny.TEXTS[0], tiny.TEXTS[:2], {"text": tiny.TEXTS[0], "text_pair": "Paris"}):
            assert_same(ours(each), told(each))
            assert_same(ours(each, top_k=2), told(each, top_k=2))
            assert_same(compiled(each, **options), eager(each, **options))
    # Of transformers 4: in the order of the model's own labels.
    every = pipeline(model=compiled.model, return_all_scores=True)(tiny.TEXTS[0])
    assert [each["label"] for each in every[0]] == ["好评 (4–5)", "差评", "中立"]
    assert compiled(tiny.TEXTS[:1], return_all_scores=True) == every
    assert compiled(tiny.TEXTS[0], return_all_scores=False) == compiled(tiny.TEXTS[0])


@pytest.mark.filterwarnings("ignore:`max_length` is ignored when")
@many
@given(
    text=texts,
    options=st.fixed_dictionaries(
        {},
        optional={
            "max_length": st.integers(4, 12),
            "truncation": st.sampled_from([True, False, None, "longest_first", "only_first", "do_not_truncate"]),
            "padding": st.sampled_from([True, False, "longest", "do_not_pad"]),
            "add_special_tokens": st.booleans(),
        },
    ),
)
def test_texts_are_cut_as_by_transformers(classifiers, text, options):
    eager, compiled = classifiers
    expected = eager.tokenizer(text, **options)["input_ids"]
    for each in (options, {"tokenizer_kwargs": options}):
        assert compiled.preprocess(text, **each)["input_ids"].tolist() == [expected]


def test_what_is_told_of_texts_is_checked(classifiers):
    compiled = classifiers[1]
    with pytest.raises(UsageError, match=r"truncation='yes' .* Choose one of: True, False, 'longest_first'"):
        compiled("x", truncation="yes")
    with pytest.raises(UsageError, match="max_length=0 is of the wrong type: Expected `int` >= 1"):
        compiled("x", max_length=0)
    with pytest.raises(UsageError, match=r"unknown field `trunc`"):
        compiled("x", tokenizer_kwargs={"trunc": True})
    with pytest.raises(UsageError, match=r"The tokenizer's options are .*max_length"):
        compiled.preprocess("x", max_length=0)


def test_inputs_may_be_pairs_generators_and_datasets(classifiers):
    eager, compiled = classifiers
    pair = tiny.TEXTS[0], tiny.TEXTS[3]
    expected = eager({"text": pair[0], "text_pair": pair[1]})
    assert_same(compiled(pair), expected)
    assert_same(compiled([pair, pair]), [expected, expected])
    with pytest.raises(InputError, match="several are a list"):
        compiled(tuple(tiny.TEXTS))
    rows = [{"line": text, "n": index} for index, text in enumerate(tiny.TEXTS * 2)]
    dataset = KeyDataset(rows, "line")
    taken = []

    def lines():
        for row in rows:
            taken.append(row["n"])
            yield row["line"]

    answers = compiled(lines(), batch_size=2)
    assert taken == [], "as its answers are asked for"
    first = next(answers)
    assert taken == [0, 1]
    everything = [first, *answers]
    assert_same(everything, list(eager(dataset)))
    for given_ in (dataset, iter(KeyDataset(rows, "line")), map(str, tiny.TEXTS * 2)):
        assert_same(list(compiled(given_)), everything)
    with pytest.raises(UsageError, match="does not know topk"):
        compiled(lines(), topk=1)
    for wrong in (0, "8", 2.5):
        with pytest.raises(UsageError, match="batch_size must be a whole number from 1"):
            pipeline(model=compiled.model, batch_size=wrong)
    assert_same(pipeline(model=compiled.model, batch_size=5)(tiny.TEXTS), eager(tiny.TEXTS))


def test_pipelines_take_what_transformers_take(pairs, classifiers, tmp_path):
    """Its arguments in scripts that are carried over: the same tokenizer, the CPU by its number."""
    path, compiled = pairs("AutoModelForSequenceClassification", ["好评 (4–5)", "差评", "中立"])
    expected = classifiers[1](tiny.TEXTS)
    same = transformers.AutoTokenizer.from_pretrained(path)
    name = classifiers[1].model.artifact.contract.source.model
    for tokenizer in (str(compiled), compiled, path, name, same, classifiers[1].tokenizer, None):
        ours = pipeline("sentiment-analysis", str(compiled), tokenizer=tokenizer, device=-1, prepack=False)
        assert_same(ours(tiny.TEXTS), expected)
    assert_same(pipeline(model=classifiers[1].model, device=torch.device("cpu"))(tiny.TEXTS), expected)
    other = pipeline(model=classifiers[1].model, tokenizer=path)
    with pytest.raises(UsageError, match="this pipeline has another tokenizer"):
        other.save_pretrained(tmp_path / "other")
    classifiers[1].save_pretrained(tmp_path / "out")
    assert_same(pipeline(model=tmp_path / "out", prepack=False)(tiny.TEXTS), expected)
    with pytest.raises(UsageError, match=r"tokenizer='nobody/nothing' is neither a directory"):
        pipeline(model=classifiers[1].model, tokenizer="nobody/nothing")("x")
    with pytest.raises(UsageError, match="device='cuda' comes too late"):
        pipeline(model=classifiers[1].model, device=0)
    with pytest.raises(UsageError, match="There is no device 'cuda:7'"):
        pipeline(model=compiled, device=7)


def test_a_tokenizer_of_another_length_cuts_there(taggers):
    """What it says is transformers' limit, and where the model was compiled for less it is no licence to cut."""
    eager, compiled = taggers
    long = " ".join(tiny.TEXTS)
    shorter, longer = (copy.deepcopy(eager.tokenizer) for _ in range(2))
    shorter.model_max_length, longer.model_max_length = 20, 100
    assert_same(pipeline(model=compiled.model, tokenizer=shorter)(long), theirs_with(eager, shorter)(long))
    with pytest.raises(InputError, match="was compiled for 48"):
        pipeline(model=compiled.model, tokenizer=longer)(long)
    assert_same(pipeline(model=compiled.model, tokenizer=longer)(long, truncation=True), eager(long))


def theirs_with(eager, tokenizer, **options):
    return transformers.pipeline(eager.task, model=eager.model, tokenizer=tokenizer, device="cpu", **options)


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_text_classification_scores_and_pairs(classifiers, function):
    eager, compiled = classifiers
    pair = {"text": tiny.TEXTS[0], "text_pair": tiny.TEXTS[3]}
    assert_same(
        compiled([pair, pair], top_k=None, function_to_apply=function),
        eager([pair, pair], top_k=None, function_to_apply=function),
    )


@pytest.mark.parametrize(
    ("problem", "labels"),
    [("regression", ["x"]), ("multi_label_classification", ["a", "b"]), (None, ["x"]), ("regression", ["a", "b"])],
)
def test_text_classification_by_problem_type(pairs, problem, labels):
    auto = "AutoModelForSequenceClassification"
    path, compiled = pairs(auto, labels)
    eager, ours = theirs("text-classification", path, auto), pipeline(model=compiled)
    eager.model.config.problem_type = ours.model.config["problem_type"] = problem
    assert_same(ours(tiny.TEXTS, top_k=None), eager(tiny.TEXTS, top_k=None))


@pytest.fixture(scope="module")
def taggers(pairs):
    auto = "AutoModelForTokenClassification"
    path, compiled = pairs(auto, NAMES)
    return theirs("ner", path, auto), pipeline("ner", compiled)


@many
@given(text=texts, strategy=st.sampled_from(["none", "simple", "first", "average", "max"]))
def test_token_classification(taggers, text, strategy):
    eager, compiled = taggers
    found = compiled(text, aggregation_strategy=strategy)
    assert_same(found, eager(text, aggregation_strategy=strategy))
    for entity in found:
        assert text[entity["start"] : entity["end"]].strip()


def test_token_classification_of_lists_and_long_texts(taggers):
    eager, compiled = taggers
    assert_same(compiled(tiny.TEXTS, ignore_labels=[]), eager(tiny.TEXTS, ignore_labels=[]))
    long = " ".join(tiny.TEXTS)
    options = {"stride": 8, "aggregation_strategy": "simple"}
    assert_same(compiled([long, "Paris"], **options), eager([long, "Paris"], **options))
    with pytest.raises(UsageError, match="takes an aggregation_strategy"):
        compiled(long, stride=8)
    # The tokenizer says 48, to which transformers cuts by itself.
    assert_same(compiled(long), eager(long))
    with pytest.raises(InputError, match="A text is a str"):
        compiled({"text": long})


def test_byte_level_words_are_told_by_spaces(checkpoint, artifact):
    auto = "AutoModelForTokenClassification"
    path = checkpoint("bert", auto, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    eager, compiled = theirs("ner", path, auto), pipeline("ner", artifact(path, batch_size=2))
    for strategy in ("none", "simple", "average"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Tokenizer does not support real words")
            expected = eager(tiny.TEXTS[1:4:2], aggregation_strategy=strategy)
        assert_same(compiled(tiny.TEXTS[1:4:2], aggregation_strategy=strategy), expected)


def test_fill_mask(pairs):
    auto = "AutoModelForMaskedLM"
    path, compiled = pairs(auto)
    eager, ours = theirs("fill-mask", path, auto), pipeline("fill-mask", compiled)
    batch = ["The [MASK] of France.", "今天[MASK]气很[MASK]。", "Water boils at 100 degrees [MASK] sea level."]
    assert_same(ours(batch), eager(batch))
    assert_same(ours(batch[:1]), eager(batch[:1]))
    long = batch[0] + " level" * 60
    assert_same(ours(long, tokenizer_kwargs={"truncation": True}), eager(long, tokenizer_kwargs={"truncation": True}))
    assert_same(ours(batch[1], top_k=3), eager(batch[1], top_k=3))
    options = {"targets": ["paris", "天", "is", "天"], "top_k": 5}
    assert_same(ours(batch[0], **options), eager(batch[0], **options))
    with pytest.raises(InputError, match=r"has no \[MASK\]"):
        ours("no mask")
    with pytest.raises(InputError, match=r"'boiling water' is .* tokens"):
        ours(batch[0], targets="boiling water")


def test_feature_extraction(pairs):
    path, compiled = pairs("AutoModel")
    eager, ours = theirs("feature-extraction", path, "AutoModel"), pipeline(model=compiled)
    assert_same(ours(tiny.TEXTS), eager(tiny.TEXTS))
    assert_same(ours(tiny.TEXTS[3]), eager(tiny.TEXTS[3]))
    states = np.array(eager(tiny.TEXTS[3])[0])
    assert_same(ours(tiny.TEXTS[3], pooling="mean"), states.mean(0).tolist())
    assert_same(ours(tiny.TEXTS[3:4], pooling="cls"), [states[0].tolist()])
    with pytest.raises(UsageError, match="choose one of: none, mean, cls"):
        ours("x", pooling="sum")


@pytest.mark.parametrize("multi_label", [False, True])
def test_zero_shot(pairs, multi_label):
    auto = "AutoModelForSequenceClassification"
    path, compiled = pairs(auto, NLI)
    eager, ours = theirs("zero-shot-classification", path, auto), pipeline("zero-shot-classification", compiled)
    options = {"candidate_labels": ["天气", "water", "Paris", "sea"], "multi_label": multi_label}
    assert_same(ours(tiny.TEXTS[2:4], **options), eager(tiny.TEXTS[2:4], **options))
    options = {"candidate_labels": "water, sea", "hypothesis_template": "It is about {}.", "multi_label": multi_label}
    assert_same(ours(tiny.TEXTS[2], **options), eager(tiny.TEXTS[2], **options))
    labels, long = ["sea", "water"], " ".join(tiny.TEXTS)
    assert_same(ours(long, labels), eager(long, labels))
    assert_same(ours(sequences=[long], candidate_labels=labels), eager(sequences=[long], candidate_labels=labels))
    with pytest.raises(InputError, match="Name the labels"):
        ours("x")


def test_text_generation(decoder, checkpoint):
    path = checkpoint("llama")
    eager = theirs("text-generation", path, "AutoModelForCausalLM", do_sample=False)
    ours = pipeline("text-generation", decoder)
    options = {"max_new_tokens": 6, "return_full_text": False}
    for prompt in (tiny.TEXTS[0], tiny.TEXTS[3]):
        assert_same(ours(prompt, max_new_tokens=6), eager(prompt, max_new_tokens=6))
        assert_same(ours([prompt, "Water"], **options), eager([prompt, "Water"], **options))
    talk = [{"role": "user", "content": "你好"}]
    started = [*talk, {"role": "assistant", "content": "The"}]
    for messages in (talk, started, [talk, started]):
        assert_same(ours(messages, max_new_tokens=4), eager(messages, max_new_tokens=4))
    assert_same(
        ours(text_inputs=prompt, prefix="Paris ", **options), eager(text_inputs=prompt, prefix="Paris ", **options)
    )
    found = eager(prompt, **options)[0]["generated_text"]
    told = {**options, "stop_sequence": re.findall("[!-~]{2}", found)[-1], "padding": True}
    assert_same(ours(prompt, **told), eager(prompt, **told))
    assert_same(ours(prompt, add_special_tokens=False, **options), eager(prompt, add_special_tokens=False, **options))
    [answer] = ours("Water")
    assert answer["generated_text"].startswith("Water"), "as long as fits"


@pytest.fixture(scope="module")
def generators(checkpoint, artifact):
    """A decoder for one row, and for three."""
    path = checkpoint("llama")
    wide = artifact(path, batch_size=3, dynamic_batch_size=True)
    return path, [pipeline("text-generation", each) for each in (artifact(path), wide)]


PROMPTS = [tiny.TEXTS[0], "Water", tiny.TEXTS[3], "A compiler"]


def test_rows_of_arguments_go_with_their_prompts(generators):
    """However many prompts are run together, and one row stands for all."""
    options = {"max_new_tokens": 4, "guidance_scale": 3.0, "return_full_text": False, "eos_token_id": []}
    away, mask = torch.tensor([[5, 6], [200, 201], [0, 9], [30, 31]]), [[1, 1], [1, 1], [0, 1], [1, 1]]
    for pipe in generators[1]:
        alone = [pipe(each, negative_prompt_ids=[row], negative_prompt_attention_mask=[real], **options)
                 for each, row, real in zip(PROMPTS, away, mask, strict=True)]  # fmt: skip
        told = {"negative_prompt_ids": away, "negative_prompt_attention_mask": mask, **options}
        for size in (None, 2, 4):
            assert pipe(PROMPTS, batch_size=size, **told) == alone
        assert list(pipe(iter(PROMPTS), **told)) == alone
        steps = {name: value for name, value in told.items() if name != "return_full_text"}
        assert pipe.postprocess(pipe.forward(pipe.preprocess(PROMPTS), **steps), return_full_text=False) == alone
        same = [pipe(each, negative_prompt_ids=[[5, 6]], **options) for each in PROMPTS]
        assert same != alone
        assert pipe(PROMPTS, negative_prompt_ids=[[5, 6]], **options) == same
        with pytest.raises(InputError, match="negative_prompt_ids has 3 rows; there are 4 inputs"):
            pipe(PROMPTS, negative_prompt_ids=away[:3], **options)
        with pytest.raises(InputError, match=r"negative_prompt_ids has 3 rows; there are \d or more inputs"):
            list(pipe(iter(PROMPTS), negative_prompt_ids=away[:3], **options))


def test_functions_are_told_which_input_they_are_asked_about(generators):
    options = {"max_new_tokens": 1, "return_full_text": False}
    for pipe in generators[1]:
        texts = [pipe.tokenizer.decode([40 + index]) for index in range(4)]
        assert len({*texts}) == 4
        answers = pipe(PROMPTS, prefix_allowed_tokens_fn=lambda index, _: [40 + index], **options)
        assert [each["generated_text"] for [each] in answers] == texts


def test_languages_go_with_their_sounds(generators):
    """In the options and in the dict of options that transformers takes besides."""
    own, languages = generators[1][0]._options_of, ["de", "fr", "en"]
    assert own({"language": languages}, [1, 2], 3) == {"language": ["fr", "en"]}
    assert own({"generate_kwargs": {"language": languages, "task": "x"}}, [0], None) == {
        "generate_kwargs": {"language": ["de"], "task": "x"}
    }
    assert own({"language": "fr"}, [1, 2], 3) == {"language": "fr"}


def test_what_generate_returns_besides_is_beside_the_text(generators):
    """By transformers' names, as lists; and log-probabilities."""
    path, [pipe, wide] = generators
    eager = theirs("text-generation", path, "AutoModelForCausalLM", do_sample=False)
    told = {"max_new_tokens": 5, "eos_token_id": 2, "return_dict_in_generate": True, "output_scores": True}
    for options in ({**told, "output_logits": True}, {**told, "num_beams": 2, "num_return_sequences": 2}):
        for prompts in (PROMPTS[0], PROMPTS[:3]):
            assert_same((wide if "num_beams" in options else pipe)(prompts, **options), eager(prompts, **options))
    asked = {"max_new_tokens": 5, "eos_token_id": [], "top_logprobs": 2}
    for ours in (pipe, wide):
        for prompt, [found] in zip(PROMPTS, ours(PROMPTS, **asked), strict=True):
            expected = ours.model.generate([ours.tokenizer.encode(prompt)], **asked)
            assert list(found) == ["generated_text", "logprobs", "top_logprobs_ids", "top_logprobs"]
            for name in ("logprobs", "top_logprobs_ids", "top_logprobs"):
                assert_same(found[name], expected[name][0].tolist())
    config = GenerationConfig(return_dict_in_generate=True, output_scores=True, max_new_tokens=2)
    assert [*pipe("Water", generation_config=config)[0]] == ["generated_text", "scores"]
    assert [*pipe("Water", max_new_tokens=2)[0]] == ["generated_text"]


def test_what_a_pipeline_makes_of_its_inputs_cannot_be_given(generators):
    with pytest.raises(UsageError, match="attention_mask is what TextGenerationPipeline makes of its inputs"):
        generators[1][0]("Water", attention_mask=[[1]])


def test_multiple_choice(pairs):
    path, compiled = pairs("AutoModelForMultipleChoice", num_choices=3)
    inputs = [{"prompt": tiny.TEXTS[0], "choices": ["Paris", "天气", "It boils."]},
              {"prompt": tiny.TEXTS[3], "choices": ["好", "a compiler", "naïve"]}]  # fmt: skip
    ours, tokenizer = pipeline(model=compiled), transformers.AutoTokenizer.from_pretrained(path)
    for given_, found in zip(inputs, ours(inputs), strict=True):
        batch = tokenizer([given_["prompt"]] * 3, given_["choices"], return_tensors="pt", padding=True)
        with torch.inference_mode():
            logits = oracle.eager(path, "AutoModelForMultipleChoice")(**{k: v[None] for k, v in batch.items()}).logits[
                0
            ]
        assert_same(found["scores"], logits.softmax(-1).tolist())
        assert found["answer"] == given_["choices"][found["choice"]]
        assert found["score"] == max(found["scores"])
    with pytest.raises(InputError, match="the same number of choices"):
        ours([inputs[0], {"prompt": "x", "choices": ["y"]}])
    with pytest.raises(InputError, match="An input is"):
        ours({"prompt": "x"})


@pytest.fixture(scope="module")
def summarizer(tmp_path_factory, artifact):
    """A T5 that wants its translations announced."""
    config = transformers.T5Config(
        vocab_size=tiny.VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0, task_specific_params={
            "translation": {"prefix": "to German: "}, "summarization": {"max_length": 300},
            "translation_en_to_de": {
                "prefix": "in German: ", "max_length": 9, "num_beams": 2, "repetition_penalty": 1.7,
            },
        },
    )  # fmt: skip
    path = tmp_path_factory.mktemp("t5")
    tiny.save_checkpoint(path, config, transformers.AutoModelForSeq2SeqLM)
    return path, artifact(path, batch_size=2)


@pytest.mark.parametrize(
    ("task", "key"), [(None, "generated_text"), ("summarization", "summary_text"), ("translation", "translation_text")]
)
def test_text_of_text(summarizer, task, key):
    path, compiled = summarizer
    ours = pipeline(task, compiled)
    prefix = "to German: " if task == "translation" else ""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    answers = ours(tiny.TEXTS[2:5], max_new_tokens=6)
    for text, found in zip(tiny.TEXTS[2:5], answers, strict=True):
        batch = tokenizer(prefix + text, return_tensors="pt")
        with torch.inference_mode():
            ids = oracle.eager(path, "AutoModelForSeq2SeqLM").generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6, do_sample=False
            )
        assert found == {key: tokenizer.decode(ids[0], skip_special_tokens=True)}
    assert ours(tiny.TEXTS[2], max_new_tokens=6) == answers[:1]
    several = ours(tiny.TEXTS[2:3], max_new_tokens=6, num_beams=2, num_return_sequences=2)
    assert [list(each) for each in several[0]] == [[key], [key]]
    begun = [[0, 70], [0, 80], [0, 90]]
    alone = [ours([text], decoder_input_ids=[row], max_new_tokens=6)[0]
             for text, row in zip(tiny.TEXTS[2:5], begun, strict=True)]  # fmt: skip
    assert ours(tiny.TEXTS[2:5], decoder_input_ids=begun, max_new_tokens=6) == alone != answers
    [told] = ours(tiny.TEXTS[2:3], max_new_tokens=6, logprobs=True)
    assert list(told) == [key, "logprobs"]
    # Nothing says how long an answer may be: as long as fits, the start included.
    assert ours.forward(ours.preprocess(tiny.TEXTS[2]), eos_token_id=[])["sequences"].shape == (1, 48)


def test_a_task_has_settings_of_its_own(summarizer):
    """As transformers 4's pipelines go by them: before the model's own, after the call's."""
    path, compiled = summarizer
    ours, tokenizer = pipeline("translation_en_to_de", compiled), transformers.AutoTokenizer.from_pretrained(path)
    batch = tokenizer("in German: " + tiny.TEXTS[2], return_tensors="pt").input_ids
    asked = {"num_beams": 2, "repetition_penalty": 1.7, "do_sample": False}
    for given_, length in (({}, {"max_length": 9}), ({"max_new_tokens": 4}, {"max_new_tokens": 4})):
        with torch.inference_mode():
            ids = oracle.eager(path, "AutoModelForSeq2SeqLM").generate(input_ids=batch, **asked, **length)
        expected = [{"translation_text": tokenizer.decode(ids[0], skip_special_tokens=True)}]
        assert ours(tiny.TEXTS[2], **given_) == expected
        assert ours(tiny.TEXTS[2], generation_config=given_) == expected
    assert ours.forward(ours.preprocess("x"), num_beams=1, eos_token_id=[])["sequences"].shape == (1, 9)


@pytest.fixture(scope="module")
def reader(pairs):
    return pipeline("question-answering", pairs("AutoModelForQuestionAnswering")[1])


def test_question_answering_reads_long_contexts_in_pieces(reader):
    long = {"question": "What boils?", "context": " ".join(tiny.TEXTS * 3)}
    answers = reader([long, {"question": "谁?", "context": tiny.TEXTS[3]}], top_k=3, doc_stride=4)
    for given_, found in zip((long["context"], tiny.TEXTS[3]), answers, strict=True):
        assert [each["answer"] for each in found] == [given_[each["start"] : each["end"]] for each in found]
        assert [each["score"] for each in found] == sorted((each["score"] for each in found), reverse=True)
    assert len(reader.preprocess(long)["input_ids"]) > 3
    assert len(reader.preprocess(long, truncation=True)["input_ids"]) == 1
    nothing = reader(long, handle_impossible_answer=True, top_k=1000)
    assert {"start": 0, "end": 0, "answer": ""}.items() <= min(nothing, key=lambda each: len(each["answer"])).items()
    with pytest.raises(InputError, match="The question alone has"):
        reader(question="What? " * 48, context="x")
    with pytest.raises(InputError, match="empty"):
        reader(question="What?", context=" ")
    # What the tokenizers library answers with a panic.
    room = max(reader.model.lengths) - len(reader.tokenizer.encode(long["question"], ""))
    assert reader(long, doc_stride=room - 1)["answer"]
    with pytest.raises(InputError, match=rf"doc_stride={room} must be less than {room}"):
        reader(long, doc_stride=room)


STEPS = {
    "feature-extraction": ("AutoModel", {}, [tiny.TEXTS[0], tiny.TEXTS[3]], {"pooling": "cls"}),
    "fill-mask": ("AutoModelForMaskedLM", {}, ["今天[MASK]气", "The [MASK] of France."], {"top_k": 2}),
    "text-classification": (
        "AutoModelForSequenceClassification", {"labels": NLI}, tiny.TEXTS[:2] * 2,
        {"function_to_apply": "none", "truncation": True},
    ),
    "token-classification": (
        "AutoModelForTokenClassification", {"labels": NAMES}, [tiny.TEXTS[3], " ".join(tiny.TEXTS)],
        {"aggregation_strategy": "simple", "stride": 8},
    ),
    "question-answering": (
        "AutoModelForQuestionAnswering", {},
        [{"question": "What boils?", "context": " ".join(tiny.TEXTS[:3])}, {"question": "谁?", "context": "好"}],
        {"top_k": 3, "doc_stride": 4, "max_answer_len": 2},
    ),
    "zero-shot-classification": (
        "AutoModelForSequenceClassification", {"labels": NLI}, tiny.TEXTS[1:3],
        {"candidate_labels": ["water", "天气"], "hypothesis_template": "{}!", "multi_label": True},
    ),
    "multiple-choice": (
        "AutoModelForMultipleChoice", {"num_choices": 3},
        [{"prompt": tiny.TEXTS[0] * 3, "choices": ["Paris", "天气", each]} for each in ("sea", "好")],
        {"truncation": True},
    ),
}  # fmt: skip
GENERATING = {
    "text-generation": {"max_length": 20, "return_full_text": False},
    "text2text-generation": {"max_new_tokens": 4, "prefix": "Paris "},
    "summarization": {"max_new_tokens": 4, "num_beams": 2},
    "translation": {"max_new_tokens": 4, "truncation": True},
}
OF_TEXT = [task for task, (place, _) in PIPELINES.items() if not place.startswith(("vision:", "audio:"))]


@pytest.mark.parametrize("task", OF_TEXT)
def test_calling_is_the_three_steps_in_turn(pairs, decoder, summarizer, task):
    if task in GENERATING:
        compiled = decoder if task == "text-generation" else summarizer[1]
        assert_steps_are_the_call(task, compiled, ["Water", tiny.TEXTS[0], "天气"], **GENERATING[task])
    else:
        auto, changes, inputs, options = STEPS[task]
        assert_steps_are_the_call(task, pairs(auto, **changes)[1], inputs, **options)


def test_the_steps_of_a_list_give_each_prompt_its_own_length(decoder):
    """Where nothing says how long, what fits behind the prompts that run together, not behind the longest of all."""
    assert_steps_are_the_call("text-generation", decoder, ["Water", tiny.TEXTS[0], "天气"])


def test_options_may_be_given_once(pairs, taggers):
    _, compiled = pairs("AutoModelForTokenClassification", NAMES)
    simple = pipeline(model=compiled, aggregation_strategy="simple", threads=1)
    assert_same(simple(tiny.TEXTS[0]), taggers[1](tiny.TEXTS[0], aggregation_strategy="simple"))
    same = pipeline("token-classification", CompiledModel.from_pretrained(compiled))
    assert_same(same(tiny.TEXTS[0]), taggers[1](tiny.TEXTS[0]))


def test_mistakes_are_named(classifiers, decoder, encoder):
    with pytest.raises(
        UsageError,
        match=r"does not know topk. Did you mean top_k\? Its options are: .*, top_k, truncation, batch_size",
    ):
        classifiers[1]("x", topk=1)
    with pytest.raises(UsageError, match="Did you mean 'fill-mask'"):
        pipeline("fillmask", encoder)
    with pytest.raises(UsageError, match=r"compiled for feature-extraction.*Ask it for: feature-extraction"):
        pipeline("text-generation", encoder)
    with pytest.raises(UsageError, match="Name the model"):
        pipeline("fill-mask")
    with pytest.raises(InputError, match="list of inputs is empty"):
        classifiers[1]([])
    with pytest.raises(InputError, match="An input is a text"):
        classifiers[1](7)
    with pytest.raises(UsageError, match="choose one of: softmax, sigmoid, none"):
        classifiers[1]("x", function_to_apply="relu")
    with pytest.raises(InputError, match="An input is a text, or messages"):
        pipeline(model=decoder)(7)


@pytest.mark.parametrize("labels", [["a", "b"], "a"])
def test_zero_shot_without_entailment_takes_the_last_label(pairs, labels):
    """As transformers does, with a warning."""
    auto = "AutoModelForSequenceClassification"
    path, compiled = pairs(auto, ["好评 (4–5)", "差评", "中立"])
    eager, ours = theirs("zero-shot-classification", path, auto), pipeline("zero-shot-classification", compiled)
    with pytest.warns(PrecastWarning, match="one of whose labels is 'entailment'; this model's are: 好评"):
        found = ours(tiny.TEXTS[0], candidate_labels=labels)
    assert_same(found, eager(tiny.TEXTS[0], candidate_labels=labels))
    for nothing in ("", None, ["Water", ""]):
        with pytest.raises(InputError, match="An input is a text of one character at least; this is"):
            ours(nothing, candidate_labels=labels)
    with pytest.raises(UsageError, match="candidate_labels=None is of the wrong type"):
        pipeline("zero-shot-classification", ours.model, candidate_labels=labels)("Water", candidate_labels=None)


def test_pairs_of_texts_as_they_once_were(classifiers):
    eager, ours = classifiers
    pair = [[["Water here", "天气"]]]
    assert_same(ours(pair), eager(pair))
    with pytest.raises(InputError, match="An input is a text, or a pair of texts"):
        ours(pair[0])


def test_empty_prompts_begin_with_bos(checkpoint, decoder):
    eager = theirs("text-generation", checkpoint("llama"), "AutoModelForCausalLM")
    ours = pipeline(model=decoder)
    options = {"max_new_tokens": 5, "do_sample": False}
    answer = ours("", **options)
    assert_same(answer, eager("", **options))
    assert ours(["Water", ""], **options) == [ours("Water", **options), answer]
    ours.model.generation_config = GenerationConfig()
    with pytest.raises(InputError, match="A prompt is empty, and there is no bos_token_id"):
        ours("", **options)
    assert ours("", bos_token_id=1, **options) == answer


def test_text_tasks_need_neither_torch_nor_transformers(pairs):
    import subprocess
    import sys

    _, compiled = pairs("AutoModelForTokenClassification", NAMES)
    code = f"""
import sys, json
from precast.runtime import pipeline
print(json.dumps(pipeline(model={str(compiled)!r})("天气 Paris", ignore_labels=[])))
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"天", "气"} <= {each["word"] for each in json.loads(done.stdout)} | {"天", "气"}
