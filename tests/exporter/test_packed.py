"""Checkpoints that are already quantized, packed here word by word as their formats are documented."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from precast.exporter import ExportOptions
from precast.exporter.checkpoint.checkpoint import Checkpoint
from precast.exporter.checkpoint.prequantized import (
    SourceScheme,
    find_packing,
    find_quantization_settings,
    strip_quantization,
)
from precast.exporter.checkpoint.resolve import resolve
from precast.runtime.artifact.tasks import get_task
from precast.runtime.errors import CheckpointError

IN_ORDER = tuple(range(8))
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GENERATION = get_task("text-generation")


class Made:
    """A random weight [outputs, inputs] on a grid: its codes, scales and zero points, and the group of each input."""

    def __init__(self, outputs: int, inputs: int, size: int, bits: int, *, middle: bool, shuffled: bool, seed: int):
        random = np.random.default_rng(seed)
        count = 1 if size == -1 else ceil(inputs / size)
        self.bits, self.group = bits, np.arange(inputs) // (inputs if size == -1 else size)
        if shuffled:
            random.shuffle(self.group)
        self.codes = random.integers(0, 2**bits, (outputs, inputs))
        self.zeros = random.integers(0, 2**bits, (outputs, count))
        if middle:
            self.zeros[:] = 2 ** (bits - 1)
        self.scales = (random.random((outputs, count)) * 0.02 + 1e-3).astype(np.float16)

    @property
    def weight(self) -> torch.Tensor:
        zeros, scales = self.zeros[:, self.group], self.scales[:, self.group]
        return torch.from_numpy((self.codes - zeros).astype(np.float32) * scales.astype(np.float32))


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] = IN_ORDER) -> torch.Tensor:
    """int32 [rows, n]: each row's codes, 32 / bits per word, the first in its lowest bits; the last filled with 0."""
    per_word, rows = 32 // bits, []
    for row in np.pad(codes, [(0, 0), (0, -codes.shape[1] % per_word)]).tolist():
        chunks = [row[start : start + per_word] for start in range(0, len(row), per_word)]
        rows.append([sum(chunk[order[place]] << bits * place for place in range(per_word)) for chunk in chunks])
    return torch.from_numpy(np.array(rows, np.uint32).view(np.int32))


def gptq(made: Made, form: str = "gptq") -> dict[str, torch.Tensor]:
    stored = made.zeros - 1 if form == "gptq" else made.zeros
    return {
        "qweight": words(made.codes, made.bits).T.contiguous(),
        "qzeros": words(stored.T % 2**made.bits, made.bits),
        "scales": torch.from_numpy(made.scales.T.copy()),
        "g_idx": torch.from_numpy(made.group.astype(np.int32)),
    }


def awq(made: Made) -> dict[str, torch.Tensor]:
    return {
        "qweight": words(made.codes.T, 4, AWQ_ORDER),
        "qzeros": words(made.zeros.T, 4, AWQ_ORDER),
        "scales": torch.from_numpy(made.scales.T.copy()),
    }


def compressed(made: Made, form: str, *, symmetric: bool, actorder: str | None = None) -> dict[str, torch.Tensor]:
    middle = 2 ** (made.bits - 1)
    parts = {"weight_scale": torch.from_numpy(made.scales).bfloat16()}
    made.scales = parts["weight_scale"].float().numpy()
    if form == "pack-quantized":
        parts["weight_packed"] = words(made.codes, made.bits)
        parts["weight_shape"] = torch.tensor(made.codes.shape)
        zeros = words(made.zeros.T, made.bits).T.contiguous()
    else:
        parts["weight"] = torch.from_numpy((made.codes - middle).astype(np.int8))
        zeros = torch.from_numpy((made.zeros - middle).astype(np.int8))
    if not symmetric:
        parts["weight_zero_point"] = zeros
    if actorder == "group":
        parts["weight_g_idx"] = torch.from_numpy(made.group.astype(np.int32))
    return parts


def scheme(bits: int, size: int, *, symmetric: bool, form: str, **changes: Any) -> dict[str, Any]:
    """A quantization_config as compressed-tensors writes it."""
    strategy = "channel" if size == -1 else "group"
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "actorder": None,
        "group_size": None if size == -1 else size, "dynamic": False, "observer": "minmax", **changes,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


Pack = tuple[dict[str, Any], Callable[[Made], dict[str, torch.Tensor]], dict[str, Any]]


def gptq_pack(bits: int = 4, size: int = 32, *, sym: bool = True, desc_act: bool = False, form: str = "gptq") -> Pack:
    written = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": sym, "desc_act": desc_act}
    if form != "gptq":
        written["checkpoint_format"] = form
    return written, lambda made: gptq(made, form), {"size": size, "bits": bits, "middle": sym, "shuffled": desc_act}


def awq_pack(size: int = 32) -> Pack:
    written = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    return written, awq, {"size": size, "bits": 4, "middle": False, "shuffled": False}


def compressed_pack(bits: int, size: int, form: str, *, symmetric: bool, actorder: str | None = None) -> Pack:
    return (
        scheme(bits, size, symmetric=symmetric, form=form, actorder=actorder),
        lambda made: compressed(made, form, symmetric=symmetric, actorder=actorder),
        {"size": size, "bits": bits, "middle": symmetric, "shuffled": actorder == "group"},
    )


PACKS = {
    "gptq": gptq_pack(),
    "gptq-8-rows": gptq_pack(8, -1),
    "gptq-asymmetric": gptq_pack(sym=False),
    "gptq-v2-activation-order": gptq_pack(sym=False, desc_act=True, form="gptq_v2"),
    "awq": awq_pack(),
    "awq-rows": awq_pack(-1),
    "packed": compressed_pack(4, 32, "pack-quantized", symmetric=True),
    "packed-asymmetric": compressed_pack(4, 32, "pack-quantized", symmetric=False),
    "packed-8-rows": compressed_pack(8, -1, "pack-quantized", symmetric=False),
    "packed-activation-order": compressed_pack(4, 32, "pack-quantized", symmetric=False, actorder="group"),
    "int-rows": compressed_pack(8, -1, "int-quantized", symmetric=True),
    "naive-groups": compressed_pack(4, 32, "naive-quantized", symmetric=False),
}


def quantized(source: Path, target: Path, pack: Pack, **changes: Any) -> dict[str, torch.Tensor]:
    """Pack every projection of a checkpoint; what its weights are then worth, in float32."""
    written, packed, layout = pack
    shutil.copytree(source, target)
    tensors, expected = {}, {}
    for seed, (name, tensor) in enumerate(load_file(source / "model.safetensors").items()):
        if name.endswith("_proj.weight"):
            made = Made(*tensor.shape, seed=seed, **layout)
            parts = packed(made)
            tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
            expected[name] = made.weight
        else:
            tensors[name] = tensor.half()
            expected[name] = tensors[name].float()
    save_file({**tensors, **changes}, target / "model.safetensors", {"format": "pt"})
    describe(target, written)
    return expected


def describe(path: Path, written: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": written}))


def opened(path: Path) -> Checkpoint:
    return resolve(str(path), ExportOptions())


def altered(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_packed_checkpoints_load_exactly(pack: Pack, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    expected = quantized(checkpoint("llama"), tmp_path / "packed", pack)
    model = opened(tmp_path / "packed").load(GENERATION, "float32")
    held = model.state_dict()
    assert set(expected) | {"lm_head.weight"} == set(held)
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())
    assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_generation_settings_are_those_of_the_files(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Of config.json, where older checkpoints have them, too: transformers looks there, given a folder to load from."""
    path = tmp_path / "packed"
    quantized(checkpoint("llama"), path, PACKS["gptq"])
    (path / "generation_config.json").unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "no_repeat_ngram_size": 2, "max_length": 33}))
    found = opened(path).load(GENERATION, "float32").generation_config
    assert (found.no_repeat_ngram_size, found.max_length, found.eos_token_id) == (2, 33, 2)


@settings(max_examples=60, deadline=None)
@given(
    pack=st.one_of(
        st.builds(
            gptq_pack, st.sampled_from([4, 8]), st.sampled_from([8, 24, -1]), sym=st.booleans(),
            desc_act=st.booleans(), form=st.sampled_from(["gptq", "gptq_v2"]),
        ),
        st.builds(awq_pack, st.sampled_from([8, 24, -1])),
        st.builds(
            compressed_pack, st.sampled_from([4, 8]), st.sampled_from([8, 24, -1]),
            st.sampled_from(["pack-quantized", "int-quantized", "naive-quantized"]), symmetric=st.booleans(),
            actorder=st.sampled_from([None, "weight", "group"]),
        ),
    ),
    outputs=st.integers(1, 5), inputs=st.integers(1, 5), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_weight_is_what_was_packed(pack: Pack, outputs: int, inputs: int, seed: int) -> None:
    written, packed, layout = pack
    made = Made(outputs * 8, inputs * 8, seed=seed, **layout)
    weight = find_packing(written, "model").weight(packed(made))
    assert weight.dtype == torch.float32
    assert torch.equal(weight, made.weight)


@pytest.mark.parametrize("outputs", [5, 8])
def test_words_that_are_not_full(outputs: int) -> None:
    written, packed, layout = compressed_pack(4, -1, "pack-quantized", symmetric=False)
    made = Made(outputs, 13, seed=0, **layout)
    assert torch.equal(find_packing(written, "model").weight(packed(made)), made.weight)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_one_scale_for_a_whole_weight(form: str, shape: tuple[int, ...]) -> None:
    written = scheme(8, -1, symmetric=False, form=form, strategy="tensor")
    made = Made(8, 16, -1, 8, middle=False, shuffled=False, seed=0)
    made.scales[:], made.zeros[:] = made.scales[0], made.zeros[0]
    parts = compressed(made, form, symmetric=True)
    parts["weight_scale"] = parts["weight_scale"][0].reshape(shape)
    parts["weight_zero_point"] = torch.tensor(made.zeros[0, 0] - 128, dtype=torch.int8).reshape(shape)
    assert torch.equal(find_packing(written, "model").weight(parts), made.weight)


def test_zero_points_that_were_not_packed() -> None:
    written, packed, layout = compressed_pack(4, 8, "pack-quantized", symmetric=False)
    made = Made(8, 16, seed=0, **layout)
    parts = {**packed(made), "weight_zero_point": torch.from_numpy((made.zeros - 8).astype(np.int8))}
    assert torch.equal(find_packing(written, "model").weight(parts), made.weight)


def test_what_the_grid_is(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    grids = {}
    for name in ("gptq-8-rows", "gptq-v2-activation-order", "awq", "packed"):
        quantized(checkpoint("llama"), tmp_path / name, PACKS[name])
        grids[name] = opened(tmp_path / name).source_scheme
    assert grids == {
        "gptq-8-rows": SourceScheme("gptq", 8, -1, symmetric=True),
        "gptq-v2-activation-order": SourceScheme("gptq", 4, 32, symmetric=False, contiguous=False),
        "awq": SourceScheme("awq", 4, 32, symmetric=False),
        "packed": SourceScheme("compressed-tensors", 4, 32, symmetric=True),
    }
    assert opened(checkpoint("llama")).source_scheme is None


def test_the_configuration_is_of_the_unpacked_model(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quantized(checkpoint("llama"), tmp_path / "packed", PACKS["gptq"])
    found, plain = opened(tmp_path / "packed"), opened(checkpoint("llama"))
    assert found.written_config == plain.written_config
    assert not hasattr(found.config, "quantization_config")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_settings_may_be_those_of_the_text_model(key: str) -> None:
    written = {"model_type": "a", "text_config": {"hidden_size": 4, key: COMPRESSED}}
    assert find_quantization_settings(written) == COMPRESSED
    assert strip_quantization(written) == {"model_type": "a", "text_config": {"hidden_size": 4}}
    assert find_quantization_settings({"quantization_config": None, "text_config": None}) is None


def test_a_module_may_be_spread_over_files(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    expected = quantized(checkpoint("llama"), path := tmp_path / "packed", PACKS["gptq"])
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    where = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in where if where[name] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    held = opened(path).load(GENERATION, "float32").state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())


COMPRESSED = scheme(4, 32, symmetric=True, form="pack-quantized")
GROUP = COMPRESSED["config_groups"]["group_0"]
REFUSED = {
    "quant_method 'bitsandbytes'": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "quant_method 'fp8'": {"quant_method": "fp8"},
    "quant_method None": {"bits": 4},
    "bits 3": {**PACKS["gptq"][0], "bits": 3},
    "bits '4'": {**PACKS["gptq"][0], "bits": "4"},
    "group_size 0": {**PACKS["gptq"][0], "group_size": 0},
    "checkpoint_format 'marlin'": {**PACKS["gptq"][0], "checkpoint_format": "marlin"},
    "is_marlin_format": {**PACKS["gptq"][0], "is_marlin_format": True},
    "rotation 'hadamard'": {**PACKS["gptq"][0], "rotation": "hadamard"},
    r"dynamic rules for '\+:.*down.*'": {**PACKS["gptq"][0], "dynamic": {"-:.*up.*": {}, "+:.*down.*": {"bits": 8}}},
    "bits 8": {**PACKS["awq"][0], "bits": 8},
    "version 'gemv'": {**PACKS["awq"][0], "version": "GEMV"},
    "format 'float-quantized'": {**COMPRESSED, "format": "float-quantized"},
    "num_bits 2": scheme(2, 32, symmetric=True, form="pack-quantized"),
    "type 'float'": scheme(8, 32, symmetric=True, form="naive-quantized", type="float"),
    "strategy 'block'": scheme(8, 32, symmetric=True, form="int-quantized", strategy="block"),
    "activations are quantized too": {**COMPRESSED, "config_groups": {"a": {**GROUP, "input_activations": {"a": 1}}}},
    "config_groups a, b differ": {**COMPRESSED, "config_groups": {"a": GROUP, "b": {**GROUP, "format": "dense"}}},
    "no config_groups": {**COMPRESSED, "config_groups": {}},
    "weights None in a": {**COMPRESSED, "config_groups": {"a": {"targets": ["Linear"]}}},
    "config_groups 3": {**COMPRESSED, "config_groups": 3},
    "the cache is quantized": {**COMPRESSED, "kv_cache_scheme": {"num_bits": 8}},
    "sparsity_config format 'sparse-24-bitmask'": {**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}},
    "activations are transformed": {**COMPRESSED, "transform_config": {"config_groups": {"u": {}}}},
}


@pytest.mark.parametrize(("said", "written"), REFUSED.items(), ids=REFUSED)
def test_other_schemes_are_refused(said: str, written: dict[str, Any], checkpoint: Any, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("llama"), path := tmp_path / "packed")
    describe(path, written)
    with pytest.raises(CheckpointError, match=rf"packed is quantized .*{said}.*quantized from.*gptq \(4 or 8 bits"):
        _ = opened(path).config


Q = "model.layers.0.self_attn.q_proj"
GARBLED = {
    "qzeros of shape [1, 8], not [2, 8]": ("gptq", lambda held: held.update({f"{Q}.qzeros": held[f"{Q}.qzeros"][:1]})),
    "has no scales": ("gptq", lambda held: held.pop(f"{Q}.scales")),
    "scales in int32": ("awq", lambda held: held.update({f"{Q}.scales": held[f"{Q}.scales"].int()})),
    "qweight of shape [512]": ("awq", lambda held: held.update({f"{Q}.qweight": held[f"{Q}.qweight"].flatten()})),
    "qweight in int64": ("awq", lambda held: held.update({f"{Q}.qweight": held[f"{Q}.qweight"].long()})),
    "g_idx with groups 5 to 5, but 2": ("gptq", lambda held: held[f"{Q}.g_idx"].fill_(5)),
    "zero points other than 8": ("gptq", lambda held: held[f"{Q}.qzeros"].add_(1)),
    "their shapes are not those of config.json": (
        "gptq", lambda held: [held.update({f"{Q}.{part}": held[f"{Q}.{part}"][:, :n].clone()})
                              for part, n in (("qweight", 32), ("qzeros", 4), ("scales", 32))],
    ),
    f"{Q}.weight is in torch.int8": ("int-rows", lambda held: held.pop(f"{Q}.weight_scale")),
    "has no weight_zero_point": ("packed-asymmetric", lambda held: held.pop(f"{Q}.weight_zero_point")),
    "weight_packed of shape [64, 8], not [64, 9]": (
        "packed", lambda held: held.update({f"{Q}.weight_shape": torch.tensor([64, 72])}),
    ),
    "weight in float32, not int8": ("int-rows", lambda held: held.update({f"{Q}.weight": held[f"{Q}.weight"].float()})),
    "no tensor in its safetensors files is a *.qweight": (
        "gptq", lambda held: [held.pop(name) for name in list(held) if name.endswith("qweight")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("said", "case"), GARBLED.items(), ids=GARBLED)
def test_garbled_tensors_are_refused(said: str, case: tuple[str, Any], checkpoint: Any, tmp_path: Path) -> None:
    pack, change = case
    quantized(checkpoint("llama"), tmp_path / "packed", PACKS[pack])
    altered(tmp_path / "packed", change)
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path / "packed").load(GENERATION, "float32")
    assert said in str(caught.value)
    assert "weights of packed cannot be loaded" in str(caught.value)


def test_a_truncated_file_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quantized(checkpoint("llama"), tmp_path / "packed", PACKS["awq"])
    file = tmp_path / "packed" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="weights of packed cannot be loaded"):
        opened(tmp_path / "packed").load(GENERATION, "float32")


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("unused", [f"{Q}.bias", "model.layers.0.mlp.act_fn.scales"])
def test_what_would_change_answers_is_not_dropped(unused: str, value: float, checkpoint: Any, tmp_path: Path) -> None:
    quantized(checkpoint("llama"), tmp_path / "packed", PACKS["awq"], **{unused: torch.full((64,), value)})
    if value == 0.0:
        opened(tmp_path / "packed").load(GENERATION, "float32")
        return
    for task in ("text-generation", "feature-extraction"):
        with pytest.raises(CheckpointError, match=f"no place for: {unused}"):
            opened(tmp_path / "packed").load(get_task(task), "float32")


def test_a_lacking_weight_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quantized(checkpoint("llama"), tmp_path / "packed", PACKS["awq"])
    altered(tmp_path / "packed", lambda held: [held.pop(name) for name in list(held) if name.startswith(f"{Q}.")])
    with pytest.raises(CheckpointError, match=f"no weights for {Q}.weight"):
        opened(tmp_path / "packed").load(GENERATION, "float32")


def test_transposed_weights_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoint("gpt2"), path := tmp_path / "packed")
    describe(path, PACKS["gptq"][0])
    made = Made(64, 64, 32, 4, middle=True, shuffled=False, seed=0)

    def pack(held: dict[str, torch.Tensor]) -> None:
        del held["transformer.h.0.attn.c_proj.weight"]
        held.update({f"transformer.h.0.attn.c_proj.{part}": value for part, value in gptq(made).items()})

    altered(path, pack)
    with pytest.raises(CheckpointError, match="Conv1D"):
        opened(path).load(GENERATION, "float32")
