"""dequantize: quantised operators become float ones, with the weights that their codes stand for.

The numbers of weights do not change: each is scale * (code - zero point), in float32. Activations are no longer
rounded, so the outputs move by what rounding them had cost. Used to run a model where integer kernels are slow, or,
before quantize-linear, to quantise it anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.errors import InvalidOption
from fxopt.ir.graph import Graph
from fxopt.passes.base import Context, ConvertingPass
from fxopt.passes.dequantize.walk import Walk

__all__ = ["Dequantize"]

_CLIP = ("auto", "all")


@dataclass(frozen=True)
class Dequantize(ConvertingPass):
    """Turn quantised operators into float ones, with the weights that their codes stand for.

    Options (without weights and activations the pass is neutral):
        weights: codes become float constants; False: they stay codes behind DequantizeLinear.
        activations: they are no longer rounded; False: integer operators become float ones between QuantizeLinear and
            DequantizeLinear.
        clip: what is left of the range of an activation. Quantisers drop a ReLU or ReLU6 before levels that begin at 0
            (and end at 6): "auto" puts it back there and lets other values leave their range; "all" clips every value.
    """

    enters_bodies: ClassVar[bool] = True

    weights: bool = True
    activations: bool = True
    clip: str = "auto"

    def __post_init__(self) -> None:
        if self.clip not in _CLIP:
            raise InvalidOption(f"dequantize: clip={self.clip!r}; expected one of {_CLIP}")

    def run(self, graph: Graph, ctx: Context) -> int:
        """Walk in execution order; returns how many operators changed."""
        if graph.origin != "onnx" or not (self.weights or self.activations):
            return 0
        walk = Walk(graph, ctx, self.name, self.weights, self.activations, self.clip)
        return walk.run()
