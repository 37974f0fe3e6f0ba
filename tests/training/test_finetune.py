"""`fxopt.finetune`: the same numbers as a loop in PyTorch, zeros that stay, checkpoints, and clear errors."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.errors import Diverged, InvalidInput, InvalidModel, InvalidOption, UnknownName, Unsupported
from fxopt.finetuning import Finetuned
from fxopt.frontends.to_onnx import to_onnx
from fxopt.frontends.torch_export import load as load_torch
from fxopt.ir.graph import Graph, set_attribute
from fxopt.ir.shapes import infer
from fxopt.ir.sparsity import Mark, Pattern
from fxopt.ir.views.conv import Conv, convs
from fxopt.ir.views.linear import Linear, linears
from fxopt.training.checkpoints import FILE
from fxopt.training.parameters import parameters
from tests import zoo
from tests.conftest import mlp as mlp_model
from tests.passes.helpers import onnx_graph

DYNAMIC = {"x": {0: "batch"}}


class Net(nn.Module):
    """A convolution, batch norm, a residual block over features with layer norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(8)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.batch_norm(torch.relu(self.conv(x)))  # which no exporter folds
        h = F.max_pool2d(h, 2).flatten(1)
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.head(h)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    for parameter in model.parameters():  # equal constants would become one
        parameter.data += 0.01 * torch.randn_like(parameter)
    model.batch_norm.running_mean = torch.randn(8)
    model.batch_norm.running_var = torch.rand(8) + 0.5
    return model.eval()


@cache
def dense(origin: str, seed: int = 0) -> Graph:
    """The net as a graph; not to be changed."""
    x = torch.randn(3, 1, 4, 4)
    graph = load_torch(net(seed), (x,), DYNAMIC) if origin == "torch" else to_onnx(net(seed), (x,), DYNAMIC)[0]
    infer(graph, {"batch": 3})
    return graph


def batches(count: int = 6, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 1, 4, 4, generator=generator), torch.randint(0, 5, (16,), generator=generator))
        for _ in range(count)
    ]


def prune(graph: Graph, text: str, sparsity: float = 0.5) -> Graph:
    """A copy with marked zeros of the smallest weights, wherever the pattern fits."""
    graph, pattern = graph.copy(), Pattern.parse(text)
    for view in (*linears(graph), *convs(graph)):
        assert isinstance(view, (Linear, Conv))
        weight = view.weight(graph).flatten(1)
        if not pattern.refusal(*weight.shape):
            sparse = weight * pattern.mask(weight.abs(), sparsity)
            stored = sparse.t() if isinstance(view, Linear) and view.transposed else sparse
            target = str(view.weight_node.target)
            set_attribute(graph.root, target, stored.reshape(graph.attribute(target).shape).contiguous())
            view.node.meta["sparsity"] = Mark.of(pattern, sparse)
    return graph


def tuned(model: Any, data: Any, **options: Any) -> Finetuned:
    return fxopt.finetune(model, data, **{"progress": False, **options})


def constants(graph: Graph) -> dict[str, Tensor]:
    names = [str(node.target) for node in graph.fx.find_nodes(op="get_attr")]
    return {name: value for name in names if isinstance(value := graph.attribute(name), Tensor)}


def same_bits(a: Graph, b: Graph) -> bool:
    found, other = constants(a), constants(b)
    return found.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in found.items())


# ---- numbers


def plain_training(model: Net, data: list[tuple[Tensor, Tensor]], rate: float) -> list[float]:
    """The loop that anyone would write."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for x, y in data:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_it_computes_what_a_loop_in_pytorch_does(origin: str) -> None:
    model = net()
    graph, data = dense(origin), batches()
    result = tuned(
        graph, data, optimizer=lambda values: torch.optim.SGD(values, lr=0.05, momentum=0.9), schedule="constant"
    )
    losses = plain_training(model, data, 0.05)
    assert [step.loss for step in result.history] == pytest.approx(losses, rel=1e-4)
    x = torch.randn(7, 1, 4, 4)
    with torch.no_grad():
        expected = model(x)
    assert torch.allclose(result(x), expected, rtol=1e-4, atol=1e-5)
    if origin == "torch":
        weights = result.weights()
        assert weights.keys() == dict(model.named_parameters()).keys()
        copied = net()
        copied.load_state_dict(weights, strict=False)
        with torch.no_grad():
            assert torch.allclose(copied(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "bert", "llama", "vit"])
def test_transformers_of_both_origins_learn_alike(name: str) -> None:
    """The gradients of the weights of linears, seen through steps of plain SGD."""
    inputs = list(zoo.case(name).inputs.values())
    results = []
    for origin in zoo.ORIGINS:
        graph = zoo.graph(name, origin)
        names = [view.weight_node.name for view in linears(graph) if isinstance(view, Linear)]
        goal = torch.randn(_first(graph.run(inputs)).shape, generator=torch.Generator().manual_seed(0))
        data = [(tuple(inputs), goal)] * 3
        result = tuned(
            graph, data, loss=lambda outputs, goal: (_first(outputs) - goal).square().mean(), schedule="constant",
            train=f"^({'|'.join(names)})$",
            optimizer=lambda values: torch.optim.SGD(values, lr=2e-3),
        )  # fmt: skip
        results.append([step.loss for step in result.history])
    assert results[0][2] < results[0][1] < results[0][0]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-3)


def _first(outputs: Any) -> Tensor:
    leaves, _ = torch.utils._pytree.tree_flatten(outputs)
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_trained_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 8).to(dtype)
    name = {torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]
    graph = onnx_graph(f"g ({name}[n, 4] x) => ({name}[n, 8] y) {{ y = MatMul(x, w) }}", w=weight)
    data = [(torch.randn(8, 4).to(dtype), torch.randint(0, 8, (8,)))] * 200
    result = tuned(graph, data, learning_rate=2e-5, schedule="constant")  # steps that the element type cannot hold
    found = next(iter(result.weights().values()))
    assert found.dtype == dtype and not torch.equal(found, weight)
    assert result.history[-1].loss < result.history[0].loss


# ---- what stays


@pytest.mark.parametrize("origin", ["torch", "onnx"])
@pytest.mark.parametrize("pattern", ["4x1", "2:4", "8x2:4", "1x1"])
def test_zeros_stay_and_the_model_learns(origin: str, pattern: str) -> None:
    graph = prune(dense(origin), pattern)
    before = {name: value.clone() for name, value in constants(graph).items()}
    result = tuned(
        graph, batches(), epochs=3, learning_rate=0.02, masks="marks",
        optimizer=lambda values: torch.optim.SGD(values, lr=0.02, momentum=0.9, weight_decay=0.1),
    )  # fmt: skip
    assert result.history[-1].loss < result.history[0].loss
    pruned = 0
    for view in (*linears(graph), *convs(graph)):
        if isinstance(view, (Linear, Conv)) and "sparsity" in view.node.meta:
            target = str(view.weight_node.target)
            was, now = before[target], result.graph.attribute(target)
            pruned += 1
            assert bool((was == 0).any()) and not bool(now[was == 0].any()) and not torch.equal(was, now)
            assert view.node.meta["sparsity"].violation(view.weight(result.graph).flatten(1)) == ""
    assert pruned >= 2
    assert all(torch.equal(value, before[name]) for name, value in constants(graph).items()), "the original changed"


def test_the_graph_keeps_its_structure_and_shares_what_is_not_trained(tmp_path: Path) -> None:
    graph = dense("onnx")
    result = tuned(graph, batches(2), train="head")
    kept, made = list(graph.nodes), list(result.graph.nodes)
    assert [(node.op, node.name, node.target) for node in kept] == [(node.op, node.name, node.target) for node in made]
    assert graph.inputs == result.graph.inputs and graph.outputs == result.graph.outputs
    changed = {name for name, value in constants(graph).items() if not torch.equal(value, result.graph.attribute(name))}
    assert changed == set(result.weights()) and len(changed) == 2
    for name, value in constants(graph).items():
        if name not in changed:
            assert result.graph.attribute(name).data_ptr() == value.data_ptr()
    result.save(tmp_path / "tuned.onnx")
    session = fxopt.load(tmp_path / "tuned.onnx")
    x = torch.randn(3, 1, 4, 4)
    assert torch.allclose(torch.as_tensor(session(x)), result(x), rtol=1e-4, atol=1e-5)
    before, after = onnx_names(graph), onnx_names(fxopt.capture(tmp_path / "tuned.onnx"))
    assert before == after


def onnx_names(graph: Graph) -> list[str]:
    return [f"{node.op} {node.name}" for node in graph.nodes]


def test_batch_statistics_scales_and_tables_of_positions_are_not_trained() -> None:
    roles = parameters(dense("torch"))
    assert not [name for name in roles if "running" in name]
    assert roles == {
        "conv.weight": "weight", "conv.bias": "vector", "batch_norm.weight": "vector", "batch_norm.bias": "vector",
        "up.weight": "weight", "up.bias": "vector", "down.weight": "weight", "down.bias": "vector",
        "norm.weight": "vector", "norm.bias": "vector", "head.weight": "weight", "head.bias": "vector",
    }  # fmt: skip
    text = (
        "g (float[3, 4] x) => (float[3, 4] y) "
        "{ a = MatMul(x, w)\n b = Mul(a, scale)\n c = Add(b, mask)\n y = Add(c, bias) }"
    )
    graph = onnx_graph(
        text, w=torch.randn(4, 4), scale=torch.tensor([0.5]), mask=torch.randn(3, 4), bias=torch.randn(4)
    )
    assert parameters(graph) == {"c_w": "weight", "c_bias": "vector"}
    assert parameters(graph, "mask|scale").keys() == {"c_mask", "c_scale"}
    text = (
        "g (float[n, 4] x, int64[n, 1] ids) => (float[n, 4] y) { p = Cast <to = 1> (ids)\n f = Mul(p, freq)\n c = Cos(f)\n"
        " a = MatMul(x, w)\n b = Mul(a, c)\n y = Mul(b, scale) }"
    )
    graph = onnx_graph(text, w=torch.randn(4, 4), freq=torch.rand(4), scale=torch.rand(4))
    assert parameters(graph) == {"c_w": "weight", "c_scale": "vector"}  # frequencies of positions are no factors


def test_marks_keep_blocks_and_zeros_keep_every_zero() -> None:
    graph = prune(dense("torch"), "4x1")
    weight = graph.attribute("up.weight").clone()
    blocks = Pattern.parse("4x1").spread(~Pattern.parse("4x1").occupied(weight))
    row, column = (int(index) for index in (~blocks).nonzero()[0])
    weight[row, column] = 0.0  # by accident, in a block that is kept
    set_attribute(graph.root, "up.weight", weight)
    found = {
        masks: tuned(graph, batches(2), masks=masks).graph.attribute("up.weight")
        for masks in ("marks", "zeros", "none")
    }
    assert found["marks"][row, column] != 0 and not bool(found["marks"][blocks].any())
    assert found["zeros"][row, column] == 0 and not bool(found["zeros"][blocks].any())
    assert bool(found["none"][blocks].any())  # and nothing is said to be sparse any more
    assert not any("sparsity" in node.meta for node in tuned(graph, batches(1), masks="none").graph.nodes)
    with pytest.raises(Unsupported, match="no node has a mark"):
        tuned(dense("torch"), batches(1), masks="marks")


def test_the_random_numbers_of_the_surroundings_are_untouched() -> None:
    graph, items = dense("torch"), batches(4)

    def numbers() -> tuple[float, float, float]:
        return torch.rand(1).item(), np.random.rand(), random.random()

    found = []
    for trains in (False, True):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        if trains:
            tuned(graph, torch.utils.data.DataLoader(items, batch_size=None, shuffle=True))
        found.append(numbers())
    assert found[0] == found[1]


# ---- objectives


def test_the_terms_of_the_loss_are_those_of_the_papers() -> None:
    """Against sums written out in float64; the last two positions of the second row are padding."""
    from fxopt.training.losses import cross_entropy, distribution, mean_square, next_token, square_head

    torch.manual_seed(0)
    student, teacher, targets = torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.randint(0, 5, (2, 4))
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    places = [(int(b), int(t)) for b, t in real.nonzero()]

    def softmax(row: Tensor, temperature: float = 1.0) -> list[float]:
        powers = [math.exp(float(value) / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    expected = -sum(math.log(softmax(student[p])[int(targets[p])]) for p in places) / 6
    assert cross_entropy(student, targets, real).item() == pytest.approx(expected, rel=1e-5)
    marked = targets.masked_fill(~real, -100)
    assert cross_entropy(student, marked).item() == pytest.approx(expected, rel=1e-5)
    turned = cross_entropy(student.movedim(-1, 1), marked)  # [batch, classes, space]
    assert turned.item() == pytest.approx(expected, rel=1e-5)
    shares = torch.tensor([[softmax(row) for row in rows] for rows in teacher])
    soft = -sum(q * math.log(p) for place in places for q, p in zip(softmax(teacher[place]), softmax(student[place])))
    assert cross_entropy(student, shares, real).item() == pytest.approx(soft / 6, rel=1e-5)
    following = [(b, t) for b, t in places if t > 0]
    after = -sum(math.log(softmax(student[b, t - 1])[int(targets[b, t])]) for b, t in following) / len(following)
    assert next_token(student, targets, real).item() == pytest.approx(after, rel=1e-5)
    apart = sum(
        q * math.log(q / p)
        for place in places
        for q, p in zip(softmax(teacher[place], 2.0), softmax(student[place], 2.0))
    )
    assert distribution(student, teacher, 2.0, -1, real).item() == pytest.approx(4 * apart / 6, rel=1e-5)
    s, t = ([value for place in places for value in each[place].double().tolist()] for each in (student, teacher))
    squares = sum((a - b) ** 2 for a, b in zip(s, t)) / sum(b * b for b in t)
    assert square_head(student, teacher, real).item() == pytest.approx(squares, rel=1e-5)
    flat = square_head(student.flatten(0, 1), teacher.flatten(0, 1), real)
    assert flat.item() == pytest.approx(squares, rel=1e-5)
    assert mean_square(student, teacher, real).item() == pytest.approx(
        sum((a - b) ** 2 for a, b in zip(s, t)) / len(s), rel=1e-5
    )
    assert cross_entropy(student, torch.full((2, 4), -100)).item() == 0.0


def test_the_whole_loss_is_the_weighted_sum_of_its_terms() -> None:
    whole = dense("torch")
    sparse = prune(whole, "4x1", 0.7)
    result = tuned(sparse, batches(2), teacher=whole, task=2.0, distill=0.5, squarehead=3.0, temperature=2.0)
    for step in result.history:
        assert step.loss == pytest.approx(2.0 * step.task + 0.5 * step.distill + 3.0 * step.squarehead, rel=1e-5)
        assert min(step.task, step.distill, step.squarehead) > 0
    alike = tuned(whole, batches(1), teacher=whole, loss=None).history[0]
    assert alike.task == 0 and abs(alike.distill) < 1e-6 and alike.squarehead < 1e-9


def test_a_teacher_can_be_a_graph_a_module_or_a_function() -> None:
    model = net()
    whole, data = dense("torch"), batches(3)
    sparse = prune(whole, "4x1", 0.7)
    x = data[0][0]
    as_graph = tuned(sparse, data, teacher=whole)
    as_module = tuned(sparse, data, teacher=model, example_inputs=(x[:2],), dynamic_shapes=DYNAMIC)
    as_function = tuned(sparse, data, teacher=model)
    without = tuned(sparse, data, teacher=whole, squarehead=0)
    assert as_graph.history == as_module.history and as_graph.history[0].squarehead > 0
    assert [step.loss for step in as_function.history] == pytest.approx(
        [step.loss for step in without.history], rel=1e-4
    )
    exported = tuned(sparse, data, teacher=dense("onnx"))  # other names: blocks are paired in order
    assert [step.squarehead for step in exported.history] == pytest.approx(
        [step.squarehead for step in as_graph.history], rel=1e-3
    )
    with pytest.raises(InvalidOption, match="give the teacher as a model"):
        tuned(sparse, data, teacher=lambda x: model(x), squarehead=1.0)
    with pytest.raises(InvalidOption, match="need teacher="):
        tuned(sparse, data, distill=1.0)
    with pytest.raises(UnknownName, match=r"'gelo'; did you mean 'gelu'"):
        tuned(sparse, data, teacher=whole, blocks=["gelo"])
    named = tuned(sparse, data, teacher=whole, blocks=["gelu", "add_35"])
    assert named.history[0].squarehead > as_graph.history[0].squarehead


def test_without_blocks_squarehead_is_left_out_and_said() -> None:
    graph = onnx_graph(_LINEAR, w=torch.randn(4, 3))
    data = [(torch.randn(2, 4), torch.tensor([0, 2]))]
    with pytest.warns(UserWarning, match="without SquareHead: the model has no residual blocks"):
        assert tuned(graph, data, teacher=graph).history[0].squarehead == 0
    with pytest.raises(InvalidOption, match="no residual blocks; name the nodes"):
        tuned(graph, data, teacher=graph, squarehead=1.0)


_LINEAR = "g (float[n, 4] x) => (float[n, 3] y) { y = MatMul(x, w) }"


def test_distillation_alone_brings_a_pruned_model_back() -> None:
    whole = dense("onnx")
    sparse = prune(whole, "4x1", 0.5)
    data = [x for x, _ in batches(100)]
    result = tuned(sparse, data, loss=None, teacher=whole, learning_rate=5e-3)
    x = torch.randn(64, 1, 4, 4)
    (expected,), (was,), (now,) = whole.run([x]), sparse.run([x]), result.graph.run([x])
    assert (now - expected).square().mean() < 0.5 * (was - expected).square().mean()


def test_losses_of_other_tasks() -> None:
    graph = onnx_graph(_LINEAR, w=torch.randn(4, 3))
    x = torch.randn(64, 4)
    goal = torch.randn(4, 3)
    data = [(x, x @ goal)] * 300
    found = tuned(graph, data, loss="mse", learning_rate=0.2)
    assert torch.allclose(found.weights()["c_w"], goal, atol=1e-2)
    own = tuned(graph, data, loss=lambda y, wanted: (y - wanted).square().mean(), learning_rate=0.2)
    assert same_bits(found.graph, own.graph)
    tokens = "g (int64[n, s] ids) => (float[n, s, 6] y) { e = Gather(table, ids)\n y = MatMul(e, w) }"
    model = onnx_graph(tokens, table=torch.randn(6, 8), w=torch.randn(8, 6))
    ids = torch.arange(12).remainder(6).reshape(1, 12)
    result = tuned(model, [ids] * 100, loss="next-token", learning_rate=0.1)  # the next is always one more
    assert result.history[-1].loss < 0.05
    assert torch.equal(result(ids)[0, :5].argmax(-1), torch.arange(1, 6))


# ---- batches


def test_batches_in_every_form() -> None:
    text = "g (float[n, 4] a, float[n, 4] b) => (float[n, 3] y) { c = Sub(a, b)\n y = MatMul(c, w) }"
    graph = onnx_graph(text, w=torch.randn(4, 3))
    a, b, y = torch.randn(5, 4), torch.randn(5, 4), torch.randint(0, 3, (5,))
    forms: list[Any] = [
        (a, b, y), ((a, b), y), [[a, b], y], ({"b": b, "a": a}, y), {"a": a, "b": b, "labels": y},
        {"a": a, "b": b, "target": y}, {"a": a.numpy(), "b": b.numpy(), "label": y.tolist()},
    ]  # fmt: skip
    losses = {round(tuned(graph, [form]).history[0].loss, 5) for form in forms}
    assert len(losses) == 1
    named = {"a": a, "b": b, "answer": y}
    assert round(tuned(graph, [named], targets="answer").history[0].loss, 5) in losses
    with pytest.warns(UserWarning, match="'idx' is left out: the model does not take it"):
        tuned(graph, [{"a": a, "b": b, "target": y, "idx": torch.arange(5)}])
    with pytest.raises(InvalidInput, match="batch 0 has no targets"):
        tuned(graph, [(a, b)] * 2)
    with pytest.raises(InvalidInput, match="has no 'answers', which targets= names; it has a, b, answer"):
        tuned(graph, [named], targets="answers")
    with pytest.raises(InvalidInput, match="batch 1: input 'b' has shape .5, 3., expected .n, 4."):
        tuned(graph, [(a, b, y), (a, b[:, :3], y)])


def test_padding_does_not_count() -> None:
    """Positions that an attention mask hides change neither the loss of the task nor those of the teacher."""
    text = (
        "g (int64[n, s] ids, int64[n, s] attention_mask) => (float[n, s, 6] y) "
        "{ e = Gather(table, ids)\n f = MatMul(e, u)\n h = Add(e, f)\n m = Unsqueeze(attention_mask, last)\n"
        " k = Cast <to = 1> (m)\n z = Mul(h, k)\n y = MatMul(h, w)\n unused = Identity(z) }"
    )
    torch.manual_seed(0)
    weights = {"table": torch.randn(6, 8), "u": torch.randn(8, 8), "w": torch.randn(8, 6)}
    graph = onnx_graph(text, last=torch.tensor([-1]), **weights)
    other = onnx_graph(text, last=torch.tensor([-1]), **{name: value + 0.1 for name, value in weights.items()})
    ids, labels = torch.randint(0, 6, (2, 5)), torch.randint(0, 6, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[:, 3:] = 0
    changed = ids.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 6
    found = [
        tuned(graph, [{"ids": each, "attention_mask": mask, "labels": labels}], teacher=other).history[0]
        for each in (ids, changed)
    ]
    assert found[0] == found[1] and found[0].squarehead > 0
    assert found[0] != tuned(
        graph, [{"ids": ids, "attention_mask": torch.ones_like(mask), "labels": labels}], teacher=other
    ).history[0]  # fmt: skip


def test_how_long() -> None:
    graph, data = dense("torch"), batches(4)
    assert [len(tuned(graph, data, **options).history) for options in ({}, {"epochs": 3}, {"steps": 6})] == [4, 12, 6]
    rates = [step.rate for step in tuned(graph, data, epochs=10, learning_rate=1.0, clip=1e-9).history]
    assert max(rates) == pytest.approx(0.975) and rates.index(max(rates)) == 1 and rates[-1] == pytest.approx(1 / 40)
    assert {step.rate for step in tuned(graph, iter(data), learning_rate=1e-4).history} == {1e-4}  # no known end
    halves = tuned(graph, data, schedule=lambda step, steps: 0.5**step, learning_rate=1e-4).history
    assert [step.rate for step in halves] == [1e-4, 5e-5, 2.5e-5, 1.25e-5]
    with pytest.raises(InvalidInput, match="ended after 4 batches, and gave none in epoch 2; 9 steps need data"):
        tuned(graph, iter(data), steps=9)
    with pytest.raises(InvalidInput, match="gave no batches"):
        tuned(graph, [])
    with pytest.raises(InvalidOption, match="'cosine' needs steps="):
        tuned(graph, iter(data), schedule="cosine")
    with pytest.raises(InvalidInput, match="put a single batch into a list"):
        tuned(graph, data[0][0])


# ---- checkpoints


class Crash(Exception):
    """The run is cut off."""


def crashing(data: list[Any], after: int) -> Iterator[Any]:
    for index, item in enumerate(data):
        if index == after:
            raise Crash
        yield item


class Noisy(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Rows with random noise, drawn from three generators; breaks down at the n-th row."""

    def __init__(self, rows: int, last: int | None = None) -> None:
        self.x, self.y = batches(1)[0]
        self.rows, self.left = rows, last

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Crash
        noise = torch.rand(1) + float(np.random.rand()) + random.random()
        return self.x[index] * noise, self.y[index]


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path: Path, origin: str) -> None:
    teacher = dense(origin)
    sparse = prune(teacher, "4x1")
    options: dict[str, Any] = {"teacher": teacher, "epochs": 3, "checkpoint_every": 4, "learning_rate": 0.01}

    def loader(last: int | None = None) -> Any:
        return torch.utils.data.DataLoader(Noisy(16, last), batch_size=3, shuffle=True)

    whole = tuned(sparse, loader(), **options)
    assert len(whole.history) == 18
    for last in (5 * 3, 9 * 3 + 1):  # in the first epoch, before it is over, and in the second
        folder = tmp_path / f"{origin}-{last}"
        with pytest.raises(Crash):
            tuned(sparse, loader(last), checkpoint=folder, **options)
        assert [file.name for file in folder.iterdir()] == [FILE]
        torch.manual_seed(last)  # whatever the surroundings draw
        resumed = tuned(sparse, loader(), checkpoint=folder, resume=True, **options)
        assert resumed.history == whole.history
        assert same_bits(resumed.graph, whole.graph)
        again = tuned(sparse, loader(), checkpoint=folder, resume=True, **options)
        assert again.history == whole.history and same_bits(again.graph, whole.graph)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "RMSprop", "Adagrad", "NAdam", "Rprop"])
def test_the_state_of_optimizers_is_resumed(tmp_path: Path, kind: str) -> None:
    graph, data = dense("torch"), batches(8)

    def optimizer(values: Any) -> torch.optim.Optimizer:
        more = {"momentum": 0.9} if kind in ("SGD", "RMSprop") else {}
        made: torch.optim.Optimizer = getattr(torch.optim, kind)(values, lr=1e-3, **more)
        return made

    options: dict[str, Any] = {"optimizer": optimizer, "schedule": "constant", "checkpoint_every": 2}
    with pytest.raises(Crash):
        tuned(graph, crashing(data, 5), checkpoint=tmp_path, **options)
    resumed = tuned(graph, data, checkpoint=tmp_path, resume=True, **options)
    assert same_bits(resumed.graph, tuned(graph, data, **options).graph)


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    graph, data = dense("torch"), batches(2)
    tuned(graph, data, checkpoint=tmp_path)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(InvalidOption, match="holds a checkpoint; give resume=True"):
        tuned(graph, data, checkpoint=tmp_path)
    with pytest.raises(InvalidOption, match="learning_rate was 0.001 there and is 0.01 here"):
        tuned(graph, data, checkpoint=tmp_path, resume=True, learning_rate=0.01)
    with pytest.raises(InvalidOption, match="of another run: model was"):
        tuned(dense("torch", 1), data, checkpoint=tmp_path, resume=True)
    with pytest.raises(InvalidOption, match="resume=True needs checkpoint="):
        tuned(graph, data, resume=True)
    assert (tmp_path / FILE).read_bytes() == before
    for damaged in (before[:100], b"", before[: len(before) // 2]):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(InvalidModel, match=FILE):
            tuned(graph, data, checkpoint=tmp_path, resume=True)
    fresh = tuned(graph, data, checkpoint=tmp_path / "new" / "folder", resume=True)  # nothing there yet
    assert same_bits(fresh.graph, tuned(graph, data).graph)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_state(tmp_path: Path) -> None:
    graph, data = dense("torch"), batches(6)
    x, y = data[4]
    data[4] = (x * 1e30, y)
    with pytest.raises(Diverged, match=r"loss is (nan|inf) in step 5.*holds the last good state") as error:
        tuned(graph, data, checkpoint=tmp_path, checkpoint_every=2)
    assert str(tmp_path / FILE) in str(error.value)
    resumed = tuned(graph, [*data[:4], *batches(2, seed=9)], checkpoint=tmp_path, checkpoint_every=2, resume=True)
    assert all(math.isfinite(step.loss) for step in resumed.history)
    assert all(bool(torch.isfinite(value).all()) for value in resumed.weights().values())

    def with_bad_gradient(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + (outputs - outputs.detach()).abs().sqrt().sum()

    with pytest.raises(Diverged, match=r"gradient is (nan|inf) in step 1: try a lower learning rate"):
        tuned(graph, batches(1), loss=with_bad_gradient)


# ---- errors


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"learning_rat": 1.0}, UnknownName, r"option of finetune 'learning_rat'; did you mean 'learning_rate'"),
        ({"loss": "cross_entropy"}, UnknownName, r"loss 'cross_entropy'; did you mean 'cross-entropy'"),
        ({"schedule": "cosin"}, UnknownName, r"schedule 'cosin'; did you mean 'cosine'"),
        ({"masks": "zero"}, UnknownName, r"masks 'zero'; did you mean 'zeros'"),
        ({"train": "hed"}, UnknownName, r"none matches train=\) 'hed'.*head.weight"),
        ({"train": "("}, InvalidOption, r"train='\(' is not a regular expression"),
        ({"steps": 2, "epochs": 1}, InvalidOption, r"give one of them"),
        ({"steps": 0}, InvalidOption, r"steps=0; expected more than 0"),
        ({"learning_rate": math.nan}, InvalidOption, r"learning_rate=nan"),
        ({"squarehead": -1.0}, InvalidOption, r"squarehead=-1.0; expected a weight of at least 0"),
        ({"teacher": 3}, InvalidOption, r"teacher=3; expected a model or a function"),
        ({"optimizer": lambda values: 3}, InvalidOption, r"optimizer= gave a int"),
        ({"loss": lambda y, t: y}, InvalidInput, r"loss= gave torch.float32\[16, 5\], expected one"),
        ({"loss": lambda y, t: torch.zeros(())}, Unsupported, r"no gradient reaches"),
        ({"loss": "mse"}, InvalidInput, r"targets have shape \[16\], expected that of the output, \[16, 5\]"),
    ],
)
def test_wrong_options(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        tuned(dense("torch"), batches(1), **options)


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (torch.zeros(16, 2, dtype=torch.int64), r"targets have shape \[16, 2\], expected \[16\] for an output"),
        (torch.zeros(15, dtype=torch.int64), r"targets have shape \[15\], expected \[16\]"),
        (torch.zeros(16), r"targets are float32 of shape \[16\]; expected classes as integers"),
        (torch.full((16,), 5), r"target 5 is no class: the model has 5"),
        (torch.zeros(16, dtype=torch.bool), r"targets are bool"),
        ({"a": torch.zeros(16)}, r"takes one tensor of targets, got a dict"),
    ],
)
def test_wrong_targets(targets: Any, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        tuned(dense("torch"), [(batches(1)[0][0], targets)])


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(mlp_model(), path)
    data = [(torch.randn(4, 16), torch.randint(0, 8, (4,)))]
    quantised = fxopt.optimize(
        path, "host", calibration=[{"x": torch.randn(4, 16)}] * 2, passes=["quantize-linear"], budget=None, force=True,
        objective="size",
    )  # fmt: skip
    with pytest.raises(Unsupported, match="rounding has no gradient; fine-tune the float model, then quantise"):
        tuned(quantised, data)
    quantised.save(tmp_path / "quantised.onnx")
    with pytest.raises(Unsupported, match="fine-tune the float model"):
        tuned(tmp_path / "quantised.onnx", data)
    integers = onnx_graph("g (int64[n] x) => (int64[n] y) { y = Add(x, c) }", c=np.array([3]))
    with pytest.raises(Unsupported, match="no trainable parameters"):
        tuned(integers, data)
    with pytest.raises(InvalidInput, match="captured on example_inputs="):
        tuned(net(), data)


def test_constants_without_a_gradient_are_named() -> None:
    text = "g (float[n, 4] x) => (float[n, 3] y) { a = MatMul(x, w)\n b = Add(a, c)\n d = Sign(b)\n e = Mul(d, s)\n y = Add(e, t) }"
    graph = onnx_graph(text, w=torch.randn(4, 3), c=torch.randn(3), s=torch.ones(3), t=torch.zeros(3))
    data = [(torch.randn(2, 4), torch.tensor([0, 2]))]
    assert tuned(graph, data).history  # the gradient of sign is zero, but it is one
    rounded = onnx_graph(
        "g (float[n, 4] x) => (float[n, 3] y) { a = MatMul(x, w)\n b = Cast <to = 7> (a)\n c = Cast <to = 1> (b)\n y = Add(c, t) }",
        w=torch.randn(4, 3), t=torch.zeros(3),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="no gradient reaches 1 of the trained constants: c_w"):
        tuned(rounded, data)


# ---- before and after


def test_what_goes_in_and_comes_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(mlp_model(), path)
    data = [(torch.randn(8, 16), torch.randint(0, 8, (8,))) for _ in range(3)]
    seen: list[tuple[str, int, int]] = []
    first = tuned(path, data, progress=lambda *given: seen.append(given))
    assert [given[1:] for given in seen] == [(1, 3), (2, 3), (3, 3)] and seen[0][0].startswith("fine-tuning (loss ")
    assert first.report.outcome == "fine-tuned" and "3 steps, loss" in first.report.why
    assert "fine-tuned: 3 steps" in str(first.report)
    for model in (fxopt.capture(path), onnx.load(path), fxopt.optimize(path, "host", passes=[])):
        assert same_bits(tuned(model, data).graph, first.graph)
    again = tuned(first, data)
    assert not same_bits(again.graph, first.graph)
    fast = fxopt.optimize(first, "host", calibration=[x for x, _ in data], guard_seconds=0.2)
    assert torch.allclose(torch.as_tensor(fast(data[0][0])), first(data[0][0]), atol=0.5)
    fast.save(tmp_path / "fast.onnx")
    first.save(tmp_path / "folder")
    loaded = fxopt.load(tmp_path / "folder")
    assert loaded.report.outcome == "fine-tuned"
    assert torch.allclose(torch.as_tensor(loaded(data[0][0])), first(data[0][0]), atol=1e-5)


def test_a_tuned_module_is_optimised_and_saved(tmp_path: Path) -> None:
    x = torch.randn(3, 1, 4, 4)
    result = tuned(net(), batches(2), example_inputs=(x,), dynamic_shapes=DYNAMIC)
    result.save(tmp_path / "folder")
    assert torch.equal(fxopt.load(tmp_path / "folder")(x), result(x))
    fast = fxopt.optimize(result, "host", example_inputs=(x,), passes=[])
    assert torch.allclose(torch.as_tensor(fast(x)), result(x), rtol=1e-4, atol=1e-5)
    eager = fxopt.optimize(result, "a100", passes=[])
    with pytest.warns(UserWarning, match="running the reference"):
        assert torch.equal(eager(x), result(x))


# ---- packed weights, other orders


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_packed_weights_are_trained_as_floats_with_their_marks(origin: str) -> None:
    from fxopt.ir.masks import mark_of
    from fxopt.passes.base import Context
    from fxopt.passes.pack_sparse import PackSparse
    from fxopt.testing import PLAIN_CPU

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16, bias=False), nn.ReLU(),
        nn.Linear(16, 6),
    ).eval()  # fmt: skip
    x = torch.randn(5, 4, 4, 4)
    whole = load_torch(model, (x,)) if origin == "torch" else to_onnx(model, (x,))[0]
    infer(whole)
    sparse = prune(whole, "2:4")
    packed = sparse.copy()
    assert PackSparse().run(packed, Context(PLAIN_CPU, objective="size")) == 3
    data = [(x, torch.randint(0, 6, (5,)))] * 4
    results = [tuned(each, data, learning_rate=0.01, masks="marks") for each in (sparse, packed)]
    assert [step.loss for step in results[0].history] == pytest.approx([step.loss for step in results[1].history])
    for result in results:
        assert sum(mark_of(node) is not None for node in result.graph.nodes) >= 3
        assert not [node for node in result.graph.calls() if "fxopt" in str(node.target)]
    expected, got = results[0](x), results[1](x)
    assert torch.allclose(expected, got, atol=1e-5) and not torch.allclose(got, packed.run([x])[0], atol=1e-3)


def test_the_teacher_of_rearranged_channels_has_the_same_order() -> None:
    from fxopt.passes.rearrange_channels import rearrange

    whole = dense("torch")
    ordered = whole.copy()
    assert any(each.refusal is None for each in rearrange(ordered, Pattern.parse("4x1"), 0.5))
    sparse, data = prune(ordered, "4x1"), batches(1)
    with pytest.warns(UserWarning, match="without SquareHead: the channels of the model were rearranged"):
        assert tuned(sparse, data, teacher=whole).history[0].squarehead == 0
    with pytest.raises(InvalidOption, match="give the dense model with the same order as teacher"):
        tuned(sparse, data, teacher=whole, squarehead=1.0)
    assert tuned(sparse, data, teacher=ordered).history[0].squarehead > 0
