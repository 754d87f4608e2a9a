"""Generation settings as other people publish them: read as transformers does, and refused by the call they change."""

from __future__ import annotations

import copy
import shutil
import types

import handmade
import numpy as np
import oracle
import pytest
import torch
import transformers

from precast.runtime import CompiledModelForCausalLM, GenerationConfig, pipeline, validation_worker
from precast.runtime.errors import FormatError, InputError
from precast.runtime.generation.unsupported import UNSUPPORTED
from precast.runtime.models.languages import language_id

PROMPT = [5, 9, 30, 7, 200, 31]


@pytest.fixture
def reading(decoder):
    """`reading(settings)`: the model with these as its generation_config.json."""
    model = CompiledModelForCausalLM.from_pretrained(decoder)

    def read(settings):
        model.__dict__["_generation_file"], model.generation_config = settings, None
        return model

    return read


HARMLESS = [
    {"chat_format": "chatml", "user_token_id": 195, "profiles": {"safe": {"top_p": 0.8}}, "stop_words_ids": [[1]]},
    {"temperature": 0.0, "top_k": -1, "top_p": 0.0, "min_p": 3.0, "typical_p": 0.2, "top_h": 0.4},
    {"do_sample": False, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "length_penalty": 1e30, "early_stopping": True},
    {"use_cache": False, "cache_implementation": "hybrid", "low_memory": True, "diversity_penalty": 0.3},
    {"output_attentions": True, "output_scores": True, "output_hidden_states": True, "output_logits": True},
    {"return_dict_in_generate": True, "language": "fr", "forced_decoder_ids": [[1, 5]]},
    {"renormalize_logits": True, "remove_invalid_values": True, "is_assistant": False, "max_time": None},
    {"eos_token_id": [2, 32000, -1], "suppress_tokens": [-1, 999], "pad_token_id": -1},
]


@pytest.mark.parametrize("settings", HARMLESS, ids=lambda settings: next(iter(settings)))
def test_what_changes_no_answer_stops_nobody(reading, decoder, checkpoint, settings):
    theirs = copy.deepcopy(oracle.eager(checkpoint("llama")))
    theirs.generation_config = transformers.GenerationConfig(**{"eos_token_id": 2, "pad_token_id": 0, **settings})
    with torch.inference_mode():
        expected = theirs.generate(torch.tensor([PROMPT]), attention_mask=torch.ones(1, 6), max_new_tokens=12)
    expected = getattr(expected, "sequences", expected)
    found = reading({"eos_token_id": 2, **settings}).generate([PROMPT], max_new_tokens=12)
    assert getattr(found, "sequences", found).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("settings", "options", "off"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, {}, {"penalty_alpha": 0.0}),
        ({"dola_layers": "low"}, {}, {"dola_layers": None}),
        ({"force_words_ids": [[5]]}, {}, {"force_words_ids": None}),
        ({"watermarking_config": {"greenlist_ratio": 0.25}}, {"do_sample": True}, {"watermarking_config": None}),
        ({"num_beam_groups": 2, "num_beams": 1}, {"num_beams": 4}, {"num_beams": 1}),
        ({}, {"return_dict_in_generate": True, "output_hidden_states": True}, {"output_hidden_states": False}),
        ({"return_dict_in_generate": True, "output_attentions": True}, {}, {"output_attentions": False}),
    ],
    ids=lambda settings: next(iter(settings), ""),
)
def test_what_changes_an_answer_is_refused_by_the_call_that_it_changes(reading, settings, options, off):
    model = reading(settings)
    name = next(name for name in {**settings, **off} if name in UNSUPPORTED)
    with pytest.raises(InputError, match=rf"{name}=.* is not done by this runtime.*\. Pass {name}=.* to go without"):
        model.generate([PROMPT], **options)
    assert model.generate([PROMPT], **{**options, "max_new_tokens": 2, **off}) is not None


def test_outputs_that_a_file_asks_for_are_refused_where_they_would_be_missing(reading):
    """They are by generate(), which would return them; a stream and a pipeline return texts."""
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True, "eos_token_id": []}
    model = reading(asked)
    with pytest.raises(InputError, match="output_attentions=True is not done"):
        model.generate([PROMPT])
    tokens = list(model.stream([PROMPT], max_new_tokens=4))
    assert model.generate([PROMPT], max_new_tokens=4, return_dict_in_generate=False)[0, 6:].tolist() == tokens
    assert pipeline("text-generation", model)("The", max_new_tokens=4)[0]["generated_text"].startswith("The")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("[]", FormatError, r"generation_config\.json holds \[\], not an object"),
        ("null", FormatError, "holds None, not an object"),
        ("{", FormatError, r"generation_config\.json is not valid JSON"),
        ("\ufeff{}", FormatError, "not valid JSON"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", FormatError, "nests more than 100 levels"),
        ('{"max_new_tokens": ' + "9" * 5000 + "}", FormatError, "not valid JSON"),
        ('{"max_new_tokens": 5.5}', InputError, r"generation_config\.json.* max_new_tokens=5\.5 is of the wrong type"),
        ('{"max_new_tokens": 0}', InputError, "max_new_tokens must be a whole number of at least 1, not 0"),
        ('{"do_sample": true, "temperature": NaN}', InputError, "temperature must be above 0, not nan"),
        ('{"do_sample": true, "seed": -1}', InputError, "seed must be a whole number of at least 0"),
        (f'{{"num_beams": {2**62}}}', InputError, "takes .* rows .num_beams"),
    ],
    ids=range(11),
)
def test_a_file_that_holds_no_settings_is_named(decoder, tmp_path, content, error, message):
    path = shutil.copytree(decoder, tmp_path / "copy")
    (path / "generation_config.json").write_text(content)
    handmade.relist(path)
    with pytest.raises(error, match=message):
        CompiledModelForCausalLM.from_pretrained(path).generate([PROMPT])


def test_numbers_beyond_all_bounds_in_a_file_are_bounded_by_the_model(reading):
    huge = {"max_length": 2**62, "top_k": 2**62, "no_repeat_ngram_size": 2**62, "max_matching_ngram_size": 2**40,
            "prompt_lookup_num_tokens": 2**62, "min_new_tokens": 2**62, "eos_token_id": 2}  # fmt: skip
    plain = reading({"eos_token_id": []}).generate([PROMPT], max_new_tokens=48 - len(PROMPT)).tolist()
    found = reading(huge).generate([PROMPT])
    assert found.shape == (1, 48)
    assert reading({"eos_token_id": [], "max_length": 2**62}).generate([PROMPT]).tolist() == plain


def test_validation_goes_by_settings_of_its_own(reading):
    model = reading({"max_new_tokens": 1, "guidance_scale": 3.0, "suppress_tokens": [*range(320)], "temperature": "x"})
    question = {"kind": "greedy", "rows": [PROMPT], "side": "right", "count": 5, "adapters": []}
    (answer,) = validation_worker._ask_decoder(model, question)
    expected = reading({"eos_token_id": []}).generate([PROMPT], max_new_tokens=5)
    assert answer["tokens"].tolist() == expected[0, 6:].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token_id": -1}, r"eos_token_id=-1 is none of the model's tokens, 0\.\.319.*eos_token_id=\[\]"),
        ({"eos_token_id": [2, 320]}, "eos_token_id=320 is none"),
        ({"suppress_tokens": [-3]}, "suppress_tokens=-3 is none"),
        ({"begin_suppress_tokens": [4, 400]}, "begin_suppress_tokens=400 is none"),
        ({"bad_words_ids": [[4], [5, -2]]}, "bad_words_ids=-2 is none"),
        ({"forced_bos_token_id": 99999}, "forced_bos_token_id=99999 is none"),
        ({"generation_config": transformers.GenerationConfig(eos_token_id=-1)}, "eos_token_id=-1 is none"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' is of the wrong type"),
        ({"forced_bos_token_id": "fr_XX"}, r"has no tokens for languages.*vocabulary_id\('fr_XX'\)"),
    ],
)
def test_ids_of_a_call_are_the_models(reading, options, message):
    with pytest.raises(InputError, match=message):
        reading({}).generate([PROMPT], **options)


def test_languages_go_by_code_and_by_name():
    def of(*tokens):
        return types.SimpleNamespace(added_tokens={token: index for index, token in enumerate(tokens)})

    mbart, m2m = of("</s>", "en_XX", "fr_XX"), of("<pad>", "__en__", "__fr__")
    nllb = of("eng_Latn", "fra_Latn", "zho_Hans", "zho_Hant")
    for tokenizer, name, index in (
        (mbart, "fr_XX", 2), (mbart, "fr", 2), (mbart, "French", 2), (m2m, "__fr__", 2), (m2m, "fr", 2),
        (m2m, "english", 1), (nllb, "fra_Latn", 1), (nllb, "fra", 1), (nllb, "zho_Hant", 3),
    ):  # fmt: skip
        assert language_id(tokenizer, "forced_bos_token_id", name) == index
    with pytest.raises(InputError, match="forced_bos_token_id='zho' is any of zho_Hans, zho_Hant"):
        language_id(nllb, "forced_bos_token_id", "zho")
    with pytest.raises(InputError, match=r"'fra_Latin' is no language of this model\. Did you mean 'fra_Latn'"):
        language_id(nllb, "forced_bos_token_id", "fra_Latin")


def test_the_models_settings_may_be_set(reading):
    model = reading({})
    for given in (
        transformers.GenerationConfig(max_new_tokens=3, eos_token_id=[]), {"max_new_tokens": 3, "eos_token_id": []},
        GenerationConfig(max_new_tokens=3, eos_token_id=[]),
    ):  # fmt: skip
        model.generation_config = given
        assert model.generate([PROMPT]).shape == (1, 9)
    model.generation_config.max_new_tokens = np.int64(4)
    model.generation_config.use_cache = False
    assert model.generate([PROMPT]).shape == (1, 10)
    assert model.new_session().generate([PROMPT]).shape == (1, 10), "a session is the same model"
    model.generation_config.dola_layers = "low"
    with pytest.raises(InputError, match=r"dola_layers='low' is not done"):
        model.generate([PROMPT], do_sample=True)
    with pytest.raises(InputError, match=r"given 'max_tokens', which generate\(\) does not know"):
        model.generation_config.max_tokens = 3
    with pytest.raises(InputError, match="must be a GenerationConfig or a dict, not 5"):
        model.generation_config = 5
    model.generation_config = None
    assert model.generation_config == GenerationConfig()
