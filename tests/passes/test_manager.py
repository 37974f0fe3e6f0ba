"""The pass manager: it counts, times, orders, repeats, dumps, verifies, and names the pass that broke the graph."""

from __future__ import annotations

import operator
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxopt.ir.shapes as shapes
from fxopt.errors import InvalidModel, InvalidOption, PassError, UnknownName, VerificationError
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph, label
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.shapes import infer
from fxopt.ir.verify import NumericCheck
from fxopt.passes.base import Context, ExactPass
from fxopt.passes.fold_constants import FoldConstants
from fxopt.passes.manager import PassManager
from fxopt.testing import PLAIN_CPU
from tests.conftest import ROOT
from tests.passes.helpers import onnx_graph

RELU, ADD, MUL, RESHAPE = (
    OnnxOp("", "Relu", 14),
    OnnxOp("", "Add", 14),
    OnnxOp("", "Mul", 14),
    OnnxOp("", "Reshape", 19),
)


def model(relus: int = 3) -> onnx.ModelProto:
    """x [n, 4] -> Relu ... Relu -> MatMul w [4, 4] -> Reshape [-1] -> Add x.sum... -> y [m]."""
    nodes = [
        helper.make_node("Relu", [f"r{index - 1}" if index else "x"], [f"r{index}"], name=f"relu{index}")
        for index in range(relus)
    ]
    nodes += [
        helper.make_node("MatMul", [f"r{relus - 1}", "w"], ["p"], name="product"),
        helper.make_node("Reshape", ["p", "flat"], ["f"], name="flatten"),
        helper.make_node("Add", ["f", "one"], ["y"], name="plus_one"),
    ]
    weights = {
        "w": np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32),
        "flat": np.array([-1], np.int64),
        "one": np.array([1], np.float32),
    }
    body = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    made = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


SAMPLE = [torch.randn(6, 4, generator=torch.Generator().manual_seed(0))]


@pytest.fixture
def graph() -> Graph:
    made = load(model())
    infer(made, {"n": 6})
    return made


def context() -> Context:
    return Context(PLAIN_CPU)


def run(graph: Graph, *passes: ExactPass, numbers: bool = True, **options: Any) -> PassManager:
    """The manager after it ran the passes on the graph."""
    manager = PassManager(passes, **options)
    manager.run(graph, context(), NumericCheck.of(graph, SAMPLE) if numbers else None)
    return manager


def targets(graph: Graph) -> list[str]:
    return [node.target.op_type for node in graph.calls()]  # type: ignore[union-attr]


@dataclass(frozen=True)
class DropOneRelu(ExactPass):
    """relu(relu(x)) -> relu(x), one at a time."""

    seconds: float = 0.0

    def run(self, graph: Graph, ctx: Context) -> int:
        time.sleep(self.seconds)
        for node in list(graph.calls()):
            source = node.args[0]
            if node.target is RELU and getattr(source, "target", None) is RELU:
                graph.replace(node, source)  # type: ignore[arg-type]
                return 1
        return 0


@dataclass(frozen=True)
class Swap(ExactPass):
    """One operator for another: what `change` does to the node named `node`, once."""

    node: str = "plus_one"
    change: Callable[[Graph, Any], Any] | None = None
    done: list[int] = field(default_factory=list, compare=False)

    def run(self, graph: Graph, ctx: Context) -> int:
        if self.done:
            return 0
        self.done.append(1)
        assert self.change is not None
        found = graph.find(self.node)
        assert found is not None
        self.change(graph, found)
        return 1


class SwapAgain(Swap):
    """The same under another name."""


@dataclass(frozen=True)
class Idle(ExactPass):
    """Does nothing."""

    def run(self, graph: Graph, ctx: Context) -> int:
        return 0


def replaced(target: Any, *extra: Any, constant: torch.Tensor | None = None) -> Callable[[Graph, Any], None]:
    """A change: the node's operator becomes `target`, on its first input and a constant."""

    def change(graph: Graph, node: Any) -> None:
        arguments = [node.args[0], *extra]
        if constant is not None:
            arguments.append(graph.add_constant(constant, "made"))
        graph.replace(node, graph.call(target, tuple(arguments), before=node, made_by="swap"))

    return change


# ---- running


def test_repeats_until_nothing_changes_and_counts() -> None:
    graph = load(model(relus=5))
    infer(graph)
    manager = PassManager([DropOneRelu(), Idle()], rounds=10)
    total = manager.run(graph, context())
    assert total == 4 and targets(graph) == ["Relu", "MatMul", "Reshape", "Add"]
    assert [(step.name, step.changes) for step in manager.runs] == [
        entry for round_ in range(5) for entry in (("drop-one-relu", int(round_ < 4)), ("idle", 0))
    ]


def test_stops_after_the_given_rounds() -> None:
    graph = load(model(relus=5))
    infer(graph)
    assert PassManager([DropOneRelu()], rounds=2).run(graph, context()) == 2


def test_times_the_pass_and_its_verification_apart(graph: Graph) -> None:
    manager = run(graph, DropOneRelu(seconds=0.05), rounds=1)
    assert 0.05 <= manager.runs[0].seconds < 5
    assert 0 < manager.runs[0].verify_seconds < 5


def test_no_passes_change_nothing(graph: Graph) -> None:
    before = targets(graph)
    assert PassManager([]).run(graph, context(), NumericCheck.of(graph, SAMPLE)) == 0
    assert targets(graph) == before


def test_the_ledger_names_the_nodes(graph: Graph) -> None:
    ctx = context()
    step = Swap(change=replaced(ADD, constant=torch.ones(1)))
    PassManager([step]).run(graph, ctx)
    (verdict,) = ctx.ledger.select(pass_name="swap")
    assert (verdict.node, verdict.outcome) == ("plus_one", "applied")


# ---- order


def test_a_pass_that_must_run_later_is_refused_at_once() -> None:
    class Late(Idle):
        after: ClassVar[tuple[str, ...]] = ("idle",)

    with pytest.raises(
        PassError, match=re.escape("pass late must run after idle, but comes before it in ['late', 'idle']")
    ):
        PassManager([Late(), Idle()])
    PassManager([Idle(), Late()])
    PassManager([Late()])  # nothing to come after


def test_the_pipelines_keep_their_own_order() -> None:
    from fxopt.passes.pipelines import exact_pipeline, spelling_pipeline

    PassManager([*exact_pipeline(), *spelling_pipeline()])


# ---- failures


def test_an_exception_is_wrapped_with_what_ran_before(graph: Graph) -> None:
    def fail(graph: Graph, node: Any) -> None:
        raise ZeroDivisionError("by accident")

    steps = (DropOneRelu(), Idle(), Swap(change=fail))
    with pytest.raises(
        PassError, match=re.escape("pass swap failed after ['drop-one-relu']: ZeroDivisionError: by accident")
    ) as caught:
        run(graph, *steps)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_of_ours_is_wrapped_too(graph: Graph) -> None:
    def fail(graph: Graph, node: Any) -> None:
        raise InvalidModel("the model is odd")

    with pytest.raises(
        PassError, match=re.escape("pass swap failed after []: InvalidModel: the model is odd")
    ) as caught:
        run(graph, Swap(change=fail))
    assert isinstance(caught.value.__cause__, InvalidModel)


@pytest.mark.parametrize("result", [None, "3", 1.5, -1])
def test_the_number_of_changes_must_be_a_number(graph: Graph, result: Any) -> None:
    class Talkative(Idle):
        def run(self, graph: Graph, ctx: Context) -> int:
            return result  # type: ignore[no-any-return]

    with pytest.raises(
        PassError, match=rf"pass talkative returned {re.escape(repr(result))}; expected the number of changes"
    ):
        run(graph, Talkative())


def test_topology(graph: Graph) -> None:
    def change(graph: Graph, node: Any) -> None:
        early = graph.find("relu0")
        assert early is not None
        early.args = (node,)

    with pytest.raises(
        VerificationError,
        match=r"pass swap \(after \[\]\) broke the graph: node 'relu0' uses 'plus_one', which is not computed before it",
    ):
        run(graph, Swap(change=change))


def test_a_missing_constant(graph: Graph) -> None:
    def change(graph: Graph, node: Any) -> None:
        delattr(graph.root, str(node.args[1].target))

    with pytest.raises(VerificationError, match=r"pass swap .* refers to the constant 'c_one', which is gone"):
        run(graph, Swap(change=change))


def test_an_operator_that_is_no_function(graph: Graph) -> None:
    def change(graph: Graph, node: Any) -> None:
        node.op, node.target = "call_module", "some.module"

    with pytest.raises(VerificationError, match=r"pass swap .* is a call_module of 'some.module'; expected a call"):
        run(graph, Swap(change=change))


def test_the_number_of_outputs(graph: Graph) -> None:
    def change(graph: Graph, node: Any) -> None:
        graph.output.args = ((node, node),)

    with pytest.raises(VerificationError, match="pass swap .* 2 outputs; the signature has 1"):
        run(graph, Swap(change=change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda graph, node: replaced(OnnxOp("", "Cast", 19))(graph, node) or _set_kwargs(graph, "plus_one", to=11),
            r"'y' was float32\['24'\] and became float64\['24'\]",
        ),
        (replaced(RESHAPE, constant=torch.tensor([2, -1])), r"'y' was float32\['24'\] and became float32\['2', '12'\]"),
    ],
    ids=["dtype", "shape"],
)
@pytest.mark.parametrize("numbers", [False, True])
def test_an_output_of_another_type(graph: Graph, change: Any, message: str, numbers: bool) -> None:
    with pytest.raises(
        VerificationError, match=rf"pass swap \(after \['drop-one-relu'.*\]\) broke the graph: .*{message}"
    ):
        run(graph, DropOneRelu(), Swap(change=change), numbers=numbers)


def _set_kwargs(graph: Graph, name: str, **kwargs: Any) -> None:
    node = graph.find(name)
    assert node is not None
    node.kwargs = kwargs


def test_an_inner_value_of_another_type_is_found_at_the_output(graph: Graph) -> None:
    def change(graph: Graph, node: Any) -> None:  # the product becomes [4, 4] whatever n is
        made = graph.add_constant(torch.randn(4, 4), "other")
        node.args = (made, node.args[1])

    with pytest.raises(
        VerificationError, match=r"pass swap .*'plus_one' was float32\['24'\] and became float32\['16'\]"
    ):
        run(graph, Swap("product", change))


# ---- numbers


def test_other_numbers_name_the_pass_and_the_node(graph: Graph) -> None:
    step = Swap("relu2", replaced(OnnxOp("", "Neg", 13)))
    with pytest.raises(
        VerificationError,
        match=r"pass swap .*changed what the model computes: output 'y': largest error .* the first node that differs is 'relu2'",
    ):
        run(graph, DropOneRelu(), step)


def test_rounding_is_not_a_difference(graph: Graph) -> None:
    def change(graph: Graph, node: Any) -> None:  # (x + 1) + tiny
        made = graph.call(
            ADD, (node, graph.add_constant(torch.tensor([1e-8]), "tiny")), before=graph.output, made_by="swap"
        )
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    run(graph, Swap(change=change))


def test_an_error_that_only_infinities_show(graph: Graph) -> None:
    step = Swap(change=replaced(MUL, constant=torch.tensor([float("inf")])))
    with pytest.raises(VerificationError, match="other elements are infinite or NaN than before"):
        run(graph, step)


def test_a_pass_that_says_it_changed_nothing_is_checked_too(graph: Graph) -> None:
    class Silent(Swap):
        def run(self, graph: Graph, ctx: Context) -> int:
            super().run(graph, ctx)
            return 0

    step = Silent("relu2", replaced(OnnxOp("", "Neg", 13)))
    with pytest.raises(VerificationError, match="pass silent"):
        run(graph, step)


@pytest.mark.parametrize("bad", [0, 1, 2, 3, 4])
def test_bisection_finds_the_first_bad_pass(bad: int) -> None:
    """Five passes, each drops one of six Relus; number `bad` makes an Abs of another one; later ones are fine."""

    @dataclass(frozen=True)
    class Step(ExactPass):
        number: int = 0

        @property
        def name(self) -> str:
            return f"step-{self.number}"

        def run(self, graph: Graph, ctx: Context) -> int:
            if self.number == bad:
                node = graph.find("relu0")
                if node is None or node.target is not RELU:
                    return 0
                replaced(OnnxOp("", "Identity", 19))(graph, node)
                return 1
            if getattr(graph, f"_seen_{self.number}", False):
                return 0
            setattr(graph, f"_seen_{self.number}", True)
            node = graph.find("plus_one")
            assert node is not None
            replaced(ADD, constant=torch.ones(1))(graph, node)
            return 1

    graph = load(model(relus=1))
    infer(graph, {"n": 6})
    with pytest.raises(VerificationError, match=rf"pass step-{bad} \(step {bad + 1} of"):
        run(graph, *(Step(number) for number in range(5)))


def test_bisection_leaves_the_ledger_alone(graph: Graph) -> None:
    ctx = context()
    step = DropOneRelu()
    wrong = Swap("plus_one", replaced(ADD, constant=torch.full((1,), 2.0)))
    with pytest.raises(VerificationError):
        PassManager([step, wrong]).run(graph, ctx, NumericCheck.of(graph, SAMPLE))
    assert ctx.ledger.counts() == {"drop-one-relu": {"applied": 2}, "swap": {"applied": 1}}


# ---- dynamic dimensions


@pytest.mark.parametrize(
    ("node", "shape"),
    [("flatten", [24]), ("plus_one", [24])],
    ids=["an inner reshape", "the output"],
)
def test_a_rewrite_that_fixes_a_dynamic_dimension_is_found(graph: Graph, node: str, shape: list[int]) -> None:
    """On the sample everything is right; for another n it is not."""
    change = replaced(RESHAPE, constant=torch.tensor(shape))

    def both(graph: Graph, found: Any) -> None:
        if node == "plus_one":  # reshape behind the addition
            made = graph.call(
                RESHAPE, (found, graph.add_constant(torch.tensor(shape), "made")), before=graph.output, made_by="swap"
            )
            found.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        else:
            change(graph, found)

    with pytest.raises(VerificationError, match=r"pass swap .* does not take its inputs at n=3: .*12"):
        run(graph, Swap(node, both))


def test_a_rewrite_that_expands_to_the_size_of_the_sample_is_found(graph: Graph) -> None:
    """x + 0 [6, 4]: broadcasting fits n = 6 and n = 1 only."""

    def change(graph: Graph, node: Any) -> None:
        zero = graph.add_constant(torch.zeros(6, 4), "zero")
        node.args = (graph.call(ADD, (node.args[0], zero), before=node, made_by="swap"), node.args[1])

    with pytest.raises(VerificationError, match="pass swap .* 'add' does not take its inputs at n=3"):
        run(graph, Swap("product", change))


def test_an_operator_that_fails_at_every_size_is_found_without_numbers(graph: Graph) -> None:
    def change(graph: Graph, node: Any) -> None:
        node.args = (node.args[0], graph.add_constant(torch.randn(5, 4), "wrong"))

    with pytest.raises(VerificationError, match="pass swap .* 'product' does not take its inputs at n=6"):
        run(graph, Swap("product", change), numbers=False)


def test_an_operator_that_failed_before_may_be_replaced() -> None:
    """The file says n, the model takes 6 only: every rewrite of it would fail at other sizes as well."""
    made = model()
    made.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array([24], np.int64), "flat"))
    graph = load(made)
    infer(graph, {"n": 6})
    assert "failure" in graph.find("flatten").meta  # type: ignore[union-attr]
    run(graph, Swap("flatten", replaced(RESHAPE, constant=torch.tensor([24]))))


def test_a_rewrite_that_keeps_dimensions_dynamic_passes(graph: Graph) -> None:
    def change(graph: Graph, node: Any) -> None:
        zero = graph.add_constant(torch.zeros(1, 4), "zero")
        node.args = (graph.call(ADD, (node.args[0], zero), before=node, made_by="swap"), node.args[1])

    run(graph, Swap("product", change))


# ---- only the neighbourhood


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the nodes whose types are derived."""
    names: list[str] = []
    original = shapes._value_of

    def counting(graph: Graph, node: Any, *rest: Any) -> Any:
        names.append(label(node))
        return original(graph, node, *rest)

    monkeypatch.setattr(shapes, "_value_of", counting)
    return names


def test_only_what_changed_and_its_users_are_derived_again(derived: list[str]) -> None:
    graph = load(model(relus=50))
    infer(graph, {"n": 6})
    assert len(set(derived)) > 50
    derived.clear()
    run(graph, Swap("relu20", replaced(OnnxOp("", "Relu", 14))), numbers=False)
    assert set(derived) <= {"relu20", "relu21"}


def test_a_type_that_differs_is_followed_as_far_as_it_differs(derived: list[str]) -> None:
    graph = load(model(relus=20))
    infer(graph, {"n": 6})
    derived.clear()

    def change(graph: Graph, node: Any) -> None:  # two casts around relu10: float64 inside
        cast = OnnxOp("", "Cast", 19)
        wide = graph.call(cast, (node.args[0],), {"to": 11}, before=node, made_by="swap")
        node.args = (wide,)
        user = next(iter(node.users))
        narrow = graph.call(cast, (node,), {"to": 1}, before=user, made_by="swap")
        user.args = (narrow,)

    run(graph, Swap("relu10", change), numbers=False)
    assert (
        {"relu10"} <= set(derived) <= {"relu10", "relu11", "cast", "cast_1", "cast_default", "cast_default_1", "Cast"}
    )


def test_nothing_is_derived_when_nothing_changed(graph: Graph, derived: list[str]) -> None:
    run(graph, Idle(), numbers=False)
    assert derived == []


# ---- dumps


def test_dumps_are_numbered_and_run(graph: Graph, tmp_path: Path) -> None:
    expected = graph.run(SAMPLE)[0]
    run(graph, DropOneRelu(), Idle(), Swap(change=replaced(ADD, constant=torch.ones(1))), dump=tmp_path / "dump")
    names = sorted(path.name for path in (tmp_path / "dump").glob("*.py"))
    assert names == ["00-input.py", "01-drop-one-relu.py", "02-swap.py", "03-drop-one-relu.py"]
    np.savez(tmp_path / "in.npz", x=SAMPLE[0].numpy())
    done = subprocess.run(
        [sys.executable, str(tmp_path / "dump" / names[-1]), str(tmp_path / "in.npz")],
        capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "y" in done.stdout and "24" in done.stdout
    from fxopt.ir.text import load_text

    assert torch.equal(load_text(tmp_path / "dump", "03-drop-one-relu").run(SAMPLE)[0], expected)


def test_a_second_manager_goes_on_counting(graph: Graph, tmp_path: Path) -> None:
    first = run(graph, DropOneRelu(), dump=tmp_path, rounds=1)
    run(graph, Swap(change=replaced(ADD, constant=torch.ones(1))), dump=tmp_path, dumped=first.dumped)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == ["00-input.py", "01-drop-one-relu.py", "02-swap.py"]


# ---- PyTorch graphs


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.relu()).flatten() + 1


def captured() -> Graph:
    from fxopt.frontends.torch_export import load as load_torch

    return load_torch(Net().eval(), (SAMPLE[0],), {"x": {0: "n"}})


@dataclass(frozen=True)
class Flatten(ExactPass):
    """flatten(x) -> view(x, [n * 3]) with the sample's n."""

    size: int = -1

    def run(self, graph: Graph, ctx: Context) -> int:
        aten = torch.ops.aten
        wanted = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
        for node in list(graph.calls()):
            if node.target in wanted and node.args[1] != [self.size]:
                made = graph.call(aten.reshape.default, (node.args[0], [self.size]), before=node, made_by=self.name)
                graph.replace(node, made)
                return 1
        return 0


def test_torch_graphs_are_verified_with_symbolic_sizes() -> None:
    run(captured(), Flatten())
    with pytest.raises(VerificationError, match="pass flatten .* dimension 'n' of input 'x' was dynamic and became 6"):
        run(captured(), Flatten(18))


def test_getitem_is_an_operator_that_may_be_dropped() -> None:
    """A tuple's element that nobody uses any more does not trouble the verifier."""
    node = helper.make_node("Split", ["x"], ["a", "b"], name="split", axis=1, num_outputs=2)
    add = helper.make_node("Add", ["a", "b"], ["y"], name="add")
    info = helper.make_tensor_value_info
    body = helper.make_graph([node, add], "g", [info("x", 1, ["n", 4])], [info("y", 1, ["n", 2])])
    graph = load(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    infer(graph, {"n": 6})

    def change(graph: Graph, node: Any) -> None:
        node.args = (node.args[0], node.args[0])
        graph.prune()

    with pytest.raises(VerificationError, match="pass swap .*changed what the model computes"):
        run(graph, Swap("add", change))
    assert [node.target for node in graph.fx.nodes].count(operator.getitem) == 1


# ---- the ledger


def test_what_is_folded_away_has_a_row_of_its_own() -> None:
    made = onnx_graph(
        "g (float[3, 2] x) => (float[3, 3] y) { a = Neg(w) b = Exp(a) y = MatMul(x, b) }", w=np.ones((2, 3), np.float32)
    )
    ctx = context()
    PassManager([FoldConstants()]).run(made, ctx)
    rows = {(row.pass_name, row.node, row.outcome, row.reason) for row in ctx.ledger.verdicts}
    assert rows == {
        ("fold-constants", name, "applied", "removed; the result is the same") for name in ("n_a", "n_b")
    }


def test_asking_the_ledger_for_what_does_not_exist() -> None:
    ledger = context().ledger
    with pytest.raises(UnknownName, match="unknown outcome 'refuse'; did you mean 'refused'"):
        ledger.select(outcome="refuse")  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match=r"node='\(' is not a regular expression"):
        ledger.select(node="(")
