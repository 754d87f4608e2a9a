"""Less than float32: what is cast, what stays, what comes out; and the rule that encoders are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch.utils._pytree import tree_leaves, tree_map
from zoo import seq2seq as zoo

from precast.exporter import ExportOptions, export
from precast.exporter.backends import dtypes
from precast.exporter.backends.dtypes import choose_dtype
from precast.exporter.checkpoint.resolve import resolve
from precast.exporter.kinds.plan import make_plan
from precast.exporter.kinds.samples import Answer, ValidationSample
from precast.exporter.kinds.trace import Program, trace
from precast.exporter.precision import Cast, cast_programs, choose_cast
from precast.exporter.quantize import Recipe, Scheme, quantize
from precast.exporter.quantize.choose import quantize_model
from precast.exporter.validation.metrics import Floor, floor_for
from precast.exporter.validation.reference import Reference
from precast.exporter.validation.revalidate import validate_again
from precast.exporter.validation.rules import judge_cast
from precast.runtime.errors import AccuracyError, UsageError

aten: Any = torch.ops.aten
BF16 = torch.bfloat16
MODES = [(what, dtype) for what in ("matmul", "all", "weights") for dtype in (BF16, torch.float16)]
FAMILIES = {
    "llama": ("AutoModelForCausalLM", {"sequence_length": (24,)}),
    "gpt2": ("AutoModelForCausalLM", {"sequence_length": (24,)}),
    "bert": ("AutoModel", {"batch_size": 2, "sequence_length": (16,)}),
}

families = pytest.mark.parametrize("family", ["llama", "bert", pytest.param("gpt2", marks=pytest.mark.slow)])


def traced(source, **options) -> list[Program]:
    asked = ExportOptions(**options)
    checkpoint = resolve(str(source), asked)
    plan = make_plan(checkpoint, asked)
    return list(trace(checkpoint.load(plan.task, plan.dtype), plan))


@pytest.fixture
def programs(checkpoint):
    """`programs("bert")`: the traced graphs of a tiny checkpoint."""

    def make(family, changes=None, **options):
        auto, shapes = FAMILIES[family]
        return traced(checkpoint(family, auto, **(changes or {})), **{**shapes, **options})

    return make


def arguments(program: Program, seed: int = 0) -> Any:
    """What the graph takes: random tokens, all else as it was traced with."""
    random = torch.Generator().manual_seed(seed)
    args = list(program.exported.example_inputs[0])
    args[0] = torch.randint(3, tiny.VOCABULARY, args[0].shape, generator=random)
    return tree_map(lambda each: each.clone(), args)


def run(program: Program, args: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(program.exported.module()(*args))


def recast(args: Any, program: Program) -> Any:
    """The arguments in the types that the program takes now."""
    leaves, spec = torch.utils._pytree.tree_flatten(args)
    typed = [each.to(getattr(torch, it.dtype)) for each, it in zip(leaves, program.graph.inputs, strict=True)]
    return torch.utils._pytree.tree_unflatten(typed, spec)


def nodes(program: Program, target: Any) -> list[torch.fx.Node]:
    return [node for node in program.exported.graph.nodes if node.target is target]


def dtype_of(node: Any) -> torch.dtype:
    return node.meta["val"].dtype


@pytest.mark.parametrize(("what", "dtype"), MODES)
@families
def test_answers_are_close_and_typed_as_described(programs, family, what, dtype):
    [program] = programs(family)
    args = arguments(program)
    expected = run(program, args)
    [less] = cast_programs([program], Cast(what, dtype))
    found = run(less, recast(args, less))
    difference = float((found[0] - expected[0]).abs().max() / expected[0].abs().max())
    assert 1e-6 < difference < (0.03 if dtype == BF16 else 0.004)
    for tensor, spec in zip(found, less.graph.outputs, strict=True):
        assert tensor.dtype == getattr(torch, spec.dtype)
    is_low = what != "matmul" and family != "bert"
    assert less.graph.outputs[0].dtype == "float32"
    assert {layer.dtype for layer in less.graph.cache} <= {Cast(what, dtype).name if is_low else "float32"}


@pytest.mark.parametrize("what", ["matmul", "all", "weights"])
@families
def test_every_node_says_its_type_truly(programs, family, what):
    """Backends read the types off the graph."""
    [less] = cast_programs(programs(family), Cast(what, BF16))

    class Checked(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if node.op != "output":
                said = [each.dtype for each in tree_leaves(node.meta.get("val")) if isinstance(each, torch.Tensor)]
                assert said == [each.dtype for each in tree_leaves(result) if isinstance(each, torch.Tensor)], node
            return result

    exported, given = less.exported, iter(tree_leaves(recast(arguments(less), less)))
    weights = {**exported.constants, **exported.state_dict}
    values = [weights[spec.target] if spec.target else next(given) for spec in exported.graph_signature.input_specs]
    with torch.no_grad():
        Checked(exported.graph_module).run(*values)


def test_products_only(programs):
    """Linear layers in bfloat16 with their weights; norms, softmax, caches and what is added up in float32."""
    [less] = cast_programs(programs("llama"), Cast("matmul", BF16))
    for node in nodes(less, aten.linear.default):
        assert {dtype_of(each) for each in node.all_input_nodes} == {BF16}
    for target in (aten.rsqrt.default, aten.silu.default, aten.add.Tensor, torch.ops.precast.cached_attention.default):
        for node in nodes(less, target):
            assert not any(dtype_of(each) == BF16 for each in node.all_input_nodes)
    kinds = {name: tensor.dtype for name, tensor in less.exported.state_dict.items()}
    assert kinds["model.lm_head.weight"] == kinds["model.model.layers.0.mlp.up_proj.weight"] == BF16
    assert kinds["model.model.norm.weight"] == kinds["model.model.embed_tokens.weight"] == torch.float32


def test_all_leaves_norms_and_positions_in_float32(programs):
    """bfloat16 cannot count beyond 256, and a variance of 1e-5 is nothing in float16."""
    [less] = cast_programs(programs("llama"), Cast("all", BF16))
    for target in (aten.cos.default, aten.sin.default, aten.rsqrt.default, aten.mean.dim, aten.pow.Tensor_Scalar):
        assert nodes(less, target)
        for node in nodes(less, target):
            assert dtype_of(node) == dtype_of(node.all_input_nodes[0]) == torch.float32
    sums = [node for node in nodes(less, aten.add.Tensor) if len(node.all_input_nodes) == 2]
    assert BF16 in {dtype_of(node) for node in sums}
    attention = nodes(less, torch.ops.precast.cached_attention.default)[0]
    assert {dtype_of(each) for each in attention.args[:5]} == {BF16}


def test_far_positions_are_told_apart(checkpoint):
    """Tokens 300 to 420: a rotation by a rounded position would be off by up to a whole radian."""
    source = checkpoint("llama", max_position_embeddings=512)
    [program] = traced(source, sequence_length=(448,))
    args = arguments(program)
    args[0] = torch.randint(3, tiny.VOCABULARY, (1, 420), generator=torch.Generator().manual_seed(1))
    args[2], args[3] = torch.tensor([420], dtype=torch.int32), torch.arange(300, 420)[None]
    expected = run(program, args)[0]
    [less] = cast_programs([program], Cast("all", BF16))
    assert float((run(less, recast(args, less))[0] - expected).abs().max() / expected.abs().max()) < 0.03


@pytest.mark.parametrize(("what", "dtype"), MODES)
def test_padding_never_counts(programs, what, dtype):
    """A mask's lowest number is infinite in less than float32: rows would be no numbers."""
    [less] = cast_programs(programs("bert"), Cast(what, dtype))
    args = arguments(less)
    args[1][0, :10], args[1][1, 3:] = 0, 0
    first = run(less, args)[0]
    args[0][0, :10], args[0][1, 3:] = 7, 9
    second = run(less, args)[0]
    assert torch.isfinite(first).all()
    assert torch.equal(first[0, 10:], second[0, 10:])
    assert torch.equal(first[1, :3], second[1, :3])


def test_weights_are_cast_once_for_all_graphs(programs):
    """Two prompts' graphs and the decode step; the table of the embedding is the output layer's too."""
    made = cast_programs(programs("llama", {"tie_word_embeddings": True}, prefill_lengths=(4, 8)), Cast("matmul", BF16))
    assert len(made) == 3
    places = [{name: each.data_ptr() for name, each in it.exported.state_dict.items()} for it in made]
    assert places[0] == places[1] == places[2]
    tables = [it.exported.state_dict["model.model.embed_tokens.weight"] for it in made]
    assert {table.dtype for table in tables} == {BF16}
    sizes = {each.data_ptr(): each.nbytes for each in made[0].exported.state_dict.values()}
    assert sum(sizes.values()) < 0.51 * sum(
        4 * each.numel() for each in {each.data_ptr(): each for each in made[0].exported.state_dict.values()}.values()
    )


def test_a_table_that_another_graph_multiplies_by_is_cast_in_all(tmp_path):
    """T5's encoder only looks words up, its decoder's output layer multiplies by the same table."""
    zoo.make(tmp_path, "t5", zoo.TEXT)
    made = traced(tmp_path, batch_size=2, sequence_length=(8,), decoder_sequence_length=8)
    expected = run(made[0], arguments(made[0]))
    args = arguments(made[1])
    reference = run(made[1], args)
    less = cast_programs(made, Cast("all", BF16))
    handed = {spec.name: spec.dtype for spec in less[0].graph.outputs}
    assert handed
    assert set(handed.values()) == {"bfloat16"}
    assert {spec.name: spec.dtype for spec in less[1].graph.inputs if spec.name in handed} == handed
    for each, wanted in ((less[0], expected), (less[1], reference)):
        found = run(each, recast(arguments(each), each))
        assert float((found[0].float() - wanted[0]).abs().max() / wanted[0].abs().max()) < 0.05
    shared = [
        {name: each.dtype for name, each in it.exported.state_dict.items() if "shared" in name or "embed" in name}
        for it in less
    ]
    assert all(dtype == BF16 for found in shared for dtype in found.values())


# ---------------------------------------------------------------- what is asked for


def test_what_options_mean():
    assert choose_cast(ExportOptions()) is None
    assert choose_cast(ExportOptions(dtype="float16")) == Cast("weights", torch.float16)
    assert choose_cast(ExportOptions(auto_cast="matmul")) == Cast("matmul", BF16)
    assert choose_cast(ExportOptions(auto_cast="all", auto_cast_type="fp16")) == Cast("all", torch.float16)
    assert floor_for(ExportOptions(dtype="bfloat16")) == Floor(0.005, 0.94)
    assert floor_for(ExportOptions(auto_cast="all", auto_cast_type="fp16")) == Floor(0.0005, 0.98)
    assert floor_for(ExportOptions(auto_cast="matmul", max_kl=0.5)) == Floor(0.5, None)


@pytest.mark.parametrize(
    ("stored", "options", "expected"),
    [
        ("bfloat16", {"backend": "aoti"}, "bfloat16"),
        ("bfloat16", {"backend": "export"}, "bfloat16"),
        ("bfloat16", {"backend": "onnx"}, "float32"),
        ("bfloat16", {"backend": "aoti", "isa": "avx2"}, "float32"),
        ("float16", {"backend": "aoti"}, "float32"),
        ("float16", {"backend": "aoti", "device": "cuda"}, "float16"),
        ("float32", {"backend": "aoti"}, "float32"),
    ],
)
def test_auto_is_the_dtype_of_the_checkpoint_where_it_is_computed_in(
    monkeypatch, checkpoint, stored, options, expected
):
    """On a CPU with instructions for bfloat16 alone."""
    monkeypatch.setattr(dtypes, "matmul_dtypes", lambda isa: frozenset({BF16} if isa == "native" else ()))
    asked = ExportOptions(dtype="auto", sequence_length=(24,), **options)
    asked.check()
    opened = resolve(str(checkpoint("llama")), asked)
    opened.text_config.dtype = stored
    assert choose_dtype(asked, opened).dtype == expected


def test_bounds_are_checked_once_the_dtype_is_known(monkeypatch, checkpoint):
    asked = ExportOptions(dtype="auto", sequence_length=(24,), backend="export", max_kl=0.1)
    asked.check()
    with pytest.raises(UsageError, match="bound what is lost"):
        choose_dtype(asked, resolve(str(checkpoint("llama")), asked))


# ---------------------------------------------------------------- the rule for encoders


def verdict(change: Any, **options: Any) -> Any:
    """Four random rows, and the answers that `change` makes of them."""
    random = np.random.default_rng(0)
    rows = [random.normal(size=(9, 16)).astype(np.float32) for _ in range(4)]
    sample = ValidationSample("rows", "outputs", tensors=[{} for _ in rows])
    reference = Reference([sample], [[Answer({"states": row}) for row in rows]])
    asked = ExportOptions(**{"auto_cast": "matmul", **options})
    return judge_cast(reference, [[{"states": change(row, random)} for row in rows]], asked, "with casts to bf16")


def rounded(row: Any, random: Any) -> Any:
    return torch.from_numpy(row).to(BF16).float().numpy()


def noisy(row: Any, random: Any) -> Any:
    return row + 0.1 * random.normal(size=row.shape)


def of_another_mask(row: Any, random: Any) -> Any:
    """Two of nine tokens are what they would be in other company."""
    return np.concatenate([random.normal(size=(2, 16)), row[2:]])


def test_rounding_passes():
    found = verdict(rounded)
    assert found.status == "passed"
    assert found.figures["max_row_error"] < 0.01
    assert found.figures["min_cosine"] > 0.9999
    assert found.figures.keys() >= {"max_abs_difference", "max_relative_difference", "questions"}


def test_more_than_rounding_is_refused_with_both_numbers():
    with pytest.raises(AccuracyError, match=r"^With casts to bf16, .*0\.045 is allowed.*0\.05 is.*accept_loss=True"):
        verdict(noisy)
    found = verdict(noisy, accept_loss=True)
    assert found.status == "accepted"
    assert "row error <= 0.045" in found.reason


def test_a_wrong_mask_is_no_loss_that_could_be_accepted():
    with pytest.raises(AccuracyError, match=r"a fault of the graph"):
        verdict(of_another_mask, accept_loss=True)


def test_float16_is_held_to_its_own_digits():
    assert verdict(lambda row, random: row.astype(np.float16).astype(np.float32), auto_cast_type="fp16")
    coarse = lambda row, random: row + 0.02 * random.normal(size=row.shape)  # noqa: E731
    assert verdict(coarse).status == "passed"
    with pytest.raises(AccuracyError, match=r"0\.01 is allowed"):
        verdict(coarse, auto_cast_type="fp16")


def test_a_short_row_is_measured_by_the_others():
    """A score near zero has no direction that could be kept."""
    random = np.random.default_rng(0)
    rows = [np.array([3.0, -2.0]), np.array([0.01, 0.01]), np.array([-4.0, 1.0])]
    sample = ValidationSample("rows", "outputs", tensors=[{} for _ in rows])
    reference = Reference([sample], [[Answer({"logits": row}) for row in rows]])
    found = [[{"logits": row + 0.02 * random.normal(size=2)} for row in rows]]
    assert judge_cast(reference, found, ExportOptions(dtype="bfloat16"), "in bf16").status == "passed"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_number_is_never_accepted(value):
    with pytest.raises(AccuracyError, match="NaN or infinity"):
        verdict(lambda row, random: row * value, accept_loss=True)


def test_a_lost_mask_is_seen(checkpoint, programs):
    """The same graph without its mask, judged on padded rows."""
    [program] = programs("bert")
    [less] = cast_programs([program], Cast("matmul", BF16))
    model = transformers.AutoModel.from_pretrained(checkpoint("bert", "AutoModel"), attn_implementation="eager").eval()
    rows = [torch.tensor([[5, 9, 30, 7]]), torch.tensor([[80, 3, 3, 12, 40, 41]])]
    ids, mask = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : row.shape[1]], mask[index, : row.shape[1]] = row[0], 1
    with torch.no_grad():
        expected = [Answer({"states": model(row).last_hidden_state[0].numpy()}) for row in rows]
    reference = Reference([ValidationSample("rows", "outputs", tensors=[{}, {}])], [expected])
    for given, is_right in ((mask, True), (torch.ones_like(mask), False)):
        states = run(less, [ids, given, torch.zeros_like(ids)])[0]
        found = [[{"states": states[index, : row.shape[1]].numpy()} for index, row in enumerate(rows)]]
        if is_right:
            judge_cast(reference, found, ExportOptions(auto_cast="matmul"), "in bf16")
        else:
            with pytest.raises(AccuracyError, match="does not give the reference's answers"):
                judge_cast(reference, found, ExportOptions(auto_cast="matmul"), "in bf16")


# ---------------------------------------------------------------- as a whole


@pytest.mark.slow
def test_an_encoder_decoder_in_bfloat16_as_a_whole(tmp_path):
    """What the encoder made, and the caches, are held in it; the logits are float32 and within the bounds."""
    source = zoo.make(tmp_path / "bart", "bart", zoo.TEXT)
    options = ExportOptions(
        task=zoo.TEXT, backend="export", dtype="bfloat16", batch_size=2, sequence_length=(8,), decoder_sequence_length=8
    )
    variant = export(str(source), tmp_path / "out", options).contract.variants[0]
    assert (variant.name, variant.dtype, variant.accuracy.status) == ("export-bf16", "bfloat16", "passed")
    assert 1e-4 < variant.accuracy.figures["max_row_error"] < 0.045
    assert {layer.dtype for layer in variant.graphs[-1].cache} == {"bfloat16"}
    again = validate_again(tmp_path / "out", str(source), ExportOptions(), keep=False)
    assert again == variant.accuracy


@pytest.mark.slow
@pytest.mark.parametrize(("options", "name"), [({"dtype": "bfloat16"}, "bf16"), ({"auto_cast": "all"}, "bf16-all")])
def test_a_decoder_as_a_whole(checkpoint, tmp_path, options, name):
    source = checkpoint("llama")
    asked = ExportOptions(backend="export", sequence_length=(24,), **options)
    variant = export(str(source), tmp_path / "out", asked).contract.variants[0]
    assert (variant.name, variant.dtype) == (f"export-{name}", options.get("dtype", "float32"))
    assert variant.accuracy.status == "passed"
    assert variant.accuracy.reason.endswith("KL divergence <= 0.005, top-1 agreement >= 0.94")
    told = {"auto_cast": "all", "auto_cast_type": "bf16"} if "auto_cast" in options else {}
    assert {key: value for key, value in variant.compiler.options.items() if key.startswith("auto")} == told


def test_products_of_8_bits_compute_in_float32(checkpoint):
    asked = ExportOptions(sequence_length=(24,), quantize="a8w8", dtype="bfloat16", backend="export")
    opened = resolve(str(checkpoint("llama")), asked)
    plan = make_plan(opened, asked)
    model = opened.load(plan.task, "float32")
    quantize_model(model, opened, plan, asked)
    (less, *_) = cast_programs(list(trace(model, plan))[:1], Cast("weights", BF16))
    products = nodes(less, torch.ops.precast.int8_linear.default)
    assert products
    for node in products:
        assert dtype_of(node) == dtype_of(node.args[0]) == dtype_of(node.args[2]) == torch.float32


def test_layers_of_codes_compute_in_float32(checkpoint):
    """Their scales are float32, and so are results; what is not quantized, and caches, are of the cast type."""
    asked = ExportOptions(sequence_length=(24,))
    opened = resolve(str(checkpoint("llama")), asked)
    plan = make_plan(opened, asked)
    model = opened.load(plan.task, plan.dtype)
    quantize(model, Recipe(Scheme(8, 32, "symmetric"), skipped=("*.mlp.*",)))
    (program, *_) = trace(model, plan)
    (less, *_) = cast_programs([program], Cast("weights", BF16))
    codes = nodes(less, torch.ops.precast.quantized_linear.default)
    assert codes
    for node in codes:
        assert dtype_of(node) == dtype_of(node.args[0]) == dtype_of(node.args[2]) == torch.float32
    assert {dtype_of(node) for node in nodes(less, torch.ops.aten.linear.default)} == {BF16}
    assert {layer.dtype for layer in less.graph.cache} == {"bfloat16"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This CPU has no instructions")
@pytest.mark.parametrize("backend", ["aoti", "export"])
@pytest.mark.parametrize("cast", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"auto_cast": "matmul"}])
@pytest.mark.parametrize(
    "rounded", [{"quantize": "int8"}, {"quantize": "int4"}, {"quantize": "int8", "kv_cache": "int8"}]
)
def test_a_quantized_decoder_is_cast_as_a_whole(checkpoint, tmp_path, backend, cast, rounded):
    options = ExportOptions(sequence_length=(48,), backend=backend, max_kl=0.1, **cast, **rounded)
    (variant,) = export(str(checkpoint("llama")), tmp_path / "out", options).contract.variants
    assert variant.accuracy.status == "passed"
    assert variant.quantization.startswith(rounded["quantize"])
    assert variant.dtype == cast.get("dtype", "float32")
