"""PyTorch -> graph: same numbers, names that the user knows, shared weights, errors that say what to do."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError, InvalidInput, UnknownName
from fxopt.frontends import fx as fx_frontend
from fxopt.frontends.capture.call_spec import CallSpec
from fxopt.frontends.capture.program import export
from fxopt.frontends.torch_export import load
from fxopt.ir.graph import Graph, provenance
from tests.zoo import BUILDERS, Mlp, case, graph

QUICK = ("mlp", "cnn")
architectures = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BUILDERS]
)


def call(model: Graph, *args: Any, **kwargs: Any) -> Any:
    return model.call_spec.unflatten(model.run(model.call_spec.flatten(args, kwargs)))


@architectures
def test_same_numbers_at_every_size(name: str) -> None:
    if name not in ("mlp", "cnn", "encoder"):
        pytest.importorskip("transformers")
    made, captured = case(name), graph(name, "torch")
    for sizes in ({}, {"batch": 5, "seq": 9}, {"batch": 1}):
        inputs = made.resized(**sizes)
        with torch.no_grad():
            expected = made.model(**inputs)
        given = call(captured, **inputs)
        assert type(given) is type(expected)
        torch.testing.assert_close(pytree.tree_leaves(given), pytree.tree_leaves(expected), atol=1e-6, rtol=1e-5)


# ---- signatures


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Rich(nn.Module):
    """Nested inputs and outputs, constants, defaults, keyword extras."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(OrderedDict(project=nn.Linear(4, 4), drop=nn.Dropout(0.5)))

    def forward(
        self, input: torch.Tensor, pair: Any, flag: bool = True, scale: float = 2.0, extra: Any = None, **more: Any
    ) -> Any:
        y = self.inner(input) * scale + pair["a"] + pair["list"][0]
        if flag:
            y = y + more["late"]
        return {"y": y, "none": None, "pair": Pair(y + 1, y - 1), "size": y.shape[1]}, input


def rich_arguments(rows: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = torch.arange(4.0 * rows).reshape(rows, 4)
    return (x, {"a": x + 1, "list": [x * 2]}), {"late": x - 3}


@cache
def rich_graph() -> tuple[nn.Module, Graph]:
    model = Rich().eval()
    args, kwargs = rich_arguments()
    batch = {0: "batch"}
    dynamic = {"input": batch, "pair": {"a": batch, "list": [batch]}, "late": batch}
    return model, load(model, args, dynamic, kwargs)


def test_names_of_nested_inputs_and_outputs() -> None:
    _, captured = rich_graph()
    assert [str(spec) for spec in captured.inputs] == [
        f"{name}: float32[batch, 4]" for name in ("input", "pair_a", "pair_list_0", "late")
    ]
    names = ["output_0_y", "output_0_pair_left", "output_0_pair_right", "output_1"]
    assert [str(spec) for spec in captured.outputs] == [f"{name}: float32[batch, 4]" for name in names]
    assert [node.target for node in captured.placeholders] == ["input", "pair_a", "pair_list_0", "late"]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_call_spec_round_trip(rows: int) -> None:
    model, captured = rich_graph()
    args, kwargs = rich_arguments(rows)
    with torch.no_grad():
        expected = model(*args, **kwargs)
    for given in (
        call(captured, *args, **kwargs),
        call(captured, pair=args[1], input=args[0], **kwargs),
        call(captured, *args, True, 2.0, **kwargs),  # a default that is given
    ):
        assert isinstance(given, tuple)
        assert isinstance(given[0]["pair"], Pair)
        assert given[0]["none"] is None
        assert given[0]["size"] == 4
        torch.testing.assert_close(given, expected, atol=0, rtol=0)


def test_call_spec_as_plain_data() -> None:
    _, captured = rich_graph()
    assert captured.call_spec.to_json() is None  # a named tuple of the user's is not plain

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 2.0) -> dict[str, Any]:
            return {"y": x * scale, "more": [x, None]}

    captured = load(Plain().eval(), torch.ones(2))
    spec = CallSpec.from_json(json.loads(json.dumps(captured.call_spec.to_json())))
    given = spec.unflatten(captured.run(spec.flatten((torch.ones(2), 2.0))))
    assert torch.equal(given["y"], torch.full((2,), 2.0))
    assert given["more"][1] is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda args, kwargs: (args[:1], kwargs), "missing a required argument: 'pair'"),
        (lambda args, kwargs: (args, {}), r"missing key\(s\).*late|arity"),
        (lambda args, kwargs: ((args[0], {"a": args[0]}), kwargs), "arity"),
        (lambda args, kwargs: ((*args, False), kwargs), "'flag' is False; the model was captured with True"),
        (lambda args, kwargs: ((1.0, args[1]), kwargs), "'input' is a float; the model was captured with a tensor"),
        (
            lambda args, kwargs: ((*args, True, 2.0, args[0]), kwargs),
            "'extra' is a tensor of .*captured with None",
        ),
    ],
)
def test_calls_that_do_not_fit(change: Any, reason: str) -> None:
    _, captured = rich_graph()
    args, kwargs = change(*rich_arguments())
    with pytest.raises(InvalidInput, match=reason):
        captured.call_spec.flatten(args, kwargs)


def test_what_the_capture_fixed_may_be_left_out() -> None:
    model = Rich().eval()
    args, kwargs = rich_arguments()
    captured = load(model, args, kwargs={**kwargs, "flag": False, "scale": 3.0})
    expected = model(*args, False, 3.0, **kwargs)[0]["y"]
    assert torch.equal(call(captured, *args, **kwargs)[0]["y"], expected)
    assert torch.equal(call(captured, *args, flag=False, **kwargs)[0]["y"], expected)
    with pytest.raises(InvalidInput, match="'scale' is 2.0; the model was captured with 3.0"):
        call(captured, *args, scale=2.0, **kwargs)


def test_a_result_that_is_an_input_gets_a_name_of_its_own() -> None:
    class Same(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x, "y": x + 1}

    captured = load(Same().eval(), torch.ones(2))
    assert [spec.name for spec in captured.outputs] == ["x_out", "y"]
    assert torch.equal(call(captured, torch.zeros(2))["x"], torch.zeros(2))


# ---- dimensions


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, y]).reshape(-1)


def specs(dynamic: Any, rows: int = 2) -> list[str]:
    captured = load(Sum().eval(), (torch.ones(rows, 3), torch.ones(rows, 3)), dynamic)
    return [str(spec).partition(": float32")[2] for spec in (*captured.inputs, *captured.outputs)]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        ({"x": {0: "batch"}, "y": {0: "batch"}}, ["[batch, 3]", "[batch, 3]", "[6*batch]"]),
        ({"x": {0: Dim("n", max=100)}, "y": {-2: "n"}}, ["[n, 3]", "[n, 3]", "[6*n]"]),
        ((["a", None], None), ["[a, 3]", "[{rows}, 3]", "[3*a + {width}]"]),
        ({"x": {0: Dim.DYNAMIC}}, ["[x_0, 3]", "[{rows}, 3]", "[3*x_0 + {width}]"]),
        (None, ["[{rows}, 3]", "[{rows}, 3]", "[{all}]"]),
    ],
)
def test_dimensions_have_the_users_names(dynamic: Any, expected: list[str], rows: int) -> None:
    numbers = {"rows": rows, "width": 3 * rows, "all": 6 * rows}
    assert specs(dynamic, rows) == [text.format(**numbers) for text in expected]


def test_independent_dimensions() -> None:
    *inputs, output = specs(({0: "a"}, {0: "b"}))
    assert inputs == ["[a, 3]", "[b, 3]"]
    assert output in ("[3*a + 3*b]", "[3*b + 3*a]")


def test_automatic_dimensions() -> None:
    assert specs("auto")[:2] == ["[x_0, x_1]", "[y_0, x_1]"]


def test_the_users_sizes_are_remembered() -> None:
    captured = load(Mlp().eval(), torch.ones(1, 16), {"x": {0: "batch"}})
    assert captured.sizes == {"batch": 1}
    assert captured.run([torch.ones(7, 16)])[0].shape == (7, 10)


def test_a_range_that_the_model_demands_is_found() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(16.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table[: x.shape[1]]

    captured = load(Positions().eval(), torch.ones(2, 4), {"x": {1: "length"}})
    assert captured.inputs[0].shape == (2, "length")
    assert captured.run([torch.ones(2, 9)])[0].shape == (2, 9)


def test_a_slice_of_something_larger_is_an_example() -> None:
    """Its strides are no condition on the dynamic size."""
    captured = load(Mlp().eval(), torch.ones(2, 3, 20)[..., :16], {"x": {0: "batch", 1: "length"}})
    assert captured.run([torch.ones(4, 20, 16)])[0].shape == (4, 20, 10)


def test_constraints_are_told_in_the_users_names() -> None:
    class Odd(nn.Module):
        def forward(self, first: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return first + (x if x.shape[0] != 5 else -x).sum()

    with pytest.raises(CaptureError, match=r"(?s)Constraints violated \(n\).*x.size\(\)\[0\] != 5.*range") as raised:
        load(Odd().eval(), (torch.ones(1), torch.ones(4)), {"x": {0: "n"}})
    assert "tensors" not in str(raised.value)


@pytest.mark.parametrize(
    ("dynamic", "error", "reason"),
    [
        ({"z": {0: "batch"}}, UnknownName, "unknown argument in dynamic_shapes: 'z'.* Known: x, y"),
        ({"x": {2: "batch"}}, InvalidInput, r"'x': no axis 2 in a tensor of shape \[2, 3\]"),
        ({"x": {0: "two words"}}, InvalidInput, "'two words' is not a name"),
        ({"x": {0: 7}}, InvalidInput, "axis 0 is 2, not 7"),
        ({"x": {0: "n", 1: "n"}}, InvalidInput, "'n' is 2 in 'x' and 3 in 'x'"),
        ("all", InvalidInput, 'expected "auto"'),
        (3, InvalidInput, "expected {argument: {axis: name}} for x, y"),
    ],
)
def test_dynamic_shapes_that_do_not_fit(dynamic: Any, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        specs(dynamic)


# ---- the graph


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert ids.shape[0] > 0
        return self.head(self.embed(ids).to(torch.float32))


def test_weights_are_shared_and_tied_ones_are_one_constant() -> None:
    model = Tied().eval()
    captured = load(model, torch.tensor([1, 2]))
    (constant,) = [node for node in captured.nodes if node.op == "get_attr"]
    tensor = captured.constant(constant)
    assert tensor is not None
    assert tensor.data_ptr() == model.embed.weight.data_ptr()
    assert captured.size_bytes() == model.embed.weight.nbytes


def test_provenance_is_the_module_path() -> None:
    captured = load(Mlp().eval(), torch.ones(2, 16))
    assert [provenance(node)[0] for node in captured.calls()][::2] == ["first", "second"]
    assert provenance(list(captured.calls())[1])[0].startswith("zoo.py:")  # relu, in forward itself
    assert {provenance(node)[0] for node in captured.nodes if node.op == "get_attr"} >= {"first.weight"}


def test_neither_checks_nor_copies_are_left() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU(inplace=True)).eval()
    captured = load(model, torch.ones(2, 4), {"input": {0: "batch"}})
    assert [node.target.overloadpacket.__name__ for node in captured.calls()] == ["linear", "relu"]


def test_a_copied_graph_is_the_same() -> None:
    captured = load(Mlp().eval(), torch.ones(2, 16))
    x = torch.randn(2, 16)
    assert torch.equal(captured.copy().run([x])[0], captured.run([x])[0])


def test_conditions() -> None:
    class Either(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, torch.cos, torch.sin, (x,))

    captured = load(Either().eval(), torch.ones(2))
    for x in (torch.ones(2), -torch.ones(2)):
        assert torch.equal(captured.run([x])[0], Either()(x))


# ---- the module is left as it was


def test_training_mode_is_restored() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4).eval())
    with pytest.warns(UserWarning, match="Sequential is in training mode; it is captured in evaluation mode"):
        captured = load(model, torch.ones(2, 4))
    assert [module.training for module in model.modules()] == [True, True, True, False]
    model.eval()
    assert torch.equal(captured.run([torch.ones(2, 4)])[0], model(torch.ones(2, 4)))


def test_training_mode_is_restored_after_a_failure() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(3, 3))
    with warnings.catch_warnings(), pytest.raises(CaptureError):
        warnings.simplefilter("ignore")
        load(model, torch.ones(2, 4))
    assert model.training
    assert load(model.eval(), torch.ones(2, 3)).run([torch.ones(2, 3)])[0].shape == (2, 3)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    load(Mlp().eval(), torch.ones(2, 16))
    with pytest.raises(CaptureError):
        load(Branch().eval(), torch.ones(2))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.slow
def test_a_compiled_module_is_unwrapped() -> None:
    model = torch.compile(Mlp().eval())
    assert provenance(next(load(model, torch.ones(2, 16)).calls()))[0] == "first"  # type: ignore[arg-type]


# ---- what cannot be captured


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # this line is named
            return x
        return -x


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 6) + 1


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1  # this line too
        return x + self.count


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)


class Cache:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x, Cache(x)


class Numpy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.numpy() * 2)


@pytest.mark.parametrize(
    ("model", "dynamic", "reasons"),
    [
        (Branch(), None, ["Branch could not be captured: ", "data-dependent", "test_torch_export.py:", "torch.where"]),
        (Fixed(), {"x": {0: "batch"}}, ["batch", "constant (2)", "leave it out of dynamic_shapes"]),
        (
            Counter(),
            None,
            ["Counter.forward changes the buffer 'count' in place", "test_torch_export.py:", "return the new"],
        ),
        (InPlace(), None, ["InPlace.forward changes its input 'x' in place"]),
        (Unknown(), None, ["forward returned a Cache", "use_cache=False"]),
        (Numpy(), None, ["test_torch_export.py:", "x.numpy() * 2", "stay in torch"]),
        (nn.Linear(5, 5), None, ["same reduction dim", "[2, 6] X [5, 5]", "example inputs"]),
    ],
)
def test_what_cannot_be_captured(model: nn.Module, dynamic: Any, reasons: list[str]) -> None:
    model.eval()
    with pytest.raises(CaptureError) as raised:
        load(model, torch.ones(2, 6), dynamic)
    text = str(raised.value)
    assert all(reason in text for reason in reasons), text
    assert "To fix it: " in text
    assert text.count("\n") < 12


def test_the_cause_is_kept() -> None:
    with pytest.raises(CaptureError) as raised:
        load(Branch().eval(), torch.ones(2))
    assert raised.value.__cause__ is not None
    assert "if x.sum() > 0" in str(raised.value)


@pytest.mark.parametrize(
    ("model", "examples", "reason"),
    [
        (Mlp().eval(), None, "missing a required argument: 'x'"),
        (Mlp().eval(), {"y": torch.ones(1)}, r"do not fit Mlp.forward.*'y'|missing a required argument"),
        (Mlp().eval(), (1, 2), "too many positional arguments"),
        ("model.pt", None, "expected a torch.nn.Module or an ExportedProgram, got a str"),
    ],
)
def test_examples_that_do_not_fit(model: Any, examples: Any, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        load(model, examples)


# ---- other sources


def test_an_exported_program() -> None:
    model = Mlp().eval()
    batch = Dim("batch")
    exported = torch.export.export(model, (torch.ones(2, 16),), dynamic_shapes={"x": {0: batch}}, strict=False)
    x = torch.randn(3, 16)
    for dynamic, name in ((None, "x_0"), ({"x": {0: "batch"}}, "batch")):
        captured = load(exported, dynamic_shapes=dynamic)
        assert captured.inputs[0].shape == (name, 16)
        torch.testing.assert_close(call(captured, x), model(x).detach(), atol=0, rtol=0)
        torch.testing.assert_close(call(captured, x=x), model(x).detach(), atol=0, rtol=0)


def test_an_exported_program_with_nested_arguments() -> None:
    model = Rich().eval()
    args, kwargs = rich_arguments()
    exported = torch.export.export(model, args, {**kwargs, "flag": True}, strict=False)
    captured = load(exported)
    assert captured.inputs[0].name == "input"
    given = call(captured, *args, flag=True, **kwargs)
    torch.testing.assert_close(given[0]["pair"], model(*args, **kwargs)[0]["pair"], atol=0, rtol=0)
    assert export(exported).run([*captured.call_spec.flatten(args, {**kwargs, "flag": True})])[0].shape == (2, 4)


def test_a_symbolically_traced_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
    traced = torch.fx.symbolic_trace(model)
    captured = fx_frontend.load(traced, torch.ones(1, 3, 8, 8), {"input": {0: "batch"}})
    assert captured.inputs[0].shape == ("batch", 3, 8, 8)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(captured.run([x])[0], model(x))
    with pytest.raises(InvalidInput, match=r"expected a torch.fx.GraphModule, got a Sequential"):
        fx_frontend.load(model, x)  # type: ignore[arg-type]
