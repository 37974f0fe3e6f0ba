"""Conversion to a newer opset: node by node, with operators of other domains and functions, and verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fxopt.errors import InvalidOption, Unsupported, VerificationError
from fxopt.frontends.convert_graph import convert_graph
from fxopt.frontends.convert_opset import convert, opset_of
from fxopt.frontends.onnx import load
from fxopt.ir.ledger import Ledger
from fxopt.ir.onnx.export import to_model
from fxopt.ir.onnx.op import OnnxOp

LATEST = 23
MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"


def model(
    opset: int,
    nodes: list[NodeProto],
    shape: list[int | str] | None = None,
    constants: dict[str, Any] | None = None,
    outputs: int | None = None,
    **more: Any,
) -> ModelProto:
    """A graph of x to y."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "one",
        [info("x", TensorProto.FLOAT, shape or [2, 3, 4])],
        [info("y", TensorProto.FLOAT, [None] * (len(shape or [2, 3, 4]) if outputs is None else outputs))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1), *more.pop("imports", [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=7, **more)


def run(proto: ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


node = helper.make_node
F32 = np.float32
CASES: dict[str, ModelProto] = {
    "Squeeze": model(11, [node("Squeeze", ["x"], ["y"], "s", axes=[1])], [2, 1, 4], outputs=2),
    "Unsqueeze": model(11, [node("Unsqueeze", ["x"], ["y"], axes=[0, 2])], outputs=5),
    "ReduceSum": model(11, [node("ReduceSum", ["x"], ["y"], axes=[1], keepdims=1)]),
    "ReduceMean": model(13, [node("ReduceMean", ["x"], ["y"], axes=[-1], keepdims=0)], outputs=2),
    "Softmax": model(11, [node("Softmax", ["x"], ["y"], axis=1)]),
    "LogSoftmax": model(11, [node("LogSoftmax", ["x"], ["y"], axis=1)]),
    "Dropout": model(10, [node("Dropout", ["x"], ["y"], ratio=0.3)]),
    "Clip": model(10, [node("Clip", ["x"], ["y"], min=-0.5, max=0.5)]),
    "Pad": model(10, [node("Pad", ["x"], ["y"], pads=[0, 1, 0, 0, 0, 2], value=1.5)]),
    "Slice": model(9, [node("Slice", ["x"], ["y"], axes=[1, 2], starts=[0, 1], ends=[2, 4])]),
    "Split": model(
        12, [node("Split", ["x"], ["a", "b"], axis=2, split=[1, 3]), node("Mul", ["a", "b"], ["y"])]
    ),
    "Upsample": model(
        9, [node("Upsample", ["x", "s"], ["y"], mode="nearest")], [1, 2, 3, 4], {"s": np.array([1, 1, 2, 2], F32)}
    ),
    "TopK": model(
        9, [node("TopK", ["x"], ["y", "i"], axis=2, k=2)]
    ),
    "BatchNormalization": model(
        8,
        [node("BatchNormalization", ["x", "a", "b", "m", "v"], ["y"])],
        constants={name: np.array([0.5, 1.5, 2.5], F32) for name in "abmv"},
    ),
    "GroupNormalization": model(
        18,
        [node("GroupNormalization", ["x", "a", "b"], ["y"], num_groups=2)],
        [2, 4, 5],
        {"a": np.array([0.5, 2], F32), "b": np.array([1, 3], F32)},
    ),
    "GridSample": model(
        16,
        [node("GridSample", ["x", "g"], ["y"], mode="bicubic")],
        [1, 2, 4, 4],
        {"g": np.linspace(-1, 1, 8, dtype=F32).reshape(1, 2, 2, 2)},
    ),
    "dynamic": model(
        11, [node("Relu", ["x"], ["r"]), node("Squeeze", ["r"], ["y"], axes=[1])], ["n", 1, 4], outputs=2
    ),
    "com.microsoft": model(
        12,
        [
            node("Gelu", ["x"], ["g"], "gelu", domain="com.microsoft"),
            node("Squeeze", ["g"], ["y"], "squeeze", axes=[1]),
        ],
        [2, 1, 4],
        outputs=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_converts(name: str) -> None:
    source = CASES[name]
    before = source.SerializeToString()
    result = convert(source, LATEST)
    assert source.SerializeToString() == before
    assert opset_of(result.model) == LATEST
    assert result.error == 0.0
    onnx.checker.check_model(result.model, full_check=True)
    x = np.random.default_rng(0).standard_normal(
        [d.dim_value or 5 for d in source.graph.input[0].type.tensor_type.shape.dim]
    )
    np.testing.assert_array_equal(run(source, x.astype(F32)), run(result.model, x.astype(F32)))


def test_what_does_not_change_is_kept_byte_for_byte() -> None:
    result = convert(CASES["com.microsoft"], LATEST)
    assert result.model.graph.node[0] == CASES["com.microsoft"].graph.node[0]
    assert result.changed == ("squeeze: Squeeze-11 became Squeeze of opset 23",)
    assert str(result) == "converted from opset 12 to 23: 1 node rewritten; verified, noise to signal 0.0e+00"


def test_sub_graphs_and_functions() -> None:
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Squeeze", ["x"], ["t"], axes=[1])], "then", [], [info("t", TensorProto.FLOAT, [2, 4])]
    )
    other = helper.make_graph(
        [node("Own", ["x"], ["e"], domain="own")], "else", [], [info("e", TensorProto.FLOAT, [2, 4])]
    )
    function = helper.make_function(
        "own",
        "Own",
        ["a"],
        ["b"],
        [node("Squeeze", ["a"], ["c"], axes=[1]), node("Neg", ["c"], ["b"])],
        [helper.make_opsetid("", 12)],
    )
    for flag in (True, False):
        source = model(
            12,
            [node("If", ["c"], ["y"], then_branch=body, else_branch=other)],
            [2, 1, 4],
            {"c": np.array(flag)},
            2,
            functions=[function],
            imports=[helper.make_opsetid("own", 1)],
        )
        source.ir_version = 8
        result = convert(source, LATEST)
        assert result.error == 0.0
        x = np.ones((2, 1, 4), F32)
        np.testing.assert_array_equal(run(source, x), run(result.model, x))
        assert [entry.version for entry in result.model.functions[0].opset_import] == [LATEST]


def test_example_models_reach_the_newest_opset() -> None:
    for path in sorted(MODELS.glob("*.onnx")):
        result = convert(onnx.load(path), LATEST)
        assert result.error is not None, f"{path.name}: {result.remark}"
        assert result.error <= 1e-10


@pytest.mark.parametrize("opset", [8, 99])
def test_refuses_a_version_below_or_beyond(opset: int) -> None:
    with pytest.raises(InvalidOption, match=rf"opset {opset}: the model is at opset 12 .* upwards only"):
        convert(CASES["com.microsoft"], opset)


def test_same_version_changes_nothing() -> None:
    result = convert(CASES["com.microsoft"], 12)
    assert result.model is CASES["com.microsoft"]
    assert str(result) == "the model is at opset 12 already"


def behind_unknown(*nodes: NodeProto, opset: int, **constants: Any) -> ModelProto:
    """Nodes on `u`, whose type nobody knows."""
    custom = node("Opaque", ["x"], ["u"], domain="elsewhere")
    return model(opset, [custom, *nodes], constants=constants, imports=[helper.make_opsetid("elsewhere", 1)])


def test_a_model_that_does_not_run_is_converted_and_said_to_be_unverified() -> None:
    result = convert(behind_unknown(node("Softmax", ["u"], ["y"], axis=1), opset=11), 13)
    assert result.error is None
    assert "not verified: the model does not run on the inputs" in str(result)
    assert [entry.op_type for entry in result.model.graph.node] == ["Opaque", "Shape", "Flatten", "Softmax", "Reshape"]


def test_refuses_what_cannot_be_said() -> None:
    norm = node("GroupNormalization", ["u", "a", "a"], ["y"], "norm", num_groups=1)
    with pytest.raises(Unsupported, match="node 'norm': .* number of channels of 'u' is not known"):
        convert(behind_unknown(norm, opset=18, a=np.ones(1, F32)), 21)


def test_refuses_what_was_kept_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(proto: ModelProto, target: int) -> ModelProto:
        raise RuntimeError("No Adapter For Softmax")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuses)
    softmax = node("Softmax", ["u"], ["y"], "probabilities", axis=1)
    with pytest.raises(Unsupported, match=r"probabilities \(Softmax-11 as Softmax-13: No Adapter For Softmax\)"):
        convert(behind_unknown(softmax, opset=11), 13)
    with pytest.raises(VerificationError, match="computes another 'y'"):
        convert(CASES["Softmax"], 13)
    with pytest.raises(Unsupported, match="Squeeze-11 has no form as Squeeze-13: attributes"):
        convert(CASES["Squeeze"], 13)


def test_a_wrong_conversion_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(proto: ModelProto, target: int) -> ModelProto:
        return model(target, [node("Neg", ["x"], ["y"])])

    monkeypatch.setattr(onnx.version_converter, "convert_version", wrong)
    with pytest.raises(VerificationError, match="computes another 'y' than at opset 11"):
        convert(CASES["Softmax"], 13)


def test_the_ledger_says_so() -> None:
    ledger = Ledger()
    graph = convert_graph(load(CASES["com.microsoft"]), 21, ledger)
    assert graph.model is not None
    assert graph.model.opsets[""] == 21
    assert "converted from opset 12 to 21" in ledger.notes[0]
    assert ledger.notes[1].startswith("squeeze: Squeeze-11 became")


def test_command(tmp_path: Path, cli: Callable[..., Any]) -> None:
    source, target, report = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "out.json"
    onnx.save(CASES["dynamic"], source)
    ran = cli("convert", source, "-o", target, "--opset", LATEST, "--input-shape", "x:7,1,4", "--json", report)
    assert ran.code == 0, ran.text
    assert "converted from opset 11 to 23: 1 node rewritten" in ran.text
    written = onnx.load(target)
    onnx.checker.check_model(written, full_check=True)
    assert opset_of(written) == LATEST
    assert [dim.dim_value for dim in written.graph.input[0].type.tensor_type.shape.dim] == [7, 1, 4]
    said = json.loads(report.read_text())
    assert (said["source_opset"], said["opset"], said["error"]) == (11, LATEST, 0.0)
    assert run(written, np.ones((7, 1, 4), F32)).shape == (7, 4)


def test_input_shapes_are_repeated(tmp_path: Path, cli: Callable[..., Any]) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[n, k] x, float[m, 4] y) => (float[n, p] z) '
        "{ a = Transpose (y) b = MatMul (x, y) z = MatMul (b, a) }"
    ).SerializeToString())  # fmt: skip
    ran = cli("convert", source, "-o", target, "--input-shape", "x:2,?", "--input-shape", "y:rows,4")
    assert ran.code == 0, ran.text
    assert "inputs: x: float32[2, k]; y: float32[rows, 4]" in ran.text
    found = [[dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
             for value in onnx.load(target).graph.input]  # fmt: skip
    assert found == [[2, "k"], ["rows", 4]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--opset", "8"], "upwards only"),
        (["--opset", "13", "--input-shape", "z:1"], "unknown input 'z'"),
        ([], "nothing to convert"),
        (["--input-shape", "x:2,2,4"], "is fixed at 1"),
    ],
)
def test_command_refuses(arguments: list[str], message: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(CASES["dynamic"], source)
    ran = cli("convert", source, "-o", target, *arguments)
    assert ran.code == 2
    assert message in ran.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx"]


def test_a_graph_whose_operators_stay_keeps_its_weights() -> None:
    """No weight is copied: the tensors are the same objects, and untouched nodes are written back byte for byte."""
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), "w")
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[n, 64] x) => (float[n, 64] y) <float[64, 64] w = {0}>'
        " { m = MatMul (x, w) t = Transpose <perm = [1, 0]> (m) y = Transpose <perm = [1, 0]> (t) }"
    )
    proto.graph.initializer[0].CopyFrom(weight)
    graph, ledger = load(proto), Ledger()
    made = convert_graph(graph, 23, ledger)
    assert ledger.notes == ["converted from opset 18 to 23: every operator stays what it is"]
    assert made.model is not None and graph.model is not None
    assert (made.model.opsets[""], graph.model.opsets[""]) == (23, 18)
    before = {value.data_ptr() for value in graph.root.buffers()}
    assert {value.data_ptr() for value in made.root.buffers()} == before
    written = to_model(made)
    onnx.checker.check_model(written, full_check=True)
    assert list(written.graph.node) == list(proto.graph.node) and written.ir_version >= 10
    assert {node.target.since_version for node in made.calls() if isinstance(node.target, OnnxOp)} == {13, 23}
    x = torch.randn(3, 64)
    assert torch.equal(made.run([x])[0], graph.run([x])[0])
