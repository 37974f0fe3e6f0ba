"""The public functions."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxopt.errors import FxoptError, InvalidInput, InvalidOption, NotReady, Unsupported, unknown
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Ledger

if TYPE_CHECKING:
    from onnx import ModelProto

    from fxopt.backends.base import Backend, Executable
    from fxopt.cost_model.roofline import GraphPrediction
    from fxopt.engine import Outcome, Request, Sample
    from fxopt.ir.error import OutputError
    from fxopt.ir.target import Target
    from fxopt.report.report import Report

OBJECTIVES = ("latency", "size")
Model = Any  # nn.Module, ExportedProgram, GraphModule, path or ModelProto
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Options:
    """The keywords of `optimize`, kept for a capture at the first call."""

    target: str | Target
    dynamic_shapes: Any = None
    calibration: Any = None
    evaluate: Callable[[Any], float] | None = None
    budget: float | None = 0.02
    objective: str = "latency"
    passes: Sequence[Any] | None = None
    backend: str | None = None
    include: str | None = None
    exclude: str | None = None
    threads: int | None = None
    force: bool = False
    require_speedup: float | None = None
    require_passes: tuple[str, ...] = ()
    input_shapes: Mapping[str, Sequence[int]] | None = None
    guard_seconds: float = 10.0
    seed: int = 0
    dump: Path | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        if self.budget is not None and not self.budget >= 0:
            raise InvalidOption(f"budget={self.budget}; expected a number of at least 0, or None")
        if self.threads is not None and self.threads < 1:
            raise InvalidOption(f"threads={self.threads}; expected a number of at least 1, or None for all cores")
        if not self.guard_seconds > 0:
            raise InvalidOption(f"guard_seconds={self.guard_seconds}; expected more than 0")


def optimize(
    model: Model,
    target: str | Target = "host",
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    calibration: Any = None,
    evaluate: Callable[[Any], float] | None = None,
    budget: float | None = 0.02,
    objective: str = "latency",
    passes: Sequence[Any] | None = None,
    backend: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
    threads: int | None = None,
    force: bool = False,
    require_speedup: float | None = None,
    require_passes: Sequence[str] = (),
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    guard_seconds: float = 10.0,
    seed: int = 0,
    dump: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Optimized:
    """Make a model faster on a target within an error budget; what does not pay is rolled back.

    Args:
        model: an `nn.Module`, `ExportedProgram` or `GraphModule`, a path of an ONNX file, or a `ModelProto`. It is not
            changed.
        target: a name (`fxopt targets`) or a `Target`; "host" is this machine.
        example_inputs: a tuple of positional inputs or a dict of named ones; a PyTorch model without them is captured
            at its first call.
        dynamic_shapes: as in `torch.export.export`.
        calibration: path (.npz, .npy, folder), "random", or an iterable of batches (dicts, tuples, tensors). Half of
            it calibrates, half verifies. Without it the example inputs are used.
        evaluate: `callable(model) -> float`, higher is better; `model` is a function of tensors.
        budget: largest accepted loss: noise to signal of the outputs, or drop of the metric when `evaluate` is given;
            None accepts everything.
        objective: "latency" or "size".
        passes: None: the exact passes and the planner's choice; []: nothing; a list of passes or texts
            ("quantize-linear{bits=8}"): the exact passes and these.
        include, exclude: regular expressions over node names.
        threads: of the backend; None: all cores.
        force: skip the guard.
        require_speedup, require_passes: recorded for the caller; see `Optimized.unmet`.
        guard_seconds: time for measuring.
        dump: a folder for the graph after every pass.

    Raises:
        FxoptError: in its subclasses: unknown names, invalid models, inputs and options, failed captures.
    """
    options = _Options(
        target, dynamic_shapes, calibration, evaluate, budget, objective, passes, backend, include, exclude, threads,
        force, require_speedup, tuple(require_passes), input_shapes, guard_seconds, seed,
        None if dump is None else Path(dump), progress,
    )  # fmt: skip
    _backend(backend, _target(target, threads), [])  # unknown names fail now, not at the first call
    _passes(passes)
    result = Optimized(model, options)
    if _is_onnx(model) or example_inputs is not None or _is_exported(model):
        result._prepare(example_inputs)
    return result


class Optimized(torch.nn.Module):
    """An optimised model, called like the original; `report`, `ledger`, `graph` and `save` say what was done."""

    def __init__(self, model: Model, options: _Options | None) -> None:
        super().__init__()
        self._options = options
        self._source = [model]  # in a list, so that a module's parameters do not count as this one's
        self._outcome: Outcome | None = None

    def _prepare(self, example_inputs: Any, first_call: bool = False) -> None:
        assert self._options is not None
        self._outcome = _run(self._source[0], example_inputs, self._options, first_call)
        self._source.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; outputs have a PyTorch model's structure, or are a tensor or tuple of an ONNX model."""
        if self._outcome is None:
            if not self._source:
                raise NotReady("the optimisation of the first call failed; call optimize again")
            warnings.warn("fxopt: captured at the first call; one sample is little to calibrate on", stacklevel=2)
            self._prepare(_Bound(args, kwargs), first_call=True)
        outcome = self._ready
        flat = _flat_inputs(outcome.graph, args, kwargs)
        if outcome.report.executed_on.startswith("eager") and outcome.report.target != "host":
            self._warn_once(outcome)
        try:
            results = outcome.executable.run(flat)
        except FxoptError:
            raise
        except Exception as error:
            misfit = _misfit(outcome.graph, flat)
            if misfit:
                raise InvalidInput(misfit) from error
            raise
        return _structured(outcome.graph, results)

    def _warn_once(self, outcome: Outcome) -> None:
        if not getattr(self, "_warned", False):
            self._warned = True
            warnings.warn(f"compiled for {outcome.report.target}, running the reference", stacklevel=3)

    @property
    def _ready(self) -> Outcome:
        if self._outcome is None:
            raise NotReady("the model has not been captured yet: give optimize(example_inputs=...) or call it once")
        return self._outcome

    @property
    def report(self) -> Report:
        """What was done, with the proof."""
        return self._ready.report

    @property
    def ledger(self) -> Ledger:
        """One verdict with a reason per node and pass."""
        return self._ready.ledger

    @property
    def graph(self) -> Graph:
        """The optimised graph."""
        return self._ready.graph

    @property
    def unmet(self) -> str:
        """Which of `require_speedup` and `require_passes` the result does not meet; "" when all are."""
        options = self._options
        if options is None:
            return ""
        applied = {row.pass_name for row in self.ledger.select(outcome="applied")}
        missing = [name for name in options.require_passes if name.replace("_", "-") not in applied]
        if missing:
            return f"pass {missing[0]} was required and changed nothing"
        wanted = options.require_speedup
        measured = self.report.measured
        if wanted is None or (measured is not None and measured.ratio >= wanted):
            return ""
        return f"a speed-up of {wanted:g} was required; " + (
            f"measured {measured.ratio:.2f}" if measured else f"nothing was measured ({self.report.why})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model: `*.onnx`, or a folder with a manifest, the graph and its constants.

        Raises:
            Unsupported: an operator has no ONNX form (it is named).
            OutputError: the path cannot be written.
        """
        from fxopt.artifact import save

        save(self._ready, Path(path))


@dataclass
class _Bound:
    """Positional and keyword inputs of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# ---- resolving what the user gave


def _is_onnx(model: Model) -> bool:
    return isinstance(model, (str, os.PathLike)) or type(model).__name__ == "ModelProto"


def _is_exported(model: Model) -> bool:
    return isinstance(model, torch.export.ExportedProgram) and model.example_inputs is not None


def _target(target: str | Target, threads: int | None) -> Target:
    from fxopt.ir.target import Target as TargetType

    if isinstance(target, TargetType):
        return target
    if target == "host":
        from fxopt.cost_model.host import detect_host

        return detect_host(threads)
    from fxopt.catalog import find_target

    return find_target(target)


def _backend(name: str | None, target: Target, notes: list[str]) -> Backend:
    from fxopt.catalog import entries, find_backend

    known = entries("backend")
    if name is None and target.backend not in known:
        notes.append(f"backend {target.backend} is not part of this version: decided for {target.name}, run in eager")
        name = "eager"
    found: Any = find_backend(name or target.backend)
    backend: Backend = found()
    backend.require()
    return backend


def _passes(passes: Sequence[Any] | None) -> list[Any] | None:
    if passes is None:
        return None
    if isinstance(passes, str) or not isinstance(passes, Sequence):
        raise InvalidOption(f"passes={passes!r}; expected a list of passes or texts")
    from fxopt.catalog import pass_from_text
    from fxopt.passes.base import Pass

    found = [pass_from_text(item) if isinstance(item, str) else item for item in passes]
    for index, item in enumerate(found):
        if not isinstance(item, Pass):
            raise InvalidOption(f"passes[{index}] is {item!r}; expected a pass or its text")
    return found


def _pattern(option: str, text: str | None) -> re.Pattern[str] | None:
    if text is None:
        return None
    try:
        return re.compile(text)
    except re.error as error:
        raise InvalidOption(f"{option}={text!r} is not a regular expression: {error}") from error


def _load(model: Model, example_inputs: Any, options: _Options, backend: Backend, notes: list[str]) -> Graph:
    """The graph in the origin that the backend takes."""
    if _is_onnx(model):
        from fxopt.frontends.onnx import load

        return load(model)
    args, kwargs = _bound(example_inputs)
    if backend.name == "onnxruntime":
        from fxopt.frontends.to_onnx import to_onnx

        graph, found = to_onnx(model, args, options.dynamic_shapes, kwargs=kwargs)
        notes.extend(found)
        return graph
    from fxopt.frontends.torch_export import load as load_torch

    return load_torch(model, args, options.dynamic_shapes, kwargs)


def _bound(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, _Bound):
        return example_inputs.args, example_inputs.kwargs
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (list, tuple)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _flat_inputs(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Inputs in the order of the graph's: nested structures are flattened, keywords go by name."""
    names = [spec.name for spec in graph.inputs]
    if graph.call_spec is not None:
        flat: list[Any] = graph.call_spec.flatten(args, kwargs)
        return flat
    for name in kwargs:
        if name not in names:
            raise InvalidInput(f"{unknown('input', name, names)}")
        if name in names[: len(args)]:
            raise InvalidInput(f"input {name!r} was given twice, by position and by name")
    return [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]


def _misfit(graph: Graph, flat: Sequence[Any]) -> str:
    """Which input does not fit the model; "" when all do."""
    sizes: dict[str, int] = {}
    for spec, value in zip(graph.inputs, flat, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        if spec.dtype is not None and value.dtype != spec.dtype:
            given, expected = (str(dtype).removeprefix("torch.") for dtype in (value.dtype, spec.dtype))
            return f"input {spec.name!r} has element type {given}, expected {expected}"
        if spec.shape is None:
            continue
        wanted = [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape]
        pairs = list(zip(wanted, value.shape, strict=False))
        if len(wanted) != value.dim() or any(isinstance(dim, int) and dim != size for dim, size in pairs):
            shown = ", ".join("?" if dim is None else str(dim) for dim in wanted)
            return f"input {spec.name!r} has shape {list(value.shape)}, expected [{shown}]"
        sizes.update((dim, size) for dim, size in pairs if isinstance(dim, str))
    return ""


def _structured(graph: Graph, results: list[Any]) -> Any:
    """The outputs in the structure of the original."""
    if graph.call_spec is not None:
        return graph.call_spec.unflatten(results)
    return results[0] if len(results) == 1 else tuple(results)


def _samples(graph: Graph, example_inputs: Any, options: _Options, notes: list[str]) -> list[Sample]:
    """Flat inputs per sample: the calibration data, else the example inputs."""
    if options.calibration is None:
        if example_inputs is None:
            return []
        args, kwargs = _bound(example_inputs)
        notes.append(
            "calibrated and verified on the example inputs alone; give calibration data for a better judgement"
        )
        return [_flat_inputs(graph, args, kwargs)]
    from fxopt.calibration import load

    batches = load(options.calibration, graph, seed=options.seed, input_shapes=options.input_shapes, warn=notes.append)
    if len(batches) == 1:
        notes.append("one calibration sample: it calibrates and verifies, which flatters the error")
    return [[batch[spec.name] for spec in graph.inputs] for batch in batches]


def _request(model: Model, example_inputs: Any, options: _Options) -> tuple[Graph, Request]:
    from fxopt.engine import Request, bind_sizes

    notes: list[str] = []
    target = _target(options.target, options.threads)
    backend = _backend(options.backend, target, notes)
    passes = _passes(options.passes)
    graph = _load(model, example_inputs, options, backend, notes)
    samples = _samples(graph, example_inputs, options, notes)
    bind_sizes(graph, samples[0] if samples else None, _sizes(graph, options.input_shapes))
    request = Request(
        target, backend, samples, passes, options.evaluate, options.budget, options.objective,
        _pattern("include", options.include), _pattern("exclude", options.exclude), options.threads, options.force,
        options.guard_seconds, options.dump, options.progress, notes,
    )  # fmt: skip
    return graph, request


def _sizes(graph: Graph, shapes: Mapping[str, Sequence[int]] | None) -> dict[str, int]:
    """Sizes of named dimensions from `--input-shape`."""
    sizes: dict[str, int] = {}
    for name, shape in (shapes or {}).items():
        spec = next((spec for spec in graph.inputs if spec.name == name), None)
        if spec is None:
            raise unknown("input", name, [spec.name for spec in graph.inputs])
        if spec.shape is None:
            continue
        if len(spec.shape) != len(shape):
            raise InvalidInput(f"--input-shape {name}: {len(shape)} dimensions given, the model has {spec}")
        for dim, size in zip(spec.shape, shape, strict=True):
            if isinstance(dim, str):
                sizes[dim] = size
            elif isinstance(dim, int) and dim != size:
                raise InvalidInput(f"--input-shape {name}:{list(shape)}: the model fixes {spec}")
    return sizes


def _run(model: Model, example_inputs: Any, options: _Options, first_call: bool) -> Outcome:
    from fxopt.engine import Optimizer

    graph, request = _request(model, example_inputs, options)
    if first_call:
        request.warnings.append("captured at the first call: that call is the only sample")
    evaluator = _evaluator(graph)
    baseline = _baseline(model, graph, request)
    outcome = Optimizer(graph, request, baseline, evaluator).run()
    if outcome.executable is not baseline:
        baseline.close()
    return outcome


def _evaluator(graph: Graph) -> Any:
    """ONNX Runtime for single operators without a torch reference."""
    if graph.origin != "onnx":
        return None
    from fxopt.backends.onnxruntime.evaluator import OnnxEvaluator

    return OnnxEvaluator()


def _baseline(model: Model, graph: Graph, request: Request) -> Executable:
    """What came in, as the backend runs it: the file itself where there is one."""
    from fxopt.backends.eager import EagerExecutable

    if request.backend.name == "onnxruntime":
        if isinstance(model, (str, os.PathLike)):
            from fxopt.backends.onnxruntime.session import OnnxExecutable

            return OnnxExecutable(Path(model), request.threads)
        return request.backend.compile(graph, request.target, threads=request.threads)
    return EagerExecutable(graph, _evaluator(graph))


# ---- the other functions


def capture(model: Model, example_inputs: Any = None, dynamic_shapes: Any = None) -> Graph:
    """The model as a `Graph`, unchanged: ONNX files and messages in the ONNX dialect, PyTorch models as aten.

    Raises:
        InvalidModel, CaptureError: the model cannot be read or captured.
    """
    if _is_onnx(model):
        from fxopt.frontends.onnx import load

        graph = load(model)
    else:
        from fxopt.frontends.torch_export import load as load_torch

        args, kwargs = _bound(example_inputs)
        graph = load_torch(model, args, dynamic_shapes, kwargs)
    from fxopt.engine import bind_sizes

    bind_sizes(graph, None)
    return graph


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Optimized:
    """What `Optimized.save` wrote (an ONNX file or a folder), ready to run.

    Raises:
        InvalidModel: there is nothing that can be loaded.
    """
    from fxopt.artifact import load as load_artifact

    result = Optimized(None, None)
    result._source.clear()
    result._outcome = load_artifact(Path(path), threads)
    return result


def explain(model: Model, target: str | Target = "host", *, example_inputs: Any = None, **options: Any) -> Ledger:
    """The verdict of every pass on every node, from plan and prices alone; options as in `optimize`."""
    from fxopt.backends.eager import EagerExecutable
    from fxopt.engine import Optimizer

    known = set(_Options.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise unknown("option of explain", name, known)
    graph, request = _request(model, example_inputs, _Options(target, **options))
    evaluator = _evaluator(graph)
    return Optimizer(graph, request, EagerExecutable(graph, evaluator), evaluator).explain()


def predict(
    model: Model,
    target: str | Target = "host",
    *,
    example_inputs: Any = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    threads: int | None = None,
) -> GraphPrediction:
    """Predicted time per node and in total, with an interval, on a target that need not be here."""
    from fxopt.cost_model.roofline import predict_graph
    from fxopt.engine import bind_sizes

    graph = model if isinstance(model, Graph) else capture(model, example_inputs)
    if input_shapes:
        bind_sizes(graph, None, _sizes(graph, input_shapes))
    return predict_graph(graph, _target(target, threads))


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
    input_shapes: Mapping[str, Sequence[int]] | None = None,
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
    options = _Options("host", calibration="random" if data is None else data, seed=seed, input_shapes=input_shapes)
    samples = _samples(graph_a, None, options, notes)
    for sample in samples:
        misfit = _misfit(graph_b, sample)
        if misfit:
            raise InvalidInput(f"the second model does not take the data: {misfit}")
    results_a, results_b = [run_a(sample) for sample in samples], [run_b(sample) for sample in samples]
    if len(results_a[0]) != len(results_b[0]):
        raise InvalidInput(f"the models have {len(results_a[0])} and {len(results_b[0])} outputs")
    timing = measure(lambda: run_a(samples[0]), lambda: run_b(samples[0]), seconds)
    return Comparison(
        output_error(results_a, results_b), timing.baseline, timing.result, timing.ratio, timing.low, timing.high,
        timing.bursts, len(samples), tuple(notes),
    )  # fmt: skip


def _runnable(model: Model, threads: int | None) -> tuple[Graph, Callable[[Sequence[Any]], list[Any]]]:
    if isinstance(model, Optimized):
        outcome = model._ready
        return outcome.graph, outcome.executable.run
    if not _is_onnx(model):
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
    input_shapes: Mapping[str, Sequence[int]] | None = None,
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
        options = _Options("host", calibration="random" if data is None else data, seed=seed, input_shapes=input_shapes)
        sample = _samples(graph, None, options, notes)[0]
        runs[name if name not in runs else f"{name} ({len(runs)})"] = lambda run=run, sample=sample: run(sample)  # type: ignore[misc]
    times = measure_many(runs, seconds)
    first = times[next(iter(times))]
    return [
        BenchRow(name, row.median, row.minimum, first.median / row.median, row.bursts) for name, row in times.items()
    ]
