"""Which kernel a node gets, what it takes over, and what it runs in otherwise; the numbers stay those of the graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.backends.triton import library
from fxopt.backends.triton.block_plan import block_plan
from fxopt.backends.triton.lower import lowered
from fxopt.backends.triton.lower.job import Job, Kernels
from fxopt.backends.triton.static_report import StaticReport
from fxopt.cost_model.targets import get_target
from fxopt.ir.graph import Graph
from fxopt.ir.ops.attention_pattern import attention_pattern, dense, diagonal
from fxopt.ir.ops.linear_24 import compress_24, linear_24
from fxopt.ir.ops.linear_fp8 import linear_fp8, to_e4m3
from fxopt.ir.ops.linear_nbits import group_count, linear_nbits
from fxopt.ir.ops.linear_shift import linear_shift, shift_codes
from fxopt.ir.ops.linear_sparse import linear_sparse, stored
from fxopt.ir.ops.linear_w8a8 import linear_w8a8, linear_w8a8_dynamic
from fxopt.ir.packing import pack
from fxopt.ir.sparsity import Pattern

F16 = torch.float16
GOOD = StaticReport("k", 80, 4, 96, 0, 1000, {"tensor": 1}, {"HMMA": 1})


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Kernels are not compiled here: those whose name is in the dictionary have this reason against them."""
    refused: dict[str, str] = {}
    monkeypatch.setattr(library, "minor", lambda: (3, 7))
    monkeypatch.setattr(library, "interprets", lambda: False)
    monkeypatch.setattr(Kernels, "refusal", lambda self, launch: refused.get(launch.name, ""))
    monkeypatch.setattr(Job, "uncompilable", lambda self, operator, arguments, rows=None: refused.get(operator.name, ""))
    return refused


class NBits(nn.Module):
    """`linear_nbits` or `linear_shift`, and something behind it."""

    def __init__(self, behind: Callable[[Tensor, Tensor], Tensor] | None = None, **options: Any) -> None:
        super().__init__()
        self.behind = behind
        self.columns, self.group, self.bits = 128, options.get("group", 32), options.get("bits", 4)
        self.rounded, self.shift = options.get("rounded", 16), options.get("shift", False)
        outputs = options.get("outputs", 48)
        codes = torch.randint(0, 1 << self.bits, (outputs, self.columns), dtype=torch.uint8)
        scales = torch.rand(outputs, group_count(self.columns, self.group)) * 0.02
        if self.shift:
            codes, scales = shift_codes(torch.randn(outputs, self.columns), self.group)
        self.register_buffer("codes", pack(codes, self.bits))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.randn(outputs).half() if options.get("bias", True) else None)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        if self.shift:
            y = linear_shift(x, self.codes, self.scales, self.bias, self.columns, self.group)
        else:
            y = linear_nbits(
                x, self.codes, self.scales, None, self.bias, self.columns, self.bits, self.group, self.rounded
            )  # fmt: skip
        return y if self.behind is None else self.behind(y, other)


def captured(model: nn.Module, *inputs: Tensor, **options: Any) -> Graph:
    return fxopt.capture(model.eval(), inputs, **options)


def job_of(graph: Graph, target: str = "a100") -> Job:
    return lowered(graph, get_target(target))


def names(job: Job) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in job.graph.calls()]


def reasons(job: Job, outcome: str) -> list[str]:
    return [verdict.reason for verdict in job.verdicts if verdict.outcome == outcome]


def assert_alike(job: Job, graph: Graph, *inputs: Tensor, room: float = 2e-3) -> None:
    for result, expected in zip(job.graph.run(inputs), graph.run(inputs), strict=True):
        assert result.dtype == expected.dtype and result.shape == expected.shape
        assert float((result - expected).float().norm()) <= room * float(expected.float().norm()) + 1e-6


def inputs(rows: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 128).half(), torch.randn(rows, 48).half()


@pytest.mark.parametrize(
    ("behind", "what", "left"),
    [
        (None, "", 1),
        (lambda y, other: torch.relu(y), ", with relu", 1),
        (lambda y, other: nn.functional.gelu(y), ", with gelu", 1),
        (lambda y, other: nn.functional.gelu(y, approximate="tanh") * other, ", with gelu_tanh and mul", 1),
        (lambda y, other: nn.functional.silu(y) * other, ", with silu and mul", 1),
        (lambda y, other: other + y, ", with add", 1),
        (lambda y, other: y * y, "", 2),  # both operands are the linear
        (lambda y, other: y + 1.0, "", 2),
        (lambda y, other: torch.relu(y) + y, "", 3),
        (lambda y, other: y + other[:1], "", 3),  # broadcast
        (lambda y, other: torch.add(y, other, alpha=2.0), "", 2),
    ],
)
def test_epilogues(behind: Any, what: str, left: int) -> None:
    x, other = inputs()
    graph = captured(NBits(behind), x, other)
    job = job_of(graph)
    assert reasons(job, "applied") == [f"planar4/1 of 48 x 128, 4 rows{what}"]
    assert len(names(job)) == left and names(job).count("fxopt_triton.linear_packed") == 1
    assert_alike(job, graph, x, other)


def test_packed_constants_take_the_place_of_the_others() -> None:
    x, other = inputs()
    graph = captured(NBits(), x, other)
    job = job_of(graph)
    kept = {str(node.target) for node in job.graph.nodes if node.op == "get_attr"}
    assert not any("codes" in name for name in kept) and sum("words" in name for name in kept) == 1
    assert any("codes" in str(node.target) for node in graph.nodes)  # the graph that came in is as it was


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3}, {"shift": True}, {"group": 128}, {"bias": False}])
def test_forms_of_weights(options: dict[str, Any]) -> None:
    x, other = inputs()
    graph = captured(NBits(**options), x, other)
    job = job_of(graph)
    layout = "shift4" if options.get("shift") else "planar2" if options.get("bits") == 2 else "planar4"
    assert reasons(job, "applied") == [f"{layout}/1 of 48 x 128, 4 rows"]
    assert_alike(job, graph, x, other)


@pytest.mark.parametrize(
    ("options", "reason", "runs_in"),
    [
        ({"bits": 8}, "8-bit weights have no packed layout; expected 2, 3 or 4 bits", "aten.linear"),
        ({"group": 48}, "group 48 has no packed layout", "aten.linear"),
        ({"rounded": 8}, "activations are rounded to 8 bits; the kernels take them as they are", "fxopt.linear_nbits"),
    ],
)
def test_forms_without_a_kernel(options: dict[str, Any], reason: str, runs_in: str) -> None:
    x, other = inputs()
    graph = captured(NBits(**options), x, other)
    job = job_of(graph)
    (found,) = reasons(job, "refused")
    assert found.startswith(reason) and "; it runs in " in found
    assert names(job) == [runs_in]
    assert_alike(job, graph, x, other)


def test_a_kernel_that_spills_is_not_used(compiler: dict[str, str]) -> None:
    x, other = inputs()
    graph = captured(NBits(lambda y, other: torch.relu(y)), x, other)
    compiler["linear_packed"] = "255 registers do not suffice: 44 bytes a thread are spilled"
    job = job_of(graph)
    (found,) = reasons(job, "refused")
    assert found.startswith("255 registers do not suffice") and "aten.linear on the weight in 16-bit floats" in found
    assert names(job) == ["aten.linear", "aten.relu"]
    assert_alike(job, graph, x, other)


def test_weights_that_are_no_constants() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
            return linear_nbits(x, codes, scales, None, None, 128, 4, 32, 16)

    operands = torch.randn(2, 128).half(), torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 4)
    job = job_of(captured(Given(), *operands))
    assert reasons(job, "refused") == ["its weight is no constant; it runs in the reference"]


def test_dynamic_rows() -> None:
    x, other = inputs()
    rows = {0: torch.export.Dim("rows", min=1, max=512)}
    graph = captured(NBits(lambda y, other: y + other), x, other, dynamic_shapes=(rows, rows))
    job = job_of(graph)
    assert names(job) == ["fxopt_triton.linear_packed"]
    for count in (1, 4, 70):
        assert_alike(job, graph, *inputs(count))


class Int8(nn.Module):
    """Both 8-bit linears."""

    def __init__(self, columns: int = 40) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 128, (columns, columns), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(columns) * 0.01)
        self.register_buffer("bias", torch.randn(columns))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(linear_w8a8_dynamic(x, self.codes, self.scales, self.bias)) + x
        return linear_w8a8(y, self.codes, self.scales, None, 0.05, 7)


def test_8_bits() -> None:
    x = torch.randn(5, 40)
    graph = captured(Int8(), x)
    job = job_of(graph)
    assert names(job).count("fxopt_triton.linear_int8") == 2 and "aten.relu" not in names(job)
    assert reasons(job, "applied") == ["int8 of 40 x 40, 5 rows, with relu and add", "int8 of 40 x 40, 5 rows"]
    assert_alike(job, graph, x, room=1e-6)


def test_sums_that_do_not_fit_32_bits() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.ones(2, 70_000, dtype=torch.int8))
            self.register_buffer("scales", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return linear_w8a8(x, self.codes, self.scales, None, 1.0, 0)

    job = job_of(captured(Wide(), torch.ones(1, 70_000)))
    assert reasons(job, "refused") == ["sums over 70000 inputs may exceed 32 bits; it runs in the reference"]


def test_float8() -> None:
    class Fp8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", to_e4m3(torch.randn(16, 16), 0.01))
            self.register_buffer("scales", torch.full((16,), 0.01))

        def forward(self, x: Tensor) -> Tensor:
            return linear_fp8(x, self.codes, self.scales, None, None)

    graph = captured(Fp8(), torch.randn(2, 16).half())
    assert reasons(job_of(graph, "h100"), "applied") == ["torch._scaled_mm"]
    assert reasons(job_of(graph, "a100"), "refused") == ["sm_80 has no fp8; it runs in the reference"]


class Sparse(nn.Module):
    """A 2:4 linear."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        weight = torch.randn(4096, columns // 4, 4)
        weight[..., 1::2] = 0
        values, places = compress_24(weight.reshape(4096, columns).half())
        self.register_buffer("values", values)
        self.register_buffer("places", places)

    def forward(self, x: Tensor) -> Tensor:
        return linear_24(x, self.values, self.places, None)


@pytest.mark.parametrize(("text", "columns"), [("2:4", 1024), ("4x1", 64)])
def test_packed_zeros(text: str, columns: int) -> None:
    """Weights that another pass packed: those of the tensor cores' pattern for many rows, others as they were."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.randn(columns // 4, 4, columns)
            weight[:, :, ::2] = 0
            values, mask = stored(weight.reshape(columns, columns).half(), Pattern.parse(text))
            self.register_buffer("values", values)
            self.register_buffer("mask", mask)

        def forward(self, x: Tensor) -> Tensor:
            return linear_sparse(x, self.values, self.mask, None, columns, text)

    x = torch.randn(2048, columns).half()
    graph = captured(Packed(), x)
    job = job_of(graph)
    if text == "2:4":
        assert names(job) == ["fxopt_triton.linear_sparse24"]
    else:
        assert names(job) == ["aten.linear"]
        assert reasons(job, "refused")[0].startswith("GPUs skip zeros of the pattern 2:4; these are 4x1")
    few = x[:3]
    torch.testing.assert_close(job.graph.run([few])[0], graph.run([few])[0], rtol=2e-2, atol=2e-1)


@pytest.mark.slow
def test_two_of_four() -> None:
    x = torch.randn(2048, 1024).half()
    model = Sparse(1024)
    job = job_of(captured(model, x))
    assert names(job) == ["fxopt_triton.linear_sparse24"]
    assert reasons(job, "applied") == ["2:4 of 4096 x 1024, in torch's sparse products"]
    graph = captured(model, x[:4])
    few = job_of(graph)
    assert names(few) == ["aten.linear"] and "do not pay for fewer than 64 rows" in reasons(few, "refused")[0]
    assert_alike(few, graph, x[:4])
    (packed,) = job.graph.run([x[:4]])
    assert_alike(few, graph, x[:4])
    torch.testing.assert_close(packed, graph.run([x[:4]])[0], rtol=2e-2, atol=2e-1)


def test_two_of_four_of_other_sizes() -> None:
    job = job_of(captured(Sparse(40), torch.randn(128, 40).half()))
    assert "multiples of 32 outputs and 64 inputs; the weight is 4096 x 40" in reasons(job, "refused")[0]


class Decode(nn.Module):
    """Attention with heads that share keys, spelled as in transformers."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        times = q.shape[1] // k.shape[1]

        def repeated(t: Tensor) -> Tensor:
            batch, heads, length, width = t.shape
            wide = t[:, :, None].expand(batch, heads, times, length, width)
            return wide.reshape(batch, heads * times, length, width)

        return nn.functional.scaled_dot_product_attention(q, repeated(k), repeated(v))


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "reason"),
    [
        (1, 1024, 2, "applied: 1 queries over 1024 keys, which are split"),
        (64, 1024, 2, ""),
        (1, 64, 2, ""),
        (1, 512, 128, "128 key heads are enough work for 108 multiprocessors"),
    ],
)
def test_decoding(queries: int, keys: int, heads: int, reason: str) -> None:
    operands = tuple(torch.randn(1, 2 * heads if index == 0 else heads, queries if index == 0 else keys, 16).half() for index in range(3))
    graph = captured(Decode(), *operands)
    job = job_of(graph)
    if reason.startswith("applied"):
        assert names(job) == ["fxopt_triton.decode_attention"]  # the repeated keys are gone
        assert reasons(job, "applied") == [reason.removeprefix("applied: ")]
    else:
        assert "fxopt_triton.decode_attention" not in names(job)
        assert not reason or reason in reasons(job, "refused")[0]
    assert_alike(job, graph, *operands)


def test_decoding_in_float32_is_left_to_torch() -> None:
    operands = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 600, 16), torch.randn(1, 2, 600, 16)
    job = job_of(captured(Decode(), *operands))
    assert "the operands are torch.float32; it takes float16 and bfloat16" in reasons(job, "refused")[0]


class Patterns(nn.Module):
    """Attention by patterns."""

    def __init__(self, *patterns: tuple[int, ...]) -> None:
        super().__init__()
        self.numbers = [number for pattern in patterns for number in pattern]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_pattern(q, k, v, self.numbers, 0.25)


def test_patterns() -> None:
    operands = tuple(torch.randn(1, 2, 512, 16).half() for _ in range(3))
    graph = captured(Patterns(diagonal(20), diagonal(30)), *operands)
    job = job_of(graph)
    (reason,) = reasons(job, "applied")
    assert names(job) == ["fxopt_triton.pattern_attention"]
    found = re.match(r"2 heads in one launch, (0\.\d+) of the tiles of (\d+)x(\d+)", reason)
    assert found is not None
    plan = block_plan((*diagonal(20), *diagonal(30)), 512, int(found[2]), int(found[3]))
    assert float(found[1]) == pytest.approx(plan.density, abs=0.006)
    assert_alike(job, graph, *operands)
    graph = captured(Patterns(diagonal(20), diagonal(2000)), *operands)
    (doubtful,) = reasons(job_of(graph), "applied")
    assert "predicted not to pay on a100 (not measured)" in doubtful
    graph = captured(Patterns(dense(), dense()), *operands)
    job = job_of(graph)
    assert names(job) == ["aten.scaled_dot_product_attention"]
    assert reasons(job, "refused") == ["every head sees every key; it runs in torch's attention"]
    assert_alike(job, graph, *operands)


class Heads(nn.Module):
    """A norm, queries, keys and values, and a rotary embedding, as in Llama."""

    def __init__(self, columns: int = 128, heads: int = 4, kv_heads: int = 2, width: int = 16, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.width = (heads, kv_heads, kv_heads), width
        self.parts = nn.ModuleList(NBits(outputs=count * width, bias=bias) for count in self.heads)
        angle = torch.randn(1, 3, width // 2)
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos().half())
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin().half())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.float()
        h = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        batch, length, _ = x.shape
        q, k, v = (part(h, h).view(batch, length, -1, self.width).transpose(1, 2) for part in self.parts)
        return self.turned(q), self.turned(k), v * 1.0

    def turned(self, t: Tensor) -> Tensor:
        half = self.width // 2
        other = torch.cat((-t[..., half:], t[..., :half]), -1)
        return t * self.cos[:, None] + other * self.sin[:, None]


@pytest.mark.parametrize("bias", [False, True])
def test_queries_keys_and_values_at_once(bias: bool) -> None:
    x = torch.randn(2, 3, 128).half()
    graph = captured(Heads(bias=bias), x)
    job = job_of(graph)
    assert names(job).count("fxopt_triton.qkv_packed") == 1 and "fxopt_triton.linear_packed" not in names(job)
    assert "aten.rsqrt" not in names(job) and "aten.cat" not in names(job)
    first, *others = reasons(job, "applied")
    assert first == "queries, keys and values at once: planar4/1 of 128 x 128, norm, rotary embedding"
    assert all(other.startswith("part of ") for other in others) and len(others) == 2
    assert_alike(job, graph, x)


def test_many_rows_stay_three_products(compiler: dict[str, str]) -> None:
    job = job_of(captured(Heads(), torch.randn(40, 3, 128).half()))
    assert names(job).count("fxopt_triton.linear_packed") == 3
    compiler["qkv_packed"] = "it spills"
    job = job_of(captured(Heads(), torch.randn(1, 3, 128).half()))
    assert names(job).count("fxopt_triton.linear_packed") == 3
    assert reasons(job, "refused") == ["queries, keys and values at once: it spills; it runs in three products"]


def test_what_is_no_rotary_embedding_stays() -> None:
    class Other(Heads):
        def turned(self, t: Tensor) -> Tensor:
            half = self.width // 2
            other = torch.cat((t[..., half:], -t[..., :half]), -1)  # the other way round
            return t * self.cos[:, None] + other * self.sin[:, None]

    x = torch.randn(1, 3, 128).half()
    graph = captured(Other(), x)
    job = job_of(graph)
    assert "aten.cat" in names(job)
    assert_alike(job, graph, x)


@pytest.mark.slow
def test_the_lowered_graph_traces_as_a_whole() -> None:
    """Operators are opaque to torch.compile and keep their fake rules."""
    x = torch.randn(1, 3, 128).half()
    graph = captured(Heads(), x)
    module = torch.compile(job_of(graph).graph.module, backend="aot_eager", fullgraph=True)
    for result, expected in zip(module(x), graph.run([x]), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)
