"""The terms of the loss: the task's, the teacher's distribution, and the outputs of blocks (SquareHead).

Source of SquareHead: Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models" (2023).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.errors import InvalidInput

IGNORED = -100  # a target that does not count
_EPSILON = 1e-6

Task = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean cross entropy (nats) over positions that count: target classes, or their probabilities.

    Args:
        logits: [..., classes], or [batch, classes, *space] where targets are [batch, *space].
        targets: int64 [...]; -100 does not count. Or floats of the shape of the logits.
        real: bool, of the shape of the targets: positions that are not padding.

    Raises:
        InvalidInput: shapes do not fit, or a target is no class.
    """
    axis = class_axis(logits, targets)
    if targets.is_floating_point():
        losses = -(targets * logits.float().log_softmax(axis)).sum(axis)
        return losses.mean() if real is None or real.shape != losses.shape else _mean(losses, real)
    classes = logits.shape[axis]
    counted = targets != IGNORED
    if real is not None and real.shape == targets.shape:
        counted = counted & real
    wrong = targets[counted & ((targets < 0) | (targets >= classes))]
    if wrong.numel():
        raise InvalidInput(
            f"target {int(wrong[0])} is no class: the model has {classes} ({IGNORED} marks what does not count)"
        )
    flat, labels = logits.movedim(axis, -1)[counted], targets[counted]
    return F.cross_entropy(flat.float(), labels.long(), reduction="sum") / max(1, len(labels))


def next_token(logits: Tensor, targets: Tensor, real: Tensor | None = None) -> Tensor:
    """Cross entropy of logits [batch, seq, classes] against the tokens [batch, seq] that follow."""
    if logits.dim() != 3 or logits.shape[:2] != targets.shape:
        raise InvalidInput(
            f"next-token: targets have shape {list(targets.shape)} and the output {list(logits.shape)}; expected "
            "tokens [batch, seq] and logits [batch, seq, classes]"
        )
    shifted = None if real is None or real.shape != targets.shape else real[:, 1:]
    return cross_entropy(logits[:, :-1], targets[:, 1:], shifted)


def mean_square(output: Tensor, targets: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean of (output - target)^2."""
    if output.shape != targets.shape:
        raise InvalidInput(
            f"mse: targets have shape {list(targets.shape)}, expected that of the output, {list(output.shape)}"
        )
    return (selected(output, real) - selected(targets.to(output.dtype), real)).float().square().mean()


LOSSES: dict[str, Task] = {"cross-entropy": cross_entropy, "next-token": next_token, "mse": mean_square}


def class_axis(logits: Tensor, targets: Tensor) -> int:
    """The axis of the classes: the last one, or the second of [batch, classes, *space].

    Raises:
        InvalidInput: shapes or element type do not fit.
    """
    shape, given = list(logits.shape), list(targets.shape)
    if targets.is_floating_point():
        if shape == given:
            return -1
        raise InvalidInput(
            f"targets are {str(targets.dtype).removeprefix('torch.')} of shape {given}; expected classes as integers, "
            f"or probabilities of the shape of the output, {shape}"
        )
    if targets.dtype == torch.bool:
        raise InvalidInput("targets are bool; expected classes as integers")
    if given == shape[:-1]:
        return -1
    if len(shape) > 2 and given == [shape[0], *shape[2:]]:
        return 1
    others = f" or {[shape[0], *shape[2:]]}" if len(shape) > 2 else ""
    raise InvalidInput(f"targets have shape {given}, expected {shape[:-1]}{others} for an output of shape {shape}")


def distribution(student: Tensor, teacher: Tensor, temperature: float, axis: int, real: Tensor | None) -> Tensor:
    """T^2 times the mean over positions of KL(teacher || student), both softmax(logits / T) along `axis`."""
    expected = (teacher.float() / temperature).log_softmax(axis)
    given = (student.float() / temperature).log_softmax(axis)
    apart = (expected.exp() * (expected - given)).sum(axis)
    mean = apart.mean() if real is None or real.shape != apart.shape else _mean(apart, real)
    return temperature**2 * mean


def square_head(student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
    """mean((s - t)^2) / (mean(t^2) + eps) over positions that are not padding."""
    s, t = selected(student, real).float(), selected(teacher, real).float()
    return (s - t).square().mean() / (t.square().mean() + _EPSILON)


def selected(value: Tensor, real: Tensor | None) -> Tensor:
    """The positions of [*positions, ...] that are not padding; positions may have become one axis."""
    if real is None:
        return value
    if value.shape[: real.dim()] == real.shape:
        return value[real]
    return value[real.flatten()] if value.dim() and value.shape[0] == real.numel() else value


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return (values * counted).sum() / counted.sum().clamp(min=1)
