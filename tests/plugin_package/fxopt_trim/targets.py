"""Targets as data."""

from __future__ import annotations

import dataclasses

from fxopt.cost_model.targets import get_target

BOARD = dataclasses.replace(
    get_target("x86-avx2"), name="trim-board", source="half the bandwidth of x86-avx2", error="never measured",
    bandwidth=get_target("x86-avx2").bandwidth / 2,
)  # fmt: skip
