"""The text form: what it looks like, that it parses back to the same graph, and what it rejects."""

from __future__ import annotations

import ast
import operator
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import fxopt.ir.text_files as text_module
from fxopt.errors import GraphSyntaxError, InvalidInput, InvalidModel, OutputError, Unsupported
from fxopt.ir.graph import Graph, Opaque, ValueSpec
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.structural_hash import first_difference, structural_hash
from fxopt.ir.text import constants_of, from_text, load_text, save_text, to_text

aten = torch.ops.aten
ANY = OnnxOp("test", "Any", 1)
SPEC = ValueSpec("x", torch.float32, (3, 4))


def new_graph(inputs: int = 1, origin: Any = "torch") -> tuple[Graph, list[fx.Node]]:
    """An empty graph with float32[3, 4] inputs; the caller sets `output`."""
    body = fx.Graph()
    nodes = [body.placeholder(f"x{index}") for index in range(inputs)]
    specs = tuple(ValueSpec(f"in.{index}", torch.float32, (3, 4)) for index in range(inputs))
    return Graph(body, torch.nn.Module(), origin, specs, ()), nodes


def finish(graph: Graph, *results: Any) -> Graph:
    graph.fx.output(tuple(results))
    graph.outputs = tuple(ValueSpec(f"out.{index}", None, None) for index in range(len(results)))
    return graph


def constant(graph: Graph, value: Any, target: str) -> fx.Node:
    setattr(graph.root, target, value)
    return graph.fx.create_node("get_attr", target, name=target)


def round_trip(graph: Graph) -> Graph:
    text = to_text(graph)
    again = from_text(text, constants_of(graph))
    assert first_difference(graph, again) == ""
    assert structural_hash(graph) == structural_hash(again)
    assert [node.name for node in graph.nodes] == [node.name for node in again.nodes]
    for key in ("inputs", "outputs", "name", "origin", "sizes"):
        assert getattr(graph, key) == getattr(again, key)
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(to_text(again)))
    return again


def single(*args: Any, **kwargs: Any) -> Graph:
    """One node with these arguments after its input."""
    graph, (x,) = new_graph(origin="onnx")
    return finish(graph, graph.fx.create_node("call_function", ANY, (x, *args), kwargs, name="node"))


# ---- what it looks like


def test_the_form() -> None:
    graph, (x,) = new_graph(origin="onnx")
    graph.root.register_buffer("k_w", torch.zeros(4, 10))
    w = graph.fx.create_node("get_attr", "k_w", name="w")
    y = graph.fx.create_node("call_function", OnnxOp("", "MatMul", 13), (x, w), name="y")
    y.meta["val"] = torch.empty(3, 10, device="meta")
    y.meta["provenance"] = ("/fc/MatMul", "fuse-rms-norm")
    finish(graph, y)
    lines = to_text(graph, title="after fuse-rms-norm").splitlines()
    assert lines[0] == '"""fxopt graph \'main\', origin onnx, after fuse-rms-norm."""'
    code = [line.split("  #")[0].rstrip() for line in lines]
    assert "@graph(" in code
    assert '    inputs=[("in.0", "float32", [3, 4])],' in code
    assert "def main(x0):" in code
    assert '    w = const("k_w")' in code
    assert '    y = onnx("", "MatMul", 13)(x0, w)' in code
    assert "    return (y,)" in code
    (comment,) = [line.split("  # ")[1] for line in lines if 'MatMul"' in line]
    assert comment == "float32[3, 10]   /fc/MatMul > fuse-rms-norm"
    (comment,) = [line.split("  # ")[1] for line in lines if 'const("k_w")' in line]
    assert comment == "float32[4, 10]"


def test_getitem_and_overloads() -> None:
    graph, (x,) = new_graph()
    parts = graph.fx.call_function(aten.split.Tensor, (x, 2, 1))
    first = graph.fx.call_function(operator.getitem, (parts, 0))
    size = graph.fx.call_function(aten.sym_size.int, (x, 0))
    twice = graph.fx.call_function(operator.mul, (size, 2))
    flat = graph.fx.call_function(aten.reshape.default, (first, [twice]))
    finish(graph, flat, None)
    text = to_text(graph)
    assert "= torch.ops.aten.split.Tensor(x0, 2, 1)" in text
    assert "getitem = split[0]" in text.replace("split_tensor", "split")
    assert "= operator.mul(sym_size" in text
    again = round_trip(graph)
    sample = torch.randn(3, 4)
    assert torch.equal(graph.run([sample])[0], again.run([sample])[0])


def test_fxopt_operators() -> None:
    from fxopt.ir.op import all_ops

    for op in all_ops().values():
        graph, (x,) = new_graph(origin="onnx")
        finish(graph, graph.fx.call_function(op.target, (x,)))
        assert f"= ops.{op.name}(x0)" in to_text(graph)
        round_trip(graph)


def test_names_that_python_or_the_helpers_use() -> None:
    graph, (x,) = new_graph()
    nodes = [x]
    for name in ("const", "graph", "onnx", "ops", "torch", "operator", "math", "main", "run_file", "opaque", "_0"):
        nodes.append(graph.fx.create_node("call_function", aten.relu.default, (nodes[-1],), name=name))
    finish(graph, nodes[-1])
    again = round_trip(graph)
    assert "onnx" in [node.name for node in again.nodes]
    namespace: dict[str, Any] = {"__name__": "dump"}
    exec(compile(to_text(graph), "dump.py", "exec"), namespace)  # Python agrees that it is a program
    sample = torch.randn(3, 4)
    assert torch.equal(namespace["main"].function(sample)[0], graph.run([sample])[0])


def test_a_keyword_as_overload_and_as_attribute() -> None:
    graph, (x,) = new_graph(origin="onnx")
    node = graph.fx.create_node("call_function", ANY, (x,), {"from": 1, "a b": [2], "self": 3})
    random = graph.fx.call_function(getattr(aten.random, "from"), (x, 0, 3))
    finish(graph, node, random)
    text = to_text(graph)
    assert '**{"from": 1, "a b": [2], "self": 3}' in text
    assert 'overload("aten", "random", "from")' in text
    round_trip(graph)


# ---- arguments


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 2**63 - 1, -(2**63), 0.0, -0.0, 1e-45, 0.1, 1.5, float("inf"), float("-inf"),
        "", "plain", 'a"b\'c\\', "line\nbreak\r\0", "\udc80\ud800", "ünïcödé 😀", "inf", "**", "# comment",
        [], (), [1, [2, (3, [])]], ((),), (1,), {"a": [1, {"b": None}]}, {},
        torch.float32, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.strided, torch.sparse_coo,
        torch.channels_last, torch.contiguous_format, torch.device("cpu"), torch.device("cuda", 1),
        slice(1, None, 2), slice(None), range(3), range(1, 9, -2), ..., complex(1.0, -0.0), complex(float("inf"), 2.0),
        aten.add.Tensor, [torch.int8, "x", -3.0],
    ],
    ids=repr,
)  # fmt: skip
def test_arguments(value: Any) -> None:
    again = round_trip(single(value, key=value))
    (node,) = again.calls()
    for read in (node.args[1], node.kwargs["key"]):
        assert read == value
        assert repr(read) == repr(fx.immutable_collections.immutable_list([value])[0]) or isinstance(
            value, (list, dict)
        )
        assert isinstance(read, type(value)) or isinstance(value, type(...))


def test_nan() -> None:
    (node,) = round_trip(single(float("nan"), [float("nan")])).calls()
    assert isinstance(node.args[1], float) and node.args[1] != node.args[1]


def test_types_are_kept_apart() -> None:
    values = [1, 1.0, True, "1", [1], (1,), None, "None", torch.float32, "torch.float32", 0.0, -0.0]
    hashes = {structural_hash(from_text(to_text(single(value)), {})) for value in values}
    assert len(hashes) == len(values)


scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text()
    | st.text(alphabet=st.characters(categories=["Cs", "Cc", "Lu"])) | st.complex_numbers()
    | st.sampled_from([torch.float16, torch.int64, torch.strided, torch.channels_last, torch.device("cuda:3")])
)  # fmt: skip
arguments = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=12
)  # fmt: skip


@given(st.lists(arguments, max_size=3), st.dictionaries(st.text(min_size=1, max_size=6), arguments, max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_arguments(args: list[Any], kwargs: dict[str, Any]) -> None:
    round_trip(single(*args, **kwargs))


# ---- random graphs


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A runnable graph of either origin over float32[3, 4] values."""
    origin = draw(st.sampled_from(["torch", "onnx"]))
    graph, values = new_graph(draw(st.integers(1, 3)), origin)
    graph.name = draw(st.sampled_from(["main", "torch-jit-export", 'na"me\n']))
    body = graph.fx

    def pick() -> fx.Node:
        return draw(st.sampled_from(values))

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        name = draw(st.sampled_from(["a", "b_7", "const", "onnx", "x0", "layer_1"]))
        return body.create_node("call_function", target, args, kwargs, name=name)

    def weight(shape: list[int]) -> fx.Node:
        seed = torch.Generator().manual_seed(draw(st.integers(0, 3)))
        target = f"k_{len(body.nodes)}"
        graph.root.register_buffer(target, torch.randn(shape, generator=seed))
        return body.create_node("get_attr", target)

    def torch_step(kind: int) -> fx.Node:
        if kind == 0:
            return call(aten.clamp.default, pick(), float("-inf"), draw(st.floats(width=32, allow_nan=False)))
        if kind == 1:
            return call(aten.add.Tensor, pick(), pick(), alpha=draw(st.integers(-3, 3)))
        if kind == 2:
            parts = call(aten.split.Tensor, pick(), 2, 1)
            halves = [call(operator.getitem, parts, index) for index in draw(st.permutations([0, 1]))]
            return call(aten.cat.default, halves, 1)
        if kind == 3:
            return call(
                aten._to_copy.default, call(aten._to_copy.default, pick(), dtype=torch.float16), dtype=torch.float32
            )
        if kind == 4:
            return call(aten.linear.default, pick(), weight([4, 4]), draw(st.sampled_from([None, weight([4])])))
        return call(aten.view.default, pick(), [3, call(aten.sym_size.int, pick(), 1)])

    def onnx_step(kind: int) -> fx.Node:
        if kind == 0:
            return call(OnnxOp("", "Relu", 14), pick())
        if kind == 1:
            return call(OnnxOp("", "Add", 14), pick(), pick())
        if kind == 2:
            parts = call(OnnxOp("", "Split", 18), pick(), None, axis=1, num_outputs=2, _outputs=2)
            halves = [call(operator.getitem, parts, index) for index in draw(st.permutations([0, 1]))]
            return call(OnnxOp("", "Concat", 13), *halves, axis=-1)
        if kind == 3:
            shape = call(OnnxOp("", "Shape", 15), pick())
            return call(OnnxOp("", "Reshape", 14), pick(), shape, allowzero=0)
        if kind == 4:
            return call(OnnxOp("", "MatMul", 13), pick(), weight([4, 4]))
        return call(OnnxOp("", "LeakyRelu", 16), pick(), alpha=draw(st.floats(-2, 2, width=32)))

    for _ in range(draw(st.integers(0, 10))):
        kind = draw(st.integers(0, 5))
        values.append(torch_step(kind) if origin == "torch" else onnx_step(kind))
    results = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    return finish(graph, *results)


@given(graphs())
@settings(max_examples=100, deadline=None)
def test_round_trip(graph: Graph) -> None:
    again = round_trip(graph)
    samples = [torch.randn(3, 4) for _ in graph.inputs]
    for expected, got in zip(graph.run(samples), again.run(samples), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_models_of_onnx() -> None:
    """Models of the ONNX backend suite, sequences, control flow and strings included, come back equal."""
    from fxopt.frontends.onnx import load

    files = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data").rglob("*.onnx"))
    assert len(files) > 100
    for file in files[::4]:
        round_trip(load(file, check=False))


# ---- signature, constants


def test_signatures() -> None:
    graph, (x,) = new_graph()
    graph.inputs = (ValueSpec("a b\n", torch.bfloat16, ("batch", 3, None)),)
    node = finish(graph, x, x, x)
    node.outputs = (ValueSpec("", None, None), ValueSpec("y", torch.bool, ()), ValueSpec("z", None, ("2*n", 0)))
    node.sizes = {"batch": 8}
    round_trip(node)


def test_opaque_constants() -> None:
    graph, (x,) = new_graph(origin="onnx")
    proto = onnx.helper.make_tensor("words", onnx.TensorProto.STRING, [2], [b"a", b"\xff"])
    words = constant(graph, Opaque(proto), "c_words")
    finish(graph, graph.fx.create_node("call_function", ANY, (x, words)))
    again = round_trip(graph)
    assert 'opaque("c_words", "TensorProto", "' in to_text(graph)
    assert again.attribute("c_words").proto == proto


def test_host_and_nested_constants() -> None:
    graph, (x,) = new_graph(origin="onnx")
    host = constant(graph, np.arange(3), "k_shape")
    graph.root.add_module("layer", torch.nn.Linear(4, 4))
    nested = graph.fx.create_node("get_attr", "layer.weight", name="layer_weight")
    finish(graph, graph.fx.create_node("call_function", ANY, (x, host, nested)))
    assert 'const("k_shape", host=True)' in to_text(graph)
    again = round_trip(graph)
    assert isinstance(again.attribute("k_shape"), np.ndarray)
    assert again.attribute("layer.weight") is graph.attribute("layer.weight")


def test_what_has_no_text_form() -> None:
    graph, (x,) = new_graph()
    finish(graph, graph.fx.create_node("call_function", torch.relu, (x,), name="act"))
    with pytest.raises(Unsupported, match="node 'act': .*relu.* has no text form"):
        to_text(graph)
    graph, (x,) = new_graph()
    finish(graph, graph.fx.create_node("call_method", "relu", (x,), name="act"))
    with pytest.raises(Unsupported, match="node 'act': call_method"):
        to_text(graph)
    graph, (x,) = new_graph()
    finish(graph, constant(graph, fx.GraphModule(torch.nn.Module(), fx.Graph()), "body"))
    with pytest.raises(Unsupported, match="constant 'body' is a GraphModule"):
        to_text(graph)


# ---- rejected texts

HEAD = """from fxopt.ir.text import const, graph, onnx, ops, run_file
import torch

@graph(origin="torch", inputs=[("x", "float32", [3])], outputs=[("y", None, None)])
def main(x):
"""


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        ("    print(x)\n    return (x,)", 6, "expected `name = operator\\(...\\)`"),
        ("    y = print(x)\n    return (y,)", 6, "'print' is not an operator"),
        ("    y = torch.load(x)\n    return (y,)", 6, "'torch.load' is not an operator"),
        ("    y = torch.ops.aten.nothing.default(x)\n    return (y,)", 6, "no operator torch.ops.aten.nothing.default"),
        ("    y = torch.ops.aten.relu(x)\n    return (y,)", 6, "'torch.ops.aten.relu' is not an operator"),
        ("    y = torch.ops.load_library.a.b(x)\n    return (y,)", 6, "no operator"),
        ("    y = operator.methodcaller('a')\n    return (y,)", 6, "'operator.methodcaller' is not an operator"),
        ("    y = ops.lineer_w8a8(x)\n    return (y,)", 6, "unknown fxopt operator 'lineer_w8a8'.*linear_w8a8"),
        ("    y = onnx('', 'Relu')(x)\n    return (y,)", 6, "onnx\\(domain, op_type, since_version\\)"),
        ("    y = const('k')\n    return (y,)", 6, "constant 'k' is not among the 1 given"),
        ("    y = const('forward')\n    return (y,)", 6, "'forward' cannot be the name of a constant"),
        ("    y = opaque('k', 'TensorProto', '!')\n    return (y,)", 6, "not a base64 text of a TensorProto"),
        ("    y = opaque('k', 'load', '')\n    return (y,)", 6, "'load' is not a protobuf message of onnx"),
        ("    y = torch.ops.aten.relu.default(z)\n    return (y,)", 6, "'z' is not defined above"),
        ("    y = torch.ops.aten.relu.default(1 + 2)\n    return (y,)", 6, "'1 \\+ 2' is not an argument"),
        ("    y = torch.ops.aten.relu.default(*x)\n    return (y,)", 6, "is not an argument"),
        ("    y = torch.ops.aten.relu.default(b'')\n    return (y,)", 6, "is not an argument"),
        ("    y = torch.ops.aten.relu.default(torch.nn)\n    return (y,)", 6, "is not an argument"),
        ("    y = torch.ops.aten.relu.default(x, **{'a': 1, 'a': 2})\n    return (y,)", 6, "'a' is given twice"),
        ("    x = torch.ops.aten.relu.default(x)\n    return (x,)", 6, "'x' is assigned twice"),
        ("    const = torch.ops.aten.relu.default(x)\n    return (const,)", 6, "'const' is the name of a helper"),
        ("    y = z = torch.ops.aten.relu.default(x)\n    return (y,)", 6, "expected"),
        ("    return x", 6, "must return a tuple"),
        ("    return (x, x)", 6, "2 values are returned, outputs declares 1"),
        ("    y = torch.ops.aten.relu.default(x)", 6, "the last statement must return"),
        ("    if x:\n        return (x,)\n    return (x,)", 6, "expected"),
        ("    return (x,)\nimport os", 7, "import of os"),
        ("    return (x,)\nfrom fxopt.ir.text import save_text", 7, "save_text"),
        ("    return (x,)\nmain(1)", 7, "not part of the form"),
        ("    return (x,)\nif True:\n    main(1)", 7, "not part of the form"),
        ("    return (x,)\ndef main(x):\n    return (x,)", 7, "a text holds one function"),
        ("    return (x,", 6, "never closed|invalid syntax"),
        ("    return (\0,)", None, "null byte"),
        ("    y = torch.ops.aten.relu.default(" + "[" * 150 + "]" * 150 + ")\n    return (y,)", None, ""),
        ("    y = torch.ops.aten.relu.default(" + "[" * 5000 + ")\n    return (y,)", None, "does not parse"),
    ],
)  # fmt: skip
def test_rejects_the_body(body: str, line: int | None, message: str) -> None:
    place = rf"line {line}\b.*" if line is not None else ""
    if not message:
        assert from_text(HEAD + body, {}) is not None
        return
    with pytest.raises(GraphSyntaxError, match=f"(?s){place}(?:{message})"):
        from_text(HEAD + body, {"forward": torch.zeros(1)})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('origin="torch"', 'origin="jax"', "line 4: origin is 'jax'"),
        ('origin="torch"', "origin=open('x')", "line 4: .*not a literal"),
        ('origin="torch", ', "", "line 4: .*origin"),
        ('"float32"', '"float33"', "line 4: .*'float33' is not a dtype"),
        ("[3]", "[3.5]", "line 4: .*3.5"),
        ("[3]", "3", "line 4: .*shape"),
        ("def main(x)", "def main(x, y)", "line 5: 2 parameters, inputs declares 1"),
        ("def main(x)", "def main(x=1)", "line 5: "),
        ("def main(x)", "def main(*x)", "line 5: "),
        ("def main(x)", "def other(x)", "line 5: .*main"),
        ("@graph(", "@print\n@graph(", "line 4: .*decorator"),
        ("outputs=", "extra=1, outputs=", "line 4: .*extra"),
        ("outputs=", "sizes={'n': 1.5}, outputs=", "line 4: sizes"),
        ("import torch", "import torch as t", "line 2: import"),
        ("import torch", "import subprocess", "line 2: import of subprocess"),
    ],
)
def test_rejects_the_head(old: str, new: str, message: str) -> None:
    assert old in HEAD
    with pytest.raises(GraphSyntaxError, match=message):
        from_text(HEAD.replace(old, new, 1) + "    return (x,)", {})


def test_rejects_a_text_without_a_graph() -> None:
    with pytest.raises(GraphSyntaxError, match="no function main"):
        from_text("import torch\n", {})


def test_nothing_is_executed(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    text = f"open({str(witness)!r}, 'w')\n" + HEAD + "    return (x,)\n"
    with pytest.raises(GraphSyntaxError, match="line 1: "):
        from_text(text, {})
    assert not witness.exists()


# ---- files


def mlp(seed: int = 0) -> Graph:
    graph, (x,) = new_graph()
    generator = torch.Generator().manual_seed(seed)
    graph.root.register_buffer("w", torch.randn(4, 4, generator=generator))
    graph.root.register_buffer("b", torch.ones(4))
    w, b = (graph.fx.create_node("get_attr", name) for name in ("w", "b"))
    hidden = graph.fx.call_function(aten.linear.default, (x, w, b))
    return finish(graph, graph.fx.call_function(aten.relu.default, (hidden,)))


def test_save_and_load(tmp_path: Path) -> None:
    graph = mlp()
    path = save_text(graph, tmp_path)
    assert path == tmp_path / "graph.py"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["constants.safetensors", "graph.py"]
    again = load_text(tmp_path)
    assert structural_hash(again) == structural_hash(graph)
    save_text(mlp(seed=1), tmp_path)  # over the old one, while it is mapped
    assert structural_hash(again) == structural_hash(graph)
    assert structural_hash(load_text(tmp_path)) == structural_hash(mlp(seed=1))


def test_save_every_kind_of_constant(tmp_path: Path) -> None:
    graph, (x,) = new_graph(origin="onnx")
    shared = torch.randn(8, 8)
    values: dict[str, Any] = {
        "strided": torch.randn(4, 6).t(), "shared": shared, "same": shared, "view": shared[2:4],
        "empty": torch.zeros(0, 3), "scalar": torch.tensor(3.5), "expanded": torch.randn(1, 3).expand(4, 3),
        "host": np.array([1, 2]),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(), "double": torch.randn(2, dtype=torch.complex128),
        "parameter": torch.nn.Parameter(torch.randn(2)), "opaque": Opaque(onnx.TensorProto(name="t", data_type=8)),
        **{str(dtype).removeprefix("torch."): torch.ones(3).to(dtype) for dtype in (
            torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
            torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
            torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)},
    }  # fmt: skip
    nodes = [constant(graph, value, f"k_{name}") for name, value in values.items()]
    finish(graph, graph.fx.create_node("call_function", ANY, (x, *nodes)))
    save_text(graph, tmp_path)
    again = load_text(tmp_path)
    assert first_difference(graph, again) == ""
    assert again.attribute("k_same") is again.attribute("k_shared")


def test_constants_without_plain_bytes(tmp_path: Path) -> None:
    for value in (torch.eye(2).to_sparse(), torch.empty(2, device="meta")):
        graph, (x,) = new_graph()
        finish(graph, x, constant(graph, value, "k"))
        with pytest.raises(Unsupported, match="constant 'k': a Tensor .* has no plain bytes"):
            save_text(graph, tmp_path)
        assert not list(tmp_path.iterdir())


def test_an_architecture(tmp_path: Path) -> None:
    from fxopt.frontends.torch_export import load
    from tests.zoo import case

    model = case("encoder")
    graph = load(model.model, model.inputs, model.dynamic)
    save_text(graph, tmp_path, title="after capture")
    again = load_text(tmp_path)
    assert first_difference(graph, again) == ""
    inputs = list(model.resized(batch=3, seq=7).values())
    for expected, got in zip(graph.run(inputs), again.run(inputs), strict=True):
        assert torch.equal(expected, got)


def test_dumps_share_constants(tmp_path: Path) -> None:
    graph = mlp()
    save_text(graph, tmp_path, "00-import", share=True)
    save_text(graph, tmp_path, "01-nothing", share=True)
    assert not (tmp_path / "01-nothing.safetensors").exists()
    changed = graph.copy()
    changed.root.w = torch.zeros(4, 4)
    save_text(changed, tmp_path, "02-changed", share=True)
    from safetensors.torch import load_file

    assert list(load_file(tmp_path / "02-changed.safetensors")) == ["w"]
    for stem, expected in (("00-import", graph), ("01-nothing", graph), ("02-changed", changed)):
        assert structural_hash(load_text(tmp_path, stem)) == structural_hash(expected)
    save_text(graph, tmp_path, "02-changed", share=True)
    assert structural_hash(load_text(tmp_path, "02-changed")) == structural_hash(graph)


def test_file_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidModel, match="graph.py"):
        load_text(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        save_text(mlp(), tmp_path / "file")
    save_text(mlp(), tmp_path)
    (tmp_path / "constants.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InvalidModel, match="constants.safetensors"):
        load_text(tmp_path)
    save_text(mlp(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_module, "to_text", fail)
    with pytest.raises(OutputError, match="No space left"):
        save_text(mlp(seed=1), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# ---- the file as a program


def program(path: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, cwd=Path.cwd(),
                          env={"PYTHONPATH": str(Path.cwd()), "PATH": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dump_runs(tmp_path: Path) -> None:
    graph = mlp()
    path = save_text(graph, tmp_path)
    sample = torch.randn(3, 4)
    np.savez(tmp_path / "inputs.npz", **{"in.0": sample.numpy()})
    (expected,) = graph.run([sample])
    shown = program(path, str(tmp_path / "inputs.npz"))
    assert "input in.0: float32[3, 4]" in shown and "output out.0: float32[3, 4]" in shown
    assert f"mean {expected.mean().item():.6g}" in shown


def test_an_edited_dump_runs_as_python(tmp_path: Path) -> None:
    path = save_text(mlp(), tmp_path)
    path.write_text(path.read_text().replace("    return (", "    print('mean', linear_default.mean())\n    return ("))
    shown = program(path)
    assert "mean tensor(" in shown and "out.0" in shown


def test_inputs_of_a_dump(tmp_path: Path) -> None:
    from fxopt.ir.text import run_file

    graph, (x,) = new_graph()
    graph.inputs = (ValueSpec("x", torch.bfloat16, ("batch", None)),)
    path = save_text(finish(graph, x), tmp_path)
    function = {"__name__": "dump"}
    exec(compile(path.read_text(), str(path), "exec"), function)
    (value,) = run_file(function["main"], path, ["batch=5"])
    assert value.shape == (5, 2) and value.dtype == torch.bfloat16
    np.savez(tmp_path / "wrong.npz", y=np.zeros(3))
    with pytest.raises(InvalidInput, match="wrong.npz holds y.*'x'"):
        run_file(function["main"], path, [str(tmp_path / "wrong.npz")])
    graph.inputs = (ValueSpec("x", None, None),)
    exec(compile(to_text(graph), str(path), "exec"), function)
    with pytest.raises(InvalidInput, match="input x: .*npz"):
        run_file(function["main"], path, [])


# ---- size


@pytest.mark.slow
def test_time_is_linear() -> None:
    def seconds(count: int) -> float:
        graph, (x,) = new_graph()
        node = x
        for index in range(count):
            node = graph.fx.call_function(aten.add.Tensor, (node, x), {"alpha": index})
        finish(graph, node)
        start = time.process_time()
        again = from_text(to_text(graph), {})
        assert structural_hash(again) == structural_hash(graph)
        return time.process_time() - start

    seconds(1000)
    assert seconds(20_000) < 10 * max(seconds(5_000), 0.1)
