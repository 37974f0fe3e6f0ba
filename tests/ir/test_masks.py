"""Marks of sparse weights: found in every form, checked after every pass, kept in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxopt
from fxopt.errors import GraphSyntaxError, InvalidModel, InvalidOption, VerificationError
from fxopt.frontends.onnx import load
from fxopt.ir.builder import constant_before
from fxopt.ir.graph import Graph
from fxopt.ir.masks import carry, marks, set_mark, settle, stale, verify_masks
from fxopt.ir.onnx.export import to_model
from fxopt.ir.packing import pack
from fxopt.ir.shapes import infer
from fxopt.ir.sparsity import Mark, Pattern
from fxopt.ir.text_files import constants_of, load_text, save_text
from fxopt.ir.text_parser import from_text
from fxopt.ir.text_writer import to_text
from fxopt.ir.views.weights import weight_of
from fxopt.passes.base import Context, ExactPass
from fxopt.passes.manager import PassManager
from tests.conftest import mlp
from tests.passes.helpers import context, onnx_graph, torch_graph

PATTERN = Pattern.parse("2:4")
WEIGHT = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
WEIGHT = WEIGHT * PATTERN.mask(WEIGHT.abs(), 0)
MARK = Mark.of(PATTERN, WEIGHT)


def sparse_mlp() -> onnx.ModelProto:
    """The perceptron with a 2:4 weight in fc1."""
    model = mlp()
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    weight = torch.from_numpy(numpy_helper.to_array(stored).copy())
    kept = weight * PATTERN.mask(weight.abs(), 0)
    stored.CopyFrom(numpy_helper.from_array(kept.numpy(), "w1"))
    return model


def marked(model: onnx.ModelProto | None = None) -> Graph:
    graph = load(model or sparse_mlp())
    node = graph.find("fc1")
    assert node is not None
    set_mark(graph, node, Mark(PATTERN, 0.5))
    infer(graph, {"batch": 3})
    return graph


# ---- weights in every form


def int8(weight: torch.Tensor) -> torch.Tensor:
    return torch.round(weight * 40).to(torch.int8)


FORMS = {
    "matmul": ("float[n, 16] x", "y = MatMul(x, w)", {"w": WEIGHT.t().contiguous()}),
    "gemm": ("float[n, 16] x", "y = Gemm <transB = 1> (x, w)", {"w": WEIGHT}),
    "bias": ("float[n, 16] x", "p = MatMul(x, w) y = Add(p, b)", {"w": WEIGHT.t().contiguous(), "b": torch.ones(8)}),
    "conv": ("float[n, 16, 5, 5] x", "y = Conv(x, w)", {"w": WEIGHT[..., None, None]}),
    "dequantized": (
        "float[n, 16] x", "d = DequantizeLinear <axis = 0> (w, s, z) t = Transpose <perm = [1, 0]> (d) y = MatMul(x, t)",
        {"w": int8(WEIGHT) + 3, "s": torch.full((8,), 0.5), "z": torch.full((8,), 3, dtype=torch.int8)},
    ),
    "integer": (
        "uint8[n, 16] x", "y = MatMulInteger(x, w, a, z)",
        {"w": int8(WEIGHT).t().contiguous() + 3, "a": torch.tensor(7, dtype=torch.uint8), "z": torch.full((8,), 3, dtype=torch.int8)},
    ),
    "integer conv": (
        "uint8[n, 16, 3, 3] x", "y = ConvInteger(x, w, a, z)",
        {"w": int8(WEIGHT)[..., None, None] + 3, "a": torch.tensor(7, dtype=torch.uint8), "z": torch.full((1,), 3, dtype=torch.int8)},
    ),
    "few bits": (
        "float[n, 16] x", "y = com.microsoft.MatMulNBits <K = 16, N = 8, bits = 4, block_size = 16> (x, w, s)",
        {"w": pack((torch.round(WEIGHT).clamp(-8, 7) + 8).to(torch.uint8), 4)[:, None], "s": torch.full((8, 1), 0.5)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_onnx_operators(form: str) -> None:
    given, body, constants = FORMS[form]
    result = "int32" if "integer" in form else "float"
    graph = onnx_graph(f"g ({given}) => ({result} y) {{ {body} }}", 21, {"n": 2}, check=False, **constants)
    found = weight_of(graph, next(iter(graph.result_nodes)))
    assert found is not None and found.shape == WEIGHT.shape
    expected = torch.round(WEIGHT) if form == "few bits" else int8(WEIGHT) if form not in ("matmul", "gemm", "bias", "conv") else WEIGHT
    assert torch.equal(found != 0, expected != 0)
    assert MARK.violation(found) == ""


def test_what_has_no_weight() -> None:
    graph = onnx_graph("g (float[n, 16] x, float[16, 4] w) => (float y) { p = MatMul(x, w) y = Relu(p) }", sizes={"n": 2})
    assert [weight_of(graph, node) for node in graph.nodes] == [None] * len(list(graph.nodes))
    grouped = onnx_graph("g (float[n, 32, 5, 5] x) => (float y) { y = Conv <group = 2> (x, w) }", w=WEIGHT[..., None, None])
    assert weight_of(grouped, grouped.result_nodes[0]) is None


def test_weights_of_aten_operators() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv = torch.nn.Linear(16, 8), torch.nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(self.linear(x)[..., None, None])

    graph = torch_graph(Model(), torch.randn(3, 16))
    shapes = [tuple(found.shape) for node in graph.calls() if (found := weight_of(graph, node)) is not None]
    assert shapes == [(8, 16), (4, 8)]


# ---- after passes


@dataclass(frozen=True)
class Meddle(ExactPass):
    """Give fc1 another weight."""

    how: str = "fill"

    def run(self, graph: Graph, ctx: Context) -> int:
        """Once."""
        node = graph.find("fc1")
        if node is None or self.name in node.meta["provenance"]:
            return 0
        old = node.args[1]
        weight = graph.constant(old)
        assert weight is not None and isinstance(old, torch.fx.Node)
        value = weight * 2 if self.how != "fill" else weight + 1
        node.replace_input_with(old, constant_before(graph, node, value, "w", ("w",)))
        node.meta["provenance"] = (*node.meta["provenance"], self.name)
        if self.how == "forget":
            del node.meta["sparsity"]
        return 1


def test_a_pass_that_fills_zeros_is_named() -> None:
    with pytest.raises(VerificationError, match="pass meddle .* broke the graph: node 'fc1' lost zeros of its weight: output 0, inputs 0 to 3: 4 of 4 are not zero, 2:4 allows 2"):
        PassManager([Meddle()]).run(marked(), context())


def test_a_pass_that_forgets_the_mark_is_named() -> None:
    with pytest.raises(VerificationError, match="pass meddle .* node 'fc1' has lost the mark of 'fc1', whose weight has zeros of the pattern 2:4"):
        PassManager([Meddle("forget")]).run(marked(), context())


def test_a_pass_that_scales_the_weight_is_fine() -> None:
    graph = marked()
    assert PassManager([Meddle("scale")]).run(graph, context()) == 1
    assert marks(graph) == {"fc1": Mark(PATTERN, 0.5)}


def test_nodes_without_a_weight_lose_marks() -> None:
    graph = marked()
    relu = graph.find("act")
    assert relu is not None
    relu.meta["sparsity"] = MARK
    verify_masks(graph)
    assert marks(graph) == {"fc1": Mark(PATTERN, 0.5)}


def test_product_and_bias_are_marked_together() -> None:
    _, body, constants = FORMS["bias"]
    graph = onnx_graph(f"g (float[n, 16] x) => (float[n, 8] y) {{ {body} }}", sizes={"n": 2}, **constants)
    product, total = graph.calls()
    product.meta["sparsity"] = MARK
    settle(graph)
    assert total.meta["sparsity"] == MARK and list(marks(graph)) == ["n_p"]
    verify_masks(graph)
    assert total.meta["sparsity"] == MARK


# ---- in files


def test_marks_are_texts() -> None:
    for mark in (MARK, Mark(Pattern.parse("4x1"), 1 / 3), Mark(Pattern.parse("8x2:4"), 0.5)):
        assert Mark.parse(str(mark)) == mark
    for text in ("2:4", "2:4 x", "2:4 1.5", "no 0.5", ""):
        with pytest.raises(InvalidOption, match="sparsity (mark|pattern)"):
            Mark.parse(text)


@pytest.mark.parametrize("version", [8, 10])
def test_marks_come_back_from_onnx(version: int) -> None:
    model = sparse_mlp()
    model.ir_version = version
    made = to_model(marked(model))
    onnx.checker.check_model(made, full_check=True)
    assert made.ir_version == 10
    assert [(entry.key, entry.value) for node in made.graph.node for entry in node.metadata_props] == [("fxopt.sparsity", "2:4 0.5")]
    again = load(made)
    assert marks(again) == {"fc1": Mark(PATTERN, 0.5)}
    assert to_model(again) == made, "a file with marks comes out as it came in"
    del again.find("fc1").meta["sparsity"]  # type: ignore[union-attr]
    assert to_model(again).graph == model.graph


def test_a_file_without_marks_keeps_its_version() -> None:
    model = mlp()
    model.ir_version = 8
    assert to_model(load(model)) == model


def test_a_broken_entry_is_an_invalid_model() -> None:
    made = to_model(marked())
    made.graph.node[0].metadata_props[0].value = "2:4 many"
    with pytest.raises(InvalidModel, match="node 'fc1': metadata fxopt.sparsity: sparsity mark '2:4 many'"):
        load(made)


def test_a_mark_that_the_weights_do_not_keep_is_dropped_and_said() -> None:
    made = to_model(marked())
    for tensor in made.graph.initializer:
        if tensor.name == "w1":
            tensor.CopyFrom(numpy_helper.from_array(np.ones((32, 16), np.float32), "w1"))
    graph = load(made)
    (text,) = stale(graph)
    assert text.startswith("node 'fc1' is not 2:4 0.5, as the file says: output 0, inputs 0 to 3: 4 of 4 are not zero")
    assert not marks(graph) and not stale(graph)
    result = fxopt.optimize(made, passes=[])
    assert any("is not 2:4 0.5, as the file says" in note for note in result.report.warnings)


@pytest.mark.parametrize("origin", ["onnx", "torch"])
def test_marks_come_back_from_text(origin: str, tmp_path: Path) -> None:
    graph = marked() if origin == "onnx" else marked().lower()
    assert len(marks(graph)) == 1
    save_text(graph, tmp_path)
    assert list(marks(load_text(tmp_path)).values()) == list(marks(graph).values())
    text = to_text(graph)
    for wrong, message in (("'2:4 5'", "sparsity of"), ("7", "expected the mark of each node")):
        with pytest.raises(GraphSyntaxError, match=message):
            from_text(text.replace("'2:4 0.5'", wrong).replace('"2:4 0.5"', wrong), constants_of(graph))
    name = next(node.name for node in graph.nodes if "sparsity" in node.meta)
    with pytest.raises(GraphSyntaxError, match="sparsity names 'nobody', which is no node"):
        from_text(text.replace(f"{name}': ", "nobody': ").replace(f'{name}": ', 'nobody": '), constants_of(graph))


def test_lowering_keeps_marks() -> None:
    lowered = marked().lower()
    (node,) = [node for node in lowered.calls() if "sparsity" in node.meta]
    assert weight_of(lowered, node) is not None
    verify_masks(lowered)
    fresh = marked().lower()
    for node in fresh.nodes:
        node.meta.pop("sparsity", None)
    carry(marked(), fresh)
    assert marks(fresh) == {"fc1": Mark(PATTERN, 0.5)}


def test_dequantised_weights_in_files_are_checked() -> None:
    """A mark on a convolution whose weight lies behind DequantizeLinear."""
    codes = int8(WEIGHT)[..., None, None].numpy()
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["y"], "conv"),
    ]
    body = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 3, 3])],
        [numpy_helper.from_array(codes, "q"), numpy_helper.from_array(np.ones(8, np.float32), "s")],
    )  # fmt: skip
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.graph.node[1].metadata_props.add(key="fxopt.sparsity", value="2:4 0.5")
    graph = load(model)
    assert not stale(graph) and len(marks(graph)) == 1
