"""Lossless: what no pass touches comes out of import and export as it went in."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

import fxopt
from fxopt.errors import InvalidModel
from fxopt.frontends.onnx import load
from fxopt.ir.graph import label
from fxopt.ir.onnx.export import save, to_model
from fxopt.ir.onnx.values import from_array, to_array
from tests import zoo

KINDS = {"node": 1884, "simple": 23, "pytorch-converted": 82, "pytorch-operator": 35, "real": 9}
ROOT = Path(onnx.__file__).parent.parent
EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "models").glob("*.onnx"))


def cases(kind: str) -> Iterator[tuple[str, ModelProto]]:
    """The models of the ONNX backend suite; node models are made in this process, nothing is downloaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_model_tests(kind=kind)
    for case in found:
        if case.model is not None:
            yield case.name, case.model
        elif case.model_dir is not None:
            yield case.name, onnx.load(Path(case.model_dir) / "model.onnx")
        else:
            assert case.url is not None
            yield case.name, onnx.load(ROOT / case.url)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "node" else ()) for kind in KINDS]
)
def test_suite(kind: str) -> None:
    checked, different = 0, []
    for name, model in cases(kind):
        before = model.SerializeToString(deterministic=True)
        graph = load(model, check=False)
        if to_model(graph) != model or to_model(graph.copy()) != model:
            different.append(name)
        assert model.SerializeToString(deterministic=True) == before, f"{name}: the import changed its source"
        checked += 1
    assert not different
    assert checked >= KINDS[kind]  # of onnx 1.23; newer ones have more


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_models(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    assert to_model(load(path)) == model
    fxopt.optimize(path, "host", passes=[]).save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == model


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["opset 20", "opset 23"])
@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_exported_architectures(name: str, origin: str) -> None:
    if name not in ("mlp", "cnn", "encoder"):
        pytest.importorskip("transformers")
    model = to_model(zoo.graph(name, origin))
    assert to_model(load(model)) == model


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_passes_change_nothing(kind: str, tmp_path: Path) -> None:
    """Through the public call; what ONNX Runtime cannot load is an error that says so."""
    equal, reasons = 0, []
    for _, model in list(cases(kind))[:: 5 if kind == "node" else 1]:
        source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
        source.write_bytes(model.SerializeToString())
        try:
            fxopt.optimize(source, "host", passes=[]).save(target)
        except InvalidModel as error:
            reasons.append(str(error))
            continue
        assert onnx.load(target) == model
        target.unlink()
        equal += 1
    assert all(re.match(r"ONNX Runtime \S+ cannot load in.onnx", reason) for reason in reasons), reasons
    assert equal > 2 * len(reasons)


def value(name: str, kind: int, shape: list[Any] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def corner_cases() -> ModelProto:
    """What real files hold beside plain nodes."""
    kinds = TensorProto
    double = [helper.make_node("Constant", [], ["c"], value_float=2.0), helper.make_node("Mul", ["X", "c"], ["Y"])]
    function = helper.make_function("my.dom", "Double", ["X"], ["Y"], double, [helper.make_opsetid("", 21)], [])
    product = helper.make_node("Mul", ["outer", "x"], ["e1"], name="inner product")
    deep = helper.make_graph([product], "deep then", [], [value("e1", kinds.FLOAT, None)])
    same = helper.make_node("Identity", ["outer"], ["e2"])
    other = helper.make_graph([same], "deep else", [], [value("e2", kinds.FLOAT, None)])
    total = helper.make_node("Add", ["outer", "w"], ["t"])
    then = helper.make_graph([total], "then", [], [value("t", kinds.FLOAT, None)])
    nested = helper.make_node("If", ["c2"], ["e"], then_branch=deep, else_branch=other)
    otherwise = helper.make_graph([nested], "else", [], [value("e", kinds.FLOAT, None)])
    body = helper.make_graph(
        [
            helper.make_node("Add", ["state", "w"], ["next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Identity", ["next"], ["scanned"]),
        ],
        "body",
        [value("i", kinds.INT64, []), value("go", kinds.BOOL, []), value("state", kinds.FLOAT, None)],
        [value("go_on", kinds.BOOL, []), value("next", kinds.FLOAT, None), value("scanned", kinds.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Double", ["x"], ["outer"], name="call", domain="my.dom"),
        helper.make_node("If", ["c1"], ["y"], name="if", then_branch=then, else_branch=otherwise),
        helper.make_node("Loop", ["steps", "", "y"], ["z", "zs"], name="loop", body=body),
        helper.make_node("Vendor", ["z", "", "names"], ["u", ""], name="vendor", domain="vendor.x", alpha=1.5,
                         words=["a", "b"], table=numpy_helper.from_array(np.arange(3)), text="ä"),
        helper.make_node("Constant", [], ["words"], name="words", value_strings=["a", "b"]),
        helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(np.float16([0.5]))),
        helper.make_node("Identity", ["z"], ["out"]),
        helper.make_node("Identity", ["x"], ["unused"], name="unused"),
        helper.make_node("Dropout", ["z"], ["dropped", "mask"], name="two outputs"),
    ]  # fmt: skip
    nodes[0].metadata_props.add(key="k", value="v")
    nodes[0].doc_string = "documented"
    nodes[1].attribute[0].doc_string = "an attribute"
    weights = [
        numpy_helper.from_array(np.ones(3, np.float32), "w"),
        numpy_helper.from_array(np.array(2), "steps"),
        helper.make_tensor("names", kinds.STRING, [2], [b"a", b"\xff"]),
        helper.make_tensor("int4", kinds.INT4, [5], [1, 2, 3, -4, 5]),
        helper.make_tensor("typed", kinds.FLOAT, [2], [1.0, 2.0]),  # float_data, not raw_data
        helper.make_tensor("small", kinds.BFLOAT16, [2], [1.0, 2.0]),
        helper.make_tensor("eighth", kinds.FLOAT8E4M3FN, [2], [1.0, 2.0]),
        helper.make_tensor("nothing", kinds.FLOAT, [0, 3], []),
        numpy_helper.from_array(np.arange(4096, dtype=np.float32).reshape(64, 64), "large"),
    ]
    weights[-1].doc_string = "a large one"
    inputs = [value("x", kinds.FLOAT, ["batch", 3]), value("c1", kinds.BOOL, []), value("c2", kinds.BOOL, [])]
    inputs += [value("w", kinds.FLOAT, [3]), helper.make_tensor_sequence_value_info("many", kinds.FLOAT, ["n", None])]
    outputs = [
        value("out", kinds.FLOAT, ["batch", 3]),
        value("mask", kinds.BOOL, None),
        value("large", kinds.FLOAT, [64, 64]),
    ]
    graph = helper.make_graph(
        nodes, "corner cases", inputs, outputs, weights, "a graph", [value("outer", kinds.FLOAT, ["batch", 3])]
    )
    graph.metadata_props.add(key="graph", value="property")
    sparse = graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.float32([7.0]), "sparse"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([2])))
    annotation = graph.quantization_annotation.add(tensor_name="outer")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), ("my.dom", 1), ("vendor.x", 3))]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], producer_name="p", ir_version=10)
    model.metadata_props.add(key="a", value="b")
    model.doc_string = "a model"
    model.domain = "test"
    model.model_version = 5
    return model


@pytest.mark.parametrize("name", [name for name, code in TensorProto.DataType.items() if code])
def test_every_element_type(name: str, tmp_path: Path) -> None:
    """In an initializer, a Constant and the signature, whether torch has the type or not; and a run moves it."""
    kind = TensorProto.DataType.Value(name)
    weight = helper.make_tensor("w", kind, [4], [b"a", b"b", b"c", b"d"] if name == "STRING" else [1, 0, 1, 1])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=weight),
        helper.make_node("Concat", ["w", "c", "x"], ["y"], axis=0),
    ]
    body = helper.make_graph(nodes, "g", [value("x", kind, ["n"])], [value("y", kind, ["m"])], [weight])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    graph = load(model, check=False)
    assert to_model(graph) == model
    save(graph, tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == model
    array = numpy_helper.to_array(weight)
    found = to_array(graph.run([from_array(array)])[0])
    assert found.dtype == array.dtype and found.tolist() == [*array.tolist()] * 3


def test_corner_cases() -> None:
    model = corner_cases()
    graph = load(model, check=False)
    assert to_model(graph) == model
    assert to_model(graph.copy()) == model
    assert to_model(load(to_model(graph), check=False)) == model


def test_names_are_kept() -> None:
    graph = load(corner_cases(), check=False)
    assert [spec.name for spec in graph.inputs] == ["x", "c1", "c2", "many"]  # `w` has a value
    assert [spec.name for spec in graph.outputs] == ["out", "mask", "large"]
    assert {"call", "if", "loop", "vendor", "two outputs"} <= {label(node) for node in graph.calls()}


def test_large_weights_are_held_once() -> None:
    graph = load(corner_cases(), check=False)
    (record,) = [
        node.meta["onnx"] for node in graph.nodes if node.op == "get_attr" and node.meta["onnx"].name == "large"
    ]
    assert record.stripped
    assert not record.proto.raw_data


def test_file_round_trip(tmp_path: Path) -> None:
    model = corner_cases()
    path = tmp_path / "out.onnx"
    save(load(model, check=False), path)
    assert onnx.load(path) == model
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]


def externalized(folder: Path) -> Path:
    path = folder / "in.onnx"
    onnx.save(corner_cases(), path, save_as_external_data=True, location="in.data", size_threshold=1024)
    return path


def test_external_data_round_trip(tmp_path: Path) -> None:
    path = externalized(tmp_path)
    graph = load(path, check=False)
    large = next(node for node in graph.nodes if node.op == "get_attr" and node.meta["onnx"].name == "large")
    assert torch.equal(graph.constant(large), torch.arange(4096.0).reshape(64, 64))
    assert to_model(graph) == onnx.load(path, load_external_data=False)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    save(graph, folder / "out.onnx")
    assert onnx.load(folder / "out.onnx").graph == onnx.load(path).graph
    assert {file.name for file in folder.iterdir()} == {"out.onnx", "out.onnx.data"}


@pytest.mark.parametrize("broken", ["missing", "short"])
def test_external_data_is_checked(tmp_path: Path, broken: str) -> None:
    path = externalized(tmp_path)
    data = tmp_path / "in.data"
    if broken == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(InvalidModel, match="'large'.*(does not exist|too short)"):
        load(path, check=False)


def test_given_weights_are_shared() -> None:
    model = corner_cases()
    tensor = torch.arange(4096.0).reshape(64, 64)
    model.graph.initializer[-1].ClearField("raw_data")
    graph = load(model, check=False, weights={"large": tensor})
    node = next(node for node in graph.nodes if node.op == "get_attr" and node.meta["onnx"].name == "large")
    constant = graph.constant(node)
    assert constant is not None
    assert constant.data_ptr() == tensor.data_ptr()
    assert to_model(graph) == corner_cases()
