"""Options that are given together: each pair works, or is refused by the table that says which do not."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from precast.exporter import ExportOptions, export
from precast.exporter.options.combinations import BACKEND_RULES, CONFLICTS, FEATURES, NEEDS
from precast.runtime import CompiledModelForCausalLM
from precast.runtime.artifact.backends import BACKENDS
from precast.runtime.errors import UsageError

ASKED = {
    "lora": {"lora": ("adapter",)},
    "lora_slots": {"lora_slots": 1, "lora_rank": 4},
    "prefix_tuning": {"prefix_tuning": "prefix"},
    "quantize": {"quantize": "int8"},
    "kv_cache='int8'": {"kv_cache": "int8"},
    "kv_cache='float16'": {"kv_cache": "float16"},
    "dtype": {"dtype": "bfloat16"},
    "auto_cast": {"auto_cast": "matmul"},
    "device": {"device": "cuda"},
    "tensor_parallel": {"tensor_parallel": 2},
    "pipeline_parallel": {"pipeline_parallel": 2},
    "format": {"format": "qdq"},
}
SCHEMES = ("int8", "int4", "a8w8", "a8w8-dynamic", "auto")
REFUSED = {frozenset((each.first, each.second)) for each in CONFLICTS}
TAKEN = {name: [row.name for row in BACKENDS.values() if "dtype" in row.takes] for name in ("dtype", "auto_cast")}
TAKEN |= {rule.feature: [row.name for row in BACKENDS.values() if rule.is_taken(row)] for rule in BACKEND_RULES}
TAKEN |= {"device": ["aoti"], "format": ["onnx"], "tensor_parallel": ["aoti", "neuron"]}
TAKEN |= {"pipeline_parallel": ["onnx", "export"]}
NEEDED = {each.feature: each.other for each in NEEDS}
SCHEME_NEEDS = {("tensor_parallel", "int4"): {"symmetric": True, "group_size": 16}}
SCHEME_REFUSED = {
    **{("tensor_parallel", f"a8w8{rest}"): "packed for the kernels of whole layers" for rest in ("", "-dynamic")},
    ("tensor_parallel", "auto"): "chooses groups and offsets layer by layer",
}
"""What some schemes need beside another feature, and those that it is refused with."""
NEURON = {"instance_type": "trn1"}


def asked(features, backend, **changes) -> ExportOptions:
    together = {name: value for each in features for name, value in ASKED[each].items()}
    if backend == "neuron":
        together |= NEURON
    return ExportOptions(**{"sequence_length": (40,), "backend": backend, **together, **changes})


def is_refused(features, backend) -> bool:
    pairs = {frozenset(pair) for pair in combinations(features, 2)}
    lacks = any(NEEDED.get(each, each) not in features for each in features)
    return lacks or bool(pairs & REFUSED) or any(backend not in TAKEN.get(each, list(BACKENDS)) for each in features)


def test_the_table_and_this_test_know_the_same_features():
    assert set(ASKED) == set(FEATURES)
    assert {*NEEDED, *NEEDED.values()} <= set(FEATURES)
    assert {name for pair in REFUSED for name in pair} <= set(FEATURES)
    assert all(len(pair) == 2 for pair in REFUSED)
    assert len(REFUSED) == len(CONFLICTS)
    for name, options in ASKED.items():
        assert FEATURES[name](ExportOptions(**options))
        assert not FEATURES[name](ExportOptions())


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_every_set_of_three_is_refused_by_the_table_or_not_at_all(backend):
    for count in (1, 2, 3):
        for features in combinations(FEATURES, count):
            if {"kv_cache='int8'", "kv_cache='float16'"} <= set(features):
                continue  # one value
            problems = list(asked(features, backend).problems())
            assert bool(problems) == is_refused(features, backend), (features, problems)


PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"
BETWEEN = ("<!-- begin of the table -->", "<!-- end of the table -->")


def test_the_page_has_the_table(golden_text):
    lines = ["| this | not with | because |", "|---|---|---|"]
    lines += [f"| `{each.feature}` | anything without `{each.other}` | {each.because} |" for each in NEEDS]
    lines += [f"| `{each.first}` | `{each.second}` | {each.because} |" for each in CONFLICTS]
    for rule in BACKEND_RULES:
        others = ", ".join(f"`backend={name!r}`" for name in BACKENDS if name not in TAKEN[rule.feature])
        lines.append(f"| `{rule.feature}` | {others} | {rule.because} |")
    golden_text(PAGE, "\n".join(lines), BETWEEN)


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    """A tiny Llama, an adapter and a prefix of it."""
    import adapters

    folder, source = tmp_path_factory.mktemp("files"), checkpoint("llama", num_hidden_layers=2)
    adapters.make_adapter(folder / "adapter", source, "AutoModelForCausalLM", target_modules=["q_proj", "down_proj"])
    config = tiny.config_for("llama", num_hidden_layers=2)
    width = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    (folder / "prefix").mkdir()
    numbers = np.random.default_rng(0).normal(0, 0.1, (3, width)).astype(np.float32)
    save_file({"prompt_embeddings": numbers}, folder / "prefix" / "adapter_model.safetensors")
    (folder / "prefix" / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM"}')
    return source, folder


WORKING = [
    (pair, backend, scheme)
    for backend in ("onnx", "aoti", "export")
    for pair in combinations([name for name in FEATURES if name != "device"], 2)
    if not is_refused({*pair, *(NEEDED[each] for each in pair if each in NEEDED)}, backend)
    if pair != ("kv_cache='int8'", "kv_cache='float16'")
    for scheme in (SCHEMES if "quantize" in pair else ("",))
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This CPU has no instructions")
@pytest.mark.parametrize(
    ("pair", "backend", "scheme"),
    WORKING,
    ids=[f"{'+'.join(pair)}-{backend}-{scheme}" for pair, backend, scheme in WORKING],
)
def test_every_pair_that_is_not_refused_works(files, tmp_path, pair, backend, scheme):
    source, folder = files
    changes = {
        name: str(folder / value) for name, value in (("lora", "adapter"), ("prefix_tuning", "prefix")) if name in pair
    }
    together = (*pair, *(NEEDED[each] for each in pair if each in NEEDED))
    needs = {name: value for each in pair for name, value in SCHEME_NEEDS.get((each, scheme), {}).items()}
    options = asked(together, backend, **changes, **needs, **({"quantize": scheme} if scheme else {}))
    # Random weights bear less than trained ones.
    floor = {"max_kl": 0.5} if options.is_lossy else {}
    if words := [SCHEME_REFUSED[each, scheme] for each in pair if (each, scheme) in SCHEME_REFUSED]:
        with pytest.raises(UsageError, match=words[0]):
            export(str(source), tmp_path / "out", options.replace(**floor))
        return
    (variant,) = export(str(source), tmp_path / "out", options.replace(**floor)).contract.variants
    assert variant.accuracy.status == "passed"
    model = CompiledModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(np.array([[5, 9, 30]]), max_new_tokens=4, do_sample=False).shape == (1, 7)
