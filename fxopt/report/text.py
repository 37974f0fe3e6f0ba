"""Reports and ledgers as text for a terminal or a log file."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxopt.ir.ledger import Ledger, Verdict
from fxopt.report import units
from fxopt.report.printable import printable
from fxopt.report.reasons import group_by_reason
from fxopt.report.report import Measurement, Report, Summary

Row = tuple[str, str, str, str]
_SHOWN_REASONS = 12
_COLOURS = {"applied": "green", "refused": "yellow", "rolled-back": "magenta", "no-match": "dim"}


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Table:
    """A plain table; `right` are the columns that hold figures."""
    made = Table(box=box.SIMPLE, pad_edge=False, show_header=any(headers))
    for index, header in enumerate(headers):
        made.add_column(header, overflow="fold", justify="right" if index in right else "left")
    for row in rows:
        made.add_row(*(Text(printable(cell), style=_COLOURS.get(cell, "")) for cell in row))
    return made


def summary_rows(report: Report) -> list[Row]:
    """Before -> after: operators, size, multiply-adds, predicted time, measured time, error."""
    before, after = report.before, report.after
    rows = [
        ("operators", str(before.operators), str(after.operators), units.change(before.operators, after.operators)),
        (
            "weights",
            units.size(before.size_bytes),
            units.size(after.size_bytes),
            units.change(before.size_bytes, after.size_bytes),
        ),
        (
            "multiply-adds",
            units.count(before.macs),
            units.count(after.macs),
            units.change(before.macs, after.macs),
        ),
    ]
    if before.predicted is not None or after.predicted is not None:
        rows.append(_predicted_row(report))
    if report.measured is not None:
        rows.append(_measured_row(report.measured))
    return rows + _error_rows(report)


def _predicted_row(report: Report) -> Row:
    before, after = report.before.predicted, report.after.predicted
    gain = units.speedup(before.seconds, after.seconds) if before and after else ""
    return f"predicted time ({report.target})", _interval(report.before), _interval(report.after), gain


def _interval(summary: Summary) -> str:
    predicted = summary.predicted
    if predicted is None:
        return "-"
    half = max(predicted.seconds - predicted.low, predicted.high - predicted.seconds)
    percent = f" +-{100 * half / predicted.seconds:.0f} %" if predicted.seconds > 0 else ""
    return units.seconds(predicted.seconds) + percent


def _measured_row(measured: Measurement) -> Row:
    bounds = f"{units.ratio(measured.ratio)} ({measured.low:.2f} to {measured.high:.2f})"
    threads = f"{measured.threads} thread{'s' if measured.threads != 1 else ''}"
    return (
        f"measured time ({threads})",
        units.seconds(measured.baseline_seconds),
        units.seconds(measured.result_seconds),
        bounds,
    )


def _error_rows(report: Report) -> list[Row]:
    error = report.error
    if error is None:
        return []
    budget = "none" if report.budget is None else f"{report.budget:g}"
    rows = [
        (
            "error (noise to signal)",
            "",
            f"{error.noise_to_signal:.3g}",
            "" if error.metric_before is not None else f"budget {budget}",
        )
    ]
    rows.append(("relative L2, cosine", "", f"{error.relative_l2:.3g}, {error.cosine:.6f}", f"{error.samples} samples"))
    if error.metric_before is not None and error.metric_after is not None:
        drop = error.metric_before - error.metric_after
        rows.append(
            ("metric", f"{error.metric_before:.5g}", f"{error.metric_after:.5g}", f"drop {drop:.3g}, budget {budget}")
        )
    return rows


def render_report(report: Report, ledger: Ledger | None = None) -> RenderableType:
    """The final table, what was done, and why the rest was not."""
    parts: list[RenderableType] = [table(("", "before", "after", "change"), summary_rows(report), right=(1, 2))]
    if report.measured is not None:
        parts.append(Text(f"measured against {report.measured.baseline}, {report.measured.bursts} interleaved bursts"))
    elif report.target != "host":
        where = f"here the result runs in {report.executed_on}"
        parts.append(Text(f"not measured: this machine is not {report.target}; {where}"))
    notes = ledger.notes if ledger is not None else []
    if ledger is not None:
        parts += render_reasons(ledger)
    warnings = [text for text in dict.fromkeys(report.warnings) if text not in notes]
    parts += [Text(f"warning: {printable(text)}", style="yellow") for text in warnings]
    parts.append(Text(printable(f"{report.outcome}: {report.why}" if report.why else report.outcome), style="bold"))
    return Group(*parts)


def render_reasons(ledger: Ledger) -> list[RenderableType]:
    """What passes did, and the reasons for what they did not, grouped."""
    groups = [group for group in group_by_reason(ledger.verdicts) if group.outcome != "no-match"]
    rows = [
        (group.outcome, group.pass_name, str(group.count), group.reason, _shortened(group.nodes[0]))
        for group in groups[:_SHOWN_REASONS]
    ]
    parts: list[RenderableType] = []
    if rows:
        parts.append(table(("verdict", "pass", "nodes", "reason", "for example"), rows, right=(2,)))
    if len(groups) > _SHOWN_REASONS:
        parts.append(Text(f"... and {len(groups) - _SHOWN_REASONS} more reasons; `fxopt explain` shows all"))
    return parts + [Text(f"note: {printable(note)}") for note in ledger.notes]


def render_verdicts(verdicts: Iterable[Verdict]) -> RenderableType:
    """One row per verdict."""
    rows = [
        (
            row.node,
            row.pass_name,
            row.outcome,
            row.reason,
            row.setting.removeprefix(row.pass_name).strip("{}"),
            _gain(row.predicted_gain),
            _gain(row.measured_gain),
            "" if row.error is None else f"{row.error:.3g}",
        )
        for row in verdicts
    ]
    headers = ("node", "pass", "verdict", "reason", "setting", "predicted gain", "measured gain", "error")
    used = [index for index, header in enumerate(headers) if index < 4 or any(row[index] for row in rows)]
    return table(
        [headers[index] for index in used],
        [[row[index] for index in used] for row in rows],
        right=[position for position, index in enumerate(used) if index > 4],
    )


def _gain(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else units.seconds(value)


def _shortened(name: str, limit: int = 60) -> str:
    return name if len(name) <= limit else f"...{name[3 - limit :]}"


def to_text(renderable: RenderableType, width: int = 140) -> str:
    """The text as it is printed where there is no terminal."""
    stream = io.StringIO()
    Console(file=stream, width=width, no_color=True).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def report_text(report: Report, ledger: Ledger | None = None, width: int = 140) -> str:
    """A report as plain text."""
    return to_text(render_report(report, ledger), width)
