"""The ONNX Runtime backend: what it emits is what ONNX Runtime fuses, and the numbers are those of the definitions."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxopt
from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.backends.onnxruntime.backend import version
from fxopt.backends.onnxruntime.evaluator import OnnxEvaluator
from fxopt.backends.onnxruntime.forms import FORMS
from fxopt.backends.onnxruntime.session import OnnxExecutable, make_session
from fxopt.errors import InvalidInput, InvalidModel, MissingReference, OutputError, Unsupported
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Ledger
from fxopt.ir.onnx import registry
from fxopt.ir.onnx.export import save, to_model
from fxopt.ir.op import all_ops
from fxopt.ir.shapes import infer
from fxopt.ir.target import Target
from fxopt.passes.avoid_slow_fusions import AvoidSlowFusions
from fxopt.passes.base import Context
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.testing import rewritten
from tests.backends.contrib import evaluator
from tests.conftest import mlp

torch.set_num_threads(1)

AVX2 = Target(  # where weight codes stay within 63: then no machine saturates, and all give the same numbers
    "avx2", "cpu", "x86-64", "onnxruntime", "test", "never measured", 0.3,
    {"float32": 1e11, "int8": 2e11}, 1e10, 1e-6, features=frozenset({"avx2"}),
)  # fmt: skip
Node = tuple[str, list[str], str, dict[str, Any]]  # operator, inputs, output, attributes


def weight(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """The same one for the same shape and seed."""
    values = np.random.default_rng((*shape, seed)).standard_normal(shape)
    return (values / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def model(
    nodes: Sequence[Node],
    shapes: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
    domain: str = "",
) -> onnx.ModelProto:
    """A float model; nodes are named after their outputs."""
    protos = [helper.make_node(kind, names, [out], name=out, domain=domain, **more) for kind, names, out, more in nodes]

    def infos(given: dict[str, list[Any]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in given.items()]

    constants = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    body = helper.make_graph(protos, "g", infos(shapes), infos(outputs), constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(body, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def linears(bias: bool = True) -> onnx.ModelProto:
    """x -> MatMul (+ Add) -> Relu -> Gemm."""
    nodes: list[Node] = [("MatMul", ["x", "w1"], "m", {})]
    if bias:
        nodes.append(("Add", ["m", "b1"], "a", {}))
    nodes.append(("Relu", ["a" if bias else "m"], "r", {}))
    nodes.append(("Gemm", ["r", "w2", "b2"] if bias else ["r", "w2"], "y", {"transB": 1}))
    weights = {"w1": weight(16, 24), "b1": weight(24), "w2": weight(5, 24), "b2": weight(5)}
    if not bias:
        weights = {name: value for name, value in weights.items() if name.startswith("w")}
    return model(nodes, {"x": ["n", 16]}, {"y": ["n", 5]}, weights)


def attention_inputs() -> onnx.ModelProto:
    """Query, key and value of one input."""
    nodes: list[Node] = []
    weights = {}
    for seed, name in enumerate("qkv"):
        nodes += [("MatMul", ["x", f"w{name}"], f"m{name}", {}), ("Add", [f"m{name}", f"b{name}"], name, {})]
        weights |= {f"w{name}": weight(16, 8, seed=seed), f"b{name}": weight(8, seed=seed)}
    return model(nodes, {"x": ["n", "s", 16]}, {name: ["n", "s", 8] for name in "qkv"}, weights)


def convolutions(between: str = "Relu") -> onnx.ModelProto:
    """x -> Conv -> Relu or MaxPool -> Conv -> y."""
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2]} if between == "MaxPool" else {}
    size = 4 if between == "MaxPool" else 8
    nodes: list[Node] = [
        ("Conv", ["x", "w1", "b1"], "c1", {"pads": [1, 1, 1, 1]}),
        ("Relu", ["c1"], "r1", {}),
        ("Conv", ["m" if between == "MaxPool" else "r1", "w2"], "y", {"pads": [1, 1, 1, 1]}),
    ]
    if between == "MaxPool":
        nodes.insert(2, ("MaxPool", ["r1"], "m", attributes))
    weights = {"w1": weight(8, 3, 3, 3), "b1": weight(8), "w2": weight(4, 8, 3, 3)}
    return model(nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 4, size, size]}, weights)


def sample(made: onnx.ModelProto, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn([dim.dim_value or 3 for dim in value.type.tensor_type.shape.dim], generator=generator)
        for value in made.graph.input
    ]


def quantized(made: onnx.ModelProto, kind: str) -> Graph:
    """Every linear (with this kind of range) or convolution in integers."""
    return rewritten(QuantizeLinear(activations=kind, smooth="off"), load(made), [sample(made)], Context(AVX2))


def optimized_by_runtime(graph: Graph, folder: Path) -> onnx.ModelProto:
    """The model that ONNX Runtime runs after its own optimiser."""
    save(graph, folder / "emitted.onnx", FORMS)
    make_session(folder / "emitted.onnx", 1, folder / "optimized.onnx")
    return onnx.load(folder / "optimized.onnx")


def op_types(made: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in made.graph.node)


# ---- forms that ONNX Runtime fuses


def test_dynamic_linears_become_one_kernel_each(tmp_path: Path) -> None:
    found = op_types(optimized_by_runtime(quantized(linears(), "dynamic"), tmp_path))
    assert found == {"DynamicQuantizeMatMul": 2, "Relu": 1}


def test_dynamic_linears_without_bias(tmp_path: Path) -> None:
    found = op_types(optimized_by_runtime(quantized(linears(bias=False), "dynamic"), tmp_path))
    assert found == {"DynamicQuantizeMatMul": 2, "Relu": 1}


def test_linears_of_one_input_share_its_quantisation(tmp_path: Path) -> None:
    graph = quantized(attention_inputs(), "dynamic")
    assert op_types(to_model(graph, FORMS))["DynamicQuantizeLinear"] == 1
    found = op_types(optimized_by_runtime(graph, tmp_path))
    assert found == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 3}


def test_static_linears_become_one_kernel_each(tmp_path: Path) -> None:
    found = op_types(optimized_by_runtime(quantized(linears(), "static"), tmp_path))
    assert found == {"QuantizeLinear": 2, "MatMulIntegerToFloat": 2}  # the second clamps at 0: no Relu


def test_static_linears_of_one_input_share_its_quantisation(tmp_path: Path) -> None:
    found = op_types(optimized_by_runtime(quantized(attention_inputs(), "static"), tmp_path))
    assert found == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 3}


@pytest.mark.parametrize("between", ["Relu", "MaxPool"])
def test_chains_of_convolutions_stay_in_integers(between: str, tmp_path: Path) -> None:
    """One QuantizeLinear at the entry and one DequantizeLinear at the exit; layouts change there and only there."""
    found = op_types(optimized_by_runtime(quantized(convolutions(between), "static"), tmp_path))
    pools = found.pop("MaxPool", 0) + found.pop("NhwcMaxPool", 0)
    assert pools == (between == "MaxPool") and found.pop("Transpose", 0) <= 2
    assert found == {"QuantizeLinear": 1, "QLinearConv": 2, "DequantizeLinear": 1}


def integer_operands(made: onnx.ModelProto) -> Iterator[tuple[str, int, int]]:
    """(operator, element type of the activation, element type of the weight)."""
    typed = onnx.shape_inference.infer_shapes(made)
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.graph.value_info, *typed.graph.input)}
    types |= {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    for node in made.graph.node:
        if node.op_type in ("MatMulInteger", "MatMulIntegerToFloat"):
            yield node.op_type, types.get(node.input[0], 0), types[node.input[1]]
        elif node.op_type == "QLinearConv":
            yield node.op_type, types[node.input[2]], types[node.input[5]]
        elif node.op_type == "QuantizeLinear":
            yield node.op_type, types[node.input[2]], TensorProto.INT8
        elif node.op_type == "DynamicQuantizeMatMul":
            yield node.op_type, TensorProto.UINT8, types[node.input[1]]


@pytest.mark.parametrize(
    ("made", "kind"),
    [(linears(), "dynamic"), (linears(), "static"), (attention_inputs(), "dynamic"), (convolutions(), "static")],
)
def test_activations_are_unsigned_and_weights_signed(made: onnx.ModelProto, kind: str, tmp_path: Path) -> None:
    """int8 times int8 is an order of magnitude slower on x86."""
    graph = quantized(made, kind)
    for form in (to_model(graph, FORMS), optimized_by_runtime(graph, tmp_path)):
        found = list(integer_operands(form))
        assert found
        for op_type, activation, codes in found:
            assert activation in (TensorProto.UINT8, 0), op_type
            assert codes == TensorProto.INT8, op_type


# ---- numbers


def single(name: str, arguments: tuple[Any, ...]) -> Graph:
    """A graph of one fxopt operator on x."""
    x, *rest = arguments
    graph = load(model([("Identity", ["x"], "y", {})], {"x": [None] * x.dim()}, {"y": [None] * x.dim()}))
    identity = graph.find("y")
    assert identity is not None
    operands = [
        graph.add_constant(value.clamp(-63, 63) if value.dtype == torch.int8 else value, f"operand_{index}")
        if isinstance(value, torch.Tensor)
        else value
        for index, value in enumerate(rest)
    ]
    made = graph.call(all_ops()[name].target, (identity.args[0], *operands), before=identity, made_by="test")
    graph.replace(identity, made)
    return graph


def cases(*names: str) -> Iterator[Any]:
    for name in names or ("linear_w8a8", "linear_w8a8_dynamic", "conv_w8a8", "linear_nbits"):
        for index, arguments in enumerate(all_ops()[name].sample_arguments()):
            yield pytest.param(name, arguments, id=f"{name}-{index}")


def assert_same(name: str, arguments: tuple[Any, ...], expected: torch.Tensor, found: torch.Tensor) -> None:
    """Linear: rounding of float32. Convolution: one step of the output's range, in few places."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if not expected.numel():
        return
    apart = (found.double() - expected.double()).abs()
    if name == "conv_w8a8":
        step = arguments[6]
        assert apart.max() <= 1.001 * step
        assert (apart > 0.01 * step).double().mean() <= 0.02
    elif name == "linear_nbits" and arguments[-1] == 8:  # a half is rounded to the other side in few places
        assert apart.max() <= 0.01 * expected.abs().max()
        assert apart.median() <= 1e-5 * expected.abs().max()
    else:
        assert apart.max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("name", "arguments"), cases())
def test_the_kernels_agree_with_the_definition(name: str, arguments: tuple[Any, ...]) -> None:
    graph = single(name, arguments)
    executable = OnnxRuntime().compile(graph, AVX2, threads=1)
    assert_same(name, arguments, graph.run([arguments[0]])[0], executable.run([arguments[0]])[0])
    executable.close()


@pytest.mark.parametrize(("name", "arguments"), cases("linear_w8a8", "linear_w8a8_dynamic", "conv_w8a8"))
def test_the_forms_are_valid_onnx(name: str, arguments: tuple[Any, ...]) -> None:
    """They pass the checker, and the specification's own evaluator gives the same numbers."""
    if not arguments[0].numel():
        pytest.skip("the reference evaluator does not take empty tensors everywhere")
    graph = single(name, arguments)
    made = to_model(graph, FORMS)
    onnx.checker.check_model(made, full_check=True)
    assert {node.domain for node in made.graph.node} <= {"", "" if name == "conv_w8a8" else "com.microsoft"}
    (found,) = evaluator(made).run(None, {"x": arguments[0].contiguous().numpy()})
    assert_same(name, arguments, graph.run([arguments[0]])[0], torch.from_numpy(np.ascontiguousarray(found)))


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (linears(), "dynamic"),
        (linears(bias=False), "static"),
        (attention_inputs(), "dynamic"),
        (attention_inputs(), "static"),
        (convolutions(), "static"),
        (convolutions("MaxPool"), "static"),
    ],
    ids=["linears", "linears without bias", "shared dynamic", "shared static", "relu", "maxpool"],
)
def test_whole_models(made: onnx.ModelProto, kind: str) -> None:
    graph = quantized(made, kind)
    emitted = to_model(graph, FORMS)
    onnx.checker.check_model(emitted, full_check=True)
    executable = OnnxRuntime().compile(graph, AVX2, threads=1)
    inputs = sample(made, 1)
    reference = evaluator(emitted).run(None, {"x": inputs[0].numpy()})
    for expected, found, standard in zip(graph.run(inputs), executable.run(inputs), reference, strict=True):
        signal = (expected - expected.mean()).square().sum()
        assert (found - expected).square().sum() / signal < 1e-5
        assert (torch.from_numpy(np.array(standard)) - expected).square().sum() / signal < 1e-5


def test_names_and_origins_are_kept() -> None:
    made = to_model(quantized(linears(), "dynamic"), FORMS)
    assert [value.name for value in made.graph.output] == ["y"]
    relu = next(node for node in made.graph.node if node.op_type == "Relu")
    assert (relu.name, list(relu.input), list(relu.output)) == ("r", ["a"], ["r"])
    origins = {entry.value for node in made.graph.node for entry in node.metadata_props if entry.key == "fxopt.from"}
    assert origins == {"a", "y"}
    names = [node.name for node in made.graph.node]
    assert len(set(names)) == len(names)


def test_codes_that_two_linears_share_are_written_once() -> None:
    nodes: list[Node] = [("MatMul", ["x", "w"], "m", {}), ("Relu", ["m"], "r", {}), ("MatMul", ["r", "w"], "y", {})]
    made = model(nodes, {"x": ["n", 16]}, {"y": ["n", 16]}, {"w": weight(16, 16)})
    emitted = to_model(quantized(made, "dynamic"), FORMS)
    assert [list(tensor.dims) for tensor in emitted.graph.initializer if tensor.data_type == TensorProto.INT8].count(
        [16, 16]
    ) in (1, 2)  # one when the pass shares the constant


# ---- sessions


@pytest.fixture
def file(tmp_path: Path) -> Path:
    onnx.save(mlp(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


X = torch.linspace(-1, 1, 48).reshape(3, 16)


def test_inputs_and_outputs_are_views(file: Path) -> None:
    executable = OnnxExecutable(file, 1)
    assert executable.feeds([X])["x"].__array_interface__["data"][0] == X.data_ptr()
    strided = X.t().contiguous().t()
    np.testing.assert_array_equal(executable.feeds([strided])["x"], X.numpy())
    kept: list[Any] = []
    session = executable.session

    class Recording:
        def run(self, *args: Any) -> Any:
            kept.extend(session.run(*args))
            return kept

    executable.session = Recording()  # type: ignore[assignment]
    (y,) = executable.run([X])
    assert y.data_ptr() == kept[0].__array_interface__["data"][0]


def test_results_outlive_the_session(file: Path) -> None:
    executable = OnnxExecutable(file, 1)
    (y,) = executable.run([X])
    expected = y.clone()
    executable.run([X + 1])
    executable.close()
    del executable
    gc.collect()
    assert torch.equal(y, expected)


def test_gradients_and_other_strides_do_not_matter(file: Path) -> None:
    executable = OnnxExecutable(file, 1)
    (expected,) = executable.run([X])
    for variant in (X.clone().requires_grad_(), X.repeat(2, 1)[::2][:3].copy_(X), torch.nn.Parameter(X)):
        assert torch.equal(executable.run([variant])[0], expected)


def test_threads(file: Path) -> None:
    one = OnnxExecutable(file, 1)
    assert one.session.get_session_options().intra_op_num_threads == 1
    assert one.executed_on == "onnxruntime CPU, 1 thread"
    assert OnnxExecutable(file, 2).executed_on == "onnxruntime CPU, 2 threads"
    every = OnnxExecutable(file, None)
    assert every.session.get_session_options().intra_op_num_threads == 0
    assert every.executed_on.startswith("onnxruntime CPU, ")


def test_the_wrong_number_of_inputs(file: Path) -> None:
    with pytest.raises(InvalidInput, match=r"2 inputs given, the model takes 1: \['x'\]"):
        OnnxExecutable(file, 1).run([X, X])


def test_a_model_that_onnx_runtime_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(InvalidModel, match=rf"ONNX Runtime {onnxruntime.__version__} cannot load bad.onnx: "):
        OnnxExecutable(tmp_path / "bad.onnx", 1)


def test_the_artifact_is_a_copy_of_the_file(file: Path, tmp_path: Path) -> None:
    executable = OnnxExecutable(file, 1)
    executable.save(tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == file.read_bytes()
    with pytest.raises(OutputError, match="cannot be written"):
        executable.save(tmp_path / "missing" / "copy.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.onnx", "model.onnx"]


def test_compiling_leaves_the_graph_and_no_files() -> None:
    graph = quantized(linears(), "dynamic")
    before = to_model(graph, FORMS).SerializeToString(deterministic=True)
    executable = OnnxRuntime().compile(graph, AVX2, threads=1)
    assert executable.path.exists()
    path = executable.path
    executable.close()
    assert not path.parent.exists()
    assert to_model(graph, FORMS).SerializeToString(deterministic=True) == before
    forgotten = OnnxRuntime().compile(graph, AVX2, threads=1)
    path = forgotten.path
    del forgotten
    gc.collect()
    assert not path.parent.exists()


# ---- capabilities


def test_capabilities() -> None:
    backend = OnnxRuntime()
    assert backend.name == "onnxruntime"
    for name in ("linear_w8a8", "linear_w8a8_dynamic", "conv_w8a8"):
        assert backend.supports(name, "int8") == ""
    assert (
        backend.supports("linear_w3a3", "int3") == "operator linear_w3a3 has no ONNX form that ONNX Runtime runs fast"
    )
    graph = quantized(linears(), "dynamic")
    assert {backend.refuses(node, AVX2) for node in graph.calls()} == {""}
    torch_graph = fxopt.capture(torch.nn.Linear(4, 4), (torch.ones(2, 4),))
    assert {backend.refuses(node, AVX2) for node in torch_graph.calls()} == {"aten.linear.default has no ONNX form"}
    with pytest.raises(Unsupported, match="takes graphs of ONNX origin"):
        backend.compile(torch_graph, AVX2)


def test_every_operator_has_a_form_or_is_refused() -> None:
    backend = OnnxRuntime()
    for name, declared in all_ops().items():
        assert (backend.supports(name, "int8") == "") == (declared.target in FORMS)


# ---- fusions of ONNX Runtime that are slow


def residual(second: str = "s") -> onnx.ModelProto:
    """x -> MatMul -> + x -> LayerNormalization -> y."""
    nodes: list[Node] = [
        ("MatMul", ["x", "w"], "m", {}),
        ("Relu", ["x"], "s", {}),
        ("Add", ["m", second], "a", {}),
        ("LayerNormalization", ["a", "g", "b"], "y", {"epsilon": 1e-5}),
    ]
    weights = {"w": weight(16, 16), "g": np.abs(weight(16)) + 1, "b": weight(16)}
    return model(nodes, {"x": ["n", "s", 16]}, {"y": ["n", "s", 16]}, weights)


def avoided(made: onnx.ModelProto) -> tuple[Graph, int]:
    graph = load(made)
    infer(graph, {"n": 2, "s": 5})
    return graph, AvoidSlowFusions().run(graph, Context(AVX2, Ledger(), OnnxRuntime()))


@pytest.mark.skipif(version() < (1, 32), reason="the fusion is fast in this version")
def test_a_slow_fusion_is_avoided(tmp_path: Path) -> None:
    assert "slower" in OnnxRuntime().prefers("SkipLayerNormalization")
    before = optimized_by_runtime(load(residual()), tmp_path)
    assert op_types(before)["SkipLayerNormalization"] == 1
    graph, changes = avoided(residual())
    assert changes == 1
    after = op_types(optimized_by_runtime(graph, tmp_path))
    assert after["SkipLayerNormalization"] == 0 and after["LayerNormalization"] == 1


@pytest.mark.skipif(version() < (1, 32), reason="the fusion is fast in this version")
def test_the_other_spelling_computes_the_same_bits(tmp_path: Path) -> None:
    """As ONNX Runtime does without its own optimiser."""
    graph, _ = avoided(residual())
    onnx.save(residual(), tmp_path / "plain.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    x = sample(residual())[0]
    (expected,) = onnxruntime.InferenceSession(str(tmp_path / "plain.onnx"), options).run(None, {"x": x.numpy()})
    found = OnnxRuntime().compile(graph, AVX2, threads=1).run([x])[0].numpy()
    assert expected.tobytes() == found.tobytes()


def test_other_additions_stay_as_they_are() -> None:
    assert avoided(mlp())[1] == 0
    broadcast = residual()
    broadcast.graph.node[2].input[1] = "b"  # a constant row, not a residual
    assert avoided(broadcast)[1] == 0
    graph = load(residual())
    infer(graph, {"n": 2, "s": 5})
    assert AvoidSlowFusions().run(graph, Context(AVX2)) == 0  # the backend is not known


# ---- operators without a torch reference


def foreign() -> onnx.ModelProto:
    """An operator of ONNX Runtime's, twice."""
    nodes: list[Node] = [("Inverse", ["x"], "i", {}), ("Inverse", ["i"], "y", {})]
    protos = [helper.make_node(kind, names, [out], name=out, domain="com.microsoft") for kind, names, out, _ in nodes]
    protos.append(helper.make_node("Relu", ["y"], ["z"], name="z"))
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        protos, "g", [info("x", TensorProto.FLOAT, ["n", 4, 4])], [info("z", TensorProto.FLOAT, ["n", 4, 4])]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=10)


def branching() -> onnx.ModelProto:
    """y = relu(x) + 1 if sum(x) > 0 else x captured by name."""
    info = helper.make_tensor_value_info

    def branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [info(f"{name}_out", TensorProto.FLOAT, ["n", 4])])

    then = branch(
        "then", [helper.make_node("Relu", ["h"], ["then_r"]), helper.make_node("Add", ["then_r", "one"], ["then_out"])]
    )
    other = branch("else", [helper.make_node("Identity", ["h"], ["else_out"])])
    nodes = [
        helper.make_node("Mul", ["x", "one"], ["h"], name="h"),
        helper.make_node("ReduceSum", ["h"], ["s"], name="s", keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"], name="c"),
        helper.make_node("If", ["c"], ["i"], name="if", then_branch=then, else_branch=other),
        helper.make_node("Relu", ["i"], ["y"], name="y"),
    ]
    weights = {"one": np.array(1, np.float32), "zero": np.array(0, np.float32)}
    body = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, ["n", 4])], [info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    made = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def well_conditioned() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.eye(4) * 3 + torch.rand(2, 4, 4, generator=generator)]


@pytest.fixture
def without_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if two operators had no torch reference."""
    known = registry.lookup

    def lookup(domain: str, op_type: str) -> registry.Reference | None:
        return None if op_type in ("Inverse", "If") else known(domain, op_type)

    monkeypatch.setattr(registry, "lookup", lookup)


FOREIGN: list[tuple[Callable[[], onnx.ModelProto], list[list[torch.Tensor]], set[str]]] = [
    (foreign, [well_conditioned()], {"i", "y"}),
    (branching, [[torch.ones(3, 4)], [-torch.ones(3, 4)]], {"if"}),
]


@pytest.mark.usefixtures("without_references")
@pytest.mark.parametrize(("build", "samples", "nodes"), FOREIGN, ids=["com.microsoft", "If"])
def test_operators_without_a_reference_run_in_onnx_runtime(
    build: Callable[[], onnx.ModelProto], samples: list[list[torch.Tensor]], nodes: set[str]
) -> None:
    made = build()
    graph = load(made)
    assert to_model(graph) == made  # kept verbatim
    with pytest.raises(MissingReference, match="has no torch reference"):
        graph.run(samples[0])
    evaluator = OnnxEvaluator()
    session = onnxruntime.InferenceSession(made.SerializeToString())
    for inputs in samples:
        (expected,) = session.run(None, {"x": inputs[0].numpy()})
        np.testing.assert_allclose(graph.run(inputs, evaluator=evaluator)[0].numpy(), expected, rtol=1e-6, atol=1e-6)
    assert evaluator.nodes == nodes


@pytest.mark.usefixtures("without_references")
@pytest.mark.parametrize(("build", "samples", "nodes"), FOREIGN, ids=["com.microsoft", "If"])
def test_they_run_in_float64_too_or_as_near_as_they_can(
    build: Callable[[], onnx.ModelProto], samples: list[list[torch.Tensor]], nodes: set[str]
) -> None:
    graph, evaluator = load(build()), OnnxEvaluator()
    for inputs in samples:
        plain, wide = graph.run(inputs, evaluator=evaluator), graph.run(inputs, evaluator=evaluator, widen=True)
        assert wide[0].dtype == torch.float64
        torch.testing.assert_close(plain[0].double(), wide[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("without_references")
@pytest.mark.parametrize(("build", "samples", "nodes"), FOREIGN, ids=["com.microsoft", "If"])
def test_models_with_them_are_optimised(
    build: Callable[[], onnx.ModelProto], samples: list[list[torch.Tensor]], nodes: set[str], tmp_path: Path
) -> None:
    result = fxopt.optimize(build(), calibration=[tuple(inputs) for inputs in samples], guard_seconds=0.1, threads=1)
    session = onnxruntime.InferenceSession(build().SerializeToString())
    for inputs in samples:
        (expected,) = session.run(None, {"x": inputs[0].numpy()})
        np.testing.assert_allclose(result(*inputs).numpy(), expected, rtol=1e-5, atol=1e-6)
    fxopt.optimize(build(), "a100", calibration=[tuple(inputs) for inputs in samples])


def test_a_node_that_nobody_runs(tmp_path: Path) -> None:
    made = foreign()
    made.graph.node[0].op_type = "NoSuchOperator"
    graph = load(made)
    with pytest.raises(MissingReference, match="node 'i': ONNX Runtime cannot run it either"):
        graph.run(well_conditioned(), evaluator=OnnxEvaluator())


def test_evaluators_do_not_mix_models_up() -> None:
    """Sessions are kept per node; another model's node may lie at the same address."""
    evaluator = OnnxEvaluator()
    for index in range(6):
        made = foreign()
        if index % 2:
            del made.graph.node[1]
            made.graph.node[0].output[0] = "y"
        graph = load(made)
        expected = well_conditioned()[0] if not index % 2 else well_conditioned()[0].inverse()
        (found,) = graph.run(well_conditioned(), evaluator=evaluator)
        torch.testing.assert_close(found, expected.relu(), rtol=1e-4, atol=1e-4)
        del graph, made
        gc.collect()
