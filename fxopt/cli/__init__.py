"""The command line: thin; every command calls one public function and prints what it returns."""

from __future__ import annotations

from fxopt.cli.run import main, run

__all__ = ["main", "run"]
