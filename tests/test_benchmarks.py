"""The tables in the docs are those that the result files give."""

from __future__ import annotations

from benchmarks.tables import PAGE, page


def test_the_page_is_generated_from_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m benchmarks.tables"
