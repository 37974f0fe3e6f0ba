"""fxopt operators written in PyTorch are exported one to one, and emitted as the planner's are."""

from __future__ import annotations

from collections import Counter
from functools import cache

import torch
from torch import nn

from fxopt.backends.onnxruntime.forms import FORMS
from fxopt.frontends.fxopt_nodes import restore, translations
from fxopt.frontends.to_onnx import to_onnx
from fxopt.frontends.torch_export import load as load_torch
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.export import to_model
from fxopt.ir.op import all_ops
from fxopt.ir.ops.embedding_w8 import embedding_w8
from fxopt.ir.ops.linear_w8a8 import linear_w8a8, linear_w8a8_dynamic
from fxopt.ir.shapes import infer
from fxopt.passes.base import Context
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.passes.stats import collect
from tests.passes.test_quantize_linear import AVX2


def codes_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight with 7 bits, as no kernel saturates them, and one scale per row."""
    scales = weight.abs().amax(1) / 63
    return torch.round(weight / scales[:, None]).to(torch.int8), scales


class Eight(nn.Module):
    """A linear of 8 bits, and another with a fixed range."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in (("first", (32, 16)), ("second", (8, 32))):
            codes, scales = codes_of(torch.randn(shape))
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scales", scales)
        self.register_buffer("bias", torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(linear_w8a8_dynamic(x, self.first_codes, self.first_scales, self.bias))
        return linear_w8a8(y, self.second_codes, self.second_scales, None, 0.0625, 0)


@cache
def exported() -> tuple[Graph, list[str], torch.Tensor]:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    graph, notes = to_onnx(Eight().eval(), x)
    return graph, notes, x


def test_exported_one_to_one() -> None:
    graph, notes, x = exported()
    assert notes[-1] == "verified with the definitions of its operators in torch instead"
    targets = [node.target for node in graph.calls()]
    assert targets.count(linear_w8a8_dynamic.target) == 1
    assert targets.count(linear_w8a8.target) == 1
    (y,) = graph.run([x])
    torch.testing.assert_close(y, Eight().eval()(x))


def test_emitted_in_the_forms_of_the_backend() -> None:
    import onnxruntime

    graph, _, x = exported()
    model = to_model(graph, FORMS)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["DynamicQuantizeLinear"] == kinds["QuantizeLinear"] == 1
    assert kinds["MatMulIntegerToFloat"] == 2
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {graph.inputs[0].name: x.numpy()})
    expected = Eight().eval()(x)
    step = 0.0625 * float(Eight().second_scales.max()) * 63  # one level of the second input may fall the other way
    assert (torch.from_numpy(y) - expected).abs().max() <= step


def test_every_operator_has_a_translation() -> None:
    assert set(translations()) == {declared.target for declared in all_ops().values()}


def test_an_embedding_is_exported_one_to_one() -> None:
    """Its indices are integers."""
    codes, scales = codes_of(torch.randn(9, 4, generator=torch.Generator().manual_seed(2)))

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", codes)
            self.register_buffer("scales", scales[:, None])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return embedding_w8(self.codes, self.scales, x)

    x = torch.tensor([[0, 8, 3], [1, 1, 7]])
    graph, _ = to_onnx(Table().eval(), x)
    assert [node.target for node in graph.calls()] == [embedding_w8.target]
    assert torch.equal(graph.run([x])[0], Table()(x))


def test_restoring_twice_changes_nothing() -> None:
    assert restore(exported()[0].copy()) == 0


def test_both_ways_on_one_network() -> None:
    """Quantised as a PyTorch graph and exported, or exported and quantised as an ONNX graph: the same numbers."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    samples = [[torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))] for seed in range(4)]
    step = QuantizeLinear(activations="static", smooth="off")
    results = []
    for graph in (load_torch(model, (samples[0][0],)), to_onnx(model, samples[0][0])[0]):
        infer(graph, {})
        candidates = list(step.candidates(graph, Context(AVX2)))
        stats = collect(graph, samples, {node for found in candidates for node in step.observed(graph, found)})
        for found in candidates:
            step.apply(graph, found, stats)
        graph.prune()
        if graph.origin == "torch":
            graph = to_onnx(graph.module, samples[0][0])[0]
        assert [node.target for node in graph.calls()].count(linear_w8a8.target) == 2
        results.append((graph, to_model(graph, FORMS)))
    (first, made), (second, planned) = results
    assert Counter(node.op_type for node in made.graph.node) == Counter(node.op_type for node in planned.graph.node)
    torch.testing.assert_close(first.run(samples[1])[0], second.run(samples[1])[0], rtol=1e-6, atol=1e-6)
