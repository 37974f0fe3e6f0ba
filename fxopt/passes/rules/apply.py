"""`apply_rules`: rewrite a graph by rules until nothing changes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxopt.errors import Unsupported
from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal, Verdict
from fxopt.ir.matching import Readings, accepted
from fxopt.ir.neutral import names_of
from fxopt.ir.pattern import Match, Mismatch, Pattern, Rule, compiled
from fxopt.passes.base import Context
from fxopt.passes.rules.safety import effectful, pass_through

_MOST_AT_ONE_NODE = 64  # rewrites of one value in one sweep; rules that undo each other would never end


def apply_rules(graph: Graph, rules: Sequence[Rule], ctx: Context, *, made_by: str = "", sweeps: int = 16) -> int:
    """Apply the rules, earlier ones first, in execution order, until nothing changes; returns the number of rewrites.

    What a rule refuses goes to the ledger under `made_by`, the name of the pass (default: the rule's).
    One sweep is linear in the number of nodes.
    """
    run = _Run(graph, ctx, made_by)
    for rule in rules:
        for pattern in compiled(rule, graph.origin):
            run.by_root.setdefault(pattern.root.name, []).append(pattern)
    total = 0
    for _ in range(sweeps):
        fired = sum(run.at(node) for node in list(graph.nodes))
        total += fired
        if not fired:
            break
    else:
        ctx.ledger.note(f"{made_by or 'rules'}: stopped after {sweeps} sweeps that all changed something")
    run.record()
    if total:
        graph.release_constants()
    return total


@dataclass
class _Run:
    graph: Graph
    ctx: Context
    made_by: str
    by_root: dict[str, list[Pattern]] = field(default_factory=dict)
    gone: set[fx.Node] = field(default_factory=set)
    types: dict[fx.Node, Any] = field(default_factory=dict)  # fake values of what was made: those of what it replaced
    refusals: dict[tuple[fx.Node, str], Refusal] = field(default_factory=dict)

    def at(self, node: fx.Node) -> int:
        """Rewrite the value of `node` as long as a rule fires; returns how often."""
        fired = 0
        current: fx.Node | None = node
        while current is not None and current not in self.gone and fired < _MOST_AT_ONE_NODE:
            made = self.once(current)
            if made is None:
                break
            fired += 1
            current = made if made.op == "call_function" and made in self.types else None
        return fired

    def once(self, node: fx.Node) -> fx.Node | None:
        """Apply the first rule that fires at `node`; returns what replaced it."""
        if node.op != "call_function":
            return None
        readings: Readings = {}
        for name in names_of(node):
            for pattern in self.by_root.get(name, ()):
                verdict = accepted(self.graph, pattern, node, self.types, readings)
                made = self.replaced(pattern.rule, verdict) if isinstance(verdict, Match) else verdict
                if isinstance(made, fx.Node):
                    return made
                if made is not None and not isinstance(made, Mismatch):
                    self.refusals[node, pattern.rule.name] = made
        return None

    def replaced(self, rule: Rule, match: Match) -> fx.Node | Refusal:
        """The node that took the place of the match's root, or why none did."""
        root = match.root
        excluded = self.ctx.excluded(label(root))
        if excluded is not None:
            return excluded
        builder = Builder(self.graph, root, self.made_by or rule.name, rule=rule.name if self.made_by else "")
        try:
            made: fx.Node | None = rule.replace(builder, **match.bound)
        except Unsupported as error:
            builder.discard()
            return Refusal("{}", error)
        if made is None:  # the value that would take its place is an omitted input
            builder.discard()
            return Mismatch("its input is left out")
        if made not in builder.made:
            refusal = pass_through(self.graph, root, made, match.value)
            if refusal is not None:
                builder.discard()
                return refusal
        else:
            known = match.type(root)
            if known is not None:
                self.types[made] = known
        inputs = list(root.all_input_nodes)
        self.graph.replace(root, made)
        self.gone.add(root)
        self.gone.update(drop_unused(self.graph, inputs, keep=made))
        return made

    def record(self) -> None:
        """Write the refusals that still stand to the ledger, each once."""
        record_once(
            self.ctx,
            (
                Verdict(self.made_by or rule, label(node), "refused", str(reason), rule if self.made_by else "")
                for (node, rule), reason in self.refusals.items()
                if node not in self.gone
            ),
        )


def drop_unused(graph: Graph, nodes: Iterable[fx.Node], keep: fx.Node | None = None) -> set[fx.Node]:
    """Erase those of `nodes` that nobody uses any more, then what only they used; returns what was erased."""
    erased: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in erased or node is keep or node.op in ("placeholder", "output") or effectful(node):
            continue
        parts = list(node.users)
        if any(part.users or part is keep or part.target is not operator.getitem for part in parts):
            continue
        stack.extend(node.all_input_nodes)
        for unused in (*parts, node):
            graph.erase(unused)
            erased.add(unused)
    return erased


def record_once(ctx: Context, verdicts: Iterable[Verdict]) -> None:
    """Add the verdicts that the ledger does not hold yet: passes run until nothing changes."""
    known = set(ctx.ledger.verdicts)
    for verdict in verdicts:
        if verdict not in known:
            known.add(verdict)
            ctx.ledger.add(verdict)
