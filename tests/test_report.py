"""The report as data, text and HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from fxopt.ir.ledger import Ledger, Verdict
from fxopt.ir.target import Prediction
from fxopt.report import units
from fxopt.report.html import to_html
from fxopt.report.reasons import group_by_reason
from fxopt.report.report import ErrorReport, Measurement, PassRun, Report, Summary
from fxopt.report.text import render_verdicts, report_text, to_text


def example(**changes: object) -> Report:
    before = Summary(12, {"Gemm": 4, "Relu": 8}, 4_000_000, 2_500_000, Prediction(2e-3, 1e-3, 3e-3, "memory"))
    after = Summary(9, {"Gemm": 2, "linear_w8a8": 2, "Relu": 5}, 1_000_000, 2_500_000, None)
    fields: dict[str, object] = {
        "target": "host",
        "backend": "onnxruntime",
        "executed_on": "host",
        "outcome": "optimized",
        "why": "1.60 times faster",
        "objective": "latency",
        "budget": 0.02,
        "before": before,
        "after": after,
        "measured": Measurement("ONNX Runtime, default options", 1.6e-3, 1e-3, 1.6, 1.5, 1.7, 20, 2),
        "error": ErrorReport(0.001, 0.03, 0.9995, None, None, 8),
        "pass_runs": [PassRun("fold-constants", 3, 0.01)],
        "stages": {"import": 0.1},
        "versions": {"torch": "2.13"},
        "warnings": ["calibration data are random"],
    }
    return Report(**{**fields, **changes})  # type: ignore[arg-type]


LEDGER = Ledger(
    [
        Verdict("quantize-linear", "fc1", "applied", "pays", "quantize-linear{bits=8}", 3e-4, None, 0.001),
        Verdict("quantize-linear", "fc2", "refused", "[64, 200] weight: 200 is not a multiple of group 128"),
        Verdict("quantize-linear", "fc3", "refused", "[64, 300] weight: 300 is not a multiple of group 128"),
        Verdict("quantize-linear", "<b>", "refused", "the weight holds NaN values"),
    ],
    ["one sample is little"],
)


@pytest.mark.parametrize(
    "report",
    [
        example(),
        example(measured=None, error=None, outcome="unchanged", budget=None),
        example(error=ErrorReport(float("inf"), float("nan"), 0.0, 0.9, 0.8, 3)),
    ],
)
def test_json_goes_there_and_back(report: Report) -> None:
    text = json.dumps(report.to_json(), allow_nan=False)
    again = Report.from_json(json.loads(text))
    assert repr(again) == repr(report)


def test_text_shows_before_and_after() -> None:
    text = report_text(example(), LEDGER)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "operators 12 9 -25 %" in rows
    assert "weights 4 MB 1 MB -75 %" in rows
    assert "multiply-adds 2.5 M 2.5 M same" in rows
    assert "predicted time (host) 2 ms +-50 % -" in rows
    assert "measured time (2 threads) 1.6 ms 1 ms 1.60x (1.50 to 1.70)" in rows
    assert "error (noise to signal) 0.001 budget 0.02" in rows
    assert "measured against ONNX Runtime, default options, 20 interleaved bursts" in rows
    assert "warning: calibration data are random" in rows
    assert rows[-1] == "optimized: 1.60 times faster"


def test_text_shows_a_metric() -> None:
    error = ErrorReport(0.001, 0.03, 0.9995, 97.5, 97.25, 8)
    rows = [" ".join(line.split()) for line in report_text(example(error=error)).splitlines()]
    assert "metric 97.5 97.25 drop 0.25, budget 0.02" in rows


def test_text_says_when_nothing_was_measured() -> None:
    text = report_text(example(measured=None, target="a100", executed_on="eager (reference)"))
    assert "not measured: this machine is not a100; here the result runs in eager (reference)" in text


def test_reasons_are_grouped_over_numbers_and_names() -> None:
    groups = group_by_reason(LEDGER.verdicts)
    assert [(group.outcome, group.count, group.nodes[0]) for group in groups] == [
        ("refused", 2, "fc2"),
        ("applied", 1, "fc1"),
        ("refused", 1, "<b>"),
    ]


def test_verdict_table_has_no_empty_columns() -> None:
    text = to_text(render_verdicts(LEDGER.select(outcome="refused")))
    assert "setting" not in text and "not a multiple" in text
    assert "setting" in to_text(render_verdicts(LEDGER.verdicts))


def test_long_names_are_not_cut_off() -> None:
    text = to_text(render_verdicts([Verdict("p", "block/" * 60, "refused", "because")]), width=80)
    assert text.count("/") == 60


class _Page(HTMLParser):
    """Collects what a browser would fetch, and the embedded data."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.data = ""
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.fetched += [value for key, value in found.items() if key in ("src", "href") and value]
        self.inside = found.get("id") == "data"
        if tag not in ("meta", "input", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.inside = False

    def handle_data(self, data: str) -> None:
        self.data += data if self.inside else ""


def test_html_is_whole_and_fetches_nothing() -> None:
    html = to_html(example(why="a < b </script>"), LEDGER, "model <1>.onnx")
    page = _Page()
    page.feed(html)
    assert not page.open and not page.fetched
    assert "&lt;b&gt;" in html and "<b>2 ms" not in html
    data = json.loads(page.data)
    assert Ledger.from_json(data["ledger"]) == LEDGER
    assert data["report"]["why"] == "a < b </script>"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 s"), (None, "-"), (3.2e-9, "3.2 ns"), (4.25e-5, "42.5 us"), (0.1234, "123 ms"), (75.0, "75 s")],
)
def test_seconds(value: float | None, text: str) -> None:
    assert units.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (2.5e12, "2.5 TB")])
def test_size(value: float, text: str) -> None:
    assert units.size(value) == text
