"""What zeros cost: the byte-level language model of the repository, made sparse by every method and pattern.

    python -m benchmarks.sparse_lm

All linears but the head, one after the other: each is calibrated on what the sparse ones before it give. Calibrated on
windows of Python's sources, evaluated on Python's documentation, always against the dense model in the same run.
Errors of layers are tr(D H D.T) / tr(W H W.T) with D the change of the weight and H the second moments of its inputs in
the dense model: the same for every method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from torch import Tensor

import fxopt
from benchmarks.byte_lm_bits import MODEL, samples
from benchmarks.common import write
from examples.evaluate import byte_lm_bits
from fxopt.ir.graph import Graph, label, set_attribute
from fxopt.ir.shapes import infer
from fxopt.ir.sparsity import Pattern
from fxopt.ir.views.linear import Linear, linears
from fxopt.passes.quantize_linear.gptq import gptq
from fxopt.passes.quantize_linear.grids import group_grid
from fxopt.passes.sequential import SequentialRun
from fxopt.passes.sparsify.armor import Wrapped, armor
from fxopt.passes.sparsify.low_rank import low_rank
from fxopt.passes.sparsify.methods import Pruned, magnitude, sparsegpt, sparsegpt_rounded, wanda

Method = Callable[[Tensor, Tensor], Tensor]  # a weight and its second moments -> what it becomes, dense
BITS, GROUP = 4, 32
BLOCK, STEPS = 32, 400
SHARES = (0.08, 0.17, 0.33)
METHODS = ("magnitude", "wanda", "sparsegpt")
CASES = (
    *(("2:4", 0.5), ("4:8", 0.5), ("8x2:4", 0.5), ("4x1", 0.5), ("4x1", 0.7)),
    *(("unstructured", 0.5), ("unstructured", 0.7)),
)


@dataclass
class Found:
    """One model: bits per byte, and by layer what was asked for."""

    bits: float = 0.0
    seconds: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)


def ordered(weight: Tensor, moments: Tensor, pattern: Pattern, sparsity: float) -> dict[str, Pruned]:
    """The three methods on one weight."""
    return {
        "magnitude": magnitude(weight, pattern, sparsity),
        "wanda": wanda(weight, moments, pattern, sparsity),
        "sparsegpt": sparsegpt(weight, moments, pattern, sparsity),
    }


def relative_error(weight: Tensor, changed: Tensor, moments: Tensor) -> float:
    """tr(D H D.T) / tr(W H W.T)."""
    change, wide = (changed - weight).to(moments.dtype), weight.to(moments.dtype)
    return float((change @ moments).mul(change).sum() / (wide @ moments).mul(wide).sum())


def pruned_linears(graph: Graph) -> Iterator[Linear]:
    """All linears but the head."""
    found = [view for view in linears(graph) if isinstance(view, Linear)]
    yield from found[:-1]


def layer_errors(pattern: Pattern, sparsity: float) -> dict[str, dict[str, float]]:
    """The relative output error of each layer by method, on the moments of the dense model."""
    found = {}
    for name, weight, moments in dense_layers():
        by_method = ordered(weight, moments, pattern, sparsity)
        found[name] = {key: relative_error(weight, made.weight, moments) for key, made in by_method.items()}
    return found


@cache
def dense_layers() -> tuple[tuple[str, Tensor, Tensor], ...]:
    """Name, weight and second moments of each layer of the dense model."""
    graph = captured()
    walk = SequentialRun(graph, samples())
    return tuple((label(view.node), view.weight(graph), walk.moments(view.x)) for view in pruned_linears(graph))


def captured() -> Graph:
    """The dense model."""
    graph = fxopt.capture(MODEL)
    infer(graph, {})
    return graph


def bits_per_byte(graph: Graph) -> float:
    """On held-out text."""
    return -byte_lm_bits(lambda batch: graph.run([batch])[0])


def sparse(method: Method) -> Found:
    """The model with every layer replaced by what the method makes of it, in order."""
    graph, found = captured(), Found()
    walk = SequentialRun(graph, samples())
    for view in pruned_linears(graph):
        weight, moments = view.weight(graph), walk.moments(view.x)
        begin = time.process_time()
        made = method(weight, moments)
        found.seconds += time.process_time() - begin
        found.layers[label(view.node)] = relative_error(weight, made, moments)
        set_attribute(graph.root, str(view.weight_node.target), made.t().contiguous() if view.transposed else made)
    found.bits = bits_per_byte(graph)
    return found


def plain(name: str, pattern: Pattern, sparsity: float) -> Method:
    """One of the three methods."""

    def method(weight: Tensor, moments: Tensor) -> Tensor:
        if name == "magnitude":
            return magnitude(weight, pattern, sparsity).weight
        return (wanda if name == "wanda" else sparsegpt)(weight, moments, pattern, sparsity).weight

    return method


def corrected(share: float, pattern: Pattern, weight: Tensor, moments: Tensor) -> Tensor:
    """SparseGPT, and a low-rank correction of at most this share of the weight's parameters."""
    made = sparsegpt(weight, moments, pattern, 0).weight
    left, right = low_rank(weight, made, moments, rank(share, *weight.shape))
    return made + left @ right


def rank(share: float, out: int, columns: int) -> int:
    """Of two thin matrices that have at most this share of the weight's parameters."""
    return int(share * out * columns / (out + columns))


def joint(pattern: Pattern, weight: Tensor, moments: Tensor) -> Tensor:
    """SparseGPT that rounds what it keeps in the same sweep."""
    make = partial(group_grid, bits=BITS, group=GROUP, symmetric=True)
    return sparsegpt_rounded(weight, moments, pattern, 0, make)[0].weight


def in_two_steps(pattern: Pattern, weight: Tensor, moments: Tensor) -> Tensor:
    """SparseGPT, then what it keeps is rounded to nearest."""
    made = sparsegpt(weight, moments, pattern, 0).weight
    grid = group_grid(made, BITS, GROUP, symmetric=True)
    groups = grid.groups(weight.shape[1])
    return grid.values(grid.codes(made, groups), groups)


def only_rounded(weight: Tensor, moments: Tensor) -> Tensor:
    """GPTQ on the same grid, nothing removed."""
    grid = group_grid(weight, BITS, GROUP, symmetric=True)
    return grid.values(gptq(weight, moments, grid, act_order=False).codes.float(), grid.groups(weight.shape[1]))


class Armor:
    """ARMOR as a method; it keeps the losses of every layer."""

    def __init__(self, pattern: Pattern, steps: int = STEPS) -> None:
        self.pattern, self.steps = pattern, steps
        self.losses: list[tuple[float, ...]] = []

    def __call__(self, weight: Tensor, moments: Tensor) -> Tensor:
        found: Wrapped = armor(weight, moments, self.pattern, block=BLOCK, steps=self.steps)
        self.losses.append(found.losses)
        return found.dense()


def patterns(dense: float) -> dict[str, Any]:
    """The three methods by pattern."""
    result = {}
    print(f"{'pattern':20}{'magnitude':>18}{'wanda':>18}{'sparsegpt':>18}   SparseGPT < Wanda < magnitude in")
    for text, sparsity in CASES:
        pattern, name = Pattern.parse(text), f"{text} at {sparsity:.0%}"
        errors = layer_errors(pattern, sparsity)
        count = sum(row["sparsegpt"] < row["wanda"] < row["magnitude"] for row in errors.values())
        mean = {key: sum(row[key] for row in errors.values()) / len(errors) for key in METHODS}
        increase = {key: sparse(plain(key, pattern, sparsity)).bits - dense for key in METHODS}
        result[name] = {"ordered_layers": count, "layers": errors, "increase": increase, "mean_error": mean}
        cells = "".join(f"{increase[key]:+10.4f}{mean[key]:8.4f}" for key in METHODS)
        print(f"{name:20}{cells}   {count} of {len(errors)} layers", flush=True)
    return result


def two_of_four(dense: float, wrapped: Armor) -> dict[str, Any]:
    """What is done beyond zeros at 2:4: each with the parameters that it adds to the weights."""
    pattern = Pattern.parse("2:4")
    shapes = [weight.shape for _, weight, _ in dense_layers()]
    parameters = sum(shape.numel() for shape in shapes)
    wrappers = BLOCK * sum(map(sum, shapes)) / parameters
    cases: dict[str, tuple[Method, float]] = {"sparsegpt": (plain("sparsegpt", pattern, 0), 0)}
    for share in SHARES:
        more = sum(rank(share, *shape) * sum(shape) for shape in shapes) / parameters
        cases[f"sparsegpt + low rank, at most {share:.0%}"] = (partial(corrected, share, pattern), more)
    cases["mask of the normalised weight (armor, 0 steps)"] = (Armor(pattern, 0), 0)
    cases[f"armor, blocks of {BLOCK}, {STEPS} steps"] = (wrapped, wrappers)
    cases[f"gptq {BITS} bits g{GROUP}, nothing removed"] = (only_rounded, 0)
    cases[f"sparsegpt + {BITS} bits g{GROUP} jointly"] = (partial(joint, pattern), 0)
    cases[f"sparsegpt, then {BITS} bits g{GROUP} to nearest"] = (partial(in_two_steps, pattern), 0)
    result = {}
    print(f"\n{'2:4':48}{'increase':>10}{'error':>9}{'more':>8}{'seconds':>9}")
    for name, (method, more) in cases.items():
        found = sparse(method)
        increase, mean = found.bits - dense, sum(found.layers.values()) / len(found.layers)
        result[name] = {"increase": increase, "mean_error": mean, "seconds": found.seconds, "more_parameters": more}
        print(f"{name:48}{increase:+10.4f}{mean:9.4f}{more:8.1%}{found.seconds:9.1f}", flush=True)
    return result


def main() -> None:
    """Measure and write benchmarks/results/sparse_lm.json."""
    dense = bits_per_byte(captured())
    print(f"dense: {dense:.4f} bits per byte; below, the increase and the mean error of the layers' outputs\n")
    by_pattern, wrapped = patterns(dense), Armor(Pattern.parse("2:4"))
    beyond = two_of_four(dense, wrapped)
    plain_increase = by_pattern["2:4 at 50%"]["increase"]
    ratios = {
        "sparsegpt / magnitude": plain_increase["sparsegpt"] / plain_increase["magnitude"],
        "low rank / sparsegpt": beyond["sparsegpt + low rank, at most 8%"]["increase"] / plain_increase["sparsegpt"],
        "armor, largest loss over that of its start": max(min(losses) / losses[0] for losses in wrapped.losses),
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    result = {"dense": dense, "patterns": by_pattern, "2:4": beyond, "ratios": ratios}
    print(f"written: {write('sparse_lm', result)}")


if __name__ == "__main__":
    main()
