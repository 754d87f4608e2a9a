"""Sessions in files: the same answers, and nothing taken in that was not written for this model."""

from __future__ import annotations

import os
import stat

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import decoders

from precast.runtime import CompiledModelForCausalLM
from precast.runtime.errors import FormatError, InputError
from precast.runtime.generation import session_file
from precast.runtime.generation.session import Session

some = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
prompts = st.lists(st.integers(3, 319), min_size=1, max_size=20)
ASKED = {"max_new_tokens": 8, "eos_token_id": []}


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("llama")


@pytest.fixture(scope="module", params=["float32", "int8", "batch"])
def compiled(request, source, artifact):
    options = {"float32": {}, "int8": {"kv_cache": "int8"}, "batch": {"batch_size": 3}}[request.param]
    return artifact(source, **options)


@pytest.fixture
def fed(monkeypatch):
    """How many tokens were computed."""
    counts: list[int] = []
    run = Session._run_call
    monkeypatch.setattr(
        Session, "_run_call", lambda self, call, rows: (counts.append(int(call.new.max())), run(self, call, rows))[1]
    )
    return counts


@some
@given(first=prompts, more=prompts)
def test_a_loaded_session_answers_as_one_that_read_all(compiled, tmp_path_factory, first, more):
    saving, loading, fresh = (CompiledModelForCausalLM.from_pretrained(compiled) for _ in range(3))
    file = tmp_path_factory.mktemp("session") / "a.session"
    rows = [first[:10]] * saving.batch_size
    saving.generate(rows, **ASKED)
    saving.save_session(file)
    count = loading.load_session(file)
    assert count == sum(map(len, saving._session.tokens)) > 0
    asked = [[*row, *more[:8]] for row in rows]
    assert loading.generate(asked, **ASKED).tolist() == fresh.generate(asked, **ASKED).tolist()


def test_what_was_saved_is_not_computed_again(source, artifact, tmp_path, fed):
    path = artifact(source)
    model = CompiledModelForCausalLM.from_pretrained(path)
    prompt = list(range(3, 33))
    model.generate([prompt], max_new_tokens=1)
    model.save_session(tmp_path / "a")
    other = CompiledModelForCausalLM.from_pretrained(path)
    other.load_session(tmp_path / "a")
    fed.clear()
    other.generate([[*prompt, 40, 41]], max_new_tokens=1)
    assert fed == [2]
    fed.clear()
    other.new_session().generate([[*prompt, 40, 41, 42]], max_new_tokens=1)
    assert fed == [1], "a session begins with what the model holds"


def test_a_session_is_made_while_the_model_is_in_use(source, artifact):
    model = CompiledModelForCausalLM.from_pretrained(artifact(source))
    stream = model.stream([[5, 6, 7]], **ASKED)
    begun = [next(stream), next(stream)]
    other = model.new_session()
    assert other.generate([[9, 8]], **ASKED).tolist() == model.new_session().generate([[9, 8]], **ASKED).tolist()
    assert [*begun, *stream] == other.generate([[5, 6, 7]], **ASKED)[0, 3:].tolist()


def test_states_are_saved_too(artifact, tmp_path):
    path = artifact(decoders.make(tmp_path / "mamba", "mamba"))
    model, other = CompiledModelForCausalLM.from_pretrained(path), CompiledModelForCausalLM.from_pretrained(path)
    expected = model.generate([[5, 6, 7, 8, 9]], **ASKED).tolist()
    model.reset()
    model.generate([[5, 6, 7]], max_new_tokens=1, eos_token_id=[])
    model.save_session(tmp_path / "a")
    other.load_session(tmp_path / "a")
    assert other.generate([[5, 6, 7, 8, 9]], **ASKED).tolist() == expected


@pytest.fixture
def saved(source, artifact, tmp_path):
    model = CompiledModelForCausalLM.from_pretrained(artifact(source))
    model.generate([[5, 6, 7]], **ASKED)
    model.save_session(tmp_path / "a")
    return model, tmp_path / "a"


def _rewrite(file, **changes):
    """Change the header of a file, and seal it again."""
    data = file.read_bytes()
    line, end = len(session_file._FORMAT), data.index(b"\n", len(session_file._FORMAT))
    header = {**msgspec.json.decode(data[line:end]), **changes}
    body = data[:line] + msgspec.json.encode(header) + b"\n" + data[end + 1 : -session_file._HASH_SIZE]
    file.write_bytes(body + session_file.hashlib.blake2b(body, digest_size=session_file._HASH_SIZE).digest())


def test_a_file_is_its_owners_alone_and_replaced_whole(saved, monkeypatch):
    model, file = saved
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_file.os, "replace", full)
    with pytest.raises(InputError, match=r"cannot be saved as .*No space left on device"):
        model.save_session(file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["a"]
    with pytest.raises(InputError, match=r"cannot be saved as .*No such file"):
        model.save_session(file.parent / "missing" / "a")


def test_damaged_files_are_refused_and_change_nothing(saved):
    model, file = saved
    data, held = file.read_bytes(), [list(row) for row in model._session.tokens]
    end = data.index(b"\n", len(session_file._FORMAT))
    broken = {
        "does not begin as one": [b"", b"PK\x03\x04", data[1:]],
        "is damaged": [data[:20], data[:-1], data[: end + 3], data + b"x", data[:end] + b"x" + data[end:]],
        "hash differs": [data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], data[:-1] + bytes([data[-1] ^ 1])],
    }
    for message, contents in broken.items():
        for content in contents:
            file.write_bytes(content)
            with pytest.raises(FormatError, match=message):
                model.load_session(file)
    assert model._session.tokens == held
    with pytest.raises(InputError, match="cannot be read: No such file"):
        model.load_session(file.parent / "missing")
    with pytest.raises(InputError, match="cannot be read: It is no file"):
        model.load_session(file.parent)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"digest": "0" * 64}, InputError, "is of another model: of artifact 000000000000, variant onnx, and this is"),
        ({"variant": "other"}, InputError, "variant other, and this is .*, variant onnx"),
        ({"tokens": [[5, 400]]}, FormatError, "tokens are none"),
        ({"tokens": [[-1]]}, FormatError, "tokens are none"),
        ({"tokens": [[5] * 49]}, FormatError, "tokens are none"),
        ({"tokens": [[5], [6]]}, FormatError, "tokens are none"),
        ({"tokens": [[5, 6]]}, FormatError, "arrays are none of this model's"),
        ({"tokens": [["x"]]}, FormatError, "is damaged"),
        ({"arrays": []}, FormatError, "arrays are none"),
        ({"more": 1}, FormatError, "is damaged"),
    ],
)
def test_a_file_that_says_something_else_is_refused(saved, changes, error, message):
    """Though its hash is right: the hash is no signature."""
    model, file = saved
    _rewrite(file, **changes)
    with pytest.raises(error, match=message):
        model.load_session(file)


def test_another_artifacts_session_is_refused(saved, checkpoint, artifact):
    _, file = saved
    other = CompiledModelForCausalLM.from_pretrained(artifact(checkpoint("llama", num_hidden_layers=2)))
    with pytest.raises(InputError, match=r"is of another model: .* Delete the file, or name another"):
        other.load_session(file)


def test_caches_on_a_device_are_not_saved(saved, monkeypatch):
    model, file = saved
    monkeypatch.setattr(type(model._session._engine), "move_rows", lambda *_: None, raising=False)
    with pytest.raises(InputError, match="caches are in the memory of a device"):
        model.save_session(file)
    assert np.isfinite(model([[5, 6]]).logits).all()
