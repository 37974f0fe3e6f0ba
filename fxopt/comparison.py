"""Two models, or several, side by side: how far their outputs are apart, and how fast each runs, interleaved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.errors import InvalidInput, Unsupported
from fxopt.inputs import misfit, samples_of, shaped
from fxopt.ir.graph import Graph
from fxopt.options import Options

if TYPE_CHECKING:
    from onnx import ModelProto

    from fxopt.ir.error import OutputError

Model = Any  # a path, a ModelProto, or a result of `optimize`


@dataclass(frozen=True)
class Comparison:
    """Two models on the same inputs: how far b's outputs are from a's, and how fast each runs (interleaved)."""

    error: OutputError
    a_seconds: float
    b_seconds: float
    ratio: float  # a / b: more than 1 means that b is faster
    low: float
    high: float
    bursts: int
    samples: int
    notes: tuple[str, ...] = ()


def compare(
    a: Model,
    b: Model,
    data: Any = None,
    *,
    threads: int | None = None,
    seed: int = 0,
    seconds: float = 5.0,
    input_shapes: Mapping[str, Sequence[int | str | None]] | None = None,
) -> Comparison:
    """Run two ONNX models or optimised models on the same data ("random" when none is given).

    Raises:
        InvalidInput: the inputs or the number of outputs differ.
    """
    from fxopt.guard import measure
    from fxopt.ir.error import output_error

    first, second = _runnable(a, threads), _runnable(b, threads)
    (graph_a, run_a), (graph_b, run_b) = first, second
    named_a, named_b = ([spec.name for spec in graph.inputs] for graph in (graph_a, graph_b))
    if named_a != named_b:
        raise InvalidInput(f"the models take different inputs: {named_a} and {named_b}")
    notes: list[str] = []
    shapes = shaped(graph_a, input_shapes) or None
    options = Options("host", calibration="random" if data is None else data, seed=seed, input_shapes=shapes)
    samples = samples_of(graph_a, None, options, notes)
    for sample in samples:
        reason = misfit(graph_b, sample)
        if reason:
            raise InvalidInput(f"the second model does not take the data: {reason}")
    results_a, results_b = [run_a(sample) for sample in samples], [run_b(sample) for sample in samples]
    if len(results_a[0]) != len(results_b[0]):
        raise InvalidInput(f"the models have {len(results_a[0])} and {len(results_b[0])} outputs")
    timing = measure(lambda: run_a(samples[0]), lambda: run_b(samples[0]), seconds)
    return Comparison(
        output_error(results_a, results_b), timing.baseline, timing.result, timing.ratio, timing.low, timing.high,
        timing.bursts, len(samples), tuple(notes),
    )  # fmt: skip


def _runnable(model: Model, threads: int | None) -> tuple[Graph, Callable[[Sequence[Any]], list[Any]]]:
    from fxopt.api import Optimized, is_onnx

    if isinstance(model, Optimized):
        outcome = model._ready
        return outcome.graph, outcome.executable.run
    if not is_onnx(model):
        raise Unsupported(f"compare takes paths, ModelProtos and results of optimize, not {type(model).__name__}")
    from fxopt.frontends.onnx import load

    graph = load(model)
    if isinstance(model, (str, os.PathLike)):
        from fxopt.backends.onnxruntime.session import OnnxExecutable

        return graph, OnnxExecutable(Path(model), threads).run
    from fxopt.backends.onnxruntime.backend import OnnxRuntime
    from fxopt.cost_model.host import detect_host

    return graph, OnnxRuntime().compile(graph, detect_host(threads), threads=threads).run


@dataclass(frozen=True)
class BenchRow:
    """One model of a benchmark: median and minimum seconds, and the first model's median divided by this one's."""

    model: str
    median: float
    minimum: float
    ratio: float
    bursts: int


def bench(
    models: Sequence[str | os.PathLike[str] | ModelProto],
    data: Any = None,
    *,
    threads: int | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int | str | None]] | None = None,
) -> list[BenchRow]:
    """Time ONNX models in interleaved bursts in one process."""
    from fxopt.guard import measure_many

    if not models:
        raise InvalidInput("bench needs at least one model")
    named = [
        (str(model) if isinstance(model, (str, os.PathLike)) else f"model {index}", model)
        for index, model in enumerate(models)
    ]
    runs: dict[str, Callable[[], object]] = {}
    notes: list[str] = []
    for name, model in named:
        graph, run = _runnable(model, threads)
        shapes = shaped(graph, input_shapes) or None
        options = Options("host", calibration="random" if data is None else data, seed=seed, input_shapes=shapes)
        sample = samples_of(graph, None, options, notes)[0]
        runs[name if name not in runs else f"{name} ({len(runs)})"] = lambda run=run, sample=sample: run(sample)  # type: ignore[misc]
    times = measure_many(runs, seconds)
    first = times[next(iter(times))]
    return [
        BenchRow(name, row.median, row.minimum, first.median / row.median, row.bursts) for name, row in times.items()
    ]
