"""sparsify: zeros in the weights of linears and 1x1 convolutions, where kernels skip them or where bytes count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from fxopt.errors import InvalidOption
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.masks import set_mark
from fxopt.ir.sparsity import Mark, Pattern
from fxopt.ir.target import Cost
from fxopt.passes.base import Candidate, Context, Declined, Estimate, LossyPass, Setting
from fxopt.passes.sparsify.armor import armor
from fxopt.passes.sparsify.beside import add_low_rank, rank_of, wrap
from fxopt.passes.sparsify.estimates import error_of, saved_bytes, work_of
from fxopt.passes.sparsify.kernels import AUTO, patterns_for, skipped_in, too_few_rows
from fxopt.passes.sparsify.layer import Layer, layer_of, layers, sharers
from fxopt.passes.sparsify.low_rank import low_rank
from fxopt.passes.sparsify.methods import magnitude, sparsegpt, wanda
from fxopt.passes.sparsify.refusals import has_already, unfit, unfit_beside, unfit_pattern
from fxopt.passes.stats import Stats

_METHODS = ("sparsegpt", "wanda", "magnitude", "armor")
_ARMOR = "2:4"  # what "auto" means for it
_LEVELS = (0.5, 0.7, 0.8, 0.9)  # of blocks, where none is asked for


@dataclass(frozen=True)
class Sparsify(LossyPass):
    """Set weights of linears and 1x1 convolutions to zero, in a pattern that kernels skip or that takes fewer bytes.

    It is done where it is asked for. Weights stay floats, and no later pass may fill their zeros. Linears whose value
    is an output, and weights that are used more than once, are left dense.

    Options:
        pattern: N:M like "2:4", blocks of outputs x inputs like "4x1", or "unstructured"; "auto": what the kernels of
            the target want, and unstructured where only bytes count.
        sparsity: share of blocks to remove, 0 for no change; None: several are offered. N:M has its own.
        method: "sparsegpt" (what is kept makes up for what goes), "wanda" (weights times norms of their inputs
            decide), "magnitude" (weights alone), or "armor": of linears, an N:M core between block-diagonal matrices.
        rank: share of a linear's parameters for two thin matrices beside it, which take back a part of the error.
        block, steps: of armor: the size of its blocks, and steps of its optimisation.
    """

    after = ("attention-patterns",)  # it puts heads into another order

    pattern: str = AUTO
    sparsity: float | None = None
    method: str = "sparsegpt"
    rank: float = 0.0
    block: int = 32
    steps: int = 400

    def __post_init__(self) -> None:
        found = None if self.pattern == AUTO else Pattern.parse(self.pattern)
        share = self.sparsity
        if share is not None and not (isinstance(share, (int, float)) and 0 <= share < 1):
            raise InvalidOption(f"sparsify: sparsity={share}; expected a share of at least 0 and below 1")
        if found is not None and found.is_counted and share not in (None, 0, found.sparsity):
            raise InvalidOption(f"sparsify: sparsity={share} with pattern={found}, which has {found.sparsity:g}")
        if self.method not in _METHODS:
            raise InvalidOption(f"sparsify: method={self.method!r}; expected one of {_METHODS}")
        if not 0 <= self.rank < 1:
            raise InvalidOption(f"sparsify: rank={self.rank}; expected a share of at least 0 and below 1")
        if self.rank and self.method in ("armor", "magnitude"):
            raise InvalidOption(f"sparsify: rank={self.rank} with method={self.method!r}; expected sparsegpt or wanda")
        if self.method == "armor" and found is not None and not (found.is_counted and found.outputs == 1):
            raise InvalidOption(f"sparsify: method='armor' with pattern={found}; its core is N:M, such as 2:4")
        if self.block < 1 or self.steps < 0:
            raise InvalidOption(f"sparsify: block={self.block}, steps={self.steps}; expected at least 1, and 0")

    # ---- candidates

    def candidates(self, graph: Graph, ctx: Context) -> Iterator[Candidate]:
        """One candidate per layer, pattern and share of zeros."""
        if self.sparsity == 0:
            return
        users = sharers(graph)
        for found in layers(graph):
            if isinstance(found, tuple):
                yield self._candidate(*found)
                continue
            refusal = unfit(graph, ctx, found, users)
            if refusal is None:
                yield from self._offers(graph, ctx, found)
            else:
                yield self._candidate(found.node, refusal)

    def _offers(self, graph: Graph, ctx: Context, layer: Layer) -> Iterator[Candidate]:
        weight = layer.weight(graph)
        dtype = str(weight.dtype).removeprefix("torch.")
        text = _ARMOR if self.pattern == AUTO and self.method == "armor" else self.pattern
        patterns = patterns_for(ctx, layer, weight) if text == AUTO else [Pattern.parse(text)]
        if isinstance(patterns, Refusal):
            yield self._candidate(layer.node, patterns)
            return
        for pattern in patterns:
            kernel = skipped_in(ctx, weight, str(pattern)) if ctx.objective == "latency" else ""
            refusal = kernel if isinstance(kernel, Refusal) else None
            if refusal is None and isinstance(kernel, str) and kernel:
                refusal = too_few_rows(ctx, layer, str(pattern), kernel)
            for share in self._shares(pattern):
                values = {"pattern": str(pattern), "sparsity": share, "method": self.method, **self._beside(weight)}
                if kernel and kernel != dtype and refusal is None:
                    values["kernel"] = kernel
                refused = refusal or unfit_pattern(graph, layer, pattern, share) or unfit_beside(layer, weight, values)
                shape = "x".join(map(str, weight.shape))
                group = f"{'conv' if layer.is_conv else 'linear'} {shape} {pattern} {100 * share:.0f} %"
                yield self._candidate(layer.node, refused, Setting.of(self.name, **values), group)

    def _beside(self, weight: Tensor) -> dict[str, int]:
        """The parts of a setting that say what is computed beside the sparse weight."""
        if self.method == "armor":
            return {"block": self.block}
        return {"rank": rank_of(self.rank, weight.shape[0], weight.shape[1])} if self.rank else {}

    def _shares(self, pattern: Pattern) -> tuple[float, ...]:
        if pattern.is_counted:
            return (pattern.sparsity,)
        return _LEVELS if self.sparsity is None else (float(self.sparsity),)

    def _candidate(
        self, node: fx.Node, refusal: Refusal | None, setting: Setting | None = None, group: str = ""
    ) -> Candidate:
        plain = Setting.of(self.name, pattern=self.pattern, method=self.method)
        return Candidate(self.name, node.name, label(node), setting or plain, refusal, group)

    # ---- estimate

    def observed(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """The input."""
        return (layer_of(graph, candidate.node).x,)

    def work(self, graph: Graph, candidate: Candidate) -> tuple[Cost, Cost]:
        """Work of the dense form, and the same with the zeros that a kernel skips."""
        return work_of(graph, layer_of(graph, candidate.node), candidate.setting)

    def estimate(self, graph: Graph, candidate: Candidate, stats: Stats) -> Estimate:
        """The error of removing weights by Wanda on the calibration rows (that of better methods is smaller)."""
        layer = layer_of(graph, candidate.node)
        error = error_of(graph, layer, candidate.setting, stats)
        before, after = self.work(graph, candidate)
        refusal = error if isinstance(error, Refusal) else None
        number = float("nan") if isinstance(error, Refusal) else error
        return Estimate(number, before, after, saved_bytes(graph, layer, candidate.setting), refusal)

    # ---- apply

    def moments(self, graph: Graph, candidate: Candidate) -> fx.Node | None:
        """All but magnitudes want the second moments of the input, on the graph as made sparse so far."""
        return None if self.method == "magnitude" else layer_of(graph, candidate.node).x

    def moment_rows(self, graph: Graph, candidate: Candidate) -> Callable[[Tensor], Tensor] | None:
        """Of a convolution: its positions."""
        layer = layer_of(graph, candidate.node)
        return (lambda x: layer.rows(x)[None]) if layer.is_conv else None

    def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        """Put zeros into the weight and mark the node.

        Raises:
            Declined: the statistics do not allow it.
        """
        layer, setting = layer_of(graph, candidate.node), candidate.setting
        pattern, weight = Pattern.parse(setting["pattern"]), layer.weight(graph)
        if has_already(weight, pattern, setting["sparsity"]):
            set_mark(graph, layer.node, Mark.of(pattern, weight))
            return
        moments = None if self.method == "magnitude" else stats.moments[layer.x.name]
        try:
            if self.method == "armor":
                assert moments is not None
                self._wrap(graph, layer, weight, pattern, moments)
            else:
                self._prune(graph, layer, weight, candidate, moments, stats)
        except ValueError as error:
            raise Declined(Refusal("{}", error)) from error

    def _wrap(self, graph: Graph, layer: Layer, weight: Tensor, pattern: Pattern, moments: Tensor) -> None:
        found = armor(weight, moments, pattern, block=self.block, steps=self.steps)
        wrap(graph, layer, found, Mark.of(pattern, found.core), self.name)

    def _prune(
        self, graph: Graph, layer: Layer, weight: Tensor, candidate: Candidate, moments: Tensor | None, stats: Stats
    ) -> None:
        setting = candidate.setting
        pattern, share = Pattern.parse(setting["pattern"]), setting["sparsity"]
        thin: tuple[Tensor, Tensor] | None = None
        if moments is None:
            found = magnitude(weight, pattern, share)
        else:
            moments = moments[0] if layer.is_conv else moments
            found = (wanda if self.method == "wanda" else sparsegpt)(weight, moments, pattern, share)
            if setting.get("rank"):
                thin = low_rank(weight, found.weight, moments, setting["rank"])
        stats.notes += [f"sparsify at {label(layer.node)!r}: {note}" for note in found.notes]
        layer.replace_weight(graph, found.weight, self.name)
        set_mark(graph, layer.node, Mark.of(pattern, found.weight))
        if thin is not None:
            add_low_rank(graph, layer, *thin, self.name)
