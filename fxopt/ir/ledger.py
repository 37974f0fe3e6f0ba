"""The ledger: one verdict with a reason per node and pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from fxopt.errors import InvalidOption, unknown

Outcome = Literal["applied", "refused", "no-match", "rolled-back"]


class Refusal:
    """Why something is not done; the text is made only when somebody reads it.

    >>> str(Refusal("{} is not a multiple of group {}", 200, 128))
    '200 is not a multiple of group 128'
    """

    def __init__(self, template: str, *values: object) -> None:
        self.template = template
        self.values = values

    def __str__(self) -> str:
        return self.template.format(*self.values) if self.values else self.template

    def __repr__(self) -> str:
        return f"Refusal({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Refusal) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


@dataclass(frozen=True)
class Verdict:
    """What a pass decided about a node. Gains are seconds per run, positive is faster; `error` is noise to signal."""

    pass_name: str
    node: str  # the name a user knows it by
    outcome: Outcome
    reason: str
    setting: str = ""
    predicted_gain: float | None = None
    measured_gain: float | None = None
    error: float | None = None


@dataclass
class Ledger:
    """All verdicts of one optimisation, in the order they were made."""

    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what concerns the whole model

    def add(self, verdict: Verdict) -> None:
        """Append a verdict."""
        self.verdicts.append(verdict)

    def note(self, text: str) -> None:
        """Append a remark that concerns the whole model."""
        if text not in self.notes:
            self.notes.append(text)

    def select(
        self, *, node: str | None = None, pass_name: str | None = None, outcome: Outcome | None = None
    ) -> Iterator[Verdict]:
        """The verdicts whose node matches the regular expression and whose pass and outcome are the given ones.

        Raises:
            UnknownName: there is no such outcome.
            InvalidOption: `node` is no regular expression.
        """
        if outcome is not None and outcome not in get_args(Outcome):
            raise unknown("outcome", outcome, get_args(Outcome))
        try:
            pattern = re.compile(node) if node else None
        except re.error as error:
            raise InvalidOption(f"node={node!r} is not a regular expression: {error}") from error
        return (
            verdict
            for verdict in self.verdicts
            if (pattern is None or pattern.search(verdict.node))
            and pass_name in (None, verdict.pass_name)
            and outcome in (None, verdict.outcome)
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of verdicts per pass and outcome."""
        found: dict[str, dict[str, int]] = {}
        for verdict in self.verdicts:
            per_pass = found.setdefault(verdict.pass_name, {})
            per_pass[verdict.outcome] = per_pass.get(verdict.outcome, 0) + 1
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"notes": list(self.notes), "verdicts": [asdict(verdict) for verdict in self.verdicts]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Ledger:
        """The inverse of `to_json`."""
        return cls([Verdict(**row) for row in data["verdicts"]], list(data["notes"]))
