"""If, Loop, Scan and SequenceMap over bodies.

Source: the ONNX operator specification. Where a Loop has no condition, what its body says about the condition is
ignored, as the specification says (ONNX Runtime 1.32 obeys it).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import InvalidInput, InvalidModel, MissingReference
from fxopt.ir.onnx.bodies import Body
from fxopt.ir.onnx.lane import to_ints, to_scalar, to_tensor
from fxopt.ir.onnx.references.common import as_bits, first
from fxopt.ir.onnx.references.empty_scan import empty_scan
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


@operators.reference("If", raw=True)
def if_(call: Call, cond: Any, then_branch: Body, else_branch: Body) -> Any:
    """The outputs of one branch; the other one does not run."""
    return first(call, *_checked((then_branch if bool(to_scalar(cond)) else else_branch)(), call.outputs, "If"))


@operators.reference("Loop", raw=True)
def loop(call: Call, trip_count: Any = None, cond: Any = None, *carried: Any, body: Body) -> Any:
    """Carried values after at most `trip_count` runs while the condition holds, then the stacked scan outputs.

    The body maps (iteration, condition, carried...) to (condition, carried..., scan outputs...).

    Raises:
        InvalidModel: there is neither a trip count nor a condition.
    """
    if trip_count is None and cond is None:
        raise InvalidModel("Loop has neither a trip count nor a condition; it would never end")
    limit = None if trip_count is None else int(to_scalar(trip_count))
    going = cond is None or bool(to_scalar(cond))
    count = len(carried)
    state: list[Any] = list(carried)
    rows: list[list[Any]] = []
    done = 0
    while going and (limit is None or done < limit):
        results = body(np.array(done, np.int64), np.array(True), *state)
        _checked(results, call.outputs + 1, "the body of Loop")
        state = results[1 : 1 + count]
        rows.append(results[1 + count :])
        going = cond is None or bool(to_scalar(results[0]))
        done += 1
    scanned = [
        _stacked([row[index] for row in rows], 0)
        if rows
        else empty_scan(body, 1 + count + index, (np.array(0, np.int64), np.array(True), *carried), 0)
        for index in range(call.outputs - count)
    ]
    return first(call, *state, *scanned)


@operators.reference("Scan", raw=True)
def scan(
    call: Call,
    *inputs: Any,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: list[int] | None = None,
    scan_input_directions: list[int] | None = None,
    scan_output_axes: list[int] | None = None,
    scan_output_directions: list[int] | None = None,
    directions: list[int] | None = None,
) -> Any:
    """Run the body over slices of the last `num_scan_inputs` inputs, carrying the first ones.

    The body maps (states..., slices...) to (states..., elements of the scan outputs...). A direction of 1 is backwards.
    Opset 8 has a batch axis before the scanned one, and the lengths of the sequences as its first input.
    """
    if call.version == 8:
        return first(call, *_batched(call, inputs, body, num_scan_inputs, directions))
    states = list(inputs[: len(inputs) - num_scan_inputs])
    scanned = [to_tensor(value) for value in inputs[len(inputs) - num_scan_inputs :]]
    axes = scan_input_axes or [0] * num_scan_inputs
    outputs = call.outputs - len(states)
    length = _length(scanned, axes)
    return first(
        call,
        *_scan(
            body,
            states,
            [_flipped(value, axis, back) for value, axis, back in _zip(scanned, axes, scan_input_directions)],
            axes,
            length,
            scan_output_axes or [0] * outputs,
            scan_output_directions or [0] * outputs,
        ),
    )


@operators.reference("SequenceMap", raw=True)
def sequence_map(call: Call, items: list[Any], *others: Any, body: Body) -> Any:
    """The body's outputs for each item as sequences; other sequences go along, tensors are given to every run."""
    lengths = {len(items), *(len(other) for other in others if isinstance(other, list))}
    if len(lengths) > 1:
        raise InvalidInput(f"SequenceMap: the sequences have {sorted(lengths)} items; expected equal numbers")
    rows = []
    for index, item in enumerate(items):
        along = (other[index] if isinstance(other, list) else other for other in others)
        rows.append(_checked(body(item, *along), call.outputs, "the body of SequenceMap"))
    return first(call, *([row[index] for row in rows] for index in range(call.outputs)))


def _checked(results: list[Any], wanted: int, what: str) -> list[Any]:
    if len(results) < wanted:
        raise InvalidModel(f"{what} gives {len(results)} values, the node needs {wanted}")
    return results


def _zip(values: list[Tensor], axes: list[int], directions: list[int] | None) -> zip[tuple[Tensor, int, int]]:
    return zip(values, axes, directions or [0] * len(values), strict=True)


def _flipped(value: Tensor, axis: int, backwards: int) -> Tensor:
    return _typed(as_bits(value).flip(axis), value.dtype) if backwards else value


def _typed(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits if bits.dtype == dtype else bits.view(dtype)


def _length(scanned: list[Tensor], axes: list[int]) -> int:
    lengths = [value.shape[axis] for value, axis in zip(scanned, axes, strict=True)]
    if any(length != lengths[0] for length in lengths):
        raise InvalidInput(f"Scan: the scanned axes have sizes {lengths}; expected equal ones")
    return int(lengths[0]) if lengths else 0


def _scan(
    body: Body,
    states: list[Any],
    scanned: list[Tensor],
    axes: list[int],
    length: int,
    output_axes: list[int],
    output_directions: list[int],
) -> list[Any]:
    """The states after `length` steps and the scan outputs."""
    count, first_slices = len(states), list(states)
    rows: list[list[Any]] = []
    for step in range(length):
        slices = [value.select(axis, step) for value, axis in zip(scanned, axes, strict=True)]
        results = _checked(body(*states, *slices), count + len(output_axes), "the body of Scan")
        states = results[:count]
        rows.append(results[count:])
    outputs = []
    for index, (axis, backwards) in enumerate(zip(output_axes, output_directions, strict=True)):
        if not rows:
            shapes = [value.new_empty(_without(value.shape, axis)) for value, axis in zip(scanned, axes, strict=True)]
            outputs.append(empty_scan(body, count + index, (*first_slices, *shapes), axis))
            continue
        column = [row[index] for row in rows]
        outputs.append(_stacked(column[::-1] if backwards else column, axis))
    return [*states, *outputs]


def _without(shape: torch.Size, axis: int) -> list[int]:
    axis %= len(shape)
    return [*shape[:axis], *shape[axis + 1 :]]


def _batched(
    call: Call, inputs: tuple[Any, ...], body: Body, num_scan_inputs: int, directions: list[int] | None
) -> list[Any]:
    """Scan of opset 8: every entry of the batch on its own, for its own length; what lies behind it is zero."""
    lengths, *rest = inputs
    split = len(rest) - num_scan_inputs
    states = [to_tensor(value) for value in rest[:split]]
    scanned = [to_tensor(value) for value in rest[split:]]
    longest = _length(scanned, [1] * num_scan_inputs)
    batch = scanned[0].shape[0]
    steps = to_ints(lengths) or [longest] * batch
    outputs = call.outputs - split
    entries = []
    for index in range(batch):
        own = [value[index].narrow(0, 0, steps[index]) for value in scanned]
        own = [_flipped(value, 0, back) for value, _, back in _zip(own, [0] * len(own), directions)]
        found = _scan(
            body,
            [value[index] for value in states],
            own,
            [0] * num_scan_inputs,
            steps[index],
            [0] * outputs,
            [0] * outputs,
        )
        entries.append([*found[:split], *(_padded(value, longest) for value in found[split:])])
    return [_stacked([entry[index] for entry in entries], 0) for index in range(call.outputs)]


def _padded(value: Tensor, length: int) -> Tensor:
    missing = length - value.shape[0]
    return torch.cat([value, value.new_zeros((missing, *value.shape[1:]))]) if missing else value


def _stacked(items: list[Any], axis: int) -> Any:
    """The elements of a scan output along a new axis.

    Raises:
        InvalidInput: their shapes differ.
        MissingReference: they are no tensors.
    """
    values = [to_tensor(item) for item in items]
    shapes = [tuple(getattr(value, "shape", ())) for value in values]
    if len(set(map(str, shapes))) > 1:
        raise InvalidInput(f"the elements of a scan output have the shapes {sorted(set(shapes))}; expected equal ones")
    if all(isinstance(value, np.ndarray) for value in values):
        return np.stack(values, axis)  # strings
    if not all(isinstance(value, Tensor) for value in values):
        raise MissingReference(f"a scan output of type {type(values[0]).__name__} has no torch reference")
    return _typed(torch.stack([as_bits(value) for value in values], axis), values[0].dtype)
