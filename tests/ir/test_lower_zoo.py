"""Every exported architecture: lowered to aten with its dynamic dimensions, and written back as it was read."""

from __future__ import annotations

import pytest
import torch

from fxopt.frontends.onnx import load
from fxopt.ir.onnx.export import to_model
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.verify import verify_structure
from tests.zoo import BUILDERS, case, graph

exports = pytest.mark.parametrize("origin", ["opset 20", "opset 23"])
architectures = pytest.mark.parametrize(
    "name", [name if name == "mlp" else pytest.param(name, marks=pytest.mark.slow) for name in BUILDERS]
)


@architectures
@exports
def test_dynamic_dimensions_are_kept(name: str, origin: str) -> None:
    if name not in ("mlp", "cnn", "encoder"):
        pytest.importorskip("transformers")
    source, made = graph(name, origin), case(name)
    result = source.lower()
    verify_structure(result)
    assert not [node for node in result.nodes if isinstance(node.target, OnnxOp)]
    assert [str(spec) for spec in result.inputs] == [str(spec) for spec in source.inputs]
    assert [str(spec) for spec in result.outputs] == [str(spec) for spec in source.outputs]
    dims = {dim for spec in result.inputs for dim in spec.shape or () if isinstance(dim, str)}
    assert dims == {dim for axes in made.dynamic.values() for dim in axes.values()}
    for sizes in ({}, {"batch": 5, "seq": 9}, {"batch": 1}):
        inputs = source.call_spec.flatten((), made.resized(**sizes))
        with torch.no_grad():
            for one, other in zip(source.run(inputs), result.run(inputs), strict=True):
                torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)


@architectures
@exports
def test_round_trip(name: str, origin: str) -> None:
    if name not in ("mlp", "cnn", "encoder"):
        pytest.importorskip("transformers")
    model = to_model(graph(name, origin))
    assert to_model(load(model)) == model
