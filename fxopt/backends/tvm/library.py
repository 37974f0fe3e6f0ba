"""TVM's own modules, untyped: the one place that imports them. Importing this file takes some seconds.

TVM renames much between minor versions; `fxopt[tvm]` pins the version that this folder is written for.
"""

from __future__ import annotations

import importlib
from typing import Any

tvm: Any = importlib.import_module("tvm")
ir: Any = importlib.import_module("tvm.ir")
tirx: Any = importlib.import_module("tvm.tirx")

__all__ = ["ir", "tirx", "tvm"]
