"""A model with an adapter merged answers as peft's eager one with it active; what cannot be merged is refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys

import adapters as made
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from precast.cli import main
from precast.exporter import ExportOptions, export, validate_again
from precast.exporter.checkpoint.early import check_request
from precast.exporter.checkpoint.resolve import resolve
from precast.exporter.eager.options import EagerOptions
from precast.exporter.eager.source import find_source
from precast.exporter.options.adapters import LoraRequest
from precast.exporter.quiet import silence
from precast.exporter.reuse import _key
from precast.runtime import CompiledModel
from precast.runtime.advice import suggest_larger
from precast.runtime.artifact import read_artifact
from precast.runtime.errors import CheckpointError, PrecastError, UsageError

CAUSAL, CLASSES, SEQ2SEQ = (f"AutoModelFor{name}" for name in ("CausalLM", "SequenceClassification", "Seq2SeqLM"))
FAMILIES = {
    "llama": (CAUSAL, {}, ["q_proj", "down_proj"]),
    "gpt2": (CAUSAL, {}, ["c_attn", "c_fc"]),
    "bert": (CLASSES, {}, ["query", "dense"]),
    "t5": (SEQ2SEQ, {}, ["q", "wo"]),
}
T5 = {
    "vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
IDS = torch.arange(3, 19)[None]
NO_LOHA_OF_CONV1D = {("loha", "gpt2"), ("lokr", "gpt2")}
GRID = [(kind, family) for family in FAMILIES for kind in made.CONFIGS if (kind, family) not in NO_LOHA_OF_CONV1D]
FAST = {("lora", "llama"), ("dora", "gpt2"), ("adalora", "bert"), ("lokr", "t5")}


@pytest.fixture(scope="module")
def base(checkpoint, tmp_path_factory):
    """`base("t5")`: a checkpoint of the family."""
    t5 = tmp_path_factory.mktemp("t5") / "t5"

    def find(family):
        if family != "t5":
            return checkpoint(family, FAMILIES[family][0])
        if not t5.exists():
            tiny.save_checkpoint(t5, transformers.T5Config(**T5), transformers.AutoModelForSeq2SeqLM)
        return t5

    return find


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """`adapter("llama", "dora", seed=2)`: an adapter of the family's checkpoint, made once."""
    root, found = tmp_path_factory.mktemp("adapters"), {}

    def make(family="llama", kind="lora", **settings):
        auto, _, targets = FAMILIES[family]
        key = repr((family, kind, sorted(settings.items())))
        if key not in found:
            settings = {"target_modules": targets, **settings}
            found[key] = made.make_adapter(root / str(len(found)), base(family), auto, kind, **settings)
        return found[key]

    return make


@pytest.fixture
def own(adapter, tmp_path):
    """`own(r=8)`: an adapter of llama that is the test's own, with these settings changed in its configuration."""

    def copy(**changes):
        path = shutil.copytree(adapter(), tmp_path / "adapter")
        _change(path, **changes)
        return path

    return copy


def _change(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")


def _rewrite(path, change):
    file = path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def _load(source, *lora, **options):
    checkpoint = resolve(str(source), ExportOptions(lora=tuple(map(str, lora)), **options))
    return checkpoint.load(checkpoint.task(options.get("task")), "float32")


def _logits(model):
    with torch.no_grad():
        more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        return model(input_ids=IDS, **more).logits


def _refusal(source, *lora, kind=CheckpointError, **options):
    with pytest.raises(kind) as caught:
        _load(source, *lora, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "family"), [pytest.param(*row, marks=[] if row in FAST else pytest.mark.slow) for row in GRID]
)
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_every_kind_answers_as_peft(base, adapter, kind, family, weight):
    source, path = base(family), adapter(family, kind)
    merged, adapted = (
        _load(source, f"{path}:{weight}"),
        made.open_adapted(source, FAMILIES[family][0], path, weight=weight),
    )
    expected = _logits(adapted)
    scale = max(1, expected.abs().max())
    assert (_logits(merged) - expected).abs().max() < 1e-5 * scale
    assert (_logits(merged) - _logits(_load(source))).abs().max() > 1e-2
    with silence("peft"):
        theirs = adapted.merge_and_unload()
    assert (_logits(merged) - _logits(theirs)).abs().max() < 1e-5 * scale
    assert not [name for name, _ in merged.named_modules() if re.search("lora_|base_layer", name)]


def test_several_are_merged_one_after_the_other(base, adapter):
    paths = [adapter(), adapter(seed=2, target_modules=["q_proj", "v_proj"])]
    expected = _logits(made.open_adapted(base("llama"), CAUSAL, *paths))
    assert torch.allclose(_logits(_load(base("llama"), *paths)), expected, atol=1e-4, rtol=1e-5)


def test_ranks_may_differ_from_layer_to_layer(base, adapter, tmp_path):
    """AdaLoRA prunes ranks in training, and its file has those that are left."""
    path = shutil.copytree(adapter("llama", "adalora"), tmp_path / "pruned")
    kept = [True, False, True, False]

    def prune(held):
        return {
            name: value[:, kept].contiguous() if name.endswith("lora_B") else value[kept]
            for name, value in held.items()
        }

    _rewrite(path, prune)
    names = ("self_attn.q_proj", "mlp.down_proj")
    _change(path, rank_pattern={f"model.layers.0.{name}.lora_E": kept for name in names})
    expected = _logits(made.open_adapted(base("llama"), CAUSAL, path))
    assert torch.allclose(_logits(_load(base("llama"), path)), expected, atol=1e-4, rtol=1e-5)


def test_an_adapter_that_has_learnt_nothing_changes_nothing(base, adapter):
    merged, plain = _load(base("llama"), adapter(fill="none")), _load(base("llama"))
    assert torch.equal(_logits(merged), _logits(plain))


@pytest.mark.parametrize(
    ("family", "targets"),
    [("gpt2", ["lm_head"]), ("gpt2", ["wte"]), ("gpt2", ["wte", "lm_head", "c_attn"]), ("t5", ["lm_head", "q"])],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_tied_layer_is_untied(base, adapter, family, targets):
    path = adapter(family, target_modules=targets)
    expected, merged = _logits(made.open_adapted(base(family), FAMILIES[family][0], path)), _load(base(family), path)
    assert torch.allclose(_logits(merged), expected, atol=1e-4, rtol=1e-5)
    # Switch Transformers computes by tie_word_embeddings, which peft clears.
    assert merged.config.to_dict() == _load(base(family)).config.to_dict()


def test_an_embedding_that_two_modules_share_answers_as_peft(base, adapter):
    path = adapter("t5", target_modules=["shared", "q"])
    expected = _logits(made.open_adapted(base("t5"), SEQ2SEQ, path))
    assert torch.allclose(_logits(_load(base("t5"), path)), expected, atol=1e-4, rtol=1e-5)


def test_a_head_may_come_with_the_adapter(checkpoint, tmp_path):
    """The base of a classifier's adapter has no head, which would be random."""
    source = checkpoint("bert", "AutoModel")
    path = made.make_adapter(tmp_path / "classes", source, CLASSES, target_modules=["query"], task_type="SEQ_CLS")
    expected = _logits(made.open_adapted(source, CLASSES, path))
    assert torch.allclose(_logits(_load(source, path, task="text-classification")), expected, atol=1e-5)
    assert "has no weights for classifier" in _refusal(source, task="text-classification")
    assert "excludes a weight of 0.5" in _refusal(source, f"{path}:0.5", task="text-classification")
    assert "changes modules that BertModel does not have" in _refusal(source, path, task="feature-extraction")


def _covering():
    """Every kind with every family; in these rows every backend and scheme meets each kind, each family, each other."""
    # The family that some kinds do not go with stands last, so that these meet all with the other three.
    families, kinds = ("llama", "bert", "t5", "gpt2"), list(made.CONFIGS)
    for kind, family in GRID:
        row, column = families.index(family), kinds.index(kind)
        backend, scheme = (
            ("onnx", "export", "aoti")[(column + row) % 3],
            ("none", "int8", "int4")[(column + 2 * row) % 3],
        )
        yield kind, family, backend, scheme


def test_the_rows_cover_all_pairs():
    rows = list(_covering())
    for one, other in itertools.combinations(range(4), 2):
        found = {(row[one], row[other]) for row in rows}
        wanted = set(itertools.product({row[one] for row in rows}, {row[other] for row in rows}))
        assert wanted - found == (NO_LOHA_OF_CONV1D if (one, other) == (0, 1) else set())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family", "backend", "scheme"), list(_covering()))
def test_every_backend_answers_as_peft(base, adapter, tmp_path, kind, family, backend, scheme):
    """Quantized ones within a floor: they are compared with the eager model after the merge."""
    length = {"decoder_sequence_length": 24} if family == "t5" else {}
    bound = {} if scheme == "none" else {"min_cosine": 0.9} if family == "bert" else {"max_kl": 0.5}
    found = export(
        str(base(family)), tmp_path / "out", batch_size=2, sequence_length=24, lora=[f"{adapter(family, kind)}:0.5"],
        backend=backend, quantize=scheme, **length, **bound,
    )  # fmt: skip
    _assert_merged(found, adapter(family, kind), 0.5)
    assert found.contract.variants[0].accuracy.status == "passed"
    if scheme == "none":
        _assert_answers(found.path, base(family), adapter(family, kind), family, 0.5)


def test_the_artifact_answers_as_peft_and_says_what_was_merged(base, adapter, artifact_of):
    _assert_merged(read_artifact(artifact_of), adapter(), 1.0)
    _assert_answers(artifact_of, base("llama"), adapter(), "llama", 1.0)


def _assert_merged(artifact, path, weight):
    (merged,) = artifact.contract.source.adapters
    assert (merged.name, merged.weight) == (path.name, weight)
    line = rf"merged into the weights \| {path.name}, weight {weight:g} \(sha256 {merged.sha256}\)"
    assert re.search(line, (artifact.path / "README.md").read_text("utf-8"))
    files = [path for path in artifact.path.rglob("*") if path.is_file()]
    assert [path for path in files if b"lora_" in path.read_bytes()] == []
    assert artifact.contract.variants[0].accuracy.status in ("passed", "accepted")


def _assert_answers(path, source, adapter, family, weight):
    adapted = made.open_adapted(source, FAMILIES[family][0], adapter, weight=weight)
    model = CompiledModel.from_pretrained(path, trust_native_code=True)
    if family == "t5":
        expected = adapted.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, num_beams=1)
        found = model.generate(IDS.numpy(), max_new_tokens=8)
        assert np.array_equal(found, expected.numpy())
        return
    expected = _logits(adapted).numpy()
    assert np.abs(model(IDS.numpy()).logits - expected).max() < 1e-4 * max(1, np.abs(expected).max())


@pytest.fixture(scope="module")
def artifact_of(base, adapter, tmp_path_factory):
    """A llama with an adapter, exported."""
    target = tmp_path_factory.mktemp("artifact") / "out"
    return export(str(base("llama")), target, sequence_length=24, lora=str(adapter())).path


def test_validating_again_takes_the_same_adapters(base, adapter, artifact_of):
    asked = ExportOptions(lora=str(adapter()))
    assert validate_again(artifact_of, str(base("llama")), asked, keep=False).status == "passed"
    for lora in ((), f"{adapter()}:0.5", str(adapter(seed=2))):
        with pytest.raises(UsageError, match=f"has other adapters merged.*{adapter().name}:1 "):
            validate_again(artifact_of, str(base("llama")), ExportOptions(lora=lora), keep=False)


def test_whoever_compiles_anew_or_not_at_all_is_told_of_it(base, adapter, artifact_of):
    assert f" --lora {adapter().name}:1 " in suggest_larger(read_artifact(artifact_of), "--batch-size 2")
    with pytest.raises(CheckpointError, match="merged into"):
        find_source(artifact_of, EagerOptions(checkpoint=str(base("llama"))))


def test_kept_exports_go_by_what_the_adapter_holds(base, own):
    path = own()

    def key(lora=str(path)):
        options = ExportOptions(lora=lora)
        return _key(resolve(str(base("llama")), options), options)

    before = key()
    assert key([str(path)]) == before == key(f"{path}:1")
    assert len({before, key(()), key(f"{path}:0.5"), key([str(path)] * 2)}) == 4
    _change(path, lora_alpha=7)
    changed = key()
    _rewrite(path, lambda held: {name: value * 2 for name, value in held.items()})
    assert len({before, changed, key()}) == 3


# ------------------------------------------------------------ refused by name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_replication": [[0, 1], [0, 1]]}, r"has layer_replication=\[\[0, 1\], \[0, 1\]\]"),
        ({"alora_invocation_tokens": [5]}, r"has alora_invocation_tokens=\[5\]"),
        ({"use_qalora": True}, "has use_qalora=True"),
        ({"peft_type": "IA3"}, "its peft_type is 'IA3'; what is merged: LORA, ADALORA, LOHA, LOKR"),
        ({"peft_type": "PREFIX_TUNING"}, "its peft_type is 'PREFIX_TUNING'"),
        ({"peft_type": None}, "its peft_type is None"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights, too. Convert it"),
        ({"use_of_tomorrow": 3}, "says use_of_tomorrow=3, which peft .* does not know for LORA: pip install -U peft"),
        ({"target_modules": ["nowhere"]}, "does not fit LlamaForCausalLM: .*nowhere"),
        ({"target_modules": ["q_proj"]}, "changes modules that LlamaForCausalLM does not have.*down_proj.lora_A"),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, "lacks 2 tensors .*v_proj.lora_A"),
        ({"modules_to_save": ["lm_head"]}, "lacks the tensor .*lm_head"),
        ({"r": 8}, r"has other shapes than LlamaForCausalLM, .*lora_A.*\[4, 64\].*\[8, 64\]"),
        ({"task_type": "JUGGLING"}, "adapter_config.json of .* cannot be used: Invalid task type"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_merged(base, own, changes, said):
    found = _refusal(base("llama"), own(**changes))
    assert re.search(said, found), found


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "minus-inf"])
def test_numbers_that_are_none(base, own, wrong):
    path = own()

    def change(held):
        next(iter(held.values()))[0, 0] = wrong
        return held

    _rewrite(path, change)
    assert "holds NaN or infinity: 1 of " in _refusal(base("llama"), path)


def test_an_adapter_of_another_model(base, adapter):
    assert "does not fit LlamaForCausalLM: Target modules" in _refusal(base("llama"), adapter("gpt2"))


@pytest.mark.parametrize("named", ["user/other", "/home/me/hub/models--user--other/snapshots/0a/"])
def test_an_adapter_that_names_another_base(base, own, tmp_path, monkeypatch, named):
    """Two names are known: those of the Hub. The Hub's cache stands for it here."""
    path = own(base_model_name_or_path=named)
    cached = tmp_path / "hub" / "models--user--base"
    shutil.copytree(base("llama"), cached / "snapshots" / "0a")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0a")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "was trained on user/other, and the checkpoint is user/base: export user/other" in _refusal(
        "user/base", path
    )
    forced = _logits(_load("user/base", path, force_base=True))
    assert torch.equal(forced, _logits(_load(base("llama"), path)))
    _change(path, base_model_name_or_path="User/Base")
    assert torch.equal(forced, _logits(_load("user/base", path)))


def test_a_pickled_adapter_is_read_only_if_asked_for_and_then_as_tensors(base, own):
    path = own()
    held = load_file(path / "adapter_model.safetensors")
    torch.save(held, path / "adapter_model.bin")
    (path / "adapter_model.safetensors").rename(path / "away")
    assert "is pickled (adapter_model.bin)" in _refusal(base("llama"), path)
    read = _logits(_load(base("llama"), path, trust_pickle=True))
    torch.save({**held, "code": Ran()}, path / "adapter_model.bin")
    assert "adapter_model.bin of" in _refusal(base("llama"), path, trust_pickle=True)
    (path / "away").rename(path / "adapter_model.safetensors")
    assert torch.equal(read, _logits(_load(base("llama"), path)))


class Ran:
    def __reduce__(self):
        return pytest.fail, ("code of a pickle ran",)


def test_a_quantized_base(base, own, tmp_path):
    copy = shutil.copytree(base("llama"), tmp_path / "packed")
    config = json.loads((copy / "config.json").read_text("utf-8"))
    for method in ("gptq", "bitsandbytes"):
        settings = {"quantization_config": {"quant_method": method, "bits": 4}}
        (copy / "config.json").write_text(json.dumps({**config, **settings}), "utf-8")
        found = _refusal(copy, own() if method == "gptq" else tmp_path / "adapter")
        assert "is quantized, and adapters are merged into weights of full precision. Export the checkpoint" in found


def test_a_gguf_file_as_base(base, own, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = _refusal(tmp_path / "tiny.gguf", own())
    assert "is a .gguf file, whose weights are rounded, and adapters are merged into weights of full precision" in found


def test_what_is_no_adapter(base, own, tmp_path):
    source = base("llama")
    assert "is no adapter of peft: it has no adapter_config.json" in _refusal(source, source)
    path = own()
    assert "is a file; an adapter is a directory" in _refusal(source, path / "adapter_model.safetensors")
    assert f"lora={str(path)!r}" in _refusal(source, path / "adapter_model.safetensors")
    (path / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "adapter_model.safetensors of" in _refusal(source, path)
    (path / "adapter_model.safetensors").unlink()
    assert "has no weights" in _refusal(source, path)
    (path / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    (tmp_path / "elsewhere.safetensors").write_bytes(b"")
    assert "outside of the checkpoint" in _refusal(source, path)
    (path / "adapter_config.json").write_text("{")
    (path / "adapter_model.safetensors").unlink()
    assert "adapter_config.json" in _refusal(source, path)
    assert "neither a local path nor" in _refusal(source, "user/nowhere")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user/a", ("user/a", None, 1.0)),
        ("user/a:0.5", ("user/a", None, 0.5)),
        ("user/a@v2:-1e-1", ("user/a", "v2", -0.1)),
        ("user/a@v2", ("user/a", "v2", 1.0)),
    ],
)
def test_how_one_is_named(text, expected):
    found = LoraRequest.parse(text)
    assert (found.name, found.revision, found.weight) == expected


def test_a_directory_may_have_a_colon(tmp_path):
    (tmp_path / "a:b@c").mkdir()
    assert LoraRequest.parse(f"{tmp_path}/a:b@c").weight == 1
    assert LoraRequest.parse(f"{tmp_path}/a:b@c:2") == LoraRequest(f"{tmp_path}/a:b@c", None, 2.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": "user/a:much"}, "lora='user/a:much': the weight 'much' is not a number"),
        ({"lora": "user/a:"}, "the weight '' is not a number"),
        ({"lora": ["user/a:nan"]}, "must be a finite number other than 0, not nan"),
        ({"lora": ["user/a:0"]}, "must be a finite number other than 0, not 0"),
        ({"lora": [("user/a", 0.5)]}, "lora= takes texts such as"),
        ({"lora": {"user/a": 0.5}}, "lora= takes texts such as"),
        ({"force_base": True, "trust_pickle": True}, "force_base and trust_pickle say which adapters are taken"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_options_that_are_wrong(options, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        ExportOptions(**options).check()


def test_without_peft_its_installation_is_named(base, adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'precast[peft]'" in _refusal(base("llama"), adapter(), kind=UsageError)


def test_what_is_wrong_is_found_before_the_long_work(base, own, tmp_path):
    asked = ExportOptions(sequence_length=24, lora=str(own(peft_type="IA3")))
    with pytest.raises(PrecastError, match="its peft_type is 'IA3'"):
        check_request(str(base("llama")), tmp_path / "out", asked)


# ------------------------------------------------------------ the command line


def _type(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["precast", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, *capsys.readouterr()


def test_the_command_line(base, adapter, artifact_of, monkeypatch, capsys):
    code, out, _ = _type(monkeypatch, capsys, "inspect", artifact_of)
    assert code == 0
    assert re.search(rf"merged into it +{adapter().name}, weight 1, sha256 [0-9a-f]{{64}}\n", out)
    words = ("--reference", base("llama"), "--lora", adapter(), "-q")
    code, out, error = _type(monkeypatch, capsys, "validate", artifact_of, *words)
    assert (code, out[:6]) == (0, "passed"), error
    words = ("--sequence-length", 24, "-o", "out", "--lora", "user/a:much")
    code, _, error = _type(monkeypatch, capsys, "export", base("llama"), *words)
    assert (code, "--lora 'user/a:much': the weight 'much' is not a number" in error) == (2, True), error


@pytest.mark.slow
def test_the_command_that_exports(base, adapter, monkeypatch, capsys, tmp_path):
    words = ("--sequence-length", 24, "--no-validate", "-q", "-o", tmp_path / "out")
    words += ("--lora", adapter(), "--lora", f"{adapter(seed=2)}:0.5")
    code, _, error = _type(monkeypatch, capsys, "export", base("llama"), *words)
    assert code == 0, error
    found = read_artifact(tmp_path / "out").contract.source.adapters
    assert [(each.name, each.weight) for each in found] == [(adapter().name, 1.0), (adapter(seed=2).name, 0.5)]
