"""Group a ledger's verdicts by reason: what a hundred refusals have in common, in a few lines."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fxopt.ir.ledger import Outcome, Verdict

_SHAPE = re.compile(r"[\[(][^\[\]()]*\d[^\[\]()]*[\])]")
_NUMBER = re.compile(r"\b\d+(?:\.\d+)?(?:e[+-]?\d+)?\b")
_QUOTED = re.compile(r"'[^']*'")


@dataclass(frozen=True)
class ReasonGroup:
    """Verdicts of one pass and outcome whose reasons differ only in names and numbers."""

    pass_name: str
    outcome: Outcome
    reason: str  # that of the first one
    nodes: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many verdicts."""
        return len(self.nodes)


def group_by_reason(verdicts: Iterable[Verdict]) -> list[ReasonGroup]:
    """The groups, largest first."""
    members: dict[tuple[str, str, str], list[Verdict]] = {}
    for verdict in verdicts:
        members.setdefault((verdict.pass_name, verdict.outcome, _shape_of(verdict.reason)), []).append(verdict)
    groups = [
        ReasonGroup(rows[0].pass_name, rows[0].outcome, rows[0].reason, tuple(row.node for row in rows))
        for rows in members.values()
    ]
    return sorted(groups, key=lambda group: -group.count)


def _shape_of(reason: str) -> str:
    """The reason without its particulars.

    >>> _shape_of("[64, 200] weight: 200 is not a multiple of group 128")
    '# weight: # is not a multiple of group #'
    """
    for pattern in (_QUOTED, _SHAPE, _NUMBER):
        reason = pattern.sub("#", reason)
    return reason
