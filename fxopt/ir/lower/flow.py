"""If, Loop and Scan under the exporter: the branch itself, unrolled, or torch's `cond` and `while_loop`.

A rule gives NotImplemented for what the interpreter may do as always. Bodies of torch's operators are functions of
tensors, so what they capture, their constants included, becomes operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._higher_order_ops.cond import cond_op
from torch._higher_order_ops.while_loop import while_loop_op

from fxopt.errors import Unsupported
from fxopt.ir.body_types import keeps_condition
from fxopt.ir.graph import Graph, label
from fxopt.ir.lower.operands import Operands
from fxopt.ir.onnx.lane import is_host, to_scalar, to_tensor
from fxopt.ir.subgraphs import CAPTURED, CAPTURED_NAMES

if TYPE_CHECKING:
    from fxopt.ir.lower.trace import TracedRun

UNROLL_LIMIT = 32  # iterations that are written one after the other
Attributes = Mapping[str, Any] | None
Rule = Callable[["TracedRun", fx.Node, dict[fx.Node, Any], Attributes], Any]


def _if(run: TracedRun, node: fx.Node, values: dict[fx.Node, Any], attributes: Attributes) -> Any:
    """One branch when the condition is known, else `torch.cond` of both."""
    cond = values[node.args[0]]  # type: ignore[index]
    known = _known_flag(run, node.args[0], cond)
    bodies = [_Lifted(run, node, name, values, attributes) for name in ("then_branch", "else_branch")]
    if known is not None:
        return _outputs(node, bodies[0 if known else 1].plain([]))
    operands = Operands([body.around for body in bodies])

    def branch(index: int) -> Callable[..., tuple[Tensor, ...]]:
        def function(*given: Any) -> tuple[Tensor, ...]:
            results = bodies[index].called([], operands.restored(given)[index])
            return tuple(_tensor(node, value).clone() for value in results)

        return function

    predicate = to_scalar(cond) != 0 if isinstance(cond, np.ndarray) else to_tensor(cond).reshape(())
    return _outputs(node, cond_op(predicate, branch(0), branch(1), operands.flat))


def _loop(run: TracedRun, node: fx.Node, values: dict[fx.Node, Any], attributes: Attributes) -> Any:
    """Unrolled when the number of iterations is known and small, else `while_loop`."""
    limit, cond, *initial = ([values.get(arg) for arg in node.args] + [None, None])[: max(2, len(node.args))]  # type: ignore[arg-type]
    body = _Lifted(run, node, "body", values, attributes)
    always = cond is None or (
        _known_flag(run, node.args[1], cond) is True and keeps_condition(body.graph, run.traced.flag)
    )
    count = int(to_scalar(limit)) if is_host(limit) and not _has_symbol(limit) else None
    if cond is None and limit is None:
        raise Unsupported(f"node {label(node)!r}: a Loop without trip count and condition never ends")
    outputs = _count(node)
    if count is not None and always and count <= UNROLL_LIMIT:
        return NotImplemented if cond is None else _unrolled(node, body, count, initial, outputs)
    scans = outputs - len(initial)
    if scans and (count is None or not always):
        raise Unsupported(
            f"node {label(node)!r}: the length of its scan outputs depends on data, which torch's while_loop has not"
        )
    steps = _Steps(node, body, count if count is not None else _scalar(limit), always, [0] * scans, [False] * scans)
    started = torch.ones((), dtype=torch.bool) if cond is None else to_tensor(cond).reshape(())
    return _outputs(node, steps.run(started, [_tensor(node, value) for value in initial]))


def _scan(run: TracedRun, node: fx.Node, values: dict[fx.Node, Any], attributes: Attributes) -> Any:
    """Unrolled when the scanned axis is fixed and short, else `while_loop` over slices."""
    if node.target.since_version == 8:  # type: ignore[union-attr]
        return NotImplemented
    count: Any = node.kwargs["num_scan_inputs"]
    args = [_tensor(node, values[arg]) for arg in node.args]  # type: ignore[index]
    initial, scanned = args[: len(args) - count], args[len(args) - count :]
    axes: Any = node.kwargs.get("scan_input_axes") or [0] * count
    length = scanned[0].shape[axes[0]]
    if isinstance(length, int) and length <= UNROLL_LIMIT:
        return NotImplemented
    outputs = _count(node) - len(initial)
    backwards: Any = node.kwargs.get("scan_input_directions") or [0] * count
    output_axes: Any = node.kwargs.get("scan_output_axes") or [0] * outputs
    directions: Any = node.kwargs.get("scan_output_directions") or [0] * outputs
    moved = [value.flip(axis) if back else value for value, axis, back in zip(scanned, axes, backwards, strict=True)]
    body = _Lifted(run, node, "body", values, attributes)
    steps = _Steps(node, body, length, True, output_axes, list(map(bool, directions)), moved, axes)
    return _outputs(node, steps.run(torch.ones((), dtype=torch.bool), initial))


RULES: dict[str, Rule] = {"If": _if, "Loop": _loop, "Scan": _scan}


class _Lifted:
    """A body whose captured values and constants (`around`) can be given anew."""

    def __init__(
        self, run: TracedRun, node: fx.Node, name: str, values: dict[fx.Node, Any], attributes: Attributes
    ) -> None:
        from fxopt.ir.lower.trace import graphs_within

        self.run = run
        self.attributes = attributes
        self.graph: Graph = run.graph.attribute(str(node.kwargs[name].target))  # type: ignore[union-attr]
        names: Any = node.kwargs.get(CAPTURED_NAMES, ())
        captured: Any = node.kwargs.get(CAPTURED, ())
        around = {key: values[value] for key, value in zip(names, captured, strict=True)}
        self.captured = [around[key] for key in self.graph.captures]
        self.keys = [
            (id(part), target)
            for part in graphs_within(self.graph)
            for target in dict.fromkeys(str(item.target) for item in part.fx.find_nodes(op="get_attr"))
            if isinstance(run.constant(part, target), Tensor)
        ]
        parts = {id(part): part for part in graphs_within(self.graph)}
        self.around = [*self.captured, *(run.constant(parts[key], target) for key, target in self.keys)]

    def plain(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs, traced where the node is."""
        return self.called(inputs, self.around)

    def called(self, inputs: Sequence[Any], around: Sequence[Any]) -> list[Any]:
        """The outputs for other values from around."""
        from fxopt.ir.lower.trace import TracedRun

        split = len(self.captured)
        lifted = {**self.run.lifted, **dict(zip(self.keys, around[split:], strict=True))}
        inside = TracedRun(self.graph, self.run.traced, lifted)
        return inside.run([*inputs, *around[:split]], self.attributes)


class _Steps:
    """A `while_loop`: step number, whether to go on, states, and a buffer for each scan output."""

    def __init__(
        self,
        node: fx.Node,
        body: _Lifted,
        length: Any,
        always: bool,
        axes: Sequence[int],
        backwards: Sequence[bool],
        scanned: Sequence[Tensor] = (),
        scanned_axes: Sequence[int] = (),
    ) -> None:
        self.node = node
        self.body = body
        self.length = length  # a number, a SymInt, a scalar tensor, or None
        self.always = always
        self.axes = axes
        self.backwards = backwards
        self.scanned = scanned
        self.scanned_axes = scanned_axes
        self.is_scan = bool(scanned)

    def run(self, started: Tensor, initial: Sequence[Tensor]) -> list[Any]:
        """The states and scan outputs after the last step."""
        zero = torch.zeros((), dtype=torch.int64)
        buffers = self.buffers(zero, started, initial) if self.axes else []
        limit = [] if self.length is None else [_scalar(self.length)]
        operands = Operands([self.body.around, list(self.scanned), limit])
        count = len(initial)

        def go_on(step: Tensor, going: Tensor, *rest: Any) -> Tensor:
            bound = operands.restored(rest[count + len(self.axes) :])[2]
            return going.logical_and(step < bound[0]) if bound else going.clone()

        def advance(step: Tensor, going: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            states, old = rest[:count], rest[count : count + len(self.axes)]
            around, scanned, bound = operands.restored(rest[count + len(self.axes) :])
            after, now, elements = self.step(step, going, states, around, scanned)
            new = [
                self.stored(buffer, element, step, bound[0], index)
                for index, (buffer, element) in enumerate(zip(old, elements, strict=True))
            ]
            return (step + 1, after, *(value.clone() for value in now), *new)

        carried: Any = (zero, started.clone(), *(value.clone() for value in initial), *buffers)
        results = while_loop_op(go_on, advance, carried, operands.flat)
        return list(results[2:])

    def step(
        self, step: Tensor, going: Tensor, states: Sequence[Tensor], around: Sequence[Any], scanned: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Whether to go on, the new states and the elements of the scan outputs."""
        slices = [
            value.index_select(axis, step.reshape(1)).squeeze(axis)
            for value, axis in zip(scanned, self.scanned_axes, strict=True)
        ]
        given = [*states, *slices] if self.is_scan else [step, going, *states]
        results = [_tensor(self.node, value) for value in self.body.called(given, around)]
        after = going.clone() if self.always or self.is_scan else results[0].reshape(()).clone()
        results = results if self.is_scan else results[1:]
        return after, results[: len(states)], results[len(states) : len(states) + len(self.axes)]

    def buffers(self, zero: Tensor, started: Tensor, initial: Sequence[Tensor]) -> list[Tensor]:
        """Empty scan outputs; the step that tells their type is dead code afterwards."""
        _, _, elements = self.step(zero, started, initial, self.body.around, self.scanned)
        made = []
        for element, axis in zip(elements, self.axes, strict=True):
            axis %= element.dim() + 1
            made.append(element.new_zeros([*element.shape[:axis], self.length, *element.shape[axis:]]))
        return made

    def stored(self, buffer: Tensor, element: Tensor, step: Tensor, length: Tensor, index: int) -> Tensor:
        """The buffer with one element more."""
        axis = self.axes[index] % buffer.dim()
        place = length - 1 - step if self.backwards[index] else step
        return buffer.index_copy(axis, place.reshape(1), element.unsqueeze(axis))


def _unrolled(node: fx.Node, body: _Lifted, count: int, initial: Sequence[Any], outputs: int) -> Any:
    """A Loop whose condition stays true, step after step."""
    if not count and outputs > len(initial):
        return NotImplemented
    state, rows = list(initial), []
    for step in range(count):
        results = body.plain([np.array(step, np.int64), np.array(True), *state])
        state = results[1 : 1 + len(initial)]
        rows.append(results[1 + len(initial) :])
    columns = [[_tensor(node, row[index]) for row in rows] for index in range(outputs - len(initial))]
    return _outputs(node, [*state, *map(torch.stack, columns)])


def _known_flag(run: TracedRun, node: Any, value: Any) -> bool | None:
    """The value of a condition that is known while tracing; else None."""
    if isinstance(value, np.ndarray):
        item = to_scalar(value)
        return bool(item) if isinstance(item, (bool, int)) else None
    return run.traced.flag(run.graph, node)


def _has_symbol(value: np.ndarray[Any, Any]) -> bool:
    return isinstance(to_scalar(value), torch.SymInt)


def _scalar(value: Any) -> Tensor | None:
    """A count as an int64 tensor without axes; None stays None."""
    if value is None:
        return None
    if not isinstance(value, (Tensor, np.ndarray)):
        return torch.scalar_tensor(value, dtype=torch.int64)
    return to_tensor(value).reshape(()).to(torch.int64)  # type: ignore[no-any-return]


def _tensor(node: fx.Node, value: Any) -> Tensor:
    found = to_tensor(value)
    if not isinstance(found, Tensor):
        raise Unsupported(
            f"node {label(node)!r}: a {type(found).__name__} goes in or out of its body; "
            "torch's control flow takes tensors only"
        )
    return found


def _count(node: fx.Node) -> int:
    outputs: Any = node.kwargs.get("_outputs", 1)
    return int(outputs)


def _outputs(node: fx.Node, results: Sequence[Any]) -> Any:
    count = _count(node)
    return results[0] if count == 1 else tuple(results[:count])
