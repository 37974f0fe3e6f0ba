"""The fit finds the figures that made the times, and the probes show every figure."""

from __future__ import annotations

import dataclasses

import pytest

from fxopt.cost_model.fit import PLAN, Measured, fit, mean_log_error
from fxopt.cost_model.probes import probes
from fxopt.cost_model.probes.rows import _groups
from fxopt.cost_model.targets import get_target
from tests.cost_model.helpers import linears


def test_the_fit_recovers_the_figures() -> None:
    start = dataclasses.replace(get_target("x86-avx2"), cores=1)
    truth = dataclasses.replace(
        start, launch_seconds=1.3e-6, efficiency={**start.efficiency, "linear": 0.41, "linear.int8": 0.9}
    )
    rows = []
    for shape in ((2, [8, 8, 8]), (128, [384, 384]), (64, [256, 512])):
        for int8 in (False, True):
            group = "launch" if shape[0] == 2 else "linear int8" if int8 else "linear float32"
            row = Measured.of(str(shape), group, linears(*shape, int8), 1.0)
            rows.append(dataclasses.replace(row, seconds=row.predicted(truth)))
    plan = {figure: PLAN[figure] for figure in ("launch_seconds", "linear", "linear.int8")}
    found = fit(start, rows, plan)
    assert mean_log_error(found, rows) < 0.02 < mean_log_error(start, rows)
    assert found.launch_seconds == pytest.approx(truth.launch_seconds, rel=0.05)
    assert found.efficiency["linear"] == pytest.approx(0.41, rel=0.05)
    assert all(abs(row.error(found)) < 0.05 for row in rows)


def test_figures_without_rows_are_kept() -> None:
    start = get_target("x86-avx2")
    assert fit(start, []) == start


def test_probes_show_every_figure() -> None:
    groups = set(_groups())
    assert {name for names in PLAN.values() for name in names} <= groups
    found = list(probes())
    assert len({probe.name for probe in found}) == len(found)
    for group in groups - {"launch"}:
        assert any(probe.held_out for probe in found if probe.group == group)
    assert all(probe.held_out for probe in found if probe.group == "model")
