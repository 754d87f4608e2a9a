"""A checkpoint is what lies in its directory: nothing from elsewhere, no code; the hash is of what is loaded."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import transformers
from PIL import Image

from precast.exporter import ExportOptions
from precast.exporter.checkpoint import files
from precast.exporter.checkpoint.early import read_config
from precast.exporter.checkpoint.resolve import resolve
from precast.exporter.companions.files import _without_paths, config_of, write_companions
from precast.exporter.kinds.encoder import inputs
from precast.runtime.artifact.integrity import sha256_of
from precast.runtime.artifact.tasks import get_task
from precast.runtime.errors import ArtifactError, CheckpointError, UsageError
from precast.runtime.pipelines.processors import ImageProcessor, SoundProcessor

ROOT = Path(__file__).parent.parent.parent
GENERATION = get_task("text-generation")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A tiny Llama in several files."""
    path = tmp_path_factory.mktemp("shards")
    model = transformers.AutoModelForCausalLM.from_config(tiny.config_for("llama"))
    model.save_pretrained(path, max_shard_size="50KB")
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def copy(shards, tmp_path):
    """A copy of it that may be changed."""
    return Path(shutil.copytree(shards, tmp_path / "checkpoint"))


@pytest.fixture
def opened(monkeypatch):
    """The files that transformers takes weights from."""
    names, original = [], transformers.modeling_utils.safe_open
    monkeypatch.setattr(
        "transformers.modeling_utils.safe_open", lambda path, **asked: (names.append(path), original(path, **asked))[1]
    )
    return names


def _load(path):
    checkpoint = resolve(str(path), ExportOptions())
    assert checkpoint.tokenizer is not None
    checkpoint.load(GENERATION, "float32")
    return checkpoint


def _refused(path, *words):
    with pytest.raises(CheckpointError) as caught:
        _load(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# ---------------------------------------------------------------- weights


def _hash(directory, names):
    hashes = [f"{name} {sha256_of(directory / name)}\n" for name in sorted(names)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def test_the_hash_is_of_the_files_that_are_loaded(copy, opened):
    shutil.copy(next(copy.glob("model-*.safetensors")), copy / "consolidated.safetensors")
    checkpoint = _load(copy)
    loaded = {Path(path).relative_to(copy).as_posix() for path in opened}
    assert len(loaded) > 1
    assert "consolidated.safetensors" not in loaded
    assert checkpoint.weights_sha256() == _hash(copy, loaded)


def test_a_row_of_nan_in_a_table_is_found_and_said(copy):
    """No validation sample need have that token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(copy)
    model.model.embed_tokens.weight.data[77] = np.nan
    model.save_pretrained(copy)
    _refused(copy, "hold NaN: 64 of 20,480 numbers of model.embed_tokens.weight, the first at [77, 0]", "damaged")


@pytest.mark.parametrize("names", [("model.safetensors", INDEX), ("model.safetensors", "pytorch_model.bin")])
def test_of_several_forms_the_one_that_is_loaded_is_hashed(checkpoint, shards, tmp_path, opened, names):
    path = Path(shutil.copytree(checkpoint("llama"), tmp_path / "both"))
    for shard in shards.glob("model-*.safetensors"):
        shutil.copy(shard, path)
    for name in names[1:]:
        shutil.copy(shards / INDEX, path / name)
    found = _load(path)
    assert {Path(each).name for each in opened} == {"model.safetensors"}
    assert found.weights_sha256() == sha256_of(path / "model.safetensors")


def test_a_file_that_the_configuration_names_is_hashed(checkpoint, tmp_path, opened):
    path = Path(shutil.copytree(checkpoint("llama"), tmp_path / "named"))
    shutil.copy(path / "model.safetensors", path / "other.safetensors")
    (path / "model.safetensors").write_bytes(b"decoy")
    config = json.loads((path / "config.json").read_text()) | {"transformers_weights": "other.safetensors"}
    (path / "config.json").write_text(json.dumps(config))
    found = _load(path)
    assert {Path(each).name for each in opened} == {"other.safetensors"}
    assert found.weights_sha256() == sha256_of(path / "other.safetensors")


def _point(copy, entry):
    index = json.loads((copy / INDEX).read_text())
    name = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {key: entry if value == name else value for key, value in index["weight_map"].items()}
    (copy / INDEX).write_text(json.dumps(index))
    return name


@pytest.mark.parametrize("way", ["above", "absolute", "through a folder", "link", "linked folder"])
def test_weights_from_elsewhere_are_refused(copy, shards, tmp_path, way):
    outside = tmp_path / "outside"
    outside.mkdir()
    name = sorted(path.name for path in copy.glob("model-*"))[0]
    shutil.copy(shards / name, outside / name)
    entry = {
        "above": f"../outside/{name}", "absolute": str(outside / name), "through a folder": f"x/../../outside/{name}",
        "link": name, "linked folder": f"more/{name}",
    }[way]  # fmt: skip
    if way == "link":
        (copy / name).unlink()
        (copy / name).symlink_to(outside / name)
        _refused(copy, f"{name} of checkpoint is a link to {outside / name}, outside of the checkpoint")
        return
    if way == "linked folder":
        (copy / "more").symlink_to(outside)
    _point(copy, entry)
    _refused(copy, f"{INDEX} of checkpoint names {entry}, which is outside of the checkpoint")


@pytest.mark.parametrize("entry", ["../x.safetensors", "/x.safetensors", "../x.safetensors.index.json"])
def test_a_configuration_that_names_weights_elsewhere_is_refused(copy, entry):
    config = json.loads((copy / "config.json").read_text()) | {"transformers_weights": entry}
    (copy / "config.json").write_text(json.dumps(config))
    _refused(copy, f"config.json of checkpoint names {entry}, which is outside of the checkpoint")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "\0"])
def test_a_damaged_index_is_said(copy, text):
    (copy / INDEX).write_text(text)
    _refused(copy, f"{INDEX} of checkpoint, which lists the files of its weights, cannot be used")


def test_a_shard_that_is_missing_is_named(copy):
    name = _point(copy, "model-lost.safetensors")
    assert name
    _refused(copy, "checkpoint lacks the file model-lost.safetensors, which its model.safetensors.index.json names")


@pytest.mark.parametrize("is_shared", [False, True])
def test_the_hubs_cache_is_made_of_links(shards, tmp_path, is_shared):
    """snapshots -> blobs, or for what xet carries snapshots -> blobs -> one store for all repositories."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "commit"
    store = tmp_path / "blobs" / "00" if is_shared else blobs
    for folder in (blobs, snapshot, store):
        folder.mkdir(parents=True, exist_ok=True)
    for path in shards.iterdir():
        name = hashlib.sha256(path.name.encode()).hexdigest()
        shutil.copy(path, store / name)
        if is_shared:
            (blobs / name).symlink_to(Path("../../blobs/00") / name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / name)
    assert _load(snapshot).weights_sha256() == _load(shards).weights_sha256()


# ---------------------------------------------------------------- kinds of files


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
     "special_tokens_map.json", "preprocessor_config.json", "model.safetensors", "additional_chat_templates/a.jinja",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "link"])
def test_what_is_no_file_of_its_own_is_refused_before_it_is_opened(copy, tmp_path, name, kind):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).unlink(missing_ok=True)
    (tmp_path / "private").write_text("{}")
    if kind == "pipe":
        os.mkfifo(copy / name)
        _refused(copy, f"{name} of checkpoint is not a regular file")
    else:
        (copy / name).symlink_to(tmp_path / "private" if kind == "link" else kind)
        _refused(copy, f"{name} of checkpoint is a link to", "outside of the checkpoint")


def test_a_configuration_that_is_a_pipe_is_none(copy):
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")
    assert read_config(str(copy)) is None
    _refused(copy, "has no config.json")


def test_a_gguf_file_that_is_a_pipe_is_none(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    assert read_config(str(tmp_path / "model.gguf")) is None
    _refused(tmp_path / "model.gguf", "model.gguf is not a regular file or directory")


def test_a_file_too_large_to_be_read_is_refused(copy):
    with (copy / "tokenizer.json").open("wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    _refused(copy, "tokenizer.json of checkpoint has 268,435,457 bytes; 268,435,456 are the most that is read")


def test_other_programs_folders_and_files_do_not_matter(copy, tmp_path):
    (copy / ".git").mkdir()
    os.mkfifo(copy / ".git" / "x.json")
    os.mkfifo(copy / "control")
    (copy / "lost.json").symlink_to(tmp_path / "nothing")
    (copy / "logs").symlink_to(tmp_path)
    _load(copy)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("../outside", r"modules\.json of checkpoint names \.\./outside, which is outside of the checkpoint"),
        ("linked", r"modules\.json of checkpoint names linked, which is outside of the checkpoint"),
        ("a/pipe", r"a/pipe/config\.json of checkpoint is not a regular file"),
    ],
)
def test_modules_of_sentence_transformers_lie_in_the_checkpoint(tmp_path, checkpoint, folder, message):
    path = Path(shutil.copytree(checkpoint("bert", "AutoModel"), tmp_path / "checkpoint"))
    (tmp_path / "outside").mkdir()
    (path / "linked").symlink_to(tmp_path / "outside")
    (path / "a" / "pipe").mkdir(parents=True)
    os.mkfifo(path / "a" / "pipe" / "config.json")
    kinds = [("Transformer", ""), ("Pooling", folder)]
    modules = [
        {"idx": n, "name": str(n), "path": at, "type": f"sentence_transformers.{kind}"}
        for n, (kind, at) in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    found = resolve(str(path), ExportOptions())
    with pytest.raises(CheckpointError, match=message):
        found.load(get_task("feature-extraction"), "float32")


# ---------------------------------------------------------------- what it tells of other machines


def test_no_file_of_an_artifact_tells_where_anything_lay(copy, tmp_path):
    place = "/home/alice/models/secret"
    for name in ("config", "tokenizer_config", "generation_config", "preprocessor_config", "processor_config"):
        path = copy / f"{name}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        nested = {"deep": [{"_name_or_path": place}], "_name_or_path": place, "name_or_path": place}
        path.write_text(json.dumps({**old, "text": nested, "_name_or_path": place, "tokenizer_name_or_path": place}))
    checkpoint, stage = resolve(str(copy), ExportOptions()), tmp_path / "stage"
    stage.mkdir()
    model = checkpoint.load(GENERATION, "float32")
    write_companions(stage, checkpoint.tokenizer, checkpoint, model)
    (stage / "config.json").write_text(json.dumps(config_of(checkpoint, model)))
    for path in stage.iterdir():
        assert "alice" not in path.read_text(), path.name
        assert str(tmp_path) not in path.read_text(), path.name
    assert json.loads((stage / "config.json").read_text())["text"] == {"deep": [{}]}


def test_what_is_said_of_images_goes_with_the_artifact_in_the_file_that_says_it(tmp_path):
    """processor_config.json is all that newer releases of transformers write, and files of others are no contract."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=2)
    path = tiny.save_checkpoint(tmp_path / "resnet", config, transformers.AutoModelForImageClassification)
    rules = '{"image_processor_type": "ViTImageProcessor", "size": {"height": 40, "width": 48}, "size": [40, 48]}'
    (path / "processor_config.json").write_text(f'{{"processor_class": "AProcessor", "image_processor": {rules}}}')
    checkpoint, stage = resolve(str(path), ExportOptions()), tmp_path / "stage"
    stage.mkdir()
    write_companions(stage, None, checkpoint, None)
    assert [each.name for each in stage.iterdir()] == ["processor_config.json"]
    assert ImageProcessor(stage)([Image.new("RGB", (9, 9))])["pixel_values"].shape == (1, 3, 40, 48)
    assert inputs._image_size(checkpoint) == (40, 48)
    for size in (40.5, "large", [], {"longest_edge": 9}, None):
        (path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": size}}))
        with pytest.raises(UsageError, match="image_size=HEIGHT,WIDTH"):
            inputs._image_size(resolve(str(path), ExportOptions()))
    (path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"resnet/preprocessor_config.json holds \[\], not an object"):
        _ = resolve(str(path), ExportOptions()).processor_files


def test_a_label_is_no_place():
    labels = {"label2id": {"name_or_path": 3}}
    assert _without_paths(labels) == labels


# ---------------------------------------------------------------- code


@pytest.fixture
def hostile(copy, tmp_path, monkeypatch):
    """Every file of settings names code of its own, which would leave a mark; nobody may be asked."""
    mark = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(mark)!r}, 'w').write('x')\nclass Evil: pass\n")
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text(
        (copy / "evil.py").read_text() + "def generate(*a, **k): pass\n"
    )
    kinds = ("Config", "ModelForCausalLM", "Tokenizer", "Processor", "ImageProcessor", "FeatureExtractor")
    for name in ("config", "tokenizer_config", "preprocessor_config", "processor_config", "generation_config"):
        path = copy / f"{name}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**old, "auto_map": {f"Auto{kind}": "evil.Evil" for kind in kinds}}))

    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    yield copy, mark
    assert asked == []


def test_code_of_a_checkpoint_neither_runs_nor_is_asked_about(hostile):
    path, mark = hostile
    _load(path)
    assert not mark.exists()


@pytest.mark.parametrize("part", ["config", "tokenizer_config"])
def test_what_cannot_do_without_its_code_is_refused(hostile, part):
    path, mark = hostile
    changes = {"config": {"model_type": "evil"}, "tokenizer_config": {"tokenizer_class": "EvilTokenizer"}}[part]
    (path / f"{part}.json").write_text(json.dumps(json.loads((path / f"{part}.json").read_text()) | changes))
    if part == "tokenizer_config":
        (path / "config.json").write_text(
            json.dumps(json.loads((path / "config.json").read_text()) | {"model_type": "x"})
        )
    _refused(path, "checkpoint")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("maker", "kind"), [(ImageProcessor, "image_processor"), (SoundProcessor, "feature_extractor")]
)
def test_a_processor_with_code_of_its_own_is_refused(hostile, maker, kind):
    path, mark = hostile
    rules = json.loads((path / "preprocessor_config.json").read_text()) | {f"{kind}_type": "Evil"}
    (path / "preprocessor_config.json").write_text(json.dumps(rules))
    with pytest.raises(ArtifactError, match=r"transformers makes no processor of preprocessor_config\.json"):
        maker(path)([np.zeros((8, 8, 3), np.uint8)])
    assert not mark.exists()


def test_every_loader_is_told_whether_code_may_run():
    """Told nothing, transformers asks on the terminal."""
    found = 0
    for path in (path for part in ("exporter", "runtime", "cli") for path in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and _loads(node.func):
                assert "trust_remote_code" in {word.arg for word in node.keywords}, f"{path}, line {node.lineno}"
                found += 1
    assert found >= 5


def _loads(called):
    if not isinstance(called, ast.Attribute) or called.attr not in ("from_pretrained", "from_config"):
        return False
    owner = ast.unparse(called.value)
    # Ours, and one that has no code.
    return "CompiledModel" not in owner and owner != "GenerationConfig"
