"""Train the constants of a graph: forward, loss, backward, step, with zeros kept and the state on disk."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.errors import Diverged, InvalidInput, InvalidOption, Unsupported
from fxopt.inputs import structured
from fxopt.ir.graph import Graph
from fxopt.ir.interpreter import Evaluator, GraphRun, Observer
from fxopt.training.batches import Batch, Batches
from fxopt.training.checkpoints import Checkpoints
from fxopt.training.losses import IGNORED, LOSSES, class_axis, distribution, mean_square, square_head
from fxopt.training.settings import Settings
from fxopt.training.teacher import Given, Observed, Teacher

Progress = Callable[[str, int, int], None]
_NAMED = 5  # constants in a warning


@dataclass(frozen=True)
class Step:
    """One step: its number from 1, the loss with its terms (before their weights), and the learning rate."""

    number: int
    loss: float
    task: float
    distill: float
    squarehead: float
    rate: float


class TrainedRun(GraphRun):
    """A run of a graph with other values for some of its constants: parameters, in float32 where those are shorter."""

    def __init__(
        self, graph: Graph, values: Mapping[str, Tensor], evaluator: Evaluator | None, observer: Observer | None
    ) -> None:
        super().__init__(graph, evaluator, observer=observer)
        self.values = values

    def constant_of(self, node: fx.Node) -> Any:
        """A parameter, in the constant's element type."""
        value = self.values.get(str(node.target))
        if value is None:
            return super().constant_of(node)
        return value.to(self.graph.attribute(str(node.target)).dtype)


class Trainer:
    """One training run.

    Args:
        parameters: what is trained, by the target of the constant.
        zeros: which of their elements stay zero.
        blocks: the nodes whose values SquareHead compares, in the order of the teacher's.
        squarehead, distill: weights of these terms.
    """

    def __init__(
        self,
        graph: Graph,
        settings: Settings,
        parameters: dict[str, torch.nn.Parameter],
        zeros: Mapping[str, Tensor],
        *,
        teacher: Teacher | None = None,
        blocks: Sequence[str] = (),
        distill: float = 0.0,
        squarehead: float = 0.0,
        evaluator: Evaluator | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.graph = graph
        self.settings = settings
        self.parameters = parameters
        self.zeros = zeros
        self.teacher = teacher
        self.distill = distill
        self.squarehead = squarehead
        self.progress = progress
        self.run = Observed(lambda observer: TrainedRun(graph, parameters, evaluator, observer), blocks)
        self.optimizer = self._optimizer()
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.history: list[Step] = []

    def _optimizer(self) -> torch.optim.Optimizer:
        make = self.settings.optimizer
        if make is None:
            return torch.optim.AdamW(self.parameters.values(), lr=self.settings.learning_rate, weight_decay=0.0)
        made = make(list(self.parameters.values()))
        if not isinstance(made, torch.optim.Optimizer):
            raise InvalidOption(f"optimizer= gave a {type(made).__name__}, expected a torch.optim.Optimizer")
        return made

    def fit(self, batches: Batches, checkpoints: Checkpoints | None) -> list[Step]:
        """Train on the batches, from the checkpoint where there is one; the parameters hold the result.

        Raises:
            Diverged: a loss or gradient is not finite; the parameters and the checkpoint are those before it.
        """
        total = self.settings.total(batches.count)
        if total != 0:
            self.settings.rate(0, total)  # a schedule without an end fails now
        if checkpoints is not None and self.settings.resume:
            self._restore(checkpoints)
        done = len(self.history)
        for batch in batches.run(self.settings.steps, self.settings.epochs or 1, skipped=done):
            self.history.append(self._step(batch, total, checkpoints))
            done += 1
            if self.progress is not None:
                self.progress(f"fine-tuning (loss {self.history[-1].loss:.4g})", done, total or 0)
            if checkpoints is not None and done % self.settings.checkpoint_every == 0:
                checkpoints.save(self._state())
        if checkpoints is not None and done % self.settings.checkpoint_every:
            checkpoints.save(self._state())
        return self.history

    # ---- one step

    def _step(self, batch: Batch, total: int | None, checkpoints: Checkpoints | None) -> Step:
        number = len(self.history)
        factor = self.settings.rate(number, total)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(self.settings.seed + number)  # whatever was drawn before it
            loss, terms = self._loss(batch)
            self._require_finite("loss", loss.item(), number, checkpoints)
            if not loss.requires_grad:
                raise Unsupported(
                    f"{self.graph.name}: no gradient reaches the {len(self.parameters)} trained constants from the loss"
                )
            torch.autograd.backward(loss)
        self._check_gradients(number, checkpoints)
        self.optimizer.step()
        for target, zeros in self.zeros.items():
            self.parameters[target].data.masked_fill_(zeros, 0.0)
        return Step(number + 1, loss.item(), *terms, self.rates[0] * factor)

    def _loss(self, batch: Batch) -> tuple[Tensor, tuple[float, float, float]]:
        expected = None if self.teacher is None else self.teacher(batch.inputs)
        given = self.run(batch.inputs)
        real = batch.real
        if real is None and isinstance(batch.targets, Tensor) and batch.targets.dim() > 1:
            real = None if batch.targets.is_floating_point() else batch.targets != IGNORED
        weighted: list[tuple[float, Tensor]] = []
        if self.settings.loss is not None:
            weighted.append((self.settings.task, self._task(given, batch, real)))
        if expected is not None and self.distill:
            weighted.append((self.distill, self._distill(given, expected, batch, real)))
        if expected is not None and self.squarehead:
            weighted.append((self.squarehead, self._squarehead(given, expected, real)))
        loss = torch.stack([weight * term for weight, term in weighted]).sum()
        values = iter(term.item() for _, term in weighted)
        wanted = (self.settings.loss is not None, bool(self.distill), bool(self.squarehead))
        task, distill, squarehead = (next(values) if each else 0.0 for each in wanted)
        return loss, (task, distill, squarehead)

    def _task(self, given: Given, batch: Batch, real: Tensor | None) -> Tensor:
        loss = self.settings.loss
        if isinstance(loss, str):
            if not isinstance(batch.targets, Tensor):
                raise InvalidInput(
                    f"loss={loss!r} takes one tensor of targets, got a {type(batch.targets).__name__}; a function "
                    "loss=f(outputs, targets) takes anything"
                )
            return LOSSES[loss](given.output, batch.targets, real)
        assert loss is not None
        value = loss(structured(self.graph, given.results), batch.targets)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            shown = f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InvalidInput(f"loss= gave {shown}, expected one floating-point number as a tensor")
        return value.reshape(())

    def _distill(self, given: Given, expected: Given, batch: Batch, real: Tensor | None) -> Tensor:
        student, teacher = given.output, expected.output
        if student.shape != teacher.shape:
            raise InvalidInput(
                f"the teacher's output has shape {list(teacher.shape)}, the model's {list(student.shape)}"
            )
        if self.settings.loss == "mse":
            return mean_square(student, teacher, real)
        axis = class_axis(student, batch.targets) if self.settings.loss == "cross-entropy" else -1
        return distribution(student, teacher, self.settings.temperature, axis, real)

    def _squarehead(self, given: Given, expected: Given, real: Tensor | None) -> Tensor:
        for student, teacher, name in zip(given.blocks, expected.blocks, self.run.blocks, strict=True):
            if student.shape != teacher.shape:
                raise InvalidInput(
                    f"block {name!r} gives {list(student.shape)}, the teacher's {list(teacher.shape)}; choose others "
                    "with blocks=, or squarehead=0"
                )
        pairs = zip(given.blocks, expected.blocks, strict=True)
        return torch.stack([square_head(student, teacher, real) for student, teacher in pairs]).sum()

    def _check_gradients(self, number: int, checkpoints: Checkpoints | None) -> None:
        """Mask the gradients, require that they are finite, clip them."""
        for target, zeros in self.zeros.items():
            gradient = self.parameters[target].grad
            if gradient is not None:
                gradient.masked_fill_(zeros, 0.0)
        without = [target for target, value in self.parameters.items() if value.grad is None]
        if number == 0 and without:
            shown = ", ".join(without[:_NAMED]) + (", ..." if len(without) > _NAMED else "")
            warnings.warn(f"fxopt: no gradient reaches {len(without)} of the trained constants: {shown}", stacklevel=5)
        gradients = [value.grad for value in self.parameters.values() if value.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._require_finite("gradient", norm.item(), number, checkpoints)
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.settings.clip, norm)

    def _require_finite(self, what: str, value: float, number: int, checkpoints: Checkpoints | None) -> None:
        if math.isfinite(value):
            return
        kept = ""
        if checkpoints is not None and checkpoints.path.exists():
            kept = f"; {checkpoints.path} holds the last good state"
        raise Diverged(f"the {what} is {value} in step {number + 1}: try a lower learning rate, or clip=1.0{kept}")

    # ---- state

    def _state(self) -> dict[str, Any]:
        return {
            "parameters": {target: value.data for target, value in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "history": [list(asdict(step).values()) for step in self.history],
        }

    def _restore(self, checkpoints: Checkpoints) -> None:
        state = checkpoints.load()
        if state is None:
            return
        for target, value in state["parameters"].items():
            self.parameters[target].data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [Step(*row) for row in state["history"]]


@contextmanager
def reporting(progress: bool | Progress) -> Iterator[Progress | None]:
    """The bar of the command line, the user's function, or nothing."""
    if callable(progress):
        yield progress
    elif progress:
        from fxopt.cli.progress import ProgressReporter

        with ProgressReporter() as bar:
            yield bar
    else:
        yield None
