"""A report and its ledger as one HTML file that needs nothing else: no scripts or styles from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from fxopt.ir.ledger import Ledger
from fxopt.report import units
from fxopt.report.reasons import group_by_reason
from fxopt.report.report import Report
from fxopt.report.text import summary_rows

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem; vertical-align: top; }
th { border-bottom: 2px solid #888; position: sticky; top: 0; background: #fff; } td { border-bottom: 1px solid #ddd; }
td.figure, th.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: .9em; }
.applied { color: #06703a; } .refused { color: #8a5a00; } .rolled-back { color: #8a1a6b; } .no-match { color: #777; }
.outcome { padding: .6rem 1rem; background: #eef3f8; border-left: 4px solid #4a7ab0; } .warning { color: #8a5a00; }
input { font: inherit; padding: .3rem .5rem; width: 24rem; max-width: 100%; }
@media (prefers-color-scheme: dark) {
 body, th { background: #1b1d20; color: #ddd; } td { border-color: #3a3d42; } .outcome { background: #25303b; }
 .applied { color: #5fd394; } .refused, .warning { color: #e0b050; } .rolled-back { color: #e58ac6; } }
"""
_SCRIPT = """
document.getElementById("filter").addEventListener("input", function () {
  var words = this.value.toLowerCase().split(" ").filter(Boolean);
  document.querySelectorAll("#ledger tbody tr").forEach(function (row) {
    var text = row.textContent.toLowerCase();
    row.hidden = !words.every(function (word) { return text.includes(word); });
  });
});
"""


def to_html(report: Report, ledger: Ledger, title: str) -> str:
    """The page; the same data as JSON is inside it, in the element `data`."""
    data = json.dumps({"report": report.to_json(), "ledger": ledger.to_json()}).replace("<", "\\u003c")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}: fxopt report</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)} for {escape(report.target)}</h1>",
            f'<p class="outcome"><b>{escape(report.outcome)}</b>{": " if report.why else ""}{escape(report.why)}</p>',
            *(f'<p class="warning">Warning: {escape(warning)}</p>' for warning in report.warnings),
            _table(("", "before", "after", "change"), summary_rows(report), figures=(1, 2)),
            _facts(report),
            *_reasons(ledger),
            *_ledger(ledger),
            *_operators(report),
            *_work(report),
            f'<script type="application/json" id="data">{data}</script><script>{_SCRIPT}</script>',
            "</body></html>",
            "",
        ]
    )


def _facts(report: Report) -> str:
    budget = "none" if report.budget is None else f"{report.budget:g}"
    facts = {
        "backend": report.backend,
        "executed on": report.executed_on,
        "objective": report.objective,
        "budget": budget,
        **({"baseline": report.measured.baseline, "bursts": str(report.measured.bursts)} if report.measured else {}),
        **report.versions,
    }
    return "<p>" + ", ".join(f"{escape(key)}: <b>{escape(str(value))}</b>" for key, value in facts.items()) + "</p>"


def _reasons(ledger: Ledger) -> list[str]:
    rows = [
        (group.outcome, group.pass_name, str(group.count), group.reason, group.nodes[0])
        for group in group_by_reason(ledger.verdicts)
    ]
    notes = [f"<p>Note: {escape(note)}</p>" for note in ledger.notes]
    if not rows:
        return notes
    headers = ("verdict", "pass", "nodes", "reason", "for example")
    return ["<h2>What was done, and why the rest was not</h2>", _table(headers, rows, figures=(2,)), *notes]


def _ledger(ledger: Ledger) -> list[str]:
    rows = [
        (
            verdict.outcome,
            verdict.pass_name,
            verdict.node,
            verdict.reason,
            verdict.setting,
            "" if verdict.predicted_gain is None else units.seconds(verdict.predicted_gain),
            "" if verdict.measured_gain is None else units.seconds(verdict.measured_gain),
            "" if verdict.error is None else f"{verdict.error:.3g}",
        )
        for verdict in ledger.verdicts
    ]
    headers = ("verdict", "pass", "node", "reason", "setting", "predicted gain", "measured gain", "error")
    return [
        "<h2>Ledger</h2>",
        '<p><input id="filter" type="search" placeholder="words of node, pass or reason" aria-label="filter"></p>',
        _table(headers, rows, figures=(5, 6, 7), name="ledger"),
    ]


def _operators(report: Report) -> list[str]:
    before, after = report.before.op_counts, report.after.op_counts
    names = sorted({*before, *after}, key=lambda name: (-max(before.get(name, 0), after.get(name, 0)), name))
    rows = [(name, str(before.get(name, 0)), str(after.get(name, 0))) for name in names]
    return ["<h2>Operators</h2>", _table(("operator", "before", "after"), rows, figures=(1, 2))]


def _work(report: Report) -> list[str]:
    stages = [(stage, units.seconds(value)) for stage, value in report.stages.items()]
    passes = [(run.name, str(run.changes), units.seconds(run.seconds)) for run in report.pass_runs]
    return [
        "<h2>Where the time went</h2>",
        _table(("stage", "time"), stages, figures=(1,)),
        _table(("pass", "changes", "time"), passes, figures=(1, 2)),
    ]


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], figures: Sequence[int] = (), name: str = "") -> str:
    head = "".join(_heading(header, index in figures) for index, header in enumerate(headers))
    body = "".join(
        "<tr>" + "".join(_cell(cell, index in figures, headers[index]) for index, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    identity = f' id="{name}"' if name else ""
    return f"<table{identity}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _heading(text: str, figure: bool) -> str:
    return f'<th scope="col"{" class=figure" if figure else ""}>{escape(text)}</th>'


def _cell(text: str, figure: bool, header: str) -> str:
    style = "figure" if figure else escape(text) if header == "verdict" else ""
    shown = f"<code>{escape(text)}</code>" if header in ("node", "setting", "for example") and text else escape(text)
    return f'<td class="{style}">{shown}</td>' if style else f"<td>{shown}</td>"
