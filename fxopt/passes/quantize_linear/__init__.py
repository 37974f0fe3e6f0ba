"""quantize-linear: linears and convolutions with fewer bits, where that is faster within the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from fxopt.errors import InvalidOption
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.target import Cost
from fxopt.ir.views.conv import Conv, conv
from fxopt.ir.views.quantized import quantized_operators
from fxopt.passes.base import Candidate, Context, Estimate, LossyPass, Setting
from fxopt.passes.quantize_linear.conv_weights import ConvWeights
from fxopt.passes.quantize_linear.eight_bit import EightBit
from fxopt.passes.quantize_linear.float8 import Float8
from fxopt.passes.quantize_linear.grids import RANGES, quantize_weight, static_range
from fxopt.passes.quantize_linear.weight_only import WeightOnly
from fxopt.passes.stats import Stats

__all__ = ["QuantizeLinear", "quantize_weight", "static_range"]

_ACTIVATIONS = {8: ("auto", "dynamic", "static", "int8", "float")}
_WEIGHT_ONLY = ("auto", "int8", "float")
_METHODS = ("gptq", "rtn")
_ROUNDINGS = ("nearest", "gptq")
_SWITCH = ("auto", "on", "off")
_FORMATS = ("auto", "int8", "fp8")
_Part = EightBit | Float8 | WeightOnly | ConvWeights


@dataclass(frozen=True)
class QuantizeLinear(LossyPass):
    """Give linears and convolutions fewer bits: both operands 8, or the weights alone 2 to 8.

    Weights of convolutions in fewer bits save bytes of the file (`objective="size"`), not time.

    Options:
        bits: of the weights; None is neutral: nothing is offered. 8 computes in integers unless `activations` says
            otherwise, 2, 3 and 4 are for linears that wait for their weights (few rows at a time), and for small files.
        activations: with 8 bits "dynamic" (range found at run time), "static" (calibrated), "auto" (both are offered
            where both exist); weight-only: "int8" (each row and group rounded to 8 bits), "float", or "auto": what is
            fast, "float" on CUDA targets and in the tvm backend, "int8" elsewhere.
        group: inputs per scale of a weight-only form (of convolutions: of the flattened kernel); 0: one per output.
        symmetric: weight-only: no zero points.
        method: weight-only: "gptq", or "rtn" (round to nearest).
        smooth: with 8 bits "on", "off", or "auto": moving outliers of activations into the weights is offered, with the
            strength chosen on the calibration data.
        ranges: of static activations: "minmax", or "percentile" (99.99 %), "entropy" and "mse" (least squares), which
            clip outliers. "auto": "mse" for convolutions, "minmax" for linears.
        correct_bias: with 8 bits "on", "off", or "auto" (of convolutions only): the bias makes up for what rounding
            takes from the mean output.
        act_order: GPTQ rounds the inputs with the largest second moments first.
        rounding: with 8 bits: "nearest", or "gptq": a smaller error at the same speed, for a longer calibration (x86
            without VNNI keeps "nearest").
        format: with 8 bits "int8", or "fp8" (e4m3, of linears: activations are scaled per row, or, with "static", per
            tensor), or "auto": on CUDA targets both are offered, elsewhere int8.
    """

    after = ("sparsify", "attention-patterns")  # masks are chosen on floats; heads are put into another order

    bits: int | None = 8
    activations: str = "auto"
    group: int = 32
    symmetric: bool = True
    method: str = "gptq"
    act_order: bool = True
    smooth: str = "auto"
    ranges: str = "auto"
    correct_bias: str = "auto"
    rounding: str = "nearest"
    format: str = "auto"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8, None):
            raise InvalidOption(f"quantize-linear: bits={self.bits}; expected 2, 3, 4 or 8, or none for no change")
        known = _ACTIVATIONS.get(self.bits or 8, _WEIGHT_ONLY)
        if self.activations not in known:
            raise InvalidOption(
                f"quantize-linear: activations={self.activations!r} with bits={self.bits}; expected one of {known}"
            )
        if self.method not in _METHODS:
            raise InvalidOption(f"quantize-linear: method={self.method!r}; expected one of {_METHODS}")
        if self.rounding not in _ROUNDINGS:
            raise InvalidOption(f"quantize-linear: rounding={self.rounding!r}; expected one of {_ROUNDINGS}")
        if self.smooth not in _SWITCH:
            raise InvalidOption(f"quantize-linear: smooth={self.smooth!r}; expected one of {_SWITCH}")
        if self.ranges not in ("auto", *RANGES):
            raise InvalidOption(f"quantize-linear: ranges={self.ranges!r}; expected one of {('auto', *RANGES)}")
        if self.correct_bias not in _SWITCH:
            raise InvalidOption(f"quantize-linear: correct_bias={self.correct_bias!r}; expected one of {_SWITCH}")
        if self.format not in _FORMATS:
            raise InvalidOption(f"quantize-linear: format={self.format!r}; expected one of {_FORMATS}")
        if self.format == "fp8" and self.bits is not None and not self._both_operands:
            raise InvalidOption(
                f"quantize-linear: format='fp8' with bits={self.bits} and activations={self.activations!r}; expected "
                "bits=8 and activations auto, dynamic or static"
            )
        if self.format == "fp8" and self._of_int8:
            raise InvalidOption(f"quantize-linear: format='fp8' has no {', '.join(self._of_int8)}; use format=int8")
        if self.group < 0 or 0 < self.group < 16:
            raise InvalidOption(f"quantize-linear: group={self.group}; expected at least 16, or 0 for one per output")

    @property
    def _both_operands(self) -> bool:
        return self.bits == 8 and self.activations not in _WEIGHT_ONLY[1:]

    @property
    def _of_int8(self) -> tuple[str, ...]:
        """The options that are set to what only the int8 form has."""
        plain = {"smooth": "off", "ranges": "minmax", "correct_bias": "off", "rounding": "nearest"}
        values = {name: getattr(self, name) for name in plain}
        return tuple(f"{name}={value}" for name, value in values.items() if value not in ("auto", plain[name]))

    @property
    def _parts(self) -> tuple[_Part, ...]:
        if self.bits is None:
            return ()
        if self._both_operands:
            how = self.activations, self.smooth, self.ranges, self.correct_bias, self.rounding
            integer = EightBit(self.name, *how)
            float8 = Float8(self.name, self.activations, self.format == "fp8", self._of_int8)
            parts: dict[str, tuple[_Part, ...]] = {"int8": (integer,), "fp8": (float8,), "auto": (integer, float8)}
            return parts[self.format]
        options = self.name, self.bits, self.group, self.symmetric, self.method, self.act_order
        return WeightOnly(*options, self.activations), ConvWeights(*options)

    def candidates(self, graph: Graph, ctx: Context) -> Iterator[Candidate]:
        """One candidate per linear or convolution and kind of activation range; none for what is quantised already."""
        if not self._parts:
            return
        already = {found.node.name: found for found in quantized_operators(graph)}
        for name, found in already.items():
            refusal = Refusal("quantised already: {}; the pass dequantize makes floats of it", found)
            yield Candidate(self.name, name, label(found.node), Setting(self.name), refusal)
        for part in self._parts:
            for candidate in part.candidates(graph, ctx):
                if candidate.node not in already:
                    yield candidate

    def clipped(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """Values on static levels that are not simply their extremes."""
        part = self._part_of(graph, candidate)
        return part.clipped(graph, candidate) if isinstance(part, EightBit) else ()

    def observed(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """The input; for an 8-bit convolution also the output, whose range is quantised too."""
        return self._part_of(graph, candidate).observed(graph, candidate)

    def fixed_levels(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, fx.Node | None] | None:
        """Those of static activations."""
        part = self._part_of(graph, candidate)
        return part.fixed_levels(graph, candidate) if isinstance(part, EightBit) else None

    def work(self, graph: Graph, candidate: Candidate) -> tuple[Cost, Cost] | None:
        """Of weight-only forms: those of linears pay only for few rows, those of convolutions never in time."""
        part = self._part_of(graph, candidate)
        return part.work(graph, candidate) if isinstance(part, (WeightOnly, ConvWeights)) else None

    def moments(self, graph: Graph, candidate: Candidate) -> fx.Node | None:
        """GPTQ wants the second moments of the input."""
        return self._part_of(graph, candidate).moments(graph, candidate)

    def moment_rows(self, graph: Graph, candidate: Candidate) -> Callable[[Tensor], Tensor] | None:
        """Of a convolution: the patches that its kernel sees."""
        part = self._part_of(graph, candidate)
        return part.moment_rows(graph, candidate) if isinstance(part, (EightBit, ConvWeights)) else None

    def estimate(self, graph: Graph, candidate: Candidate, stats: Stats) -> Estimate:
        """The error on the calibration rows, and the work of both forms."""
        return self._part_of(graph, candidate).estimate(graph, candidate, stats)

    def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        """Replace the linear or convolution (in 8 bits with the ReLU behind it)."""
        self._part_of(graph, candidate).apply(graph, candidate, stats)

    def _part_of(self, graph: Graph, candidate: Candidate) -> _Part:
        parts = self._parts
        assert parts, "a neutral pass has no candidates"
        if self._both_operands:
            return parts[-1 if candidate.setting.get("format") == "fp8" else 0]
        node = graph.find(candidate.node)
        is_conv = node is not None and isinstance(conv(graph, node), Conv)
        return parts[-1] if is_conv else parts[0]
