"""From the ONNX dialect to aten: `lower(graph)` is `torch.export` over the interpreter, with dynamic sizes kept.

`trace` runs the graph for the exporter, `flow` turns If, Loop and Scan into torch's operators or unrolls them, `build`
makes a graph of the exported program.
"""

from __future__ import annotations

from fxopt.ir.lower.lower import lower

__all__ = ["lower"]
