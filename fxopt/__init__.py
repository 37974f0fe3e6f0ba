"""fxopt: priced, verified rewrites of neural networks.

fast = fxopt.optimize(model, target="host")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fxopt.api import Optimized, capture, explain, load, optimize, predict
    from fxopt.bundle import bundle
    from fxopt.comparison import BenchRow, Comparison, bench, compare
    from fxopt.errors import FxoptError
    from fxopt.finetuning import Finetuned, finetune
    from fxopt.ir.graph import Graph
    from fxopt.ir.ledger import Ledger, Verdict
    from fxopt.ir.target import Target

_PLACES = {
    **dict.fromkeys(("Optimized", "capture", "explain", "load", "optimize", "predict"), "fxopt.api"),
    **dict.fromkeys(("BenchRow", "Comparison", "bench", "compare"), "fxopt.comparison"),
    **dict.fromkeys(("Finetuned", "finetune"), "fxopt.finetuning"),
    "bundle": "fxopt.bundle",
    "FxoptError": "fxopt.errors",
    "Graph": "fxopt.ir.graph",
    "Ledger": "fxopt.ir.ledger",
    "Target": "fxopt.ir.target",
    "Verdict": "fxopt.ir.ledger",
}

__all__ = [
    "BenchRow",
    "Comparison",
    "Finetuned",
    "FxoptError",
    "Graph",
    "Ledger",
    "Optimized",
    "Target",
    "Verdict",
    "bench",
    "bundle",
    "capture",
    "compare",
    "explain",
    "finetune",
    "load",
    "optimize",
    "predict",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import fxopt` is cheap."""
    if name not in _PLACES:
        raise AttributeError(f"module 'fxopt' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names."""
    return sorted(__all__)
