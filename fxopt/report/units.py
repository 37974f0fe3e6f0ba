"""Figures as people read them."""

from __future__ import annotations

import math


def seconds(value: float | None) -> str:
    """A time in the unit that suits it.

    >>> seconds(0.0123), seconds(4.2e-5), seconds(None)
    ('12.3 ms', '42 us', '-')
    """
    if value is None:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= factor:
            return f"{_three(value / factor)} {unit}"
    return "0 s" if value == 0 else f"{_three(value / 1e-9)} ns"


def count(value: float | None) -> str:
    """A number with a decimal prefix.

    >>> count(950), count(1_234_000), count(7_200_000_000)
    ('950', '1.23 M', '7.2 G')
    """
    return "-" if value is None else _prefixed(value, "")


def size(value: float | None) -> str:
    """Bytes with a decimal prefix.

    >>> size(512), size(4_200_000)
    ('512 B', '4.2 MB')
    """
    return "-" if value is None else _prefixed(value, "B")


def ratio(value: float | None) -> str:
    """A factor.

    >>> ratio(1.5), ratio(None)
    ('1.50x', '-')
    """
    return "-" if value is None else f"{value:.2f}x"


def speedup(before: float, after: float) -> str:
    """How many times faster.

    >>> speedup(3.0, 2.0), speedup(1.0, 2.0), speedup(1.0, 1.0)
    ('1.50x faster', '2.00x slower', 'same')
    """
    if before == after or min(before, after) <= 0:
        return "same" if before == after else ""
    return f"{ratio(before / after)} faster" if after < before else f"{ratio(after / before)} slower"


def change(before: float | None, after: float | None) -> str:
    """The change in percent; empty when one of them is unknown.

    >>> change(200, 150), change(3, 3), change(None, 1)
    ('-25 %', 'same', '')
    """
    if before is None or after is None or before == 0:
        return ""
    percent = 100 * (after - before) / before
    if percent == 0:
        return "same"
    return f"{percent:+.1f} %" if abs(percent) < 10 else f"{percent:+.0f} %"


def _prefixed(value: float, unit: str) -> str:
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{_three(value / factor)} {prefix}{unit}"
    return f"{_three(value)} {unit}".strip()


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    if not math.isfinite(value) or value == 0:
        return str(value) if value else "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
