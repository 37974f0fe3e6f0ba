"""The public functions.

Longer than most files here: half of it is what users read of their arguments.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxopt.catalog import read_by_plugin
from fxopt.errors import FxoptError, InvalidInput, NotReady, Unsupported, unknown
from fxopt.inputs import Bound, bound, flat_inputs, misfit, samples_of, shaped, sizes_of, structured
from fxopt.ir.graph import Graph
from fxopt.ir.interpreter import Evaluator
from fxopt.ir.ledger import Ledger
from fxopt.options import (
    Options,
    Progress,
    cores_used,
    resolve_backend,
    resolve_passes,
    resolve_pattern,
    resolve_target,
)

if TYPE_CHECKING:
    from fxopt.backends.base import Backend, Executable
    from fxopt.cost_model.roofline import GraphPrediction
    from fxopt.ir.target import Target
    from fxopt.report.report import Report
    from fxopt.request import Outcome, Request

Model = Any  # nn.Module, ExportedProgram, GraphModule, path, ModelProto, Graph or Optimized


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
    input_shapes: Mapping[str, Sequence[int | str | None]] | None = None,
    guard_seconds: float = 10.0,
    seed: int = 0,
    dump: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    resume: str | os.PathLike[str] | None = None,
    custom_ops: bool = False,
    buckets: Mapping[str, int | Sequence[int]] | None = None,
    weights: str | None = None,
) -> Optimized:
    """Make a model faster on a target within an error budget; what does not pay is rolled back.

    Args:
        model: an `nn.Module`, `ExportedProgram` or `GraphModule`, a path of an ONNX file, a `ModelProto`, a `Graph`, or
            a result of `optimize` or `finetune`. It is not changed.
        target: a name (`fxopt targets`) or a `Target`; "host" is this machine.
        example_inputs: a tuple of positional inputs or a dict of named ones; a PyTorch model without them is captured
            at its first call.
        dynamic_shapes: as in `torch.export.export`.
        calibration: path (.npz, .npy, .jsonl, .json, folder), "random", a dict of arrays, or an iterable of batches
            (dicts, also of a tokeniser; tuples, tensors). Half of it calibrates, half verifies. Without it the example
            inputs are used.
        evaluate: `callable(model) -> float`, higher is better; `model` is a function of tensors.
        budget: largest accepted loss: noise to signal of the outputs, or drop of the metric when `evaluate` is given;
            None accepts everything.
        objective: "latency" or "size".
        passes: None: the exact passes and the planner's choice; []: nothing; a list of passes or texts
            ("quantize-linear{bits=8}"): the exact passes and these.
        include, exclude: regular expressions over node names.
        threads: of the backend; None: all cores.
        force: skip the guard: keep the result, whatever is measured or predicted for the whole model.
        require_speedup, require_passes: recorded for the caller; see `Optimized.unmet`.
        guard_seconds: time for measuring.
        dump: a folder for the graph after every pass.
        resume: a file for the state of the calibration: a run that was cut off goes on from it.
        custom_ops: use own kernels where they are faster (x86-64, needs fxopt[tvm]): `save` then writes a library
            beside the `.onnx` file, which a session must register (`fxopt.load` does).
        buckets: for targets that code is compiled for (WebAssembly, ARM): sizes of the dynamic dimensions, as in
            {"batch": [1, 4]}; an entry point for each combination.
        weights: for the same targets: "embedded" in the library (None too), or "external" in a file beside it.

    Raises:
        FxoptError: in its subclasses: unknown names, invalid models, inputs and options, failed captures.
    """
    options = Options(
        target, dynamic_shapes, calibration, evaluate, budget, objective, passes, backend, include, exclude, threads,
        force, require_speedup, tuple(require_passes), input_shapes, guard_seconds, seed,
        None if dump is None else Path(dump), progress, None if resume is None else Path(resume), custom_ops,
        buckets, weights,
    )  # fmt: skip
    found = resolve_target(target, threads)
    runs = resolve_backend(backend, found, [], options.of_backend)  # unknown names fail now, not at the first call
    if custom_ops:
        from fxopt.own_kernels import require_own_kernels

        require_own_kernels(runs, found)
    resolve_passes(passes)
    model = read_by_plugin(model)
    result = Optimized(model, options)
    if is_onnx(model) or is_graph(model) or example_inputs is not None or _is_exported(model):
        result._prepare(example_inputs)
    elif not isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        raise InvalidInput(f"expected a path, a ModelProto, a torch.nn.Module or a Graph, got a {type(model).__name__}")
    return result


class Optimized(torch.nn.Module):
    """An optimised model, called like the original; `report`, `ledger`, `graph` and `save` say what was done."""

    def __init__(self, model: Model, options: Options | None) -> None:
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
            self._prepare(Bound(args, kwargs), first_call=True)
        outcome = self._ready
        flat = flat_inputs(outcome.graph, args, kwargs)
        if outcome.report.executed_on.startswith("eager") and outcome.report.target != "host":
            self._warn_once(outcome)
        try:
            results = outcome.executable.run(flat)
        except FxoptError:
            raise
        except Exception as error:
            reason = misfit(outcome.graph, flat)
            if reason:
                raise InvalidInput(reason) from error
            raise
        return structured(outcome.graph, results)

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
        from fxopt.catalog import canonical

        applied = {row.pass_name for row in self.ledger.select(outcome="applied")}
        missing = [name for name in options.require_passes if canonical(name) not in applied]
        if missing:
            return f"pass {missing[0]} was required and changed nothing"
        wanted = options.require_speedup
        measured = self.report.measured
        if wanted is None or (measured is not None and measured.ratio >= wanted):
            return ""
        return f"a speed-up of {wanted:g} was required; " + (
            f"measured {measured.ratio:.2f}" if measured else f"nothing was measured ({self.report.why})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Compiled results are no pickles: neither `torch.save` nor `copy.deepcopy` takes them."""
        if self._outcome is None:
            return super().__reduce_ex__(protocol)
        raise Unsupported("a result cannot be pickled or copied; write it with .save(path), fxopt.load reads it")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model: `*.onnx`, or a folder with a manifest, the graph and its constants.

        Raises:
            Unsupported: an operator has no ONNX form (it is named).
            OutputError: the path cannot be written.
        """
        from fxopt.artifact import save

        save(self._ready, Path(path))


def is_onnx(model: Model) -> bool:
    """True for the path of an ONNX file and for a `ModelProto`."""
    return isinstance(model, (str, os.PathLike)) or type(model).__name__ == "ModelProto"


def is_graph(model: Model) -> bool:
    """True for a `Graph`, and for a result that has one."""
    return isinstance(model, Graph) or (isinstance(model, Optimized) and model._outcome is not None)


def _is_exported(model: Model) -> bool:
    return isinstance(model, torch.export.ExportedProgram) and model.example_inputs is not None


def _load(model: Model, example_inputs: Any, options: Options, backend: Backend, notes: list[str]) -> Graph:
    """The graph in the origin that the backend takes."""
    if is_onnx(model):
        from fxopt.artifact import concern_here
        from fxopt.frontends.onnx import foreign_operators, load
        from fxopt.ir.masks import stale

        graph = load(model)
        notes.extend(filter(None, [concern_here(graph, "the model"), foreign_operators(graph), *stale(graph)]))
        return graph
    args, kwargs = bound(example_inputs)
    known = (model if isinstance(model, Graph) else model.graph) if is_graph(model) else None
    if known is not None and (known.origin == "onnx" or backend.name != "onnxruntime"):
        return known.copy()  # shapes may be given anew
    source: Any = model if known is None else known.module.eval()
    if backend.name == "onnxruntime":
        from fxopt.frontends.to_onnx import to_onnx

        graph, found = to_onnx(source, args, options.dynamic_shapes, kwargs=kwargs)
        if known is not None:
            graph.call_spec = known.call_spec
        notes.extend(found)
        return graph
    from fxopt.frontends.torch_export import load as load_torch

    return load_torch(source, args, options.dynamic_shapes, kwargs)


def _request(model: Model, example_inputs: Any, options: Options) -> tuple[Graph, Request]:
    from fxopt.inputs import bind_sizes
    from fxopt.request import Request

    notes: list[str] = []
    target = resolve_target(options.target, options.threads)
    backend = resolve_backend(options.backend, target, notes, options.of_backend)
    passes = resolve_passes(options.passes)
    target = backend.target = cores_used(target, backend)
    graph = _load(model, example_inputs, options, backend, notes)
    fixed = shaped(graph, options.input_shapes)
    samples = samples_of(graph, example_inputs, replace(options, input_shapes=fixed or None), notes)
    sizes = sizes_of(graph, options.input_shapes)
    bind_sizes(graph, samples[0] if samples else None, sizes)
    backend = backend.with_sizes(sizes, _name(model, graph))
    backend.check(graph, target)
    request = Request(
        target, backend, samples, passes, options.evaluate, options.budget, options.objective,
        resolve_pattern("include", options.include), resolve_pattern("exclude", options.exclude), options.threads,
        options.force, options.guard_seconds, options.dump, options.progress, notes, options.resume,
        options.custom_ops,
    )  # fmt: skip
    return graph, request


def _name(model: Model, graph: Graph) -> str:
    """What a result is called: like the file, or the class."""
    return Path(model).stem if isinstance(model, (str, os.PathLike)) else graph.name


def _run(model: Model, example_inputs: Any, options: Options, first_call: bool) -> Outcome:
    from fxopt.engine import Optimizer

    graph, request = _request(model, example_inputs, options)
    if first_call:
        request.warnings.append("captured at the first call: that call is the only sample")
    evaluator = evaluator_of(graph)
    baseline = _baseline(model, graph, request)
    outcome = Optimizer(graph, request, baseline, evaluator).run()
    if outcome.executable is not baseline:
        baseline.close()
    return outcome


def evaluator_of(graph: Graph) -> Evaluator | None:
    """ONNX Runtime for single operators without a torch reference."""
    if graph.origin != "onnx":
        return None
    from fxopt.backends.onnxruntime.evaluator import OnnxEvaluator

    return OnnxEvaluator()


def _baseline(model: Model, graph: Graph, request: Request) -> Executable:
    """What came in, as the backend runs it: the file itself where there is one."""
    from fxopt.backends.eager import EagerExecutable

    if request.backend.is_compiler and request.target.is_host and graph.origin == "onnx":
        from fxopt.backends.onnxruntime import OnnxRuntime

        return OnnxRuntime().compile(graph, request.target, threads=request.threads)  # how the model ran so far
    if request.backend.name == "onnxruntime":
        from fxopt.ir.memory import is_large

        if isinstance(model, (str, os.PathLike)) and not is_large(graph):
            from fxopt.backends.onnxruntime import OnnxRuntime

            assert isinstance(request.backend, OnnxRuntime)
            return request.backend.open(Path(model), request.threads)
        return request.backend.compile(graph, request.target, threads=request.threads)
    return EagerExecutable(graph, evaluator_of(graph))


# ---- the other functions


def capture(model: Model, example_inputs: Any = None, dynamic_shapes: Any = None) -> Graph:
    """The model as a `Graph`, unchanged: ONNX files and messages in the ONNX dialect, PyTorch models as aten.

    Raises:
        InvalidModel, CaptureError: the model cannot be read or captured.
    """
    model = read_by_plugin(model)
    if isinstance(model, Graph):
        graph = model
    elif is_onnx(model):
        from fxopt.frontends.onnx import load

        graph = load(model)
    else:
        from fxopt.frontends.torch_export import load as load_torch

        args, kwargs = bound(example_inputs)
        graph = load_torch(model, args, dynamic_shapes, kwargs)
    from fxopt.inputs import bind_sizes

    bind_sizes(graph, None)
    return graph


def load(path: str | os.PathLike[str], *, threads: int | None = None, function: str | None = None) -> Optimized:
    """What `Optimized.save` wrote (an ONNX file or a folder), ready to run; `function` is one of `bundle`'s.

    Raises:
        InvalidModel: there is nothing that can be loaded.
    """
    from fxopt.artifact import load as load_artifact

    result = Optimized(None, None)
    result._source.clear()
    result._outcome = load_artifact(Path(path), threads, function)
    return result


def explain(model: Model, target: str | Target = "host", *, example_inputs: Any = None, **options: Any) -> Ledger:
    """The verdict of every pass on every node, from plan and prices alone; options as in `optimize`."""
    from fxopt.backends.eager import EagerExecutable
    from fxopt.engine import Optimizer

    known = set(Options.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise unknown("option of explain", name, known)
    graph, request = _request(read_by_plugin(model), example_inputs, Options(target, **options))
    evaluator = evaluator_of(graph)
    return Optimizer(graph, request, EagerExecutable(graph, evaluator), evaluator).explain()


def predict(
    model: Model,
    target: str | Target = "host",
    *,
    example_inputs: Any = None,
    input_shapes: Mapping[str, Sequence[int | str | None]] | None = None,
    threads: int | None = None,
) -> GraphPrediction:
    """Predicted time per node and in total, with an interval, on a target that need not be here."""
    from fxopt.catalog import entries, find_backend
    from fxopt.cost_model.roofline import predict_graph
    from fxopt.inputs import bind_sizes

    graph = model if isinstance(model, Graph) else capture(model, example_inputs)
    if input_shapes:
        bind_sizes(graph, None, sizes_of(graph, input_shapes))
    found = resolve_target(target, threads)
    if found.backend in entries("backend"):
        found = cores_used(found, find_backend(found.backend))
    return predict_graph(graph, found)
