"""What a plan means for the ledger: applied, refused, rolled back, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fxopt.ir.ledger import Ledger, Refusal, Verdict
from fxopt.passes.base import Candidate
from fxopt.planner.plan import Plan, Price
from fxopt.report import units


def refuse(ledger: Ledger, candidate: Candidate, reason: Refusal, error: float | None = None) -> None:
    """Write that a candidate is not done, and why."""
    ledger.add(
        Verdict(candidate.pass_name, candidate.anchor, "refused", str(reason), str(candidate.setting), error=error)
    )


def record(ledger: Ledger, chosen: Plan, prices: Mapping[Candidate, Price]) -> None:
    """Write what a plan does and what it leaves."""
    for candidate in chosen.chosen:
        price = prices[candidate]
        ledger.add(
            Verdict(
                candidate.pass_name,
                candidate.anchor,
                "applied",
                _gains(price),
                str(candidate.setting),
                predicted_gain=price.gain,
                error=price.error,
            )
        )
    for candidate, reason in chosen.refused:
        error = prices[candidate].error if candidate in prices else math.nan
        refuse(ledger, candidate, reason, None if math.isnan(error) else error)


def _gains(price: Price) -> str:
    times = f"predicted {units.seconds(price.before.seconds)} -> {units.seconds(price.after.seconds)}"
    times = f"{price.detail}; {times}" if price.detail else times
    return times if price.gain > 0 else f"saves {units.size(price.saved_bytes)}; {times}"


def roll_back(
    ledger: Ledger, gone: Sequence[Candidate] | None, reason: str, groups: Mapping[str, str] | None = None
) -> None:
    """Turn "applied" into "rolled-back": of these candidates (those of a group with its own reason), or of all."""
    reasons = {
        (candidate.pass_name, candidate.anchor, str(candidate.setting)): (groups or {}).get(candidate.group, reason)
        for candidate in gone or ()
    }
    for index, verdict in enumerate(ledger.verdicts):
        key = (verdict.pass_name, verdict.node, verdict.setting)
        if verdict.outcome == "applied" and (gone is None or key in reasons):
            ledger.verdicts[index] = replace(
                verdict, outcome="rolled-back", reason=reason if gone is None else reasons[key]
            )


def why_nothing(ledger: Ledger) -> str:
    """The most frequent reason for which nothing was done: of lossy passes, and of what was undone, if there is any."""
    undone = [verdict for verdict in ledger.verdicts if verdict.outcome in ("refused", "rolled-back")]
    lossy = [verdict for verdict in undone if verdict.setting.startswith(verdict.pass_name)]
    reasons: dict[str, int] = {}
    for verdict in [verdict for verdict in lossy if verdict.outcome == "rolled-back"] or lossy or undone:
        reasons[verdict.reason] = reasons.get(verdict.reason, 0) + 1
    if not reasons:
        return "no pass found anything to do"
    most = max(reasons, key=lambda reason: reasons[reason])
    return f"{most} ({reasons[most]} of {sum(reasons.values())} verdicts)"
