"""External data wherever a model may have them: read, kept as references, and brought along when the model moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from fxopt import onnx_backend
from fxopt.frontends.convert_graph import convert_graph
from fxopt.frontends.onnx import load
from fxopt.ir.onnx.export import save, to_model

COUNT = 4096
FLOATS = np.arange(COUNT, dtype=np.float32)
FOURS = np.arange(COUNT) % 15 - 7
Place = Callable[[TensorProto, str], TensorProto]  # moves the bytes of a tensor to a file


def four(name: str) -> TensorProto:
    typed = helper.make_tensor(name, TensorProto.INT4, [COUNT], FOURS)
    return numpy_helper.from_array(numpy_helper.to_array(typed), name)


def floats(name: str) -> TensorProto:
    return numpy_helper.from_array(FLOATS, name)


def result(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [COUNT])


def model(nodes: list[NodeProto], *weights: TensorProto, functions: bool = False) -> ModelProto:
    constants = [*weights, numpy_helper.from_array(np.float32(0.5), "half"), numpy_helper.from_array(np.bool_(1), "yes")]
    body = helper.make_graph(nodes, "g", [], [result("y")], constants)
    opsets = [helper.make_opsetid("", 21), *([helper.make_opsetid("own", 1)] if functions else [])]
    return helper.make_model(body, opset_imports=opsets, ir_version=10)


def four_bit_initializer(place: Place) -> ModelProto:
    return model([helper.make_node("DequantizeLinear", ["w", "half"], ["y"])], place(four("w"), "w.bin"))


def constant(place: Place) -> ModelProto:
    value = place(floats("w"), "w.bin")
    return model([helper.make_node("Constant", [], ["c"], value=value), helper.make_node("Neg", ["c"], ["y"])])


def four_bit_constant(place: Place) -> ModelProto:
    value = place(four("w"), "w.bin")
    nodes = [helper.make_node("Constant", [], ["c"], value=value)]
    return model([*nodes, helper.make_node("DequantizeLinear", ["c", "half"], ["y"])])


def _branch(name: str, *nodes: NodeProto, weight: TensorProto) -> GraphProto:
    return helper.make_graph(nodes, name, [], [result(nodes[-1].output[0])], [weight])


def bodies(place: Place) -> ModelProto:
    then = _branch("t", helper.make_node("Neg", ["p"], ["pp"]), weight=place(floats("p"), "p.bin"))
    other = _branch(
        "e", helper.make_node("DequantizeLinear", ["q", "half"], ["qq"]), weight=place(four("q"), "q.bin")
    )
    return model([helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other)])


def four_bit_body(place: Place) -> ModelProto:
    then = _branch("t", helper.make_node("DequantizeLinear", ["q", "half"], ["qq"]), weight=place(four("q"), "q.bin"))
    other = _branch("e", helper.make_node("Neg", ["p"], ["pp"]), weight=floats("p"))
    return model([helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other)])


def sparse(place: Place) -> ModelProto:
    made = model([helper.make_node("Neg", ["w"], ["y"])])
    tensor = SparseTensorProto(dims=[COUNT])
    tensor.values.CopyFrom(place(numpy_helper.from_array(FLOATS[1::2], "w"), "w.bin"))
    tensor.indices.CopyFrom(numpy_helper.from_array(np.arange(COUNT // 2) * 2))
    made.graph.sparse_initializer.append(tensor)
    return made


def function(place: Place) -> ModelProto:
    made = model([helper.make_node("F", [], ["y"], domain="own")], functions=True)
    inner = constant(place).graph.node
    opsets = [helper.make_opsetid("", 21)]
    made.functions.append(helper.make_function("own", "F", [], ["y"], list(inner), opsets))
    return made


@pytest.fixture
def place(tmp_path: Path) -> Place:
    def moved(tensor: TensorProto, name: str) -> TensorProto:
        (tmp_path / name).write_bytes(b"\0" * 60 + tensor.raw_data)
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", 60), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    return moved


KINDS = (four_bit_initializer, constant, four_bit_constant, bodies, four_bit_body, sparse, function)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_model_that_moves_takes_its_data_along(kind: Callable[[Place], ModelProto], place: Place, tmp_path: Path) -> None:
    plain = kind(lambda tensor, _: tensor)
    (expected,) = onnx_backend.run_model(plain, [])
    source, target = tmp_path / "in.onnx", tmp_path / "elsewhere" / "out.onnx"
    source.write_bytes(kind(place).SerializeToString())
    target.parent.mkdir()
    graph = load(source)
    assert to_model(graph) == onnx.load(source, load_external_data=False)
    save(graph, target)
    assert {path.name for path in target.parent.iterdir()} <= {"out.onnx", "out.onnx.data"}
    for path in (source, target):
        assert np.array_equal(onnx_backend.run_model(path, [])[0], expected)
    save(load(target), source.with_name("again.onnx"), external=False)
    assert onnx.load(source.with_name("again.onnx")) == plain


def test_four_bit_weights_beside_the_model_stay_there(place: Place, tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(four_bit_initializer(place).SerializeToString())
    graph = load(source)
    assert graph.size_bytes() == COUNT // 2 + 4 + 1
    save(graph, target)
    assert target.stat().st_size < 1000 and Path(f"{target}.data").stat().st_size == COUNT // 2
    (y,) = onnxruntime.InferenceSession(target).run(None, {})
    assert np.array_equal(y, FOURS * np.float32(0.5))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_model_at_a_newer_opset_takes_its_data_along(
    kind: Callable[[Place], ModelProto], place: Place, tmp_path: Path
) -> None:
    plain = kind(lambda tensor, _: tensor)
    (expected,) = onnx_backend.run_model(plain, [])
    (tmp_path / "in.onnx").write_bytes(kind(place).SerializeToString())
    made = convert_graph(load(tmp_path / "in.onnx"), 23)
    (tmp_path / "elsewhere").mkdir()
    save(made, tmp_path / "elsewhere" / "out.onnx")
    onnx.checker.check_model(tmp_path / "elsewhere" / "out.onnx")
    (found,) = onnx_backend.run_model(tmp_path / "elsewhere" / "out.onnx", [])
    assert np.array_equal(found, expected)
