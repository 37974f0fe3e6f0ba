"""ONNX graphs as aten: dynamic sizes, control flow, functions, provenance, and reasons for what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.errors import UnknownName, Unsupported
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.shapes import infer
from fxopt.ir.structural_hash import structural_hash
from fxopt.ir.verify import synthetic_sample, verify_structure
from tests import zoo
from tests.onnx import flows

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"


def lowered(text: str, *samples: tuple[Any, ...], **options: Any) -> Graph:
    """The lowered model; on every sample it must give the bits that the ONNX graph gives."""
    graph = load(flows.model(text))
    result = graph.lower(**options)
    assert result.origin == "torch"
    assert not any(isinstance(node.target, OnnxOp) for node in result.nodes)
    verify_structure(result)
    assert structural_hash(result.copy()) == structural_hash(result)
    for sample in samples:
        for one, other in zip(graph.run(sample), result.run(sample), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    return result


def targets(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.calls()]


TRUE, FALSE = torch.tensor(True), torch.tensor(False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-cnn", "digits-vit", "byte-lm"])
def test_example_models_keep_their_dynamic_dimensions(name: str) -> None:
    graph = load(MODELS / f"{name}.onnx")
    infer(graph)
    result = graph.lower()
    assert [str(spec) for spec in result.inputs] == [str(spec) for spec in graph.inputs]
    assert [spec.shape for spec in result.outputs] == [spec.shape for spec in graph.outputs]
    names = sorted({dim for spec in graph.inputs for dim in spec.shape or () if isinstance(dim, str)})
    for size in (1, 2, 5):
        sizes = {dim: size + index for index, dim in enumerate(names)}
        sample = synthetic_sample(graph.inputs, sizes, size)
        assert sample is not None
        for one, other in zip(graph.run(sample), result.run(sample), strict=True):
            assert torch.equal(one, other)
    known = {label for node in graph.nodes for label in node.meta.get("provenance", ())}
    known |= {spec.name for spec in graph.inputs}
    assert all(node.meta["provenance"][0] in known for node in result.calls())
    weights = {tensor.data_ptr() for node in graph.nodes if (tensor := graph.constant(node)) is not None}
    large = [tensor for node in result.nodes if (tensor := result.constant(node)) is not None and tensor.numel() > 64]
    assert large
    assert all(tensor.data_ptr() in weights for tensor in large)  # shared, not copied


def test_if_becomes_cond() -> None:
    sample = (torch.randn(5, 3), torch.randn(3))
    result = lowered(flows.CAPTURING, (TRUE, *sample), (FALSE, *sample), (TRUE, torch.randn(1, 3), sample[1]))
    assert targets(result).count("cond") == 1
    assert [spec.shape for spec in result.outputs] == [("n", 3)]


def test_branches_of_different_sizes_have_an_unknown_size() -> None:
    text = flows.CAPTURING.replace("t = Mul(s, two)", "t = Concat <axis = 0> (s, s)")
    text = text.replace("float[n, 3] y", "float[m, 3] y").replace("(float[n, 3] t)", "(float[m, 3] t)")
    sample = (torch.randn(5, 3), torch.randn(3))
    result = lowered(text, (TRUE, *sample), (FALSE, *sample))
    assert result.outputs[0].shape == (None, 3)


def test_a_branch_may_give_back_an_input_and_use_captured_sizes() -> None:
    text = """
    main (bool c, float[n, 3] x) => (float[n, 3] y) {
      [shape] s = Shape(x)
      [if] y = If (c) <
        then_branch = then () => (float[n, 3] t) { [same] t = Identity(x) },
        else_branch = other () => (float[n, 3] e) { [reshape] e = Reshape(x, s) }>
    }
    """
    x = torch.randn(6, 3)
    lowered(text, (TRUE, x), (FALSE, x))


def test_a_loop_in_a_branch() -> None:
    text = """
    main (bool c, float[2] x, int64 n) => (float[2] y) {
      [yes] yes = Constant <value = bool {1}> ()
      [if] y = If (c) <
        then_branch = then () => (float[2] t) {
          [loop] t = Loop (n, yes, x) <body = body (int64 i, bool go, float[2] a) => (bool on, float[2] b) {
              [keep] on = Identity(go)
              [add] b = Add(a, x)
            }>
        },
        else_branch = other () => (float[2] e) { [neg] e = Neg(x) }>
    }
    """
    x = torch.randn(2)
    lowered(text, (TRUE, x, torch.tensor(0)), (TRUE, x, torch.tensor(4)), (FALSE, x, torch.tensor(4)))


def test_sequences_do_not_leave_a_branch() -> None:
    text = """
    main (bool c, float[2] x) => (float[2] y) {
      [if] s = If (c) <
        then_branch = then () => (seq(float[2]) t) { [one] t = SequenceConstruct(x) },
        else_branch = other () => (seq(float[2]) e) { [two] e = SequenceConstruct(x, x) }>
      [zero] z = Constant <value = int64 {0}> ()
      [at] y = SequenceAt(s, z)
    }
    """
    with pytest.raises(Unsupported, match="node 'if': a list goes in or out of its body"):
        lowered(text)


def test_carried_values_that_grow_are_refused() -> None:
    text = flows.WHILE.replace("b = Add(a, a)", "b = Concat <axis = 0> (a, a)").replace("float[1] b", "float[p] b")
    text = text.replace("Less(b, l)", "Less(l, l)").replace("float[1] y", "float[p] y")
    with pytest.raises(Unsupported, match="node 'loop' cannot be lowered.*shape"):
        lowered(text)


def test_nested_ifs() -> None:
    x = torch.randn(2)
    lowered(flows.NESTED, *((one, other, x) for one in (TRUE, FALSE) for other in (TRUE, FALSE)))


def test_a_constant_condition_leaves_the_branch() -> None:
    text = flows.CAPTURING.replace("[scale]", "[yes] yes = Constant <value = bool {0}> ()\n  [scale]").replace(
        "If (c)", "If (yes)"
    )
    result = lowered(text, (TRUE, torch.randn(4, 3), torch.randn(3)))
    assert targets(result) == ["aten.mul.Tensor", "aten.add.Tensor"]
    assert [node.meta["provenance"] for node in result.calls()] == [("scale",), ("choose/again",)]


LENGTH = """
main (float[n, 3] x) => (float[n, 3] y) {
  [shape] s = Shape <start = 0, end = 1> (x)
  [two] two = Constant <value = int64[1] {2}> ()
  [three] three = Constant <value = int64[2] {-1, 3}> ()
  [less] c = Less(two, s)
  [if] y = If (c) <
    then_branch = then () => (float[n, 3] t) { [a] t = Reshape(x, three) },
    else_branch = other () => (float[n, 3] e) { [b] e = Neg(x) }>
}
"""


def test_a_condition_on_sizes_stays_dynamic() -> None:
    lowered(LENGTH, (torch.randn(2, 3),), (torch.randn(3, 3),), (torch.randn(7, 3),))


CHOSEN = """
main (float[n, 3] x) => (float[m, 3] y) {
  [shape] s = Shape <start = 0, end = 1> (x)
  [two] two = Constant <value = int64[1] {2}> ()
  [less] c = Less(two, s)
  [one] one = Constant <value = int64[1] {1}> ()
  [where] l = Where(c, one, two)
  [zero] zero = Constant <value = int64[1] {0}> ()
  [slice] y = Slice(x, zero, l, zero)
}
"""


def test_a_decision_that_torch_takes_for_all_sizes_is_found() -> None:
    with pytest.raises(Unsupported, match="dimension 'n' dynamic: torch fixed a decision for sizes like 4, and at 2"):
        lowered(CHOSEN)
    lowered(CHOSEN, (torch.randn(4, 3),), fixed=["n"])


def test_a_limit_that_the_model_has_is_no_reason_to_refuse() -> None:
    text = """
    main (float[n, 3] x) => (float[n, 3] y) {
      [shape] s = Shape <start = 0, end = 1> (x)
      [zero] zero = Constant <value = int64[1] {0}> ()
      [table] t = Constant <value = float[6, 1] {0, 1, 2, 3, 4, 5}> ()
      [slice] p = Slice(t, zero, s, zero)
      [add] y = Add(x, p)
    }
    """
    result = lowered(text, (torch.randn(2, 3),), (torch.randn(6, 3),))
    assert result.inputs[0].shape == ("n", 3)


def test_open_sizes_get_names() -> None:
    text = "main (float[?, 3] x) => (float[?, 3] y) { [neg] y = Neg(x) }"
    assert lowered(text, (torch.randn(1, 3),), (torch.randn(4, 3),)).inputs[0].shape == ("x_0", 3)
    assert lowered(text, sizes={"x_0": 5}, fixed=["x_0"]).outputs[0].shape == (5, 3)
    with pytest.raises(UnknownName, match="did you mean 'x_0'"):
        lowered(text, fixed=["x_1"])


def counted(count: int, flag: str = "yes") -> str:
    """The counting loop with this many steps."""
    constant = f"[steps] steps = Constant <value = int64 {{{count}}}> ()\n  [yes] yes"
    text = flows.COUNTING.replace("(int64 steps, float[2] x)", "(float[2] x)").replace("[yes] yes", constant)
    return text.replace("(steps, yes, x)", f"(steps, {flag}, x)")


@pytest.mark.parametrize("flag", ["yes", '""'])
def test_few_steps_are_unrolled(flag: str) -> None:
    result = lowered(counted(3, flag), (torch.randn(2),))
    assert "while_loop" not in targets(result)
    assert {node.meta["provenance"] for node in result.calls()} >= {("loop/step",), ("loop/element",)}


def test_no_steps() -> None:
    result = lowered(counted(0, '""'), (torch.randn(2),))
    assert result.outputs[1].shape == (0, 2)


@pytest.mark.parametrize("flag", ["yes", '""'])
def test_many_steps_become_a_while_loop_with_scan_outputs(flag: str) -> None:
    result = lowered(counted(50, flag), (torch.randn(2),))
    assert targets(result).count("while_loop") == 1
    assert result.outputs[1].shape == (50, 2)


def test_a_condition_of_data_becomes_a_while_loop() -> None:
    result = lowered(flows.WHILE, (torch.tensor([3.0]),), (torch.tensor([60.0]),))
    assert targets(result).count("while_loop") == 1


def test_a_number_of_steps_that_is_an_input() -> None:
    text = flows.COUNTING.replace(", float[k, 2] all)", ")").replace("last, all = Loop", "last = Loop")
    text = text.replace("float[2] b, float[2] e)", "float[2] b)").replace("[element] e = Mul(b, x)", "")
    lowered(text, *((torch.tensor(steps), torch.randn(2)) for steps in (0, 1, 40)))


def test_scan_outputs_of_data_dependent_length_are_refused() -> None:
    with pytest.raises(Unsupported, match="node 'loop': the length of its scan outputs depends on data"):
        lowered(flows.COUNTING)


@pytest.mark.parametrize("length", [4, 40, "n"])
def test_scans(length: int | str) -> None:
    text = flows.SCANNING.replace("[2, 4]", f"[2, {length}]")
    sizes = (3, 33) if length == "n" else (length,)
    result = lowered(text, *((torch.randn(2), torch.randn(2, size)) for size in sizes if isinstance(size, int)))
    assert targets(result).count("while_loop") == (length != 4)


def test_functions_are_inlined_with_their_attributes() -> None:
    result = lowered(flows.CALLING, (torch.randn(2),))
    assert [node.meta["provenance"] for node in result.calls() if "mul" in str(node.target)] == [
        ("first/r",),
        ("second/r",),
    ]


def test_operators_without_reference_are_named() -> None:
    text = flows.NESTED.replace("Neg(x)", "my.vendor(x)")
    with pytest.raises(Unsupported, match="node 'outer' > 'inner' > 'flat' cannot be lowered.*vendor"):
        lowered(text)


def test_a_dimension_that_the_model_fixes_is_an_error_and_not_fixed_silently() -> None:
    text = """
    main (float[n, 3] x) => (float[2, 3] y) {
      [shape] s = Constant <value = int64[2] {2, 3}> ()
      [reshape] y = Reshape(x, s)
    }
    """
    with pytest.raises(Unsupported, match="cannot be lowered to aten"):
        lowered(text)
    fixed = lowered(text, (torch.randn(2, 3),), sizes={"n": 2}, fixed=["n"])
    assert fixed.inputs[0].shape == (2, 3)


def test_inputs_that_are_no_tensors_are_refused() -> None:
    text = "main (seq(float[2]) s) => (int64 n) { [length] n = SequenceLength(s) }"
    with pytest.raises(Unsupported, match="input 's' is no tensor of known type"):
        lowered(text)


def test_fxopt_operators_stay_whole() -> None:
    from fxopt.ir.op import all_ops

    graph = load(flows.model("main (float[n, 8] x) => (float[n, 8] y) { [same] y = Relu(x) }"))
    declared = all_ops()["linear_w8a8"]
    arguments = next(iter(declared.sample_arguments()))
    same = graph.find("same")
    assert same is not None
    names = [item.name for item in declared.target._schema.arguments]
    tensors = {name: graph.add_constant(value, name) for name, value in zip(names[1:], arguments[1:]) if isinstance(value, torch.Tensor)}  # fmt: skip
    x = graph.add_constant(arguments[0], "x")
    given = [tensors.get(name, value) for name, value in zip(names[1:], arguments[1:], strict=False)]
    made = graph.call(declared.target, (x, *given), before=same, made_by="test")
    graph.output.args = ((made,),)
    assert str(declared.target) in targets(graph.lower())


def test_lowering_a_torch_graph_is_a_copy() -> None:
    once = lowered(flows.SCANNING)
    again = once.lower()
    assert again is not once
    assert structural_hash(again) == structural_hash(once)


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["opset 20", "opset 23"])
@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_zoo(name: str, origin: str) -> None:
    if name not in ("mlp", "cnn", "encoder"):
        pytest.importorskip("transformers")
    graph = zoo.graph(name, origin)
    result = graph.lower()
    assert [str(spec) for spec in result.inputs] == [str(spec) for spec in graph.inputs]
    assert [str(spec) for spec in result.outputs] == [str(spec) for spec in graph.outputs]
    case = zoo.case(name)
    dims = {dim for spec in result.inputs for dim in spec.shape or () if isinstance(dim, str)}
    assert dims == {dim for axes in case.dynamic.values() for dim in axes.values()}
    for batch, seq in ((2, 12), (3, 7), (1, 5)):
        resized = case.resized(batch=batch, seq=seq)
        sample = [resized[spec.name] for spec in graph.inputs]
        for one, other in zip(graph.run(sample), result.run(sample), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)


SCALED = """
scaled (float[n, 2, h, 5] x) => (float[m, 2, k, 7] y) {
  [scales] scales = Constant <value = float[4] {1.0, 1.0, 2.0, 1.5}> ()
  [scaled] y = Resize <mode = "linear"> (x, , scales)
}
"""


def test_scales_are_known_when_tracing() -> None:
    result = lowered(SCALED, (torch.randn(2, 2, 3, 5),), (torch.randn(3, 2, 4, 5),))
    assert result.outputs[0].shape == ("n", 2, "2*h", 7)
