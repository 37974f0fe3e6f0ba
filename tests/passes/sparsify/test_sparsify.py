"""sparsify: it fires in every pattern and storage, it refuses with a reason, its numbers."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from torch import nn

from fxopt.backends.eager import Eager
from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.backends.tvm import Tvm
from fxopt.catalog import find_pass, pass_from_text, pass_names
from fxopt.cost_model.roofline import predict
from fxopt.cost_model.targets import get_target
from fxopt.errors import InvalidOption, UnknownName
from fxopt.ir.graph import Graph, set_attribute
from fxopt.ir.masks import marks
from fxopt.ir.onnx.export import to_model
from fxopt.ir.sparsity import Mark, Pattern
from fxopt.ir.views.weights import weight_of
from fxopt.passes.base import Context, Declined
from fxopt.passes.sparsify import Sparsify
from fxopt.passes.stats import Stats, collect
from fxopt.testing import PLAIN_CPU, assert_neutral, assert_refuses
from tests.passes.helpers import torch_graph
from tests.passes.sparsify.models import (
    convolutions,
    images,
    linears,
    model_of,
    noise,
    offered,
    prepared,
    rows,
    size_context,
    sparse,
)

HOST = dataclasses.replace(get_target("x86-avx512-vnni"), name="host", is_host=True)
ORT = Context(HOST, capabilities=OnnxRuntime())


def reasons(graph: Graph, step: Sparsify, ctx: Context | None = None) -> dict[str, str]:
    """The refusal of each node that is left dense."""
    return {item.anchor: str(item.refusal) for item in step.candidates(graph, ctx or size_context()) if item.refusal}


# ---- it fires


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4x1:2", "8x2:4", "4x1", "8x1", "unstructured"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_weights_get_the_pattern_and_the_mark(pattern: str, method: str) -> None:
    graph, samples = prepared(linears()), rows()
    found = Pattern.parse(pattern)
    step = Sparsify(pattern, None if found.is_counted else 0.5, method)
    after, chosen = sparse(graph, step, samples)
    assert [item.anchor for item in chosen] == ["fc1_bias", "fc2"]
    assert [node.target for node in after.calls()] == [node.target for node in graph.calls()], "the operators stay"
    for name in ("fc1_bias", "fc1", "fc2"):
        node = after.find(name)
        assert node is not None
        weight = weight_of(after, node)
        assert weight is not None and found.violation(weight) == ""
        assert node.meta["sparsity"] == Mark.of(found, weight)
        share = found.sparsity if found.is_counted else 0.5
        assert found.zeros(weight) == pytest.approx(share, abs=0.02)
    assert list(marks(after)) == ["fc1", "fc2"]
    assert 0 < noise(graph, after, samples) < (1.0 if "x" not in pattern else 2.0)


def test_constants_keep_their_names_and_storage() -> None:
    graph = prepared(linears())
    after, _ = sparse(graph, Sparsify("2:4"), rows())
    before, now = (to_model(found).graph for found in (graph, after))
    stored = [sorted((item.name, list(item.dims), item.data_type) for item in found.initializer) for found in (before, now)]
    assert stored[0] == stored[1]
    assert [node.name for node in now.node] == [node.name for node in before.node]


def test_better_methods_lose_less() -> None:
    graph, every = prepared(linears(64, 96)), rows(12, 64)
    errors = [noise(graph, sparse(graph, Sparsify("2:4", method=method), every[:8])[0], every[8:])
              for method in ("sparsegpt", "wanda", "magnitude")]  # fmt: skip
    assert errors[0] < 0.5 * min(errors[1:])


def test_one_by_one_convolutions_are_linears_over_positions() -> None:
    graph, samples = prepared(convolutions(), 4), images()
    after, chosen = sparse(graph, Sparsify("2:4"), samples)
    assert [item.anchor for item in chosen] == ["point"]
    node = after.find("point")
    assert node is not None and node.kwargs == graph.find("point").kwargs  # type: ignore[union-attr]
    weight = weight_of(after, node)
    assert weight is not None and PATTERN.violation(weight) == ""
    plain, _ = sparse(graph, Sparsify("2:4", method="magnitude"), samples)
    assert 0 < noise(graph, after, samples) < noise(graph, plain, samples)
    assert reasons(graph, Sparsify("2:4")) == {
        "stem": "its kernel is 3x3; zeros are for linears and 1x1 convolutions of one group",
        "depth": "its kernel is 3x3 in 24 groups; zeros are for linears and 1x1 convolutions of one group",
        "head": "its value is an output of the model: heads stay dense unless --include names them",
    }


PATTERN = Pattern.parse("2:4")


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(32, 48), nn.Linear(48, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.first(x))).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_graphs(dtype: torch.dtype) -> None:
    samples = rows(dtype=dtype)
    graph = torch_graph(Perceptron().to(dtype), samples[0][0])
    after, chosen = sparse(graph, Sparsify("2:4"), samples, size_context(capabilities=Eager()))
    assert [item.anchor for item in chosen] == ["linear"]
    weight = next(weight_of(after, node) for node in after.calls())
    assert weight is not None and weight.dtype == dtype and PATTERN.violation(weight) == ""
    assert "its value is an output of the model" in reasons(graph, Sparsify("2:4"))["linear_1"]


def test_half_precision_files() -> None:
    graph, samples = prepared(linears(dtype=np.float16)), rows(dtype=torch.float16)
    after, _ = sparse(graph, Sparsify("4x1", 0.5), samples)
    weight = weight_of(after, after.find("fc2"))  # type: ignore[arg-type]
    assert weight is not None and weight.dtype == torch.float16
    assert 0 < noise(graph, after, samples) < 1


def test_what_has_the_pattern_already_is_only_marked() -> None:
    """As a model from elsewhere comes: no weight changes, no error."""
    wanted = PATTERN.mask(torch.rand(48, 32, generator=torch.Generator().manual_seed(0)), 0)
    random = np.random.default_rng(0).normal(size=(48, 32)) * wanted.numpy()
    graph, samples = prepared(linears(w1=random.T)), rows()
    step = Sparsify("2:4")
    first = offered(step, graph)[0]
    stats = collect(graph, samples, step.observed(graph, first))
    assert step.estimate(graph, first, stats).error == 0.0
    after = graph.copy()
    step.apply(after, first, stats)
    assert list(marks(after).values()) == [Mark(PATTERN, 0.5)]
    assert torch.equal(after.run(samples[0])[0], graph.run(samples[0])[0])


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_thin_matrices_take_back_error(method: str) -> None:
    graph, every = prepared(linears(64, 96)), rows(12, 64)
    plain, _ = sparse(graph, Sparsify("2:4", method=method), every[:8])
    step = Sparsify("2:4", method=method, rank=0.2)
    after, chosen = sparse(graph, step, every[:8])
    assert chosen[0].setting["rank"] == int(0.2 * 64 * 96 / 160)
    assert list(marks(after)) == ["fc1", "fc2"], "the core alone is marked"
    assert noise(graph, after, every[8:]) < 0.7 * noise(graph, plain, every[8:])


@pytest.mark.parametrize("origin", ["onnx", "torch"])
def test_armor_wraps_the_core(origin: str) -> None:
    torch.manual_seed(0)
    samples = rows(8, 32)
    graph = prepared(linears(32, 48)) if origin == "onnx" else torch_graph(Perceptron(), samples[0][0])
    ctx = size_context(capabilities=Eager())
    errors = []
    for steps in (0, 60):
        step = Sparsify(method="armor", block=8, steps=steps)
        after, chosen = sparse(graph, step, samples, ctx)
        assert chosen[0].setting["pattern"] == "2:4"
        (mark, *_) = marks(after).values()
        assert mark == Mark(PATTERN, 0.5)
        errors.append(noise(graph, after, samples))
    assert errors[1] < 0.7 * errors[0]


# ---- it is neutral, and only where it pays


def test_no_sparsity_offers_nothing() -> None:
    graph = prepared(linears())
    for step in (Sparsify(sparsity=0.0), Sparsify("2:4", 0), Sparsify("4x1", 0)):
        assert not list(step.candidates(graph, size_context()))
        assert_neutral(step, graph, rows(), size_context())


def test_this_cpu_skips_nothing_chosen_per_output() -> None:
    graph = prepared(linears())
    said = set(reasons(graph, Sparsify("2:4"), ORT).values())
    assert (
        "2:4 gives no time on host: no x86 instruction skips zeros chosen per output; own 8-bit kernels skip "
        '4x1, 8x1, 16x1 (needs custom_ops and the pass quantize-linear), objective="size" stores zeros in fewer bytes'
    ) in said
    assert not offered(Sparsify("2:4"), graph, ORT) and offered(Sparsify("2:4"), graph, size_context())
    arm = Context(get_target("aarch64"), capabilities=OnnxRuntime())
    assert_refuses(Sparsify("unstructured"), graph, "1x1 gives no time on aarch64: no aarch64 instruction", arm)
    assert_refuses(Sparsify("8x1"), graph, 'no kernel that skips zeros in blocks of 8x1; objective="size" stores', arm)
    assert_refuses(Sparsify(), graph, "ONNX Runtime has no kernel that skips zeros in blocks of 4x1", ORT)
    assert_refuses(Sparsify(), graph, "plain-cpu lists no kernel that skips unstructured in float32", Context(PLAIN_CPU))
    assert_refuses(Sparsify("4x1"), graph, "eager multiplies zeros like other numbers", Context(PLAIN_CPU, capabilities=Eager()))


def test_own_kernels_are_credited_with_quantising_alone() -> None:
    """The gain is that of zeros in 8 bits, not that of 8 bits."""
    graph = prepared(linears(512, 1024), 256)
    both = Context(HOST, capabilities=OnnxRuntime(), custom_ops=True, later=("quantize-linear",))
    found = offered(Sparsify(), graph, both)
    assert {item.setting["pattern"] for item in found} == {"4x1"} and {item.setting["kernel"] for item in found} == {"int8"}
    assert [item.setting["sparsity"] for item in found if item.anchor == "fc1_bias"] == [0.5, 0.7, 0.8, 0.9]
    assert {item.setting["kernel"] for item in offered(Sparsify("16x1"), graph, both)} == {"int8"}
    gains = []
    for item in found[:4]:
        before, after = Sparsify().work(graph, item)
        assert before.dtype == after.dtype == "int8" and before == dataclasses.replace(after, zeros=None)
        gains.append(predict(before, HOST).seconds / predict(after, HOST).seconds)
    assert gains == sorted(gains) and 1.2 < gains[0] < 1.6 and 3 < gains[3] < 5.4
    for lacking, text in (({"custom_ops": False}, "needs custom_ops"), ({"later": ()}, "needs the pass quantize-linear")):
        assert_refuses(Sparsify(), graph, text, dataclasses.replace(both, **lacking))
    few = prepared(linears(512, 1024), 4)
    assert re.match(r"too few rows at a time, 4: 4x1 is known to be faster from \d+ on", reasons(few, Sparsify(), both)["fc2"])
    image = prepared(convolutions(), 64)
    assert reasons(image, Sparsify(), both)["point"] == "own kernels skip zeros of linears, not of convolutions"


def test_two_of_four_on_a_gpu() -> None:
    a100 = Context(get_target("a100"), capabilities=Eager())
    half = prepared(linears(256, 512, np.float16), 4096)
    (first, *_) = offered(Sparsify(), half, a100)
    assert first.setting["pattern"] == "2:4" and first.anchor == "fc1_bias"
    before, after = Sparsify().work(half, first)
    assert 1.1 < predict(before, a100.target).seconds / predict(after, a100.target).seconds <= 1.38
    one = reasons(prepared(linears(256, 512, np.float16), 1), Sparsify("2:4"), a100)["fc1_bias"]
    assert one.startswith("too few rows at a time, 1: 2:4 is known to be faster from 3072 on (PyTorch")
    wide = reasons(prepared(linears(256, 512), 4096), Sparsify("2:4"), a100)["fc1_bias"]
    assert wide.startswith("2:4 products take float16 and bfloat16; the weight is float32")
    blocks = reasons(half, Sparsify("4x1"), a100)["fc1_bias"]
    assert blocks.startswith("the matrix units of CUDA devices skip 2:4, not 4x1")
    assert reasons(half, Sparsify("2:4"), a100)["fc2"].startswith(
        "2:4 products take outputs in multiples of 32 and inputs in multiples of 64; the weight is 40x512"
    )
    h200 = Context(get_target("h200"), capabilities=Eager())
    assert reasons(half, Sparsify("2:4"), h200)["fc1_bias"].startswith("h200 lists no kernel that skips 2:4 in float16")


def test_blocks_on_webassembly() -> None:
    pytest.importorskip("tvm", reason="the tvm backend says what it skips")
    wasm = Context(get_target("wasm-simd"), capabilities=Tvm())
    graph = prepared(linears(256, 512), 256)
    (first, *_) = offered(Sparsify(sparsity=0.8), graph, wasm)
    assert first.setting["pattern"] == "8x1" and first.setting.get("kernel") is None
    before, after = Sparsify().work(graph, first)
    assert 3.5 < predict(before, wasm.target).seconds / predict(after, wasm.target).seconds < 4.5
    assert_refuses(Sparsify("2:4"), graph, "2:4 gives no time on wasm-simd: kernels skip blocks of outputs, a multiple of 4", wasm)
    assert_refuses(Sparsify("8x1"), prepared(linears(256, 512, np.float16), 256), "take float32 and int8, not float16", wasm)


# ---- refusals


def test_groups_that_do_not_divide() -> None:
    graph = prepared(linears(30, 48))
    assert reasons(graph, Sparsify("2:4"))["fc1_bias"] == "30 inputs do not divide by the 4 of the pattern 2:4"
    assert reasons(graph, Sparsify("16x1", 0.5))["fc2"] == "40 outputs do not divide by the 16 of the pattern 16x1"


def test_heads_are_left_dense_unless_named() -> None:
    graph = prepared(linears())
    assert "heads stay dense unless --include names them" in reasons(graph, Sparsify("2:4"))["head"]
    named = size_context(include=re.compile("head"))
    assert [item.anchor for item in offered(Sparsify("2:4"), graph, named)] == ["head"]
    left_out = size_context(exclude=re.compile("fc2"))
    assert reasons(graph, Sparsify("2:4"), left_out)["fc2"] == "excluded by --exclude fc2"


@pytest.mark.parametrize("how", ["twice", "embedding"])
def test_tied_weights_are_left_dense(how: str) -> None:
    random = np.random.default_rng(0)
    weights = {"w": random.normal(size=(32, 32)), "v": random.normal(size=(32, 8)), "i": np.array([0.0, 1, 2])}
    if how == "twice":
        nodes = [helper.make_node("MatMul", ["x", "w"], ["a"], "one"), helper.make_node("Relu", ["a"], ["r"], "act"),
                 helper.make_node("MatMul", ["r", "w"], ["b"], "two")]  # fmt: skip
    else:
        nodes = [helper.make_node("Cast", ["i"], ["j"], "ids", to=7), helper.make_node("Gather", ["w", "j"], ["t"], "embed"),
                 helper.make_node("ReduceMean", ["t"], ["s"], "mean", keepdims=1), helper.make_node("Add", ["x", "s"], ["a"], "add"),
                 helper.make_node("Transpose", ["w"], ["u"], "turn"), helper.make_node("MatMul", ["a", "u"], ["b"], "two")]  # fmt: skip
    nodes.append(helper.make_node("MatMul", ["b", "v"], ["y"], "head"))
    graph = prepared(model_of(nodes, weights, ["n", 32]))
    other = "one" if how == "twice" else "embed"
    assert reasons(graph, Sparsify("2:4"))["two"] == f"its weight is tied: {other} uses it too and would lose weights"
    assert not offered(Sparsify("2:4"), graph)


def test_weights_of_one_storage_are_not_tied() -> None:
    """As those of a memory-mapped file; parts that overlap are."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    graph, asked = torch_graph(model, rows()[0][0]), size_context(capabilities=Eager())
    storage = torch.cat([parameter.detach().reshape(-1) for parameter in (model[0].weight, model[2].weight)])
    first, second = [str(node.target) for node in graph.fx.find_nodes(op="get_attr") if node.meta["val"].ndim == 2][:2]

    def offers_at(begin: int) -> int:
        set_attribute(graph.root, first, storage[:1024].view(32, 32))
        set_attribute(graph.root, second, storage[begin : begin + 1024].view(32, 32))
        return len(offered(Sparsify("2:4"), graph, asked))

    assert offers_at(1024) == 2
    assert offers_at(992) == 0


def test_tied_parameters_of_torch_modules() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(torch.relu(self.first(x))))

    graph = torch_graph(Tied(), rows()[0][0])
    assert not offered(Sparsify("2:4"), graph, size_context(capabilities=Eager()))
    assert "its weight is tied: linear_1 uses it too" in reasons(graph, Sparsify("2:4"))["linear"]


def test_patterns_that_are_in_each_others_way() -> None:
    graph, _ = sparse(prepared(linears()), Sparsify("2:4"), rows())
    assert reasons(graph, Sparsify("4x1", 0.7))["fc2"] == "its weight has the pattern 2:4 already, which 4x1 would break"
    assert reasons(graph, Sparsify("2:4"))["fc2"] == "its weight has the pattern 2:4 already, with 50% zeros"
    blocks, _ = sparse(prepared(linears()), Sparsify("4x1", 0.5), rows())
    assert reasons(blocks, Sparsify("4x1", 0.4))["fc2"] == "its weight has the pattern 4x1 already, with 50% zeros"
    assert [item.anchor for item in offered(Sparsify("4x1", 0.8), blocks)] == ["fc1_bias", "fc2"], "more zeros are fine"


def test_zeros_that_came_with_the_model_are_not_filled() -> None:
    keep = np.random.default_rng(1).random((40, 48)) < 0.25
    graph = prepared(linears(w2=np.random.default_rng(0).normal(size=(40, 48)) * keep))
    zeros = f"{1 - keep.mean():.0%}"
    assert reasons(graph, Sparsify("2:4"))["fc2"] == f"{zeros} of its weights are zero already, not as 2:4, which would fill some"
    assert f"{zeros} of its weights are zero already, not as 4x1" in reasons(graph, Sparsify("4x1", 0.6))["fc2"]
    assert "fc2" not in reasons(graph, Sparsify("unstructured", 0.9))
    assert "fc2" not in reasons(graph, Sparsify("unstructured", 0.7)), "it has these zeros already"


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (np.full((40, 48), np.nan), "the weight holds infinite or NaN values"),
        (np.zeros((0, 48)), "the weight is empty"),
    ],
)
def test_bad_weights(weight: np.ndarray, text: str) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["g"], "fc", transB=1), helper.make_node("Relu", ["g"], ["y"], "relu")]
    assert reasons(prepared(model_of(nodes, {"w": weight}, ["n", 48])), Sparsify("2:4"))["fc"] == text


def test_weights_of_integers_and_weights_computed_at_run_time() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], "fc"), helper.make_node("Relu", ["m"], ["y"], "relu")]
    whole = model_of(nodes, {"w": np.ones((8, 8))}, ["n", 8], np.int32)
    assert reasons(prepared(whole), Sparsify("2:4"))["fc"] == "the weight has type torch.int32; expected a floating-point type"
    nodes = [helper.make_node("Gemm", ["x", "t"], ["g"], "fc"), helper.make_node("Relu", ["g"], ["y"], "relu")]
    nodes.insert(0, helper.make_node("Transpose", ["x"], ["t"], "turn"))
    assert "computed at run time" in reasons(prepared(model_of(nodes, {}, [8, 8])), Sparsify("2:4"))["fc"]


def test_inputs_that_are_never_anything_but_zero() -> None:
    graph = prepared(linears())
    dead = [[torch.zeros(24, 32)] for _ in range(2)]
    step = Sparsify("2:4")
    first = offered(step, graph)[0]
    found = step.estimate(graph, first, collect(graph, dead, step.observed(graph, first)))
    assert str(found.refusal) == "its input is 0 in every calibration sample: nothing tells which weights matter"
    plain = Sparsify("2:4", method="magnitude")
    first = offered(plain, graph)[0]
    assert plain.estimate(graph, first, collect(graph, dead, plain.observed(graph, first))).refusal is None


def test_infinite_calibration_data() -> None:
    graph = prepared(linears())
    samples = rows(2)
    samples[1][0][3, 5] = torch.inf
    step = Sparsify("2:4")
    first = offered(step, graph)[0]
    found = step.estimate(graph, first, collect(graph, samples, step.observed(graph, first)))
    assert str(found.refusal) == "its calibration data hold infinite or NaN values"


@pytest.mark.parametrize(
    ("moments", "text"),
    [
        (torch.full((32, 32), torch.nan, dtype=torch.float64), "the second moments of its input are infinite or NaN"),
        (-torch.eye(32, dtype=torch.float64), "the second moments of its input have a negative diagonal"),
        (1e9 - torch.eye(32, dtype=torch.float64) * (1e9 - 1e-9), "not finite or not positive"),
        (torch.eye(31, dtype=torch.float64), r"second moments \[31, 31\] do not fit a weight of 32 inputs"),
    ],
)
def test_bad_statistics_decline_and_change_nothing(moments: torch.Tensor, text: str) -> None:
    graph = prepared(linears())
    step = Sparsify("2:4")
    first = offered(step, graph)[0]
    after = graph.copy()
    with pytest.raises(Declined, match=text):
        step.apply(after, first, Stats(moments={step.moments(graph, first).name: moments}))  # type: ignore[union-attr]
    assert not marks(after) and torch.equal(after.run(rows()[0])[0], graph.run(rows()[0])[0])


def test_what_is_beside_has_its_own_refusals() -> None:
    graph = prepared(linears(32, 48))
    assert reasons(graph, Sparsify("2:4", rank=0.01))["fc2"] == (
        "a rank of 1 has more than the asked share of the parameters of a weight 40x48"
    )
    assert reasons(graph, Sparsify(method="armor", block=16))["fc2"] == "40x48 does not divide into blocks of 16; try another block"
    assert "blocks of 2 cut through the groups of 2:4" in reasons(graph, Sparsify(method="armor", block=2)).values()
    image = prepared(convolutions(), 4)
    text = "thin and block-diagonal matrices are put beside linears, not convolutions"
    assert reasons(image, Sparsify("2:4", rank=0.2))["point"] == reasons(image, Sparsify(method="armor", block=8))["point"] == text


# ---- options and names


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pattern": "4:2"}, "leaves no zeros to choose"),
        ({"pattern": "wide"}, "sparsity pattern 'wide'"),
        ({"sparsity": 1.0}, "sparsity=1.0; expected a share of at least 0 and below 1"),
        ({"sparsity": "many"}, "sparsity=many; expected a share"),
        ({"pattern": "2:4", "sparsity": 0.7}, "sparsity=0.7 with pattern=2:4, which has 0.5"),
        ({"method": "guess"}, "method='guess'; expected one of"),
        ({"rank": 1.5}, "rank=1.5; expected a share"),
        ({"rank": 0.1, "method": "magnitude"}, "rank=0.1 with method='magnitude'; expected sparsegpt or wanda"),
        ({"method": "armor", "pattern": "4x1"}, "its core is N:M"),
        ({"block": 0}, "block=0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidOption, match=text):
        Sparsify(**options)


def test_sparsify_24_is_another_name() -> None:
    assert pass_from_text("sparsify-24") == Sparsify(pattern="2:4")
    assert pass_from_text("sparsify_24{method=wanda}") == Sparsify(pattern="2:4", method="wanda")
    assert find_pass("sparsify-24") is Sparsify and "sparsify-24" in pass_names()
    with pytest.raises(InvalidOption, match="sparsify-24 sets pattern=2:4; write sparsify{...}"):
        pass_from_text("sparsify-24{pattern=4x1}")
    with pytest.raises(UnknownName, match="did you mean 'sparsify-24'"):
        pass_from_text("sparsify-42")
    assert str(Sparsify("4x1", 0.7)) == "sparsify{pattern=4x1,sparsity=0.7}"
