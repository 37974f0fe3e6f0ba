"""fxopt::attention_pattern: slices against the definition, in torch and in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from fxopt.backends.onnxruntime.forms import FORMS
from fxopt.errors import InvalidInput
from fxopt.frontends.onnx import load
from fxopt.ir.onnx.export import to_model
from fxopt.ir.ops.attention_pattern import (
    Pattern,
    attention_pattern,
    dense,
    density,
    diagonal,
    diagonals,
    nothing,
    seen,
    stripes,
)
from fxopt.ir.shapes import infer
from fxopt.ir.sliced_attention import share, sliced_attention, slices

CASES: list[list[Pattern]] = [
    [diagonal(20), diagonal(20), dense()],
    [diagonals(3, 50), nothing(), stripes(30, 60)],
    [diagonal(9, sink=4), diagonals(1, 10, sink=3), stripes(0, 5, 90)],
]


def operands(length: int, heads: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, heads, length, 8, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("every", CASES)
def test_slices_give_what_the_definition_gives(every: list[Pattern]) -> None:
    q, k, v = operands(350)
    numbers = [number for pattern in every for number in pattern]
    exact = attention_pattern.function(*(x.double() for x in (q, k, v)), numbers, 0.4)
    plain = (attention_pattern.function(q, k, v, numbers, 0.4) - exact).abs().max()
    error = (sliced_attention(q, k, v, numbers, 0.4) - exact).abs().max()
    assert error <= 2 * plain + 1e-7


def test_declared_samples_in_slices() -> None:
    for arguments in attention_pattern.sample_arguments():
        torch.testing.assert_close(sliced_attention(*arguments), attention_pattern.function(*arguments))


def test_lists_of_blocks_hide_blocks() -> None:
    blocks = torch.zeros(1, 3, 3, dtype=torch.bool)
    blocks[0, 0, 0] = blocks[0, 2, 1] = True
    visible = seen(dense(), 150, blocks)
    assert visible[0, :64, :64].all() and visible[0, 128:, 64:128].all()
    assert int(visible.sum()) == 64 * 64 + 22 * 64
    assert slices(dense(), 150, blocks)[0].pairs < 150 * 150
    with pytest.raises(InvalidInput, match=r"blocks have shape \[1, 3, 3\]; expected \[1, 2, 2\]"):
        seen(dense(), 100, blocks)


def test_many_diagonals_are_one_band_after_renumbering() -> None:
    """Tokens by place instead of by frame: what is multiplied is near what is seen, not everything."""
    frames, height, width = 16, 16, 16
    length, frame = frames * height * width, height * width
    pattern = diagonals(32, frame)
    elements = float(seen(pattern, length).double().mean())
    assert elements == pytest.approx(65 / 256)
    assert density(pattern, length) >= 0.75, "blocks of the tokens as they are"
    assert share(pattern, length) <= 1.2 * elements


def onnx_model(length: int, heads: int) -> onnx.ModelProto:
    nodes = [helper.make_node("Add", ["q", "k"], ["s"]), helper.make_node("Add", ["s", "v"], ["y"])]
    sizes = ["batch", heads, length, 8]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name in "qkvy"]
    graph = helper.make_graph(nodes, "g", info[:3], info[3:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("every", CASES)
@pytest.mark.parametrize("with_blocks", [False, True])
def test_onnx_form(every: list[Pattern], with_blocks: bool) -> None:
    ort = pytest.importorskip("onnxruntime", reason="runs the written file")
    length = 300
    graph = load(onnx_model(length, len(every)))
    infer(graph)
    end = next(node for node in graph.calls() if node.name == graph.result_nodes[0].name)
    numbers = [number for pattern in every for number in pattern]
    taken = [node for node in graph.nodes if node.op == "placeholder"]
    blocks = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    listed = (graph.add_constant(blocks, "blocks", ("blocks",)),) if with_blocks else ()
    arguments = (*taken, numbers, 0.4, *listed)
    graph.replace(end, graph.call(attention_pattern.target, arguments, before=end, made_by="test", like=end))
    graph.prune()
    infer(graph)
    model = to_model(graph, FORMS)
    onnx.checker.check_model(model)
    q, k, v = operands(length)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: x.numpy() for name, x in zip("qkv", (q, k, v), strict=True)})[0]
    wanted = attention_pattern.function(q, k, v, numbers, 0.4, *([blocks] if with_blocks else []))
    np.testing.assert_allclose(found, wanted.numpy(), atol=2e-6)


@pytest.mark.parametrize("run", [attention_pattern, sliced_attention])
def test_wrong_patterns(run: Any) -> None:
    x = torch.zeros(1, 2, 70, 8)
    with pytest.raises(InvalidInput, match="1 patterns for 2 heads"):
        run(x, x, x, list(dense()), 1.0)
    with pytest.raises(InvalidInput, match=r"blocks have shape \[2, 1, 1\]; expected \[2, 2, 2\]"):
        run(x, x, x, [*dense(), *dense()], 1.0, torch.ones(2, 1, 1, dtype=torch.bool))
