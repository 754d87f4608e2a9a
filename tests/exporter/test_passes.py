# ruff: noqa: F821, UP037 (onnxscript writes dimensions as names in annotations)
"""Graph rewrites: exact, and done once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnxscript import FLOAT, script
from onnxscript import opset20 as op

from precast.exporter.backends.onnx.compiler import oldest_runtime
from precast.exporter.backends.onnx.pack_projections import pack_matmuls
from precast.exporter.backends.onnx.passes import (
    FlattenGemmInputs,
    RemoveProvenance,
    RemoveRedundantReshapes,
    RemoveUnusedOutputs,
)


@script(default_opset=op)
def there_and_back(x: FLOAT["batch", "length", 12]) -> FLOAT["batch", "length", 12]:
    heads = op.Reshape(x, op.Constant(value_ints=[0, 0, 3, 4]))
    merged = op.Reshape(heads, op.Constant(value_ints=[0, 0, -1]))
    return op.Relu(merged)


@script(default_opset=op)
def elsewhere(x: FLOAT["batch", "length", 12]) -> FLOAT["batch", "length", 6, 2]:
    heads = op.Reshape(x, op.Constant(value_ints=[0, 0, 3, 4]))
    return op.Relu(op.Reshape(heads, op.Constant(value_ints=[0, 0, 6, 2])))


def inferred(function):
    model = ir.serde.deserialize_model(function.to_model_proto())
    ir.passes.common.ShapeInferencePass()(model)
    return model


def run(model, x):
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(("function", "modified"), [(there_and_back, True), (elsewhere, False)])
def test_reshapes_that_lead_back_go(function, modified):
    model = inferred(function)
    x = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
    before = run(model, x)
    assert RemoveRedundantReshapes()(model).modified is modified
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert np.array_equal(run(model, x), before)
    assert any(node.op_type == "Reshape" for node in model.graph) is not modified
    assert RemoveRedundantReshapes()(model).modified is False


def test_unknown_shapes_are_left_alone():
    model = ir.serde.deserialize_model(there_and_back.to_model_proto())
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    assert RemoveRedundantReshapes()(model).modified is False


@script(default_opset=op)
def padded_maximum(x: FLOAT[1, 1, 4, 4]) -> FLOAT[1, 1, 2, 2]:
    zeros = op.Pad(x, op.Constant(value_ints=[0, 0, 1, 1, 0, 0, 1, 1]))
    return op.MaxPool(zeros, kernel_shape=[3, 3], strides=[2, 2])


@pytest.mark.parametrize(("function", "oldest"), [(padded_maximum, "1.32"), (there_and_back, "1.23")])
def test_what_older_optimizers_get_wrong_asks_for_a_newer_runtime(function, oldest):
    """ONNX Runtime 1.31 answers -1 where BiT pads with zeros and takes the maximum."""
    model = inferred(function)
    assert oldest_runtime([], [model]) == oldest
    if oldest == "1.32":
        assert run(model, np.full((1, 1, 4, 4), -1, np.float32)).ravel().tolist() == [0, 0, 0, -1]


def test_what_a_product_takes_has_two_dimensions():
    """As the fusion of GPT-2's attention leaves it: a shape in a constant alone."""
    x, weight, bias = (ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in ("x", "w", "b"))
    x.shape, weight.shape, bias.shape = ir.Shape([2, 5, 3, 4]), ir.Shape([12, 7]), ir.Shape([7])
    sizes = ir.Value(name="sizes", shape=ir.Shape([3]), const_value=ir.tensor([0, 0, 12]))
    merged = ir.node("Reshape", [x, sizes])
    product = ir.node("Gemm", [merged.outputs[0], weight, bias])
    product.outputs[0].type = x.type
    nodes = [merged, product]
    graph = ir.Graph([x, weight, bias], product.outputs, nodes=nodes, initializers=[sizes], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    assert FlattenGemmInputs()(model).modified
    assert not FlattenGemmInputs()(model).modified
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=size).astype("f") for name, size in (("x", (2, 5, 3, 4)), ("w", (12, 7)), ("b", 7))}
    expected = arrays["x"].reshape(-1, 12) @ arrays["w"] + arrays["b"]
    np.testing.assert_allclose(session.run(None, arrays)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("read", "left"), [(0, 1), (3, 4)])
def test_outputs_of_a_normalization_that_nobody_reads_go(read, left):
    scale = ir.Value(name="scale", shape=ir.Shape([8]), const_value=ir.tensor(np.ones(8, np.float32), name="scale"))
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=[2, 8])
    norm = ir.node("SkipLayerNormalization", [x, x, scale], domain="com.microsoft", num_outputs=4)
    last = ir.node("Relu", [norm.outputs[read]])
    last.outputs[0].name, last.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph(
        [x],
        last.outputs,
        nodes=[norm, last],
        initializers=[scale],
        opset_imports={"": 20, "com.microsoft": 1},
        name="g",
    )
    model, array = ir.Model(graph, ir_version=10), np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    before = run(model, array)
    assert RemoveUnusedOutputs()(model).modified is (left < 4)
    assert len(norm.outputs) == left
    assert np.array_equal(run(model, array), before)


def test_provenance_goes():
    model = inferred(there_and_back)
    model.graph.node(0).metadata_props["stack"] = "file.py"
    model.graph.doc_string = "made at home"
    RemoveProvenance()(model)
    assert not model.graph.node(0).metadata_props
    assert not model.graph.doc_string


def test_packed_weights_are_made_when_they_are_read():
    """All of them at once would be a second model beside the first."""
    generator = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 8]))
    weights = [ir.tensor(generator.normal(size=(8, size)).astype(np.float32), name=f"w{size}") for size in (4, 6)]
    values = [
        ir.Value(name=each.name, const_value=each, type=ir.TensorType(each.dtype), shape=each.shape) for each in weights
    ]
    nodes = [ir.node("MatMul", [x, value]) for value in values]
    for index, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].dtype = f"y{index}", ir.DataType.FLOAT
    graph = ir.Graph([x], [node.outputs[0] for node in nodes], nodes=nodes, initializers=values, opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    array = generator.normal(size=(2, 8)).astype(np.float32)
    before = run(model, array)
    pack_matmuls(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert [node.op_type for node in graph] == ["MatMul", "Split"]
    assert [value.name for value in graph.outputs] == ["y0", "y1"]
    packed = next(iter(graph)).inputs[1].const_value
    assert isinstance(packed, ir.LazyTensor)
    assert packed.numpy() is not packed.numpy()
    assert np.array_equal(run(model, array), before)
