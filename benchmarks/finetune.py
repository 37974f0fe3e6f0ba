"""What fine-tuning recovers of what pruning lost, and what an order of channels saves before: the byte-level model.

    python -m benchmarks.finetune

All linears but the head are pruned to 70 % in 4x1 blocks by SparseGPT, then trained for 150 steps on windows of
Python's sources; evaluated on Python's documentation, always against float32 in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fxopt
from benchmarks.common import write
from examples.data import byte_windows, python_sources
from examples.evaluate import byte_lm_bits
from fxopt.ir.graph import Graph
from fxopt.ir.masks import mark_of
from fxopt.ir.sparsity import Pattern
from fxopt.ir.views.conv import Conv, convs
from fxopt.ir.views.linear import Linear, linears
from fxopt.passes.rearrange_channels import rearrange
from fxopt.passes.sequential import SequentialRun
from fxopt.training.unpack import unpacked

MODELS = Path(__file__).parent.parent / "examples" / "models"
PATTERN, SPARSITY = Pattern.parse("4x1"), 0.7
STEPS, BATCH, LENGTH, SEED = 150, 8, 256, 7
CALIBRATION = 32  # windows, of which half calibrate
LEARNING_RATE = 3e-3
OBJECTIVES: dict[str, dict[str, Any]] = {
    "CE": {},
    "CE + KD": {"squarehead": 0.0},
    "CE + SquareHead": {"distill": 0.0},
    "CE + KD + SquareHead": {},
}


def calibration_windows() -> torch.Tensor:
    """Tokens [CALIBRATION, LENGTH]."""
    return torch.from_numpy(byte_windows(python_sources(), LENGTH, CALIBRATION, SEED + 1))


def pruned(graph: Graph) -> Graph:
    """A copy with all linears but the head pruned by SparseGPT, layer after layer, as the pass does it."""
    rows = [{"tokens": row[None]} for row in calibration_windows()]
    result = fxopt.optimize(
        graph, "host", calibration=rows, objective="size", budget=None, force=True,
        passes=[f"sparsify{{pattern={PATTERN},sparsity={SPARSITY}}}"],
    )  # fmt: skip
    return unpacked(result.graph)


def contributions(graph: Graph) -> Callable[[Linear | Conv], torch.Tensor]:
    """What each weight adds to the outputs on the calibration windows, w^2 times the mean square of its input."""
    walk = SequentialRun(graph, [[row[None]] for row in calibration_windows()[: CALIBRATION // 2]])
    views = [view for view in linears(graph) if isinstance(view, Linear)]
    squares = {view.node.name: torch.diagonal(walk.moments(view.x)) for view in views}
    found = {view.node.name: view.weight(graph).square() * squares[view.node.name] for view in views}
    return lambda view: found[view.node.name]


def training_data(steps: int = STEPS, batch: int = BATCH) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, the tokens that follow) [batch, LENGTH], one per step."""
    windows = torch.from_numpy(byte_windows(python_sources(), LENGTH + 1, steps * batch, SEED))
    return [(part[:, :-1], part[:, 1:]) for part in windows.split(batch)]


def bits(graph: Graph) -> float:
    """Bits per byte on Python's documentation."""
    return -byte_lm_bits(lambda tokens: graph.run([tokens])[0])


def kept(graph: Graph, pattern: Pattern, sparsity: float) -> float:
    """The share of all magnitudes of linears and convolutions (outputs left out) that the pattern keeps."""
    found = whole = 0.0
    for view in (*linears(graph), *convs(graph)):
        if not isinstance(view, (Linear, Conv)) or view.node in graph.result_nodes:
            continue
        scores = view.weight(graph).flatten(1).abs().double()
        if not pattern.refusal(*scores.shape):
            found += float(scores[pattern.mask(scores, sparsity)].sum()) / float(scores.sum()) * scores.numel()
            whole += scores.numel()
    return found / whole


def orders(name: str) -> dict[str, dict[str, float]]:
    """The share of magnitudes that patterns keep before and after rearranging channels."""
    rows = {}
    for text, sparsity in (("4x1", 0.7), ("8x1", 0.7), ("2:4", 0.5), ("8x2:4", 0.5)):
        graph, pattern = fxopt.capture(MODELS / f"{name}.onnx").copy(), Pattern.parse(text)
        before = kept(graph, pattern, sparsity)
        started = time.process_time()
        made = rearrange(graph, pattern, sparsity)
        rows[f"{text} at {sparsity:.0%}"] = {
            "before": before,
            "after": kept(graph, pattern, sparsity),
            "rearranged": sum(each.refusal is None for each in made),
            "groups": len(made),
            "cpu_seconds": time.process_time() - started,
        }
    return rows


def objectives(start: Graph, dense: Graph, steps: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Fine-tuned with each objective from the same start: bits per byte, and whether the zeros are still zero."""
    data, rows = training_data(steps), {}
    for name in names:
        teacher = None if name == "CE" else dense
        started = time.process_time()
        tuned = fxopt.finetune(start, data, teacher=teacher, learning_rate=LEARNING_RATE, **OBJECTIVES[name])
        rows[name] = {
            "bits": bits(tuned.graph),
            "cpu_seconds": time.process_time() - started,
            "zeros_lost": zeros_lost(start, tuned.graph),
        }
        print(f"  {name}: {rows[name]['bits']:.4f} bits per byte", flush=True)
    return rows


def zeros_lost(before: Graph, after: Graph) -> int:
    """Weights of the pruned linears that were zero and are not any more."""
    lost = 0
    for view in linears(before):
        if isinstance(view, Linear) and mark_of(view.node) is not None:
            target = str(view.weight_node.target)
            lost += int(((before.attribute(target) == 0) & (after.attribute(target) != 0)).sum())
    return lost


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write benchmarks/results/finetune.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    dense = fxopt.capture(MODELS / "byte-lm.onnx")
    result: dict[str, Any] = {
        "pattern": str(PATTERN), "sparsity": SPARSITY, "steps": options.steps, "batch": BATCH, "length": LENGTH,
        "learning_rate": LEARNING_RATE, "dense_bits": bits(dense), "starts": {},
        "orders": {name: orders(name) for name in ("byte-lm", "digits-cnn", "digits-vit")},
    }  # fmt: skip
    for name, rows in result["orders"].items():
        for pattern, row in rows.items():
            print(f"{name}, {pattern}: keeps {row['before']:.1%} of the magnitudes, rearranged {row['after']:.1%}")
    print(f"dense: {result['dense_bits']:.4f} bits per byte")
    by_magnitude, by_contribution = dense.copy(), dense.copy()
    rearrange(by_magnitude, PATTERN, SPARSITY)
    rearrange(by_contribution, PATTERN, SPARSITY, contributions(dense))
    everything = list(OBJECTIVES)
    starts = {
        "as trained": (dense, everything),
        "rearranged by magnitude": (by_magnitude, []),
        "rearranged by contribution": (by_contribution, [everything[0], everything[-1]]),
    }
    for name, (source, names) in starts.items():
        start = pruned(source)
        row: dict[str, Any] = {"bits": bits(start)}
        print(f"{name}, one shot: {row['bits']:.4f} bits per byte", flush=True)
        row["objectives"] = objectives(start, source, options.steps, names)
        for found in row["objectives"].values():
            found["recovered"] = (row["bits"] - found["bits"]) / (row["bits"] - result["dense_bits"])
        result["starts"][name] = row
        write("finetune", result)  # what is there so far
    print(f"written: {write('finetune', result)}")


if __name__ == "__main__":
    main()
