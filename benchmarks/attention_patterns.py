"""Attention that leaves out what heads do not look at: ways to run it, break-even densities, and a whole block.

    python -m benchmarks.attention_patterns [ways] [densities-1] [densities-2] [blocks]

A layer in the shape of a diffusion transformer (hidden size 384, 6 heads, 2,048 and 4,096 tokens, float32). First the
ways to compute attention at a block density of 0.25, against dense `scaled_dot_product_attention` of torch and against
what ONNX Runtime runs: dense attention over slices (what fxopt does), over gathered blocks in one call, FlexAttention
(compiled, where there is a C++ compiler) and the same slices in ONNX Runtime. Then speeds by density on one thread and
on two, with one pattern for all heads and with six (`fxopt/cost_model/attention_patterns.py` has its figures from
them). Then a whole block in torch, against what Amdahl's law gives with the measured share and speed-up of its
attention.
One thread where nothing else is said, alternating bursts. Writes results/attention_patterns.json; parts that are not
asked for stay as they are there.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn

from benchmarks.bursts import local, race
from benchmarks.common import RESULTS, write
from fxopt.backends.onnxruntime.forms import FORMS
from fxopt.frontends.onnx import load
from fxopt.ir.onnx.export import to_model
from fxopt.ir.ops.attention_pattern import attention_pattern, diagonal, seen, stripes
from fxopt.ir.pattern_work import Tile, work_of
from fxopt.ir.shapes import infer
from fxopt.ir.sliced_attention import sliced_attention

HEADS, WIDTH, LENGTHS = 6, 64, (2048, 4096)
SECONDS, RUNS = 10.0, 3
CALLS, VISITS = 4, 8  # of every competitor by density
DENSITIES = {512: (0.1, 0.3, 0.5, 0.65), 1024: (0.1, 0.25, 0.5, 0.65), 2048: (0.125, 0.25, 0.5, 0.7)}
THREADS, RUN_IN = (1, 2), ("eager", "onnxruntime")
BLOCK = 128  # of what is gathered


def density(patterns: Sequence[int], length: int) -> float:
    """The share of blocks of 64 x 64 that some head looks at."""
    return work_of(patterns, length, tile=Tile(64, 64)).share


def window(length: int, part: float) -> list[int]:
    """A diagonal window for all heads, in which about this part of the blocks of 64 is seen."""
    best = min(range(8, length, 8), key=lambda width: abs(density(diagonal(width), length) - part))
    return list(diagonal(best)) * HEADS


def operands(length: int) -> list[Tensor]:
    """q, k and v."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, WIDTH, generator=generator) for _ in range(3)]


def gathered(patterns: list[int], length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One call over all blocks of queries, with the keys that each sees gathered; only for one pattern of all heads."""
    visible = seen(patterns[:5], length)[0].reshape(length // BLOCK, BLOCK, length)
    used = visible.any(1)
    most = int(used.sum(1).max())
    places = torch.stack([torch.cat([row.nonzero().flatten(), (~row).nonzero().flatten()])[:most] for row in used])
    mask = torch.gather(visible, 2, places[:, None].expand(-1, BLOCK, -1))
    added = torch.zeros(mask.shape).masked_fill(~mask, -1e30).repeat(HEADS, 1, 1)[None]
    flat = places.flatten()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count = length // BLOCK
        keys, values = (x.index_select(2, flat).reshape(1, HEADS * count, most, WIDTH) for x in (k, v))
        queries = q.reshape(1, HEADS * count, BLOCK, WIDTH)
        return F.scaled_dot_product_attention(queries, keys, values, added).reshape(q.shape)

    return run


def flex(patterns: list[int], length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """FlexAttention compiled by Inductor; None without a compiler."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    reach = -patterns[1]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k <= reach) & (k - q <= reach)

    mask = create_block_mask(visible, None, None, length, length, device="cpu")
    compiled: Any = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def session(patterns: list[int] | None, length: int, threads: int = 1) -> Callable[[], object]:
    """ONNX Runtime on dense attention as one operator, or on slices."""
    import onnxruntime

    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, HEADS, length, WIDTH]) for name in "qkvy"]
    nodes = [helper.make_node("Attention", ["q", "k", "v"], ["y"], scale=WIDTH**-0.5)]
    made = helper.make_graph(nodes, "attention", info[:3], info[3:])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    if patterns is not None:
        graph = load(model)
        infer(graph)
        (node,) = graph.calls()
        call = (*node.args[:3], patterns, WIDTH**-0.5)
        graph.replace(node, graph.call(attention_pattern.target, call, before=node, made_by="benchmark"))
        infer(graph)
        model = to_model(graph, FORMS)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    made_session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    given = {name: x.numpy() for name, x in zip("qkv", operands(length), strict=True)}
    return lambda: made_session.run(None, given)


def ways(length: int) -> dict[str, Any]:
    """Ways to compute attention at a block density of 0.25, over torch's dense attention."""
    patterns = window(length, 0.25)
    q, k, v = operands(length)
    wanted = attention_pattern.function(q, k, v, patterns, WIDTH**-0.5)
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "torch, dense": F.scaled_dot_product_attention,
        "torch, slices": lambda q, k, v: sliced_attention(q, k, v, patterns, WIDTH**-0.5),
        "torch, gathered blocks": gathered(patterns, length),
    }
    compiled = flex(patterns, length)
    if compiled is not None:
        calls["torch, FlexAttention"] = compiled
    for name, call in calls.items():
        if name != "torch, dense":
            torch.testing.assert_close(call(q, k, v), wanted, rtol=1e-3, atol=1e-5)
    sliced = session(patterns, length)
    found: Any = sliced()
    np.testing.assert_allclose(found[0], wanted.numpy(), rtol=1e-3, atol=1e-5)
    bursts = {name: local(lambda call=call: call(q, k, v)) for name, call in calls.items()}  # type: ignore[misc]
    bursts["ONNX Runtime, dense"] = local(session(None, length))
    bursts["ONNX Runtime, slices"] = local(sliced)
    speed = race(bursts, "torch, dense", SECONDS, RUNS)
    for name in ("ONNX Runtime, dense", "ONNX Runtime, slices"):
        speed[name]["over_dense_of_onnxruntime"] = (
            speed["ONNX Runtime, dense"]["milliseconds"] / speed[name]["milliseconds"]
        )
    return {
        "length": length,
        "block_density": density(patterns, length),
        "work": work_of(patterns, length).share,
        "speed": speed,
    }


def cases(length: int) -> dict[str, list[list[int]]]:
    """Patterns of all heads: the same window, the same stripe, and one of its own for each head."""
    parts = DENSITIES[length]
    own = [[diagonal(int(length * part / 2) + 5 * i, sink=4 * (i % 2)) for i in range(HEADS)] for part in parts]
    return {
        "diagonal": [window(length, part) for part in parts],
        "stripe": [list(stripes(64, int(length * part))) * HEADS for part in parts[1::2]],
        "six": [[number for pattern in every for number in pattern] for every in own],
    }


def by_density(length: int, threads: int) -> list[dict[str, Any]]:
    """The time over that of dense attention, by the part of the work that is left and the calls it takes.

    Of the fastest calls, in turns: where another process takes a core for a moment, two threads wait for each other.
    """
    torch.set_num_threads(threads)
    q, k, v = operands(length)
    calls: dict[tuple[str, int], Callable[[], object]] = {
        ("eager", -1): lambda: F.scaled_dot_product_attention(q, k, v),
        ("onnxruntime", -1): session(None, length, threads),
    }
    rows: list[dict[str, Any]] = []
    for name, every in cases(length).items():
        for patterns in every:
            calls["eager", len(rows)] = lambda patterns=patterns: sliced_attention(q, k, v, patterns, WIDTH**-0.5)  # type: ignore[misc]
            calls["onnxruntime", len(rows)] = session(patterns, length, threads)
            work = work_of(patterns, length)
            rows.append(
                {
                    "length": length, "threads": threads, "pattern": name, "block_density": density(patterns, length),
                    "work": work.share, "whole": work.whole, "calls": work.calls,
                    "dense_macs": 2.0 * HEADS * length**2 * WIDTH,
                }
            )  # fmt: skip
    fastest = dict.fromkeys(calls, float("inf"))
    for _ in range(VISITS):
        for key, call in calls.items():
            fastest[key] = min(fastest[key], *local(call)(1, CALLS))
    for index, row in enumerate(rows):
        row |= {name: fastest[name, index] / fastest[name, -1] for name in RUN_IN}
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    torch.set_num_threads(1)
    return rows


def fitted(rows: list[dict[str, Any]], backend: str) -> dict[str, float]:
    """time = sliced * work in slices + whole * other work + call * calls / dense_macs, through the least squares."""
    columns = [[row["work"] - row["whole"], row["whole"], row["calls"] / row["dense_macs"]] for row in rows]
    found = np.linalg.lstsq(np.array(columns), np.array([row[backend] for row in rows]), rcond=None)[0]
    return dict(zip(("sliced", "whole", "call"), map(float, found), strict=True))


class Block(nn.Module):
    """A block of a diffusion transformer without its conditioning: attention and a perceptron with residuals."""

    def __init__(self, length: int, patterns: list[int] | None) -> None:
        super().__init__()
        size = HEADS * WIDTH
        self.length, self.patterns = length, patterns
        self.q, self.k, self.v, self.o = (nn.Linear(size, size) for _ in range(4))
        self.norms = nn.ModuleList([nn.LayerNorm(size), nn.LayerNorm(size)])
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[1, length, size]"""
        y = self.norms[0](x)
        q, k, v = (
            linear(y).view(1, self.length, HEADS, WIDTH).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        if self.patterns is None:
            made = F.scaled_dot_product_attention(q, k, v)
        else:
            made = sliced_attention(q, k, v, self.patterns, WIDTH**-0.5)
        x = x + self.o(made.transpose(1, 2).reshape(1, self.length, -1))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


@torch.no_grad()
def block(length: int) -> dict[str, Any]:
    """A whole block at a block density of 0.25, against Amdahl's law."""
    patterns = window(length, 0.25)
    torch.manual_seed(0)
    plain, sparse = Block(length, None).eval(), Block(length, patterns).eval()
    sparse.load_state_dict(plain.state_dict())
    x = torch.randn(1, length, HEADS * WIDTH)
    q, k, v = operands(length)
    speed = race(
        {
            "block, dense": local(lambda: plain(x)),
            "block, patterns": local(lambda: sparse(x)),
            "attention, dense": local(lambda: F.scaled_dot_product_attention(q, k, v)),
            "attention, patterns": local(lambda: sliced_attention(q, k, v, patterns, WIDTH**-0.5)),
        },
        "block, dense", SECONDS, RUNS,
    )  # fmt: skip
    times = {name: row["milliseconds"] for name, row in speed.items()}
    part = times["attention, dense"] / times["block, dense"]
    gain = times["attention, dense"] / times["attention, patterns"]
    law = 1 / (1 - part + part / gain)
    measured = times["block, dense"] / times["block, patterns"]
    return {
        "length": length, "block_density": density(patterns, length), "attention_share": part, "attention_gain": gain,
        "amdahl": law, "measured": measured, "of_amdahl": measured / law, "speed": speed,
    }  # fmt: skip


def main(parts: list[str]) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    path = RESULTS / "attention_patterns.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if parts and path.exists() else {}
    result.pop("machine", None)
    result |= {"heads": HEADS, "width": WIDTH}
    with torch.no_grad():
        if not parts or "ways" in parts:
            result["ways"] = [ways(length) for length in LENGTHS]
            for row in result["ways"]:
                print({name: round(found["ratio_of_medians"], 2) for name, found in row["speed"].items()}, flush=True)
        for threads in THREADS:
            if not parts or f"densities-{threads}" in parts:
                rows = [row for length in DENSITIES for row in by_density(length, threads)]
                others = [row for row in result.get("densities", []) if row.get("threads") != threads]
                result["densities"] = sorted([*others, *rows], key=lambda row: row["threads"])
                result.setdefault("fits", {})[str(threads)] = {name: fitted(rows, name) for name in RUN_IN}
                print(result["fits"])
        if not parts or "blocks" in parts:
            result["blocks"] = [block(length) for length in LENGTHS]
            for row in result["blocks"]:
                print({key: round(value, 3) for key, value in row.items() if isinstance(value, float)})
    print("written to", write("attention_patterns", result))


if __name__ == "__main__":
    main(sys.argv[1:])
