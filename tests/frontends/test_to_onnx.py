"""PyTorch -> ONNX: the exporter's traps are closed, and the result is the module's in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.export import Dim

from fxopt.errors import CaptureError
from fxopt.frontends.onnx import load as load_onnx
from fxopt.frontends.to_onnx import _root, both_precisions, difference, onnx_graph_of, run_onnxruntime, to_onnx
from fxopt.ir.graph import Graph, label
from fxopt.ir.onnx.export import save, to_model
from tests.zoo import BUILDERS, Mlp, case, graph, program

slow = pytest.mark.slow
architectures = pytest.mark.parametrize(
    "name", [name if name in ("mlp", "cnn") else pytest.param(name, marks=slow) for name in BUILDERS]
)


@architectures
@pytest.mark.parametrize("origin", ["opset 20", "opset 23"])
def test_same_numbers_in_torch(name: str, origin: str) -> None:
    if name not in ("mlp", "cnn", "encoder"):
        pytest.importorskip("transformers")
    if name in ("llama", "qwen2") and origin == "opset 23":
        pytest.skip("RotaryEmbedding with a dynamic batch: see test_the_rotary_trap")
    made, captured = case(name), graph(name, origin)
    for sizes in ({}, {"batch": 5, "seq": 9}, {"batch": 1}):
        inputs = made.resized(**sizes)
        with torch.no_grad():
            expected = made.model(**inputs)
        given = captured.call_spec.unflatten(captured.run(captured.call_spec.flatten((), inputs)))
        assert type(given) is type(expected)
        torch.testing.assert_close(given, expected, atol=2e-6, rtol=1e-5)


@architectures
def test_it_runs_in_onnx_runtime(name: str) -> None:
    if name not in ("mlp", "cnn", "encoder"):
        pytest.importorskip("transformers")
    made = case(name)
    captured, notes = onnx_graph_of(program(name), name)
    rotary = name in ("llama", "qwen2")
    assert captured.model is not None
    assert captured.model.opsets[""] == (20 if rotary else 23)
    assert bool(notes) == rotary
    for sizes in ({"batch": 3, "seq": 9}, {"batch": 1}):
        inputs = made.resized(**sizes)
        with torch.no_grad():
            expected = made.model(**inputs)
        given = captured.call_spec.unflatten(run_onnxruntime(captured, captured.call_spec.flatten((), inputs)))
        torch.testing.assert_close(given, expected, atol=2e-6, rtol=1e-5)


@slow
def test_the_rotary_trap() -> None:
    """Opset 23 keeps cos and sin of one row; ONNX Runtime refuses it, so opset 20 is taken and said."""
    pytest.importorskip("transformers")
    _, notes = onnx_graph_of(program("llama"), "llama")
    assert "opset 23 does not run on the example inputs" in notes[0]
    assert "RotaryEmbedding" in notes[0]
    assert notes[1:] == ["exported as opset 20"]


class Named(nn.Module):
    """A value inside has the name that the output wants, and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 64)
        self.linear = nn.Linear(64, 64)

    def forward(self, ids: torch.Tensor, linear: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.linear(self.embedding(ids)) + linear
        return {"embedding": hidden.mean(1), "hidden": hidden}


def named() -> tuple[Named, tuple[torch.Tensor, torch.Tensor], dict[str, dict[int, str]]]:
    torch.manual_seed(0)
    inputs = torch.randint(0, 32, (2, 5)), torch.randn(64)
    return Named().eval(), inputs, {"ids": {0: "batch", 1: "length"}}


@cache
def exported() -> tuple[Named, tuple[torch.Tensor, torch.Tensor], Graph]:
    model, inputs, dynamic = named()
    captured, notes = to_onnx(model, inputs, dynamic)
    assert not notes
    return model, inputs, captured


def test_names_and_dimensions() -> None:
    _, _, captured = exported()
    assert [str(spec) for spec in captured.inputs] == ["ids: int64[batch, length]", "linear: float32[64]"]
    outputs = ["embedding: float32[batch, 64]", "hidden: float32[batch, length, 64]"]
    assert [str(spec) for spec in captured.outputs] == outputs
    proto = to_model(captured)
    onnx.checker.check_model(proto, full_check=True)
    values = [name for node in proto.graph.node for name in node.output]
    values += [entry.name for entry in (*proto.graph.input, *proto.graph.initializer)]
    assert len(values) == len(set(values))
    dims = {dim.dim_param for entry in proto.graph.value_info for dim in entry.type.tensor_type.shape.dim}
    assert dims <= {"", "batch", "length"}


def test_nodes_are_called_after_modules_and_nothing_of_this_machine_is_left() -> None:
    _, _, captured = exported()
    names = [label(node) for node in captured.calls()]
    assert {"embedding/Gather", "linear/MatMul", "linear/Add"} <= set(names)
    assert len(names) == len(set(names))
    proto = to_model(captured)
    product = next(node for node in proto.graph.node if node.name == "linear/MatMul")
    assert [(entry.key, entry.value) for entry in product.metadata_props] == [("fxopt.from", "linear")]
    for trace in (str(Path(__file__).parent), "site-packages", "pkg.torch", "pkg.onnxscript", "model.linear"):
        assert trace not in str(proto)
    assert proto.graph.name == "Named"


def test_weights_are_shared() -> None:
    model, _, captured = exported()
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if parameter.numel() > 256}
    constants = [captured.constant(node) for node in captured.nodes if node.op == "get_attr"]
    assert storages == {
        tensor.untyped_storage().data_ptr() for tensor in constants if tensor is not None and tensor.nbytes > 1024
    }


def test_the_saved_file_is_whole(tmp_path: Path) -> None:
    model, inputs, captured = exported()
    save(captured, tmp_path / "model.onnx")
    again = load_onnx(tmp_path / "model.onnx")
    assert to_model(again) == to_model(captured)
    given = run_onnxruntime(again, inputs)
    torch.testing.assert_close(dict(zip(("embedding", "hidden"), given)), model(*inputs), atol=1e-6, rtol=1e-5)


def test_an_exported_program() -> None:
    model, inputs, _ = named()
    shapes = {"ids": {0: Dim("batch"), 1: Dim("length")}, "linear": None}
    program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    captured, _ = to_onnx(program, dynamic_shapes={"ids": {0: "rows"}})
    assert [str(spec) for spec in captured.inputs] == ["ids: int64[rows, ids_1]", "linear: float32[64]"]
    assert set(captured.call_spec.unflatten(run_onnxruntime(captured, inputs))) == {"embedding", "hidden"}


class Biased(nn.Module):
    """Attention with a bias per head, whose kernel leaves its result in another layout than its decomposition does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(1, 4, 24, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, 24, 64] -> the same."""
        q, k, v = (part(x).view(len(x), 24, -1, 16).transpose(1, 2) for part in self.qkv)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, self.bias.expand(len(x), -1, -1, -1))
        return y.transpose(1, 2).reshape(len(x), 24, -1).contiguous()


def test_layouts_that_the_exporter_derives_otherwise() -> None:
    model, x = Biased().eval(), torch.randn(2, 24, 64)
    with pytest.raises(ValueError, match="Cannot view a tensor"):  # or the detour is no longer needed
        try:
            torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        except Exception as error:
            raise _root(error) from None
    captured, notes = to_onnx(model, (x,))
    assert not notes and [node.op_type for node in to_model(captured).graph.node].count("Attention") == 1


def test_conditions_and_sub_graphs() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, self.linear, torch.cos, (x,))

    model = Either().eval()
    captured, _ = to_onnx(model, torch.ones(2, 3), {"x": {0: "batch"}})
    for x in (torch.ones(4, 3), -torch.ones(1, 3)):
        torch.testing.assert_close(run_onnxruntime(captured, [x])[0], model(x).detach())


def test_the_opset_can_be_chosen() -> None:
    captured, notes = onnx_graph_of(program("mlp"), "Mlp", 18)
    assert captured.model is not None
    assert captured.model.opsets[""] == 18
    assert not notes


# ---- verification


def test_a_wrong_form_is_not_taken() -> None:
    def wrong_once(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        assert graph.model is not None
        result = graph.run(inputs)
        return [result[0] * 1.01] if graph.model.opsets[""] == 23 else result

    captured, notes = onnx_graph_of(program("mlp"), "Mlp", verify=wrong_once)
    assert captured.model is not None
    assert captured.model.opsets[""] == 20
    assert notes[0].startswith("opset 23 computes something else than the module: output 'output' has a noise-to-")
    assert notes[1] == "exported as opset 20"


def test_when_every_form_is_wrong() -> None:
    with pytest.raises(CaptureError) as raised:
        onnx_graph_of(program("mlp"), "Mlp", 20, verify=lambda graph, inputs: [graph.run(inputs)[0] * 2])
    text = str(raised.value)
    assert text.startswith("Mlp could not be exported to ONNX:")
    assert "opset 20 computes something else" in text
    assert "opset 20 without torch's optimiser computes something else" in text


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda y: y + 1e-5, ""),
        (lambda y: y[:1], "output 'y' is torch.float32[1, 3], not torch.float32[2, 3]"),
        (lambda y: y.double(), "output 'y' is torch.float64[2, 3], not torch.float32[2, 3]"),
        (lambda y: y.log(), "output 'y' is not finite in other places"),
        (lambda y: y * torch.nan, "output 'y' is not finite in other places"),
        (lambda y: y * 1.01, "output 'y' has a noise-to-signal ratio of 1.0e-04"),
    ],
)
def test_what_is_different(fault: Any, reason: str) -> None:
    y = torch.arange(6.0).reshape(2, 3)
    assert difference([y], [fault(y)], ["y"]) == reason


def test_integers_must_be_equal() -> None:
    index = torch.arange(3)
    assert difference([index, 3], [index, torch.tensor(3)], ["y", "n"]) == ""
    assert difference([index], [index + 1], ["y"]) == "output 'y' differs in 3 of 3 elements"
    assert difference([3], [torch.tensor(4)], ["n"]) == "output 'n' is 4, not 3"


def test_what_cannot_be_run_is_returned_unproven() -> None:
    def broken(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("no kernel")

    captured, notes = onnx_graph_of(program("mlp"), "Mlp", verify=broken)
    assert captured.model is not None
    assert captured.model.opsets[""] == 23
    assert notes[0] == "opset 23 does not run on the example inputs: RuntimeError: no kernel"
    assert notes[-1] == "verified with the definitions of its operators in torch instead"


def test_what_nobody_can_run_is_said_to_be_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Graph, inputs: Sequence[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Graph, "run", broken)
    _, notes = onnx_graph_of(program("mlp"), "Mlp", verify=broken)
    assert notes[-1].startswith("the exported graph could not be verified: torch does not run it either (RuntimeError")


def test_a_wrong_graph_that_only_torch_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("no kernel")

    run = Graph.run
    monkeypatch.setattr(
        Graph, "run", lambda graph, inputs, **options: [2 * value for value in run(graph, inputs, **options)]
    )
    with pytest.raises(CaptureError, match="computes something else in torch: output .* noise-to-signal"):
        onnx_graph_of(program("mlp"), "Mlp", verify=broken)


def test_bfloat16_is_verified_in_torch() -> None:
    """ONNX Runtime's CPU provider has no bfloat16 kernels for most operators."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4)).eval().bfloat16()
    captured, notes = to_onnx(module, torch.randn(3, 16, dtype=torch.bfloat16))
    assert captured.outputs[0].dtype == torch.bfloat16
    assert not notes or notes[-1] == "verified with the definitions of its operators in torch instead"


class Cancels(nn.Module):
    """Zero up to rounding: a sum of probabilities, less one, which every order of sums rounds in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 257)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x).softmax(-1) * 3).sum(-1) - 3


def test_an_output_that_is_zero_up_to_rounding() -> None:
    torch.manual_seed(0)
    module, x = Cancels().eval(), torch.randn(50, 64)
    captured, notes = to_onnx(module, x)
    assert notes == []
    (given,) = run_onnxruntime(captured, [x])
    with torch.no_grad():
        expected = module(x)
    assert difference([expected], [given], ["y"]).startswith("output 'y' has a noise-to-signal ratio of")
    judged = partial(both_precisions, captured, [x])
    assert difference([expected], [given], ["y"], judged) == ""
    assert difference([expected], [given + 1e-4], ["y"], judged) != ""
    assert difference([expected + 1e-4], [given], ["y"], judged) != ""


def test_an_operator_without_an_onnx_form() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(x)

    with pytest.raises(CaptureError, match="Odd could not be exported to ONNX") as raised:
        to_onnx(Odd().eval(), torch.eye(3))
    assert "torch cannot export Odd to opset 23: " in str(raised.value)
    assert "linalg_eig" in str(raised.value)
    assert "choose another backend" in str(raised.value)


def test_in_place_changes_are_refused() -> None:
    """torch's exporter would drop them without a word."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return x + self.count

    with pytest.raises(CaptureError, match="changes the buffer 'count' in place"):
        to_onnx(Counter().eval(), torch.ones(1))


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    to_onnx(Mlp().eval(), torch.ones(2, 16))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
