"""The pass manager: runs exact passes, verifies, times, counts, dumps, and finds the pass that broke the graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from fxopt.errors import PassError, VerificationError
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Verdict
from fxopt.ir.masks import marks, verify_masks
from fxopt.ir.verify import (
    NumericCheck,
    Snapshot,
    changed_nodes,
    check_output_types,
    first_divergence,
    output_types,
    snapshot,
    verify_structure,
)
from fxopt.passes.base import Context, ConvertingPass, ExactPass

Step = ExactPass | ConvertingPass


@dataclass(frozen=True)
class PassRun:
    """One run of one pass: number of changes, seconds of the pass itself, seconds of the verification after it."""

    name: str
    changes: int
    seconds: float
    verify_seconds: float = 0.0


@dataclass
class PassManager:
    """Runs a literal list of exact passes (or, without `check`, of converting ones) until nothing changes.

    Args:
        passes: in order; each pass's `after` is checked.
        dump: a folder that receives numbered, runnable text forms, `00-input.py`, `01-fold-constants.py`, ...
        rounds: the list is repeated at most this often.
        dumped: how many text forms the folder holds already, of a manager before this one.
    """

    passes: Sequence[Step]
    dump: Path | None = None
    rounds: int = 4
    dumped: int = 0
    runs: list[PassRun] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [step.name for step in self.passes]
        for index, step in enumerate(self.passes):
            late = [name for name in step.after if name in names[index + 1 :]]
            if late:
                raise PassError(f"pass {step.name} must run after {late[0]}, but comes before it in {names}")

    def run(self, graph: Graph, ctx: Context, check: NumericCheck | None = None) -> int:
        """Rewrite `graph` in place; returns the number of changes.

        Raises:
            PassError: a pass raised ("pass X failed after [A, B]").
            VerificationError: a pass left a graph that is not well formed or, with `check`, computes something else;
                the message names the pass and the first node that differs.
        """
        start = graph.copy() if check is not None else None
        if not self.dumped:
            self._dump(graph, "input")
        done: list[Step] = []
        total = 0
        for _ in range(self.rounds):
            changes = 0
            for step in self.passes:
                changed = self._step(step, graph, ctx, [earlier.name for earlier in done])
                changes += changed
                if changed:
                    done.append(step)
            total += changes
            if not changes:
                break
        if check is not None and start is not None and total:
            self._check(start, graph, ctx, done, check)
        return total

    def _step(self, step: Step, graph: Graph, ctx: Context, done: list[str]) -> int:
        """Run one pass on the graph, then on each body from outside to inside; no value crosses their boundary."""
        run = self._run_once(step, graph, ctx, done)
        for found in list(graph.subgraphs()) if step.enters_bodies else ():
            inner = ctx.inside(found.path)
            inside = self._run_once(step, found.graph, inner, done)
            ctx.merge(inner)
            run = PassRun(
                step.name,
                run.changes + inside.changes,
                run.seconds + inside.seconds,
                run.verify_seconds + inside.verify_seconds,
            )
        if run.changes:
            self._dump(graph, step.name)
        self.runs.append(run)
        return run.changes

    def _run_once(self, step: Step, graph: Graph, ctx: Context, done: list[str]) -> PassRun:
        before = snapshot(graph)
        types, masks = output_types(graph), marks(graph)
        at = f" in {ctx.where.rstrip('/')}" if ctx.where else ""
        rows = len(ctx.ledger.verdicts)
        begin = time.perf_counter()
        try:
            changes = step.run(graph, ctx)
        except Exception as error:
            raise PassError(f"pass {step.name} failed{at} after {done}: {type(error).__name__}: {error}") from error
        if type(changes) is not int or changes < 0:
            raise PassError(f"pass {step.name} returned {changes!r}; expected the number of changes")
        middle = time.perf_counter()
        changed = changed_nodes(graph, before)
        if changed or len(before) != len(graph.fx.nodes):
            changes = max(changes, 1)  # whatever the pass says
        if changes:
            try:
                verify_structure(graph, changed, before)
                check_output_types(graph, types)
                verify_masks(graph, masks, changed)
            except VerificationError as error:
                raise VerificationError(f"pass {step.name} (after {done}) broke the graph{at}: {error}") from error
            said = any(row.outcome == "applied" for row in ctx.ledger.verdicts[rows:])
            if isinstance(step, ExactPass) and not said:
                self._record(step, graph, ctx, changes, before)
        return PassRun(step.name, changes, middle - begin, time.perf_counter() - middle)

    def _record(self, step: Step, graph: Graph, ctx: Context, changes: int, before: Snapshot) -> None:
        """A row for each operator that the pass made or removed; one for the graph where it did neither."""
        left = set(graph.fx.nodes)
        made = [node for node in graph.fx.nodes if node not in before and _is_made_by(node, step.name)]
        rows = {label(node): "exact rewrite" for node in made if node.op == "call_function"}
        for node in before:
            if node not in left and node.op == "call_function":
                rows.setdefault(label(node), "removed; the result is the same")
        for name, reason in (rows or {graph.name: f"{changes} changes"}).items():
            ctx.ledger.add(Verdict(step.name, name, "applied", reason))

    def _check(self, start: Graph, graph: Graph, ctx: Context, done: list[Step], check: NumericCheck) -> None:
        difference = check.difference(graph)
        if not difference:
            return
        guilty = first_bad_pass(start, done, ctx, lambda candidate: not check.difference(candidate))
        where = first_divergence(start, graph, check.sample, check.evaluator)
        raise VerificationError(
            f"pass {guilty} changed what the model computes: {difference}"
            + (f"; the first node that differs is {where!r}" if where else "")
        )

    def _dump(self, graph: Graph, name: str) -> None:
        if self.dump is None:
            return
        from fxopt.ir.text import save_text

        save_text(graph, self.dump, f"{self.dumped:02d}-{name}", title=name, share=True)
        self.dumped += 1


def _is_made_by(node: fx.Node, name: str) -> bool:
    return name in (node.meta.get("provenance") or ())[1:]


def first_bad_pass(start: Graph, steps: Sequence[Step], ctx: Context, good: Callable[[Graph], bool]) -> str:
    """The first pass of `steps` after which `good` no longer holds, by bisection; each probe starts from `start`."""
    quiet = Context(ctx.target, capabilities=ctx.capabilities, include=ctx.include, exclude=ctx.exclude)

    def holds(count: int) -> bool:
        graph = start.copy()
        for step in steps[:count]:
            before = snapshot(graph)
            step.run(graph, quiet)
            verify_structure(graph, changed_nodes(graph, before), before)
            for found in list(graph.subgraphs()) if step.enters_bodies else ():
                step.run(found.graph, quiet.inside(found.path))
        return good(graph)

    low, high = 0, len(steps)  # good after `low` passes, bad after `high`
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return f"{steps[high - 1].name} (step {high} of {[step.name for step in steps]})"
