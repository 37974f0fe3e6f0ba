"""`finetune`: train what a pass has changed in a model, so that it loses less; zeros stay zero."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxopt.api import Model, Optimized, capture, evaluator_of, is_onnx
from fxopt.errors import InvalidInput, InvalidOption, unknown
from fxopt.ir.graph import Graph, set_attribute
from fxopt.ir.masks import verify_masks
from fxopt.ir.structural_hash import structural_hash
from fxopt.training.batches import Batches
from fxopt.training.checkpoints import Checkpoints
from fxopt.training.masks import kept_zeros
from fxopt.training.parameters import parameters
from fxopt.training.settings import OptimizerMaker, Schedule, Settings
from fxopt.training.teacher import FunctionTeacher, GraphTeacher, Teacher, paired_blocks
from fxopt.training.trainer import Progress, Step, Trainer, reporting
from fxopt.training.unpack import unpacked

if TYPE_CHECKING:
    from fxopt.request import Outcome


class Finetuned(Optimized):
    """A model with trained weights, called like the original; it runs in torch until `optimize` compiles it."""

    def __init__(self, outcome: Outcome, history: Sequence[Step], trained: Sequence[str]) -> None:
        super().__init__(None, None)
        self._source.clear()
        self._outcome = outcome
        self.history = tuple(history)
        self._trained = tuple(trained)

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained constants by name; a captured module takes them by `load_state_dict(..., strict=False)`."""
        return {target: self.graph.attribute(target).detach() for target in self._trained}


def finetune(
    model: Model,
    data: Any,
    *,
    loss: str | Callable[[Any, Any], torch.Tensor] | None = "cross-entropy",
    teacher: Any = None,
    task: float = 1.0,
    distill: float | None = None,
    squarehead: float | None = None,
    temperature: float = 1.0,
    blocks: Sequence[str] | None = None,
    train: str | None = None,
    masks: str = "zeros",
    optimizer: OptimizerMaker | None = None,
    learning_rate: float = 1e-3,
    schedule: str | Schedule | None = None,
    clip: float | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    targets: str | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    progress: bool | Progress = True,
    seed: int = 0,
    **others: Any,
) -> Finetuned:
    """Train the weights of a model, best after `sparsify` and before quantisation; zeros of pruned weights stay zero.

    The loss is `task` times the loss of the task, plus `distill` times T^2 KL(teacher || model) of the outputs, plus
    `squarehead` times the sum over block outputs of mean((s - t)^2) / mean(t^2), over positions that are not padding
    (an input `attention_mask` says so, else targets of -100).

    Args:
        model: a `Graph`, a result of `optimize`, the path of an ONNX file, a `ModelProto`, or an `nn.Module` with
            `example_inputs` (and `dynamic_shapes`). It is not changed. Sparse weights that are packed come out as
            floats; `optimize` packs them again.
        data: batches (inputs, targets), tuples with the targets last, or dicts: a list, a DataLoader, any iterable.
        loss: "cross-entropy", "next-token" (targets are the tokens themselves), "mse", `callable(outputs, targets)`, or
            None: distillation alone, without targets.
        teacher: the dense original (a model as above), whose blocks are compared too, or `callable(*inputs)`. That of a
            model with rearranged channels is the rearranged dense model.
        distill, squarehead: weights of these terms; None: 1 where the teacher allows it.
        temperature: T of the distributions.
        blocks: names of the nodes that SquareHead compares; None: the residual sums.
        train: a regular expression over constants and the operators that use them; None: weights, biases, norms and
            tables of embeddings.
        masks: "zeros": every zero of a weight stays; "marks": only patterns that sparsify has marked; "none".
        optimizer: `callable(parameters) -> Optimizer`; None: AdamW at `learning_rate`, without weight decay.
        schedule: factor of the learning rate: "constant", "linear" or "cosine" (from a short warm-up to 0), or
            `callable(step, steps)`; None: linear where the number of steps is known.
        clip: largest norm of the gradient; None: not clipped.
        steps, epochs: how long; by default one epoch.
        targets: the key of the targets where batches are dicts.
        checkpoint: a folder for the state of the run, written every `checkpoint_every` steps and at the end.
        resume: go on from the checkpoint, if there is one; the result is that of an uninterrupted run, bit for bit, if
            the data are the same (a DataLoader shuffles the same way, a generator must begin anew).
        progress: a bar, `callable(stage, done, total)`, or False.

    Raises:
        UnknownName, InvalidOption: an option or its value does not exist.
        Unsupported: the model is quantised, or has nothing to train.
        InvalidInput: a batch does not fit the model, or targets the loss.
        Diverged: the loss is no finite number; the checkpoint before it is kept.
    """
    if others:
        known = [name for name in inspect.signature(finetune).parameters if name != "others"]
        raise unknown("option of finetune", next(iter(others)), known)
    settings = Settings(
        loss, task, distill, squarehead, temperature, blocks, train, masks, optimizer, learning_rate, schedule, clip,
        steps, epochs, targets, None if checkpoint is None else Path(checkpoint), checkpoint_every, resume, seed,
    )  # fmt: skip
    graph = unpacked(graph_of(model, example_inputs, dynamic_shapes))
    if teacher is None and (distill or squarehead or loss is None):
        raise InvalidOption("distill=, squarehead= and loss=None need teacher=, the model to learn from")
    roles = parameters(graph, train)
    zeros = kept_zeros(graph, roles, masks)
    found, pairs, head = _teacher(teacher, graph, settings, example_inputs, dynamic_shapes)
    checkpoints = _checkpoints(graph, found, settings)
    values = {target: _parameter(graph.attribute(target)) for target in roles}
    with reporting(progress) as report:
        trainer = Trainer(
            graph, settings, values, zeros, teacher=found, blocks=[name for name, _ in pairs],
            distill=(0.0 if found is None else 1.0) if distill is None else distill, squarehead=head,
            evaluator=evaluator_of(graph), progress=report,
        )  # fmt: skip
        batches = Batches(
            data, graph.inputs, targets, needed=loss is not None, tokens=loss == "next-token", seed=seed, say=_warn
        )
        history = trainer.fit(batches, checkpoints)
    return _result(graph, values, history, masks)


def graph_of(model: Model, example_inputs: Any = None, dynamic_shapes: Any = None) -> Graph:
    """The graph of anything that `finetune` takes."""
    if isinstance(model, Graph):
        return model
    if isinstance(model, Optimized):
        return model.graph
    if not is_onnx(model) and example_inputs is None and not isinstance(model, torch.export.ExportedProgram):
        raise InvalidInput(f"a {type(model).__name__} is captured on example_inputs=; none were given")
    return capture(model, example_inputs, dynamic_shapes)


def _teacher(
    teacher: Any, graph: Graph, settings: Settings, example_inputs: Any, dynamic_shapes: Any
) -> tuple[Teacher | None, list[tuple[str, str]], float]:
    """The teacher, the blocks that are compared (of the model, of the teacher), and the weight of SquareHead."""
    if teacher is None:
        return None, [], 0.0
    captured = isinstance(teacher, torch.nn.Module) and not isinstance(teacher, Optimized)
    if isinstance(teacher, (Graph, Optimized)) or is_onnx(teacher) or (captured and example_inputs is not None):
        original = unpacked(graph_of(teacher, example_inputs, dynamic_shapes))
        names, others = ([spec.name for spec in each.inputs] for each in (graph, original))
        if len(names) != len(others):
            raise InvalidInput(f"the teacher takes {len(others)} inputs ({', '.join(others)}), the model {len(names)}")
        pairs = [] if settings.squarehead == 0 else paired_blocks(graph, original, settings.blocks)
        head = 1.0 if settings.squarehead is None else settings.squarehead
        if isinstance(pairs, str):
            if settings.squarehead is not None or settings.blocks is not None:
                raise InvalidOption(f"squarehead: {pairs}")
            _warn(f"fine-tuning without SquareHead: {pairs}")
            pairs = []
        run = GraphTeacher(original, [name for _, name in pairs], evaluator_of(original))
        return run, pairs, head if pairs else 0.0
    if not callable(teacher):
        raise InvalidOption(f"teacher={teacher!r}; expected a model or a function of the inputs")
    if settings.squarehead or settings.blocks is not None:
        raise InvalidOption("squarehead compares blocks of graphs: give the teacher as a model, not as a function")
    return FunctionTeacher(teacher), [], 0.0


def _checkpoints(graph: Graph, teacher: Teacher | None, settings: Settings) -> Checkpoints | None:
    """Where the state goes; a checkpoint that is there already is only resumed from."""
    if settings.checkpoint is None:
        return None
    learned_from = structural_hash(teacher.graph) if isinstance(teacher, GraphTeacher) else type(teacher).__name__
    fingerprint = {"model": structural_hash(graph), "teacher": learned_from, **settings.fingerprint()}
    found = Checkpoints(settings.checkpoint, fingerprint)
    if not settings.resume:
        found.require_room()
    return found


def _parameter(value: torch.Tensor) -> torch.nn.Parameter:
    """A copy to train, at least float32: small steps would be lost in shorter floats."""
    wide = value.dtype if value.dtype == torch.float64 else torch.float32
    return torch.nn.Parameter(value.detach().to(wide, copy=True, memory_format=torch.contiguous_format))


def _result(graph: Graph, values: dict[str, torch.nn.Parameter], history: list[Step], masks: str) -> Finetuned:
    """The same graph with the trained constants."""
    from fxopt.backends.eager import EagerExecutable
    from fxopt.ir.ledger import Ledger
    from fxopt.report.report import Report
    from fxopt.report.summary import summary, versions
    from fxopt.request import Outcome

    tuned = graph.copy()
    for target, value in values.items():
        set_attribute(tuned.root, target, value.detach().to(graph.attribute(target).dtype))
    for node in tuned.nodes:
        node.meta.pop("levels", None)  # ranges of the values before
        if masks == "none":
            node.meta.pop("sparsity", None)
    verify_masks(tuned)
    figures = summary(tuned, 0, None)
    part = max(1, len(history) // 10)
    first, last = (sum(step.loss for step in steps) / part for steps in (history[:part], history[-part:]))
    report = Report(
        target="host", backend="eager", executed_on=EagerExecutable.executed_on, outcome="fine-tuned",
        why=f"{len(history)} steps, loss {first:.4g} at the beginning and {last:.4g} at the end", objective="accuracy",
        budget=None, before=figures, after=figures, versions=versions(),
    )  # fmt: skip
    return Finetuned(Outcome(tuned, EagerExecutable(tuned, evaluator_of(tuned)), report, Ledger()), history, [*values])


def _warn(text: str) -> None:
    warnings.warn(f"fxopt: {text}", stacklevel=4)
