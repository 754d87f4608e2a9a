"""Every key of the files that people publish beside tokenizer.json means what it means to transformers, or nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import transformers
from corpus import PUBLISHED, needs_corpus

from precast.exporter.checkpoint.tokenizer_files import save_tokenizer
from precast.runtime.inputs.tokenizer import Tokenizer

TEXTS = ["Hello <s>world</s> don't stop .", " naïve  Café <mask> x", "a <extra> b <X> c", "É"]
EXTRA = {"content": "<extra>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
MASK = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "rstrip": False, "normalized": True,
        "single_word": False, "special": True}  # fmt: skip
OWN = ("<pad>", "<s>", "</s>", "<mask>")
# What changes an answer, or would if a class heeded it.
OBEYED = {
    "add_bos_token": True, "add_eos_token": True, "add_prefix_space": True, "added_tokens_decoder": {"400": EXTRA},
    "additional_special_tokens": ["<extra>"], "clean_up_tokenization_spaces": True, "do_lower_case": True,
    "extra_special_tokens": {"image_token": "<extra>"}, "mask_token": MASK, "model_input_names": ["input_ids"],
    "pad_token_type_id": 3, "padding_side": "left", "split_special_tokens": True, "strip_accents": True,
    "tokenize_chinese_chars": False, "truncation_side": "left", "unk_token": "<new>", "pad_token": "<extra>",
    "legacy": False, "language": "german", "task": "translate", "predict_timestamps": True, "from_slow": True,
    "model_specific_special_tokens": {"sot_token": "<extra>"}, "trim_offsets": False, "remove_space": True,
    "cls_token": "<s>", "sep_token": "</s>", "bos_token": None, "eos_token": "<extra>", "image_token": "<extra>",
    "fix_mistral_regex": True, "keep_accents": True, "wordpieces_prefix": "@@", "extra_ids": 3,
}  # fmt: skip
CLASSES = ["CodeGenTokenizer", "CohereTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "LlamaTokenizerFast",
           "PreTrainedTokenizer", "Qwen2Tokenizer", "RobertaTokenizer", "NoTokenizer"]  # fmt: skip
# What says nothing about ids or texts: of calls that name their own, of training, of processors, of files.
WITHOUT_EFFECT = {
    "_commit_hash", "_name_or_path", "apply_ocr", "architectures", "auto_map", "backend", "chat_template",
    "cls_token_box", "decode_with_prefix_space", "device_map", "do_basic_tokenize", "do_normalize", "errors", "fast",
    "full_tokenizer_file", "init_inputs", "is_local", "language_codes", "legacy_behaviour", "local_files_only",
    "max_len", "max_length", "max_num_visual_tokens", "merges_file", "model_max_length", "model_type", "name_or_path",
    "never_split", "normalize", "num_image_tokens", "num_madeup_words", "offset", "only_label_first_subword",
    "pad_to_multiple_of", "pad_token_box", "pad_token_label", "pretokenize_regex", "processor_class",
    "replace_word_delimiter_char", "response_schema", "return_attention_mask", "return_tensors", "sep_token_box",
    "separate_vocabs", "source_lang", "sp_model_kwargs", "spaces_between_special_tokens", "special_tokens_map_file",
    "src_lang", "stride", "target_lang", "tgt_lang", "tokenizer_class", "tokenizer_file", "torch_dtype",
    "truncation_strategy", "trust_remote_code", "use_default_system_prompt", "use_fast", "verbose", "vocab_file",
    "vocab_size", "mask_token_sent", "pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id",
}  # fmt: skip
VALUES = {"max_length": 4, "stride": 1, "pad_to_multiple_of": 8, "truncation_strategy": "only_first", "use_fast": False,
          "errors": "ignore", "spaces_between_special_tokens": False, "sp_model_kwargs": {"alpha": 0.1}}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(path)
    return path


def _both(source, folder, settings, file="tokenizer_config.json"):
    """transformers' tokenizer of these settings, and ours of what an export writes of it."""
    shutil.copytree(source, folder)
    old = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**old, **settings}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    out = folder / "out"
    out.mkdir()
    written = save_tokenizer(theirs, out)
    (out / "tokenizer_config.json").write_text(json.dumps(written))
    return theirs, Tokenizer(out)


def _check(theirs, ours):
    for special in (True, False):
        expected = [theirs(text, add_special_tokens=special)["input_ids"] for text in TEXTS]
        assert [ours.encode(text, add_special_tokens=special) for text in TEXTS] == expected
    for skip in (True, False):
        for ids in expected:
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encodings(TEXTS[0], length=6)[0].ids == theirs(TEXTS[0], truncation=True, max_length=6)["input_ids"]
    for role in ("bos", "eos", "pad", "unk", "cls", "sep", "mask"):
        assert ours.token_id(role) == _id_of(theirs, role), role
    if theirs.pad_token is not None:
        given = theirs(TEXTS[:2], TEXTS[1:3], padding=True)
        found = {name: values.tolist() for name, values in ours(TEXTS[:2], TEXTS[1:3]).items()}
        assert {name: found[name] for name in given} == dict(given)
        assert all(not any(map(any, found[name])) for name in found.keys() - given.keys())


def _id_of(theirs, role):
    try:
        return getattr(theirs, f"{role}_token_id")
    except RecursionError:
        # An unknown token that is not in the vocabulary.
        return None


@pytest.mark.parametrize("key", [*OBEYED, *VALUES])
def test_a_key_does_what_it_does_in_transformers(plain, tmp_path, key):
    _check(*_both(plain, tmp_path / "x", {key: {**OBEYED, **VALUES}[key]}))


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_class_says_by_itself_is_written_down(plain, tmp_path, name):
    _check(*_both(plain, tmp_path / "x", {"tokenizer_class": name, "add_bos_token": False}))


def test_special_tokens_map_counts(plain, tmp_path):
    tokens = {"cls_token": MASK | {"content": "<extra>"}, "additional_special_tokens": ["<X>"], "bos_token": "</s>"}
    _check(*_both(plain, tmp_path / "x", tokens, "special_tokens_map.json"))


@pytest.mark.parametrize("key", ["clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"])
def test_cleaning_up_byte_pairs_takes_both_keys(plain, tmp_path, key):
    theirs, ours = _both(plain, tmp_path / "x", {"clean_up_tokenization_spaces": True, key: True})
    _check(theirs, ours)
    assert ours.decode(ours.encode("Stop .")) == "Stop."


def test_every_template_of_several_is_written(plain, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = {"default": "plain", "tool_use": "with {{ tools | length }} tools"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(save_tokenizer(tokenizer, tmp_path)))
    ours, talk = Tokenizer(tmp_path), [{"role": "user", "content": "Hi"}]
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        expected = tokenizer.apply_chat_template(talk, tools=tools, tokenize=False)
        assert ours.apply_chat_template(talk, tools=tools) == expected


def test_the_longest_input_is_known(plain, tmp_path):
    assert _both(plain, tmp_path / "x", {"model_max_length": 12})[1].max_length == 12
    assert Tokenizer(plain).max_length is None


@pytest.mark.slow
@needs_corpus
def test_every_published_key_is_on_the_list_and_every_file_read(plain, tmp_path):
    same = 0
    for path in sorted(PUBLISHED.glob("*/tokenizer_config.json")):
        settings = json.loads(path.read_text())
        known = {*OBEYED, *WITHOUT_EFFECT}
        assert [key for key in settings if key not in known and not key.endswith("_token")] == [], path
        settings.pop("tokenizer_class", None)
        # A token that was special and is declared not to be stays so in memory alone; none was in its own vocabulary.
        added = settings.get("added_tokens_decoder", {})
        settings["added_tokens_decoder"] = {key: each for key, each in added.items() if each["content"] not in OWN}
        folder = tmp_path / path.parent.name
        shutil.copytree(plain, folder / "plain")
        for name in ("special_tokens_map.json", "added_tokens.json"):
            if (path.parent / name).is_file():
                shutil.copy(path.parent / name, folder / "plain" / name)
        _check(*_both(folder / "plain", folder / "x", settings))
        same += 1
    assert same > 150
