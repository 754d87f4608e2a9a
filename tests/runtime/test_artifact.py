"""The artifact contract: what config.json may say, and that everything else is refused with a message of ours."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import handmade
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precast.runtime.artifact import Artifact, read_artifact, render_config, strict_json
from precast.runtime.errors import ArtifactError, FormatError, PrecastError

FREE_FORM = {"files", "figures", "options", "min_versions"}
"""Objects whose keys are data."""


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return handmade.make(tmp_path_factory.mktemp("artifact") / "good")


@pytest.fixture
def place(tmp_path, good):
    """A directory with a copy of the good config.json, to be spoiled."""
    (tmp_path / "config.json").write_bytes((good.path / "config.json").read_bytes())
    return tmp_path


def _raw() -> dict[str, Any]:
    variant = handmade.variant(quantization="int8", kv_cache="int8")
    source = msgspec.structs.replace(handmade.contract().source, revision="main")
    named = {"model.onnx": {"size": 1, "sha256": "b" * 64}, "model.onnx.data": {"size": 1, "sha256": "c" * 64}}
    return {**msgspec.to_builtins(handmade.contract(variants=[variant], source=source)), "files": named}


def _walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value below, with the keys that lead to it."""
    yield path, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _walk(inner, (*path, key))


def _at(raw: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        raw = raw[key]
    return raw


EVERYTHING = list(_walk(_raw()))
OBJECTS = [path for path, value in EVERYTHING if isinstance(value, dict) and (not path or path[-1] not in FREE_FORM)]
FIELDS = [(*path, key) for path in OBJECTS for key in _at(_raw(), path) if key != "digest"]
LEAVES = [path for path, value in EVERYTHING if not isinstance(value, (dict, list)) and path != ("digest",)]
NUMBERS = [path for path in LEAVES if type(_at(_raw(), path)) is int and path[-1] != "pad" and "figures" not in path]
TEXTS = [path for path in LEAVES if isinstance(_at(_raw(), path), str) and "options" not in path]


def _dotted(path: Any) -> Any:
    return ".".join(map(str, path)) or "top" if isinstance(path, tuple) else None


def _refused(place, raw: dict[str, Any]) -> str:
    """`raw` as the contract, its digest made right; the message of the refusal."""
    handmade.rewrite(place, lambda config: config.update(precast=raw))
    with pytest.raises(FormatError) as caught:
        read_artifact(place)
    return str(caught.value)


def test_round_trip(good, place):
    handmade.rewrite(place, lambda config: config.update(precast=_raw()))
    artifact = read_artifact(place)
    assert artifact.config == {"model_type": "llama", "note": "old"}
    raw = _raw()
    assert msgspec.to_builtins(artifact.contract) == {**raw, "digest": artifact.contract.digest}
    assert render_config(artifact.config, artifact.contract) == (place / "config.json").read_bytes()
    assert read_artifact(good.path) == good


@pytest.mark.parametrize("path", OBJECTS, ids=_dotted)
def test_unknown_keys_are_refused_at_every_level(place, path):
    raw = _raw()
    _at(raw, path)["surprise"] = 1
    assert "surprise" in _refused(place, raw)


@pytest.mark.parametrize("path", FIELDS, ids=_dotted)
def test_no_field_may_be_missing(place, path):
    raw = _raw()
    del _at(raw, path[:-1])[path[-1]]
    assert str(path[-1]) in _refused(place, raw)


@pytest.mark.parametrize("path", LEAVES, ids=_dotted)
def test_wrong_types_are_refused(place, path):
    for wrong in ({"an": "object"}, ["a list"]):
        raw = _raw()
        _at(raw, path[:-1])[path[-1]] = wrong
        assert "breaks the artifact contract" in _refused(place, raw)


@pytest.mark.parametrize("path", NUMBERS, ids=_dotted)
@pytest.mark.parametrize("wrong", [-1, 2**60, 1.0, True, "1"])
def test_absurd_numbers_are_refused(place, path, wrong):
    raw = _raw()
    _at(raw, path[:-1])[path[-1]] = wrong
    _refused(place, raw)


@pytest.mark.parametrize("path", TEXTS, ids=_dotted)
def test_absurd_texts_are_refused(place, path):
    raw = _raw()
    _at(raw, path[:-1])[path[-1]] = "x" * 5000
    _refused(place, raw)


@pytest.mark.parametrize("name", ["files", "variants"])
def test_absurd_counts_are_refused(place, name):
    raw = _raw()
    many = {"files": {f"f{n}": {"size": 1, "sha256": "b" * 64} for n in range(5000)}, "variants": raw["variants"] * 65}
    for wrong in (many[name], type(raw[name])()) if name == "variants" else (many[name],):
        assert name in _refused(place, {**raw, name: wrong})


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../x",
        "/etc/passwd",
        "a\\b",
        ".hidden",
        "a/.b",
        "a//b",
        "a/",
        "",
        ".",
        "..",
        "C:x",
        "a\n",
        "a b",
        "a\0",
    ],
)
def test_file_names_stay_inside(place, name):
    listed = {**_raw(), "files": {**_raw()["files"], name: {"size": 1, "sha256": "b" * 64}}}
    assert "files" in _refused(place, listed)
    for path in (("variants", 0, "weights", 0), ("variants", 0, "graphs", 0, "file")):
        raw = _raw()
        _at(raw, path[:-1])[path[-1]] = name
        assert "breaks the artifact contract" in _refused(place, raw)


@pytest.mark.parametrize("digest", ["b" * 63, "b" * 65, "B" * 64, "g" * 64, "b" * 64 + "\n"])
def test_hashes_are_hashes(place, digest):
    raw = _raw()
    raw["files"]["model.onnx"]["sha256"] = digest
    _refused(place, raw)


def test_a_newer_format_says_to_upgrade(place):
    message = _refused(place, {**_raw(), "format_version": 4, "whatever": "the future brings"})
    assert "has artifact format 4" in message
    assert "formats up to 3" in message
    assert "pip install -U precast" in message


def test_there_is_no_format_0(place):
    assert "no artifact format 0" in _refused(place, {**_raw(), "format_version": 0})


@pytest.mark.parametrize("change", [
    lambda config: config.update(model_type="bert"),
    lambda config: config.update(extra=1),
    lambda config: config["precast"].update(task="fill-mask"),
    lambda config: config["precast"].update(digest="0" * 64),
    lambda config: config["precast"]["files"]["model.onnx"].update(sha256="0" * 64),
])  # fmt: skip
def test_an_alteration_shows_in_the_digest(place, change):
    handmade.rewrite(place, change, seal=False)
    with pytest.raises(FormatError, match="was altered"):
        read_artifact(place)


def test_two_variants_of_one_name(place):
    assert "two variants alike: onnx, onnx" in _refused(place, {**_raw(), "variants": _raw()["variants"] * 2})


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_every_file_of_a_variant_is_listed(place, name):
    raw = _raw()
    del raw["files"][name]
    assert f"'onnx' uses {name}, not in files" in _refused(place, raw)


@pytest.mark.parametrize(
    "change",
    [
        lambda graph: graph.update(role="encode"),
        lambda graph: graph.update(cache=[]),
        lambda graph: graph["inputs"].reverse(),
        lambda graph: graph["inputs"].pop(),
        lambda graph: graph["outputs"].pop(),
        lambda graph: graph["outputs"].clear(),
    ],
)
def test_a_graph_has_what_the_runtime_takes_for_granted(place, change):
    raw = _raw()
    change(raw["variants"][0]["graphs"][0])
    assert "variant 'onnx'" in _refused(place, raw)


DEEP = "[" * 5000
JUNK = {
    "empty": (b"", "not valid JSON"),
    "not json": (b"model:", "not valid JSON"),
    "cut": (b'{"precast": {"format_version": 1', "not valid JSON"),
    "an array": (b'["precast"]', "holds a list, not an object"),
    "a number": (b"1", "holds a int, not an object"),
    "no text": (b'{"a": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
    "utf-16": ('{"precast": 1}'.encode("utf-16-le"), "not valid JSON"),
    "duplicate key": (b'{"precast": {}, "precast": {}}', "the key 'precast' twice"),
    "duplicate key, deep": (b'{"precast": {"files": {"a": 1, "a": 1}}}', "the key 'a' twice"),
    "duplicate key, escaped": (b'{"precast": 1, "\\u0070recast": 1}', "the key 'precast' twice"),
    "duplicate key at the end": (
        ("{" + "".join(f'"{n}": 0, ' for n in range(200_000)) + '"199999": 0}').encode(),
        "the key '199999' twice",
    ),
    "too deep": (b'{"precast": ' + DEEP.encode(), "more than 24 levels"),
    # A byte of ∀ is that of a quote, so all that follows would look like a string.
    "too deep, in UTF-16": (('{"∀": ' + DEEP).encode("utf-16-le"), "not valid JSON"),
    "too deep, behind a string": (b'{"a": "\\"", "b": ' + DEEP.encode(), "more than 24 levels"),
    "unclosed string of escapes": (b'{"a": "' + b'\\"' * 1_000_000, "Unterminated string"),
    "too large": (b'{"a": "' + b" " * strict_json.MAX_BYTES + b'"}', "larger than 16,777,216 bytes"),
    "NaN": (b'{"precast": NaN}', "NaN is not a JSON number"),
    "Infinity": (b'{"precast": [-Infinity]}', "-Infinity is not a JSON number"),
    "infinite in disguise": (b'{"precast": -1e999}', "-1e999 is too large a number"),
    "a number of 5000 digits": (b'{"precast": ' + b"9" * 5000 + b"}", "5000 digits"),
    "half a surrogate pair": (b'{"precast": 1, "a": "\\ud800"}', "surrogates not allowed"),
    "the contract is no object": (b'{"precast": [1]}', "breaks the artifact contract"),
    "the contract is null": (b'{"precast": null}', "breaks the artifact contract"),
}


@pytest.mark.parametrize(("data", "reason"), JUNK.values(), ids=JUNK)
def test_junk_is_refused(place, data, reason):
    (place / "config.json").write_bytes(data)
    with pytest.raises(FormatError, match=rf"config\.json.*{re.escape(reason)}") as caught:
        read_artifact(place)
    assert len(str(caught.value)) < 1000


def test_no_more_is_read_than_is_allowed(place):
    """A sparse file of a terabyte: reading it whole would end in a MemoryError."""
    with (place / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FormatError, match="larger than 16,777,216 bytes"):
        read_artifact(place)


def test_what_is_no_artifact_says_so(tmp_path):
    with pytest.raises(ArtifactError, match=r"There is no directory .*/none"):
        read_artifact(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"has no config\.json"):
        read_artifact(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=rf"To make one from this checkpoint: precast export {tmp_path} -o OUT"):
        read_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="is a file; a precast artifact is a directory"):
        read_artifact(tmp_path / "config.json")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "config.json").symlink_to("config.json")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_artifact(tmp_path / "loop")


@given(data=st.data())
def test_one_changed_byte_is_harmless_or_refused(good, tmp_path_factory, data):
    before = bytearray((good.path / "config.json").read_bytes())
    after = bytearray(before)
    after[data.draw(st.integers(0, len(before) - 1))] = data.draw(st.integers(0, 255))
    place = tmp_path_factory.mktemp("changed")
    (place / "config.json").write_bytes(after)
    try:
        found = read_artifact(place)
    except PrecastError:
        return
    assert (found.config, found.contract) == (good.config, good.contract)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('aä🦊"\\'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(value=st.dictionaries(st.text(st.characters(codec="utf-8")), JSON, max_size=4))
def test_what_is_written_is_read_back(value):
    assert strict_json.loads(strict_json.dumps(value), "x") == value


@given(value=st.dictionaries(st.text(st.characters(codec="utf-8")), JSON, max_size=4), seed=st.integers())
def test_the_digest_does_not_depend_on_the_order_of_keys(value, seed):
    def shuffled(each: Any) -> Any:
        if isinstance(each, dict):
            items = [(key, shuffled(inner)) for key, inner in each.items()]
            random.Random(seed).shuffle(items)
            return dict(items)
        return [shuffled(inner) for inner in each] if isinstance(each, list) else each

    assert strict_json.canonical_digest(shuffled(value)) == strict_json.canonical_digest(value)
    changed = {**copy.deepcopy(value), "one more": 1}
    assert strict_json.canonical_digest(changed) != strict_json.canonical_digest(value)


def test_the_order_of_keys_in_the_file_does_not_matter(good, place):
    raw = json.loads((place / "config.json").read_bytes())
    backwards = {key: raw[key] for key in reversed(raw)}
    backwards["precast"] = {key: raw["precast"][key] for key in reversed(raw["precast"])}
    (place / "config.json").write_text(json.dumps(backwards))
    assert read_artifact(place).contract == good.contract


@given(value=st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(value):
    with suppress(FormatError):
        assert isinstance(strict_json.loads(value, "x"), dict)


def test_a_variant_needs_its_own_files_and_the_shared_ones(tmp_path):
    other = handmade.variant("other", weights=["other.data", "model.onnx"], graphs=[])
    made = handmade.make(tmp_path / "out")
    files = {**made.contract.files, "other.data": made.contract.files["model.onnx"]}
    both = msgspec.structs.replace(made.contract, variants=[*made.contract.variants, other], files=files)
    artifact = Artifact(made.path, made.config, both)
    assert set(artifact.variant_files(both.variants[0])) == {"model.onnx", "model.onnx.data", "sub/tokenizer.json"}
    assert set(artifact.variant_files(other)) == {"other.data", "model.onnx", "sub/tokenizer.json"}
